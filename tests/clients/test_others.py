"""Clients that are no Python: curl, and the official Node package where there is Node."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import openai
import pytest

from shared.storage import Store
from tests.clients.conftest import MODEL, ROWS, Box
from tests.conftest import wait_for
from tests.samples import bundled_gguf, put_gguf

NODE_CLIENT = "openai@7.57.0"
PROGRAM = Path(__file__).with_name("walkthrough.mjs")


def curl(box: Box, path: str, *arguments: str) -> tuple[int, dict[str, Any]]:
    done = subprocess.run(
        [
            str(shutil.which("curl")),
            "-sS",
            "--noproxy",
            "*",
            "-w",
            "\n%{http_code}",
            "-H",
            f"Authorization: Bearer {box.ann}",
            f"{box.url}/v1/{path}",
            *arguments,
        ],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    body, status = done.stdout.rsplit("\n", 1)
    return int(status), json.loads(body)


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl")
def test_curl(box: Box, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(ROWS)
    status, file = curl(box, "files", "-F", "purpose=fine-tune", "-F", f"file=@{path}")
    assert (status, file["status"]) == (200, "processed")
    body = json.dumps({"model": MODEL, "training_file": file["id"], "suffix": "succeed curl"})
    # Without a content type of JSON too, as `-d` alone sends it.
    status, job = curl(box, "fine_tuning/jobs", "-d", body)
    assert (status, job["object"]) == (200, "fine_tuning.job")
    status, listed = curl(box, "fine_tuning/jobs?limit=1")
    assert (status, listed["object"]) == (200, "list")
    assert curl(box, f"fine_tuning/jobs/{job['id']}/events")[1]["data"]
    status, answer = curl(box, "fine_tuning/jobs", "-d", "{}")
    assert (status, answer["error"]["param"]) == (400, "model")
    status, part = curl(box, "uploads", "-H", "Content-Type: application/json", "-d", "{")
    assert (status, part["error"]["code"]) == (400, "malformed_json")


@pytest.mark.skipif(shutil.which("npm") is None or shutil.which("node") is None, reason="no Node")
def test_the_node_client(box: Box, client: openai.OpenAI, tmp_path: Path) -> None:
    shutil.copy(PROGRAM, tmp_path)
    options = ["--no-audit", "--no-fund", "--no-package-lock", "--ignore-scripts", "--prefer-offline"]
    installed = subprocess.run(
        [str(shutil.which("npm")), "install", *options, NODE_CLIENT],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    if installed.returncode != 0:
        pytest.skip(f"npm could not fetch {NODE_CLIENT}: {installed.stderr[-300:]}")
    file = client.files.create(file=("rows.jsonl", ROWS), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(model=MODEL, training_file=file.id, suffix="succeed")
    name = wait_for(lambda: client.fine_tuning.jobs.retrieve(job.id).fine_tuned_model)
    put_gguf(box.database, Store(box.settings.artifacts()), job.id, bundled_gguf())
    done = subprocess.run(
        [str(shutil.which("node")), PROGRAM.name, f"{box.url}/v1", box.ann, MODEL, name],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stdout.strip() == "done", done.stderr

"""Jobs through everything, with nothing faked: served API, real worker, real training, exports, answers."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from cli.client import Client
from tests.cli.test_serve import Served
from tests.conftest import Databases
from tests.worker.training.conftest import tiny_model
from tests.worker.training.samples import conversations, write_rows
from worker.training.generate import generate

__all__ = ["tiny_model"]
pytestmark = pytest.mark.train

EXPORTS = ["adapter", "merged_16bit", "gguf:f16", "gguf:q8_0", "gguf:q5_k_m", "gguf:q4_k_m"]
FILES = {
    "manifest.json",
    "metrics.csv",
    "adapter.tar",
    "merged_16bit.tar",
    "model-f16.gguf",
    "model-q8_0.gguf",
    "model-q5_k_m.gguf",
    "model-q4_k_m.gguf",
    "Modelfile",
}


# A program written for OpenAI.
PROGRAM = Path(__file__).parent / "clients" / "walkthrough.py"


@dataclass(frozen=True)
class Box:
    url: str
    key: str


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, databases: Databases) -> Iterator[Box]:
    """A server and its worker as they start by default, and the tiny model."""
    root = tmp_path_factory.mktemp("models")
    (root / "tiny").symlink_to(tiny_model)
    database_url = databases.create()
    folder = tmp_path_factory.mktemp("box") / "data"
    served = Served(folder, database_url, TUNEYARD_MODELS_ROOT=str(root), TUNEYARD_STANDBY="auto")
    yield Box(served.ready(), (folder / "local.key").read_text().strip())
    served.process.terminate()
    assert served.process.wait(30) == 0
    if served.process.stdout is not None:
        served.process.stdout.close()
    databases.drop(database_url)


@pytest.fixture
def client(box: Box) -> Iterator[Client]:
    with Client(box.url, box.key) as opened:
        yield opened


def test_a_job_from_upload_to_six_exports(client: Client, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", conversations(24))
    uploaded = client.upload(rows)
    assert uploaded["status"] == "processed"
    assert [m["id"] for m in client.models() if m["id"] == "local/tiny"]
    spec = {
        "model": "local/tiny",
        "dataset": {"source": "file", "file_id": uploaded["id"]},
        "max_seq_length": 512,
        "training": {"max_steps": 6, "learning_rate": 1e-3, "logging_steps": 2, "save_steps": 3},
        "exports": EXPORTS,
        "metadata": {"team": "tests"},
    }
    estimate = client.estimate(spec)
    assert estimate["steps"] == 6
    assert estimate["disk_bytes"] > 0
    job_id = client.submit(spec)["id"]
    entries = list(client.logs(job_id, follow=True))
    job = client.job(job_id)
    assert job["status"] == "succeeded", [e["message"] for e in entries]
    assert [e["seq"] for e in entries] == list(range(1, len(entries) + 1))
    phases = [e["data"]["phase"] for e in entries if e["type"] == "phase"]
    assert phases[:3] == ["preparing_data", "loading_model", "training"]
    assert phases[-1] == "exporting"
    logged = [e["data"] for e in entries if e["type"] == "metrics"]
    assert [row["step"] for row in logged] == [2, 4, 6]
    for row in logged:
        assert {"loss", "learning_rate", "epoch", "step", "total_steps", "grad_norm"} <= set(row)
        assert {"tokens_per_second", "eta_seconds"} <= set(row)
    metrics = client.metrics(job_id)
    assert [row["step"] for row in metrics] == [1, 2, 3, 4, 5, 6]
    assert metrics[-1]["loss"] < metrics[0]["loss"]
    assert job["progress"]["step"] == 6
    assert job["plan"]["engine"] == "reference"
    assert job["data_report"]["rows_used"] > 0
    _check_files(client, job_id, tmp_path / "results")
    # The server answers from the same file, and the same.
    asked = {"model": job_id, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
    choices = [chunk["choices"][0] for chunk in client.chat(asked | {"temperature": 0, "stream": True})]
    said = "".join(choice["delta"].get("content") or "" for choice in choices)
    alone = generate(str(tmp_path / "results" / "model-q4_k_m.gguf"), "Hello", max_tokens=4).text
    # But for half a character at the end.
    assert said.rstrip("\ufffd") == alone.rstrip("\ufffd")
    assert choices[-1]["finish_reason"] in ("stop", "length")


def _check_files(client: Client, job_id: str, folder: Path) -> None:
    listed = {a["name"]: a for a in client.artifacts(job_id)}
    assert set(listed) == FILES
    for name, artifact in listed.items():
        content = client.download(job_id, name, folder).read_bytes()
        assert len(content) == artifact["bytes"]
        assert hashlib.sha256(content).hexdigest() == artifact["sha256"]
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["spec"]["metadata"] == {"team": "tests"}
    assert manifest["used"]["packing"] is True
    with tarfile.open(folder / "adapter.tar") as tar:
        assert any(name.endswith("adapter_model.safetensors") for name in tar.getnames())
        assert any(name.endswith("README.md") for name in tar.getnames())
    for gguf in sorted(folder.glob("*.gguf")):
        assert generate(str(gguf), "Hello", max_tokens=4).tokens > 0


def test_openais_guide_runs_from_upload_to_an_answer(box: Box, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", conversations(24))
    done = subprocess.run(
        [sys.executable, str(PROGRAM), f"{box.url}/v1", box.key, "local/tiny", str(rows)],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr + done.stdout
    lines = done.stdout.splitlines()
    (status,) = [line.split() for line in lines if line.startswith("succeeded")]
    assert int(status[1]) > 0
    table = lines[lines.index("step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy") + 1 :]
    assert [row.split(",")[0] for row in table[:2]] == ["1", "2"]
    # Token accuracy is measured, not left out.
    assert all(0 <= float(row.split(",")[2]) <= 1 for row in table[:2])
    assert lines[-1].startswith("answered with")

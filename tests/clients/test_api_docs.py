"""docs/api.md's examples, as a reader of it types them: in their order, in bash, with curl."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import httpx
import pytest

from shared.storage import Store
from tests.clients.conftest import Box
from tests.conftest import wait_for
from tests.samples import bundled_gguf, put_gguf

ROOT = Path(__file__).parents[2]
# Every answer's status goes to stderr; what comes before the first example says where the server is.
BEFORE = """
curl() { command curl --noproxy '*' -w '%{stderr}%{http_code} %{method} %{url}\\n' "$@"; }
"""
# What a finished job without checkpoints must refuse.
REFUSED = {("POST", "/move"): 409, ("POST", "/exports"): 422}

pytestmark = pytest.mark.skipif(shutil.which("curl") is None, reason="no curl")


def blocks() -> list[str]:
    return re.findall(
        r"^```bash\n(.*?)^```$", (ROOT / "docs" / "api.md").read_text(), re.DOTALL | re.MULTILINE
    )


def run(script: str, folder: Path, **environment: str) -> tuple[str, list[tuple[int, str, str]]]:
    """What bash prints, and the status, method and address of each answer."""
    done = subprocess.run(
        [str(shutil.which("bash")), "-eu", "-o", "pipefail", "-c", BEFORE + script],
        cwd=folder,
        env={"PATH": os.environ["PATH"], "HOME": str(folder), **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    answers = re.findall(r"^(\d{3}) ([A-Z]+) (\S+)$", done.stderr, re.MULTILINE)
    return done.stdout, [(int(status), method, url) for status, method, url in answers]


def test_every_example_does_what_it_says(box: Box, tmp_path: Path) -> None:
    (tmp_path / "cli").symlink_to(ROOT / "cli")
    first, *others = blocks()
    *setting, field = first.splitlines()
    assert [line.partition("=")[0] for line in setting] == ["URL", "KEY"]
    making = next(at for at, block in enumerate(others) if block.startswith("JOB="))
    # The word that the box' worker goes by.
    begin = "\n".join([field, *others[: making + 1], 'echo; echo "$FILE $JOB"'])
    begin = begin.replace("first try", "succeed")
    where = {"URL": box.url, "KEY": box.ann}
    said, answers = run(begin, tmp_path, **where)
    file_id, job_id = said.splitlines()[-1].split()
    headers = {"Authorization": f"Bearer {box.ann}"}
    assert wait_for(
        lambda: httpx.get(f"{box.url}/jobs/{job_id}", headers=headers).json()["status"] == "succeeded"
    )
    put_gguf(box.database, Store(box.settings.artifacts()), job_id, bundled_gguf())
    said, more = run("\n".join([field, *others[making + 1 :]]), tmp_path, FILE=file_id, JOB=job_id, **where)
    answers += more
    assert len(answers) == "".join(blocks()).count("curl -")
    refused = [(status, method, url) for status, method, url in answers if status >= 300]
    assert len(refused) == len(REFUSED), said
    for status, method, url in refused:
        assert status == REFUSED[method, url.removeprefix(f"{box.url}/jobs/{job_id}")], url

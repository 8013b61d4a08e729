"""From upload to an answer with nothing faked: a program written for OpenAI, a real worker, a real model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.test_serve import Served
from tests.worker.training.conftest import tiny_model
from tests.worker.training.samples import conversations, write_rows

__all__ = ["tiny_model"]
pytestmark = pytest.mark.train

PROGRAM = Path(__file__).with_name("walkthrough.py")


def test_openais_guide_runs_from_upload_to_an_answer(
    tmp_path: Path, tiny_model: Path, database_url: str | None
) -> None:
    root = tmp_path / "models"
    root.mkdir()
    (root / "tiny").symlink_to(tiny_model)
    served = Served(tmp_path / "data", database_url, TUNEYARD_MODELS_ROOT=str(root))
    try:
        url = served.ready()
        key = (served.folder / "local.key").read_text().strip()
        rows = write_rows(tmp_path / "rows.jsonl", conversations(24))
        done = subprocess.run(
            [sys.executable, str(PROGRAM), f"{url}/v1", key, "local/tiny", str(rows)],
            capture_output=True,
            text=True,
            timeout=280,
            check=False,
        )
    finally:
        served.process.terminate()
        served.process.wait(60)
        if served.process.stdout is not None:
            served.process.stdout.close()
    assert done.returncode == 0, done.stderr + done.stdout
    lines = done.stdout.splitlines()
    (status,) = [line.split() for line in lines if line.startswith("succeeded")]
    assert int(status[1]) > 0
    table = lines[lines.index("step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy") + 1 :]
    assert [row.split(",")[0] for row in table[:2]] == ["1", "2"]
    # Token accuracy is measured, not left out.
    assert all(0 <= float(row.split(",")[2]) <= 1 for row in table[:2])
    assert lines[-1].startswith("answered with")

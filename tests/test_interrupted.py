"""A job that is killed, paused and stopped with Ctrl-C ends as one that nothing interrupted."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from cli.client import Client
from shared.spec import JobSpec
from tests.cli.test_serve import Served
from tests.conftest import wait_for
from tests.worker.training.conftest import tiny_model
from tests.worker.training.samples import conversations, new_workdir, plan_for, run_job, write_rows

__all__ = ["tiny_model"]
pytestmark = pytest.mark.train

ROWS = 24
TRAINING = {
    "max_steps": 40, "learning_rate": 1e-3, "logging_steps": 1, "save_steps": 10,
    "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1,
}  # fmt: skip


class Box:
    """A data folder that is served, stopped and served again."""

    def __init__(self, folder: Path, models: Path, database_url: str | None) -> None:
        self._folder = folder
        self._database_url = database_url
        self._models = models
        self.start()

    def start(self) -> None:
        self._served = Served(
            self._folder,
            self._database_url,
            TUNEYARD_MODELS_ROOT=str(self._models),
            TUNEYARD_STANDBY="off",
            TUNEYARD_RETRY_SECONDS="0.1",
        )
        self._url = self._served.ready()
        self._open = contextlib.ExitStack()
        self.client = self._open.enter_context(
            Client(self._url, (self._folder / "local.key").read_text().strip())
        )

    def checkpoints(self, job_id: str) -> set[int]:
        listed = self._served.get(self._url, f"/jobs/{job_id}/checkpoints").json()["data"]
        return {checkpoint["step"] for checkpoint in listed}

    def stop(self) -> None:
        """As Ctrl-C does."""
        self._open.close()
        self._served.process.send_signal(signal.SIGINT)
        assert self._served.process.wait(60) == 0
        if self._served.process.stdout is not None:
            self._served.process.stdout.close()

    def child(self) -> psutil.Process:
        (found,) = wait_for(
            lambda: [
                process
                for process in psutil.Process(self._served.process.pid).children(recursive=True)
                if "worker.child" in process.cmdline()
            ]
        )
        return found


@pytest.fixture
def box(tmp_path: Path, tiny_model: Path, database_url: str | None) -> Iterator[Box]:
    root = tmp_path / "models"
    root.mkdir()
    (root / "tiny").symlink_to(tiny_model)
    running = Box(tmp_path / "data", root, database_url)
    yield running
    running.stop()


def step_of(client: Client, job_id: str) -> int:
    progress = client.job(job_id)["progress"]
    return int(progress["step"]) if progress else 0


def test_killed_paused_and_stopped_it_ends_as_if_nothing_had_happened(
    box: Box, tmp_path: Path, tiny_model: Path
) -> None:
    uploaded = box.client.upload(write_rows(tmp_path / "rows.jsonl", conversations(ROWS)))
    spec: dict[str, Any] = {
        "model": "local/tiny",
        "dataset": {"source": "file", "file_id": uploaded["id"]},
        "max_seq_length": 512,
        "training": TRAINING,
    }
    job_id = box.client.submit(spec)["id"]

    wait_for(lambda: step_of(box.client, job_id) > 10, 90)
    os.kill(box.child().pid, signal.SIGKILL)
    wait_for(lambda: box.client.job(job_id)["attempt"] == 2 and step_of(box.client, job_id) > 12, 90)

    assert box.client.pause(job_id)["status"] == "pausing"
    wait_for(lambda: box.client.job(job_id)["status"] == "paused")
    paused_at = max(box.checkpoints(job_id))
    assert paused_at > 12
    assert box.client.resume(job_id)["status"] == "queued"
    wait_for(lambda: box.client.job(job_id)["attempt"] == 3 and step_of(box.client, job_id) > paused_at, 90)

    box.stop()
    box.start()
    wait_for(lambda: box.client.job(job_id)["status"] not in ("queued", "running"), 120)
    job = box.client.job(job_id)
    assert (job["status"], job["attempt"], job["failure"]) == ("succeeded", 4, None)

    entries = list(box.client.logs(job_id))
    assert [e["seq"] for e in entries] == list(range(1, len(entries) + 1))
    resumed = [e["data"]["step"] for e in entries if e["message"].startswith("Resumed from step")]
    assert resumed[:2] == [10, paused_at]
    assert resumed[2] > paused_at
    assert not any("can't be used" in e["message"] for e in entries)

    whole = run_job(
        JobSpec.model_validate_json(json.dumps(spec)), new_workdir(tmp_path / "whole", tiny_model, ROWS),
        **plan_for(JobSpec.model_validate_json(json.dumps(spec))).model_dump(),
    )  # fmt: skip
    rows = box.client.metrics(job_id)
    assert [row["step"] for row in rows] == list(range(1, 41))
    expected = {row["step"]: (row["loss"], row["grad_norm"]) for row in whole.sink.rows}
    assert {row["step"]: (row["loss"], row["grad_norm"]) for row in rows} == expected
    assert box.checkpoints(job_id) == set(sorted({*range(10, 41, 10), *resumed})[-3:])

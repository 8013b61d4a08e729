"""Running out of memory in the real pipeline of a real child."""

from __future__ import annotations

from pathlib import Path

import pytest

from shared.database import Database
from shared.repository import logs
from shared.settings import Settings
from tests.samples import add_dataset, make_job
from tests.worker.conftest import Start
from tests.worker.test_out_of_memory import check_history
from tests.worker.test_supervisor import entries, wait_status
from tests.worker.training.samples import conversations, write_rows

pytestmark = pytest.mark.train


def test_training_goes_on_from_the_checkpoint_under_another_split(
    start: Start, database: Database, settings: Settings, tmp_path: Path, tiny_model: Path
) -> None:
    dataset_id = add_dataset(database, settings, write_rows(tmp_path / "rows.jsonl", conversations(24)))
    training = {
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "max_steps": 4, "save_steps": 2,
        "logging_steps": 1,
    }  # fmt: skip
    job_id = make_job(
        database,
        model="local/tiny",
        dataset={"source": "file", "file_id": dataset_id},
        max_seq_length=512,
        training=training,
    )
    # It hears nothing while it imports torch.
    start(module="tests.worker.hungry_child", models_root=tiny_model.parent, lease_seconds=60.0)
    job = wait_status(database, job_id, "succeeded", "failed", seconds=180)
    assert (job.status, job.attempt, job.losses) == ("succeeded", 2, 0), job.failure
    check_history(job, 1)
    assert job.plan is not None
    assert (job.plan["micro_batch"], job.plan["accumulation"]) == (1, 2)
    assert "Resumed from step 2 of 4." in [e.message for e in entries(database, job_id)]
    with database.read() as session:
        assert [row["step"] for row in logs.read_metrics(session, job_id)] == [1, 2, 3, 4]
        assert [c.step for c in logs.read_checkpoints(session, job_id)] == [2, 4]

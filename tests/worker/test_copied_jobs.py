"""Jobs whose checkpoints are copied into the store: which are, and a pause that waits for it."""

from __future__ import annotations

import shutil
from typing import Any

import pytest

from shared.database import Database
from shared.queue import Doorbell
from shared.settings import Settings
from shared.storage import Store
from tests.conftest import wait_for
from tests.samples import make_job
from tests.worker.conftest import Start
from tests.worker.test_copies import copy_of
from tests.worker.test_pause import messages, pause, resume
from tests.worker.test_supervisor import wait_status
from worker.checkpoints import FOLDER
from worker.copies import wanted


def test_paused_it_is_in_the_store_and_goes_on_from_there(
    start: Start, database: Database, settings: Settings, doorbell: Doorbell
) -> None:
    start(store_checkpoints="on")
    job_id = make_job(database, name="patient 1")
    wait_for(lambda: messages(database, job_id)[-1] == "from step 0")
    pause(database, doorbell, job_id)
    wait_status(database, job_id, "paused")
    copy = copy_of(database, job_id)
    assert copy is not None
    kept = settings.root / "work" / job_id
    wait_for(lambda: [path.name for path in kept.iterdir()] == [FOLDER])
    # As on another machine.
    shutil.rmtree(kept)
    resume(database, doorbell, job_id)
    wait_for(lambda: f"from step {copy.step}" in messages(database, job_id))
    told = messages(database, job_id)
    assert f"The checkpoint of step {copy.step} came from the store." in told
    assert not any("begins anew" in line for line in told)


@pytest.mark.parametrize(
    ("chosen", "url", "expected"),
    [("auto", None, False), ("on", None, True), ("auto", "memory://x", True), ("off", "memory://x", False)],
)
def test_by_default_only_a_store_on_the_network_gets_copies(
    settings: Settings, chosen: str, url: str | None, expected: bool
) -> None:
    changes: dict[str, Any] = {"store_checkpoints": chosen, "artifacts_url": url}
    changed = settings.model_copy(update=changes)
    assert wanted(changed, Store(changed.artifacts())) is expected

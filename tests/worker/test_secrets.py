"""Owners' secrets in their own jobs, and nowhere else."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest

from shared.database import Database
from shared.repository import logs, secrets
from shared.settings import Settings
from shared.tables import Job
from shared.vault import HIDDEN, Redactor, Vault
from tests.conftest import wait_for
from tests.samples import make_job
from tests.worker.conftest import Start

TOKEN = "hf_ann-secret-token-0123456789"


@pytest.fixture
def sealed(settings: Settings, database: Database) -> None:
    put(settings, database, "ann", TOKEN)


def put(settings: Settings, database: Database, owner: str, value: str) -> None:
    with database.write() as session:
        secrets.put_secret(session, owner, "hub_token", Vault(settings).seal(owner, "hub_token", value))


def ended(database: Database, job_id: str) -> Job:
    def look() -> Job | None:
        with database.read() as session:
            job = session.get(Job, job_id)
        return job if job is not None and job.status in ("succeeded", "failed") else None

    job = wait_for(look, seconds=30)
    assert job is not None
    return job


def told(database: Database, job_id: str) -> dict[str, object]:
    """What the job said that it was given."""
    with database.read() as session:
        rows = logs.read_entries(session, job_id, 0, 100)
    return next(dict(row.data or {}) for row in rows if row.message.startswith("token "))


def written(database: Database, job_id: str) -> str:
    """All that the database keeps of a job."""
    with database.read() as session:
        job = session.get(Job, job_id)
        assert job is not None
        return str([job.model_dump(), logs.read_entries(session, job_id, 0, 1000)])


def test_a_job_has_its_owners_token_and_a_cache_of_its_own(
    start: Start, database: Database, settings: Settings, sealed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_of-the-worker")
    monkeypatch.setenv("HF_HOME", "/shared/by/all")
    monkeypatch.setenv("HF_HUB_CACHE", "/shared/by/all/hub")
    start()
    anns = make_job(database, owner="ann", name="tell succeed")
    bobs = make_job(database, owner="bob", name="tell succeed")
    assert [ended(database, job_id).status for job_id in (anns, bobs)] == ["succeeded"] * 2
    hers, his = told(database, anns), told(database, bobs)
    assert hers["length"] == len(TOKEN)
    assert his["length"] == len("hf_of-the-worker")
    own = settings.root / "cache" / "owners"
    assert Path(str(hers["home"])).parent == own
    assert Path(str(hers["data"])).parent.parent == own
    assert (his["home"], his["data"]) == ("/shared/by/all", "None")
    assert TOKEN not in written(database, anns) + written(database, bobs)
    assert HIDDEN in written(database, anns)


@pytest.mark.parametrize("ending", ["fail", "die"])
def test_a_failure_repeats_no_secret(start: Start, database: Database, sealed: None, ending: str) -> None:
    start(max_losses=1)
    job_id = make_job(database, owner="ann", name=f"tell {ending}")
    job = ended(database, job_id)
    assert job.failure is not None
    assert HIDDEN in str(job.failure)
    assert TOKEN not in written(database, job_id)


def test_a_secret_is_in_no_environment_or_command_that_others_see(
    start: Start, database: Database, sealed: None
) -> None:
    start(forked=False)
    job_id = make_job(database, owner="ann", name="forever")

    def look() -> int | None:
        with database.read() as session:
            rows = logs.read_entries(session, job_id, 0, 100)
        return next((int((row.data or {})["pid"]) for row in rows if row.message == "started"), None)

    pid = wait_for(look)
    assert pid is not None
    process = psutil.Process(pid)
    assert TOKEN not in str(process.environ()) + str(process.cmdline())
    assert TOKEN not in str(dict(os.environ))


def test_a_secret_of_another_key_is_left_out_and_the_job_runs(
    start: Start, database: Database, settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    other = Settings(data_dir=settings.root, secrets_key="A" * 43 + "=")
    put(other, database, "ann", TOKEN)
    start()
    job_id = make_job(database, owner="ann", name="tell succeed")
    assert ended(database, job_id).status == "succeeded"
    assert told(database, job_id)["length"] == len("none")
    assert "can't be opened" in caplog.text


def test_what_is_taken_out() -> None:
    redactor = Redactor(["abcdefgh", "abcdefghijkl"])
    value = {"abcdefgh": ["xabcdefghijkly", 1, None, ("abcdefgh",)]}
    assert redactor.value(value) == {HIDDEN: [f"x{HIDDEN}y", 1, None, [HIDDEN]]}

"""The supervisor with real child processes, a real database and a real Valkey."""

from __future__ import annotations

import os
import signal
import threading
import time
from datetime import timedelta
from pathlib import Path

import psutil
import pytest

from shared.clock import utcnow
from shared.database import Database
from shared.queue import Doorbell
from shared.repository import files, jobs, keys, logs
from shared.repository.logs import StoredEntry
from shared.settings import Settings
from shared.storage import Store
from shared.tables import Job
from shared.valkey import EmbeddedValkey
from tests.conftest import PATIENCE, wait_for
from tests.samples import add_dataset, make_job
from tests.worker.conftest import CPU, Start
from worker.supervisor import Supervisor


def read(database: Database, job_id: str) -> Job:
    with database.read() as session:
        return jobs.get_job(session, job_id, None)


def entries(database: Database, job_id: str) -> list[StoredEntry]:
    with database.read() as session:
        return logs.read_entries(session, job_id, 0, 10_000)


def child_pid(database: Database, job_id: str) -> int | None:
    told = [e.data["pid"] for e in entries(database, job_id) if e.message == "started" and e.data]
    return int(told[-1]) if told else None


def let_go(database: Database, job_id: str) -> None:
    """Let the step that lasts end."""
    pid = child_pid(database, job_id)
    assert pid is not None
    os.kill(pid, signal.SIGUSR1)


def live_workers(database: Database) -> int:
    with database.read() as session:
        return len(keys.live_workers(session, utcnow() - timedelta(minutes=1)))


def wait_status(database: Database, job_id: str, *wanted: str, seconds: float = PATIENCE) -> Job:
    return wait_for(lambda: (job := read(database, job_id)).status in wanted and job, seconds) or read(
        database, job_id
    )


def cancel(database: Database, doorbell: Doorbell, job_id: str) -> None:
    with database.write() as session:
        jobs.request_cancel(session, job_id, None)
    doorbell.ring(job_id)


@pytest.mark.postgresql
def test_a_job_runs_to_its_end(
    start: Start, database: Database, settings: Settings, doorbell: Doorbell
) -> None:
    start(forked=False)
    job_id = make_job(database, name="succeed", max_samples=10)
    doorbell.ring(job_id)
    job = wait_status(database, job_id, "succeeded", "failed")
    assert (job.status, job.attempt, job.phase, job.lease_token) == ("succeeded", 1, None, None)
    assert job.progress is not None
    assert job.progress["step"] == 3
    assert job.plan is not None
    assert job.plan["device"] == "cpu"
    assert job.finished_at is not None
    log = entries(database, job_id)
    assert [e.seq for e in log] == list(range(1, len(log) + 1))
    assert log[-1].message == "Succeeded."
    with database.read() as session:
        (artifact,) = files.list_artifacts(session, job_id)
        metrics = logs.read_metrics(session, job_id)
        (checkpoint,) = logs.read_checkpoints(session, job_id)
    assert b"".join(Store(settings.artifacts()).read(artifact.key, 0, 100)) == b"adapter"
    assert [m["step"] for m in metrics] == [1, 2, 3]
    assert metrics[0]["grad_norm"] is None
    assert checkpoint.step == 3
    work = settings.root / "work" / job_id
    assert wait_for(lambda: [p.name for p in work.iterdir()] == ["checkpoints"])
    assert (work / "checkpoints" / "checkpoint-3" / "weights").read_bytes() == b"w"


def test_a_job_gets_both_of_its_uploaded_files(
    start: Start, database: Database, settings: Settings, doorbell: Doorbell, tmp_path: Path
) -> None:
    ids = []
    for text in ("[first]", "[second]"):
        file = tmp_path / text
        file.write_text(text)
        ids.append(add_dataset(database, settings, file))
    both = {
        "dataset": {"source": "file", "file_id": ids[0]},
        "validation_dataset": {"source": "file", "file_id": ids[1]},
    }
    job_id = make_job(database, "ann", **both)
    start()
    doorbell.ring(job_id)
    assert wait_status(database, job_id, "succeeded", "failed").status == "succeeded"
    with database.read() as session:
        (artifact,) = files.list_artifacts(session, job_id)
    given = b"".join(Store(settings.artifacts()).read(artifact.key, 0, 200))
    assert given.decode() == "[first][second]"


def test_without_any_doorbell_the_database_is_looked_into(start: Start, database: Database) -> None:
    start()
    job_id = make_job(database)
    assert wait_status(database, job_id, "succeeded").status == "succeeded"


def test_the_servers_cap_of_samples_holds(start: Start, database: Database) -> None:
    start(max_samples=5)
    job_id = make_job(database)
    wait_status(database, job_id, "succeeded")
    assert [e.data["samples"] for e in entries(database, job_id) if e.message == "started" and e.data] == [5]


def test_a_failure_says_what_broke(start: Start, database: Database) -> None:
    start()
    job_id = make_job(database, name="fail")
    job = wait_status(database, job_id, "failed")
    assert job.failure is not None
    assert job.failure["code"] == "internal_error"
    assert "the pipeline broke" in job.failure["message"]
    assert job.failure["advice"]
    assert entries(database, job_id)[-1].level == "error"


def test_cancel_ends_a_running_job_and_all_its_processes(
    start: Start, database: Database, doorbell: Doorbell
) -> None:
    start()
    job_id = make_job(database, name="forever")
    pid = wait_for(lambda: child_pid(database, job_id))
    began = time.monotonic()
    cancel(database, doorbell, job_id)
    cancel(database, doorbell, job_id)
    job = wait_status(database, job_id, "cancelled")
    assert time.monotonic() - began < 5
    assert (job.lease_token, job.failure) == (None, None)
    assert wait_for(lambda: pid is not None and not psutil.pid_exists(pid))


def test_a_child_that_does_not_listen_is_killed_with_its_own_children(
    start: Start, database: Database, doorbell: Doorbell, settings: Settings
) -> None:
    start(stop_grace_seconds=0.5)
    job_id = make_job(database, name="deaf")
    pid = wait_for(lambda: child_pid(database, job_id))
    assert pid is not None
    (sleeper,) = wait_for(lambda: psutil.Process(pid).children())
    cancel(database, doorbell, job_id)
    assert wait_status(database, job_id, "cancelled", seconds=5).status == "cancelled"
    assert wait_for(lambda: not psutil.pid_exists(pid) and not sleeper.is_running())
    with database.read() as session:
        assert files.list_artifacts(session, job_id) == []
    work = settings.root / "work" / job_id
    assert wait_for(lambda: list(work.iterdir()) == [])


@pytest.mark.parametrize("name", ["die", "lost"])
def test_a_killed_child_is_run_again_and_its_job_fails_after_three_deaths(
    start: Start, database: Database, name: str
) -> None:
    start()
    job_id = make_job(database, name=name)
    other = make_job(database)
    job = wait_status(database, job_id, "failed")
    assert (job.attempt, job.losses) == (3, 3)
    assert job.failure is not None
    assert job.failure["code"] == "worker_lost"
    assert "signal 9" in job.failure["message"]
    assert wait_status(database, other, "succeeded").status == "succeeded"
    log = entries(database, job_id)
    assert [e.seq for e in log] == list(range(1, len(log) + 1))
    assert sum("goes back to the queue" in e.message for e in log) == 2


def test_a_stopped_supervisor_hands_its_jobs_back_at_once(start: Start, database: Database) -> None:
    supervisor = start()
    job_id = make_job(database, name="forever")
    pid = wait_for(lambda: child_pid(database, job_id))
    supervisor.stop()
    job = wait_status(database, job_id, "queued")
    assert (job.losses, job.lease_token) == (0, None)
    assert wait_for(lambda: pid is not None and not psutil.pid_exists(pid))
    assert wait_for(lambda: live_workers(database) == 0)


def test_a_frozen_child_loses_its_job_and_writes_nothing_when_it_wakes(
    start: Start, database: Database
) -> None:
    # Nothing runs out by itself, however slowly a process starts.
    start(lease_seconds=600)
    job_id = make_job(database, name="forever")
    first = wait_for(lambda: child_pid(database, job_id))
    assert first is not None
    os.kill(first, signal.SIGSTOP)
    with database.write() as session:
        jobs.lock_job(session, job_id, None).lease_expires_at = utcnow()
    wait_for(lambda: read(database, job_id).attempt == 2)
    second = wait_for(lambda: (pid := child_pid(database, job_id)) != first and pid)
    assert wait_for(lambda: not psutil.pid_exists(first))
    assert psutil.pid_exists(int(second))


def test_time_is_limited(start: Start, database: Database) -> None:
    start()
    job_id = make_job(database, name="forever", time_limit_seconds=1)
    job = wait_status(database, job_id, "failed")
    assert job.failure is not None
    assert job.failure["code"] == "timed_out"


def test_a_job_deleted_under_way_leaves_nothing(start: Start, database: Database, settings: Settings) -> None:
    start()
    job_id = make_job(database, name="deaf")
    pid = wait_for(lambda: child_pid(database, job_id))
    with database.write() as session:
        session.delete(jobs.lock_job(session, job_id, None))
    assert wait_for(lambda: pid is not None and not psutil.pid_exists(pid))


def test_redis_killed_in_mid_job_changes_nothing(
    tmp_path: Path, settings: Settings, database: Database
) -> None:
    with EmbeddedValkey(tmp_path / "r" / "v.sock", tmp_path / "vd") as server:
        bell = Doorbell(server.url)
        box = settings.model_copy(update={"redis_url": server.url})
        supervisor = Supervisor(box, database, bell, [CPU], "tests.worker.fake_child")
        thread = threading.Thread(target=supervisor.run)
        thread.start()
        running = make_job(database, name="forever")
        pid = wait_for(lambda: child_pid(database, running))
        assert server.process is not None
        server.process.kill()
        server.process.wait()
        steps = len(entries(database, running))
        assert wait_for(lambda: len(entries(database, running)) > steps + 5)
        server.start()
        cancel(database, bell, running)
        assert wait_status(database, running, "cancelled", seconds=5).attempt == 1
        assert wait_for(lambda: pid is not None and not psutil.pid_exists(pid))
        after = make_job(database)
        assert bell.ring(after)
        assert wait_status(database, after, "succeeded").status == "succeeded"
        supervisor.stop()
        thread.join(PATIENCE)
        bell.close()


def test_slots_run_side_by_side(start: Start, database: Database) -> None:
    start(slots=2)
    made = [make_job(database, name="forever") for _ in range(3)]
    assert wait_for(lambda: [read(database, j).status for j in made] == ["running", "running", "queued"])


def test_the_child_sees_no_secret_of_the_worker(
    start: Start, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUNEYARD_API_KEY", "ty-secret")
    monkeypatch.setenv("SOME_SERVICE_PASSWORD", "secret")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "store-secret")
    monkeypatch.setenv("HF_HOME", "/somewhere")
    start(forked=False)
    job_id = make_job(database, name="forever")
    pid = wait_for(lambda: child_pid(database, job_id))
    assert pid is not None
    environment = psutil.Process(pid).environ()
    assert environment["HF_HOME"] == "/somewhere"
    assert not {"TUNEYARD_API_KEY", "SOME_SERVICE_PASSWORD", "AWS_SECRET_ACCESS_KEY"} & set(environment)
    assert not any("ty-secret" in part for part in psutil.Process(pid).cmdline())


def test_a_job_that_this_version_cannot_read_fails_and_harms_no_other(
    start: Start, database: Database
) -> None:
    strange, good = make_job(database), make_job(database)
    with database.write() as session:
        job = jobs.lock_job(session, strange, None)
        job.spec = job.spec | {"field_of_tomorrow": 1}
    start()
    failed = wait_status(database, strange, "failed")
    assert failed.failure is not None
    assert "different versions" in failed.failure["advice"]
    assert wait_status(database, good, "succeeded").status == "succeeded"


def test_a_job_that_cannot_be_started_goes_back_and_is_tried_again(
    start: Start, database: Database, settings: Settings
) -> None:
    work = settings.root / "work"
    work.mkdir(parents=True)
    job_id = make_job(database)
    (work / job_id).write_text("in the way")
    start()
    wait_for(lambda: any("could not start it" in e.message for e in entries(database, job_id)))
    (work / job_id).unlink()
    job = wait_status(database, job_id, "succeeded")
    assert job.losses == 0


def test_a_child_whose_job_another_box_has_taken_is_ended(start: Start, database: Database) -> None:
    start(lease_seconds=60)
    job_id = make_job(database, name="deaf")
    pid = wait_for(lambda: child_pid(database, job_id))
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    with database.write() as session:
        job = jobs.lock_job(session, job_id, None)
        job.lease_token, job.worker = "another", "another-box"
    assert wait_for(lambda: not psutil.pid_exists(pid))
    assert read(database, job_id).worker == "another-box"


def test_what_no_database_stores_is_made_storable(start: Start, database: Database) -> None:
    start()
    job_id = make_job(database, name="odd")
    assert wait_status(database, job_id, "succeeded", "failed").status == "succeeded"
    (odd,) = [e for e in entries(database, job_id) if e.message.startswith("odd")]
    assert odd.message == "odd \N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}"
    assert odd.data == {"deep": [None, {"er": "\N{REPLACEMENT CHARACTER}"}]}


def test_time_is_counted_over_all_attempts(start: Start, database: Database) -> None:
    supervisor = start()
    job_id = make_job(database, name="forever", time_limit_seconds=3600)
    wait_for(lambda: child_pid(database, job_id))
    supervisor.stop()
    job = wait_status(database, job_id, "queued")
    assert 0 < job.run_seconds < 60
    assert job.attempt_started_at is None

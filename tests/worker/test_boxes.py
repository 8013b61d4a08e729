"""Two boxes without a common disk: one PostgreSQL, one Valkey, one S3-compatible store, reached over TCP."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from sqlalchemy.engine import make_url

from shared.clock import utcnow
from shared.database import Database
from shared.device import Device
from shared.queue import Doorbell
from shared.repository import copies, files, jobs, logs
from shared.repository.retention import known_keys
from shared.settings import Settings
from shared.storage import Store
from tests.conftest import Databases, wait_for
from tests.proxy import Proxy
from tests.s3 import ACCOUNT, S3Server
from tests.samples import add_dataset, make_job
from tests.worker.test_claims import GIB, plan_by_name
from tests.worker.test_supervisor import child_pid, entries, let_go, read, wait_status
from tests.worker.training.warm import fork_programs
from worker import claims, retention
from worker.supervisor import Supervisor

pytestmark = pytest.mark.postgresql(only=True)

SMALL, LARGE = Device("cuda", 0, "small", 24 * GIB), Device("cuda", 0, "large", 80 * GIB)


@dataclass
class Box:
    """A supervisor with a data folder of its own, and proxies to all that it shares with others."""

    settings: Settings
    proxies: list[Proxy]

    def cut_off(self) -> None:
        for proxy in self.proxies:
            proxy.cut()

    def come_back(self) -> None:
        for proxy in self.proxies:
            proxy.restore()


Begin = Callable[[str, Device], Box]


@pytest.fixture
def begin(
    settings: Settings,
    databases: Databases,
    s3_server: S3Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Begin]:
    """Start a box. Children that start from then on, of whatever box, reach the store as this one does."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 0, 81920\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}/usr/bin:/bin")
    monkeypatch.setattr(claims, "make_plan", plan_by_name)
    assert databases.server is not None
    socket_path = f"{databases.server.folder}/.s.PGSQL.5432"
    name_of_database = make_url(settings.database()).database

    with ExitStack() as stack:

        def start(name: str, device: Device) -> Box:
            database = stack.enter_context(Proxy(socket_path))
            redis = stack.enter_context(Proxy(settings.redis().removeprefix("unix://")))
            store = stack.enter_context(Proxy.to_url(s3_server.endpoint))
            for variable, value in s3_server.environment(store.url).items():
                monkeypatch.setenv(variable, value)
            monkeypatch.setattr("socket.gethostname", lambda: name)
            box = settings.model_copy(
                update={
                    "data_dir": tmp_path / name,
                    "database_url": f"postgresql://postgres@127.0.0.1:{database.port}/{name_of_database}",
                    "redis_url": f"redis://127.0.0.1:{redis.port}/0",
                    "lease_seconds": 10,
                }
            )
            monkeypatch.setattr("worker.process.subprocess", fork_programs())
            opened, doorbell = Database(box.database()), Doorbell(box.redis())
            supervisor = Supervisor(box, opened, doorbell, [device], "tests.worker.fake_child")
            thread = threading.Thread(target=supervisor.run)
            thread.start()
            for end in (opened.close, doorbell.close, lambda: thread.join(60), supervisor.stop):
                stack.callback(end)
            return Box(box, [database, redis, store])

        yield start


@pytest.fixture
def settings(settings: Settings, s3_url: str) -> Settings:
    return settings.model_copy(update={"artifacts_url": s3_url})


def content_of(settings: Settings, database: Database, job_id: str) -> bytes:
    with database.read() as session:
        row = files.get_artifact(session, job_id, "adapter.tar")
    return b"".join(Store(settings.artifacts()).read(row.key, 0, row.bytes))


def test_each_job_runs_on_the_box_that_it_fits_with_its_data_from_the_store(
    begin: Begin, settings: Settings, database: Database, tmp_path: Path
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_bytes(b"rows")
    dataset = {"source": "file", "file_id": add_dataset(database, settings, rows)}
    begin("small-box", SMALL)
    heavy = make_job(database, name="succeed 60", dataset=dataset)
    light = make_job(database, name="succeed 10", dataset=dataset)
    wait_status(database, light, "succeeded")
    assert read(database, heavy).status == "queued"
    begin("large-box", LARGE)
    wait_status(database, heavy, "succeeded")
    for job_id, box in ((light, "small-box"), (heavy, "large-box")):
        assert any(f"Claimed by worker {box}" in entry.message for entry in entries(database, job_id))
        assert content_of(settings, database, job_id) == b"rows"
        assert not any(ACCOUNT["AWS_SECRET_ACCESS_KEY"] in str(entry) for entry in entries(database, job_id))


def test_a_job_goes_on_at_another_box_and_the_one_that_was_cut_off_changes_nothing_when_it_comes_back(
    begin: Begin, settings: Settings, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = begin("box-1", LARGE)
    job_id = make_job(database, name="saving 60 3")
    pid = wait_for(lambda: child_pid(database, job_id))
    wait_for(lambda: copied_step(database, job_id) >= 2)
    first.cut_off()
    step = copied_step(database, job_id)
    let_go(database, job_id)
    # As if so much time had passed.
    with database.write() as session:
        jobs.lock_job(session, job_id, None).lease_expires_at = utcnow()
    begin("box-2", LARGE)
    job = wait_status(database, job_id, "succeeded")
    assert (job.attempt, job.losses) == (2, 1)
    before = [(entry.seq, entry.message) for entry in entries(database, job_id)]
    told = [message for _, message in before]
    assert "Worker box-1" in str([message for message in told if "was not heard of in time" in message])
    # From the checkpoint in the store, with the losses of a job that nothing interrupts.
    assert f"The checkpoint of step {step} came from the store." in told
    assert [m for m in told if m.startswith("from step")] == ["from step 0", f"from step {step}"]
    with database.read() as session:
        rows = logs.read_metrics(session, job_id)
    assert [(row["step"], row["loss"]) for row in rows] == [(n, 1.0 / n) for n in range(1, 6)]
    # The first box's child has trained on meanwhile, and wants to write, to publish and to end the job.
    assert psutil.pid_exists(int(pid or 0))
    first.come_back()
    wait_for(lambda: not psutil.pid_exists(int(pid or 0)))
    assert [(entry.seq, entry.message) for entry in entries(database, job_id)] == before
    assert [seq for seq, _ in before] == list(range(1, len(before) + 1))
    assert content_of(settings, database, job_id) == b"adapter"
    stored = [f.name for f in Store(settings.artifacts()).list_files() if f.name.endswith("adapter.tar")]
    assert len(stored) == 1
    # What its child put into the store and could not name is nobody's.
    monkeypatch.setattr(retention, "STRAY_SECONDS", -1.0)
    store = Store(settings.artifacts())
    retention.collect(database, store, settings, dry_run=False)
    left = [file.name for file in store.list_files()]
    with database.read() as session:
        assert known_keys(session, left) == set(left)
    assert not any("checkpoint-" in name for name in left)
    # And it works again.
    more = [make_job(database, name="forever 60") for _ in range(2)]
    wait_for(lambda: [read(database, other).status for other in more] == ["running"] * 2)


def copied_step(database: Database, job_id: str) -> int:
    with database.read() as session:
        copy = copies.find_copy(session, job_id)
    return copy.step if copy else 0


def test_a_store_that_is_away_for_a_while_costs_no_job(
    begin: Begin, settings: Settings, database: Database
) -> None:
    box = begin("box-1", LARGE)
    job_id = make_job(database, name="lasting 60 1")
    wait_for(lambda: read(database, job_id).progress)
    box.proxies[2].cut()
    let_go(database, job_id)
    wait_for(lambda: "The artifact store does not answer" in str(entries(database, job_id)))
    box.proxies[2].restore()
    job = wait_status(database, job_id, "succeeded")
    assert job.attempt == 1
    assert content_of(settings, database, job_id) == b"adapter"

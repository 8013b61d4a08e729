"""What is removed as old, and what never is."""

from __future__ import annotations

import os
import time
from datetime import timedelta
from pathlib import Path

import pytest

from shared.clock import utcnow
from shared.database import Database
from shared.events import Checkpoint, Entry
from shared.lifecycle import JobStatus
from shared.repository import exports, files, jobs, logs, owners
from shared.settings import Settings
from shared.storage import Store
from shared.tables import ArtifactRow, DatasetRow, UploadPartRow, UploadRow
from tests.samples import add_dataset, make_job
from worker import retention
from worker.checkpoints import FOLDER, checkpoint_folder, complete_checkpoints
from worker.retention import Removed, collect


@pytest.fixture
def store(settings: Settings) -> Store:
    return Store(settings.artifacts())


def ended(
    database: Database, days_ago: float, status: JobStatus = JobStatus.SUCCEEDED, owner: str = "ann"
) -> str:
    job_id = make_job(database, owner=owner)
    with database.write() as session:
        job = jobs.lock_job(session, job_id, None)
        jobs.set_status(job, JobStatus.RUNNING)
        jobs.set_status(job, status)
        job.finished_at = utcnow() - timedelta(days=days_ago)
    return job_id


def add_checkpoints(database: Database, settings: Settings, job_id: str, *steps: int) -> Path:
    folder = settings.root / "work" / job_id / FOLDER
    for step in steps:
        path = checkpoint_folder(folder, step)
        path.mkdir(parents=True)
        (path / "weights").write_bytes(b"w" * 100)
        with database.write() as session:
            told = Checkpoint(step=step, path=path, bytes=100, metrics={})
            logs.put_checkpoint(session, job_id, told, [*steps])
    return folder


def add_file(database: Database, store: Store, folder: Path, job_id: str, name: str, kind: str) -> str:
    source = folder / "file"
    source.write_bytes(b"x" * 50)
    key = f"jobs/{job_id}/token/{name}"
    store.publish(source, key)
    row = ArtifactRow(job_id=job_id, name=name, kind=kind, bytes=50, sha256="0", key=key)
    with database.write() as session:
        files.put_artifact(session, row)
    return key


def messages(database: Database, job_id: str) -> list[str]:
    with database.read() as session:
        return [entry.message for entry in logs.read_entries(session, job_id, 0, 100)]


def steps_told(database: Database, job_id: str) -> list[int]:
    with database.read() as session:
        return [row.step for row in logs.read_checkpoints(session, job_id)]


def run(
    database: Database,
    store: Store,
    settings: Settings,
    *,
    dry_run: bool = False,
    force: bool = False,
    **limits: float,
) -> list[Removed]:
    """First without doing it: what it says must be what it then does."""
    limited = settings.model_copy(update={"keep_checkpoint_days": None} | limits)
    told = collect(database, store, limited, dry_run=True, force=force)
    if not dry_run:
        assert collect(database, store, limited, dry_run=False, force=force) == told
        assert collect(database, store, limited, dry_run=False, force=force) == []
    return told


def test_checkpoints_of_jobs_that_ended_long_ago_go(
    database: Database, settings: Settings, store: Store
) -> None:
    old, new = ended(database, 40), ended(database, 10)
    paused = make_job(database)
    with database.write() as session:
        jobs.request_pause(session, paused, None)
    folders = [add_checkpoints(database, settings, job_id, 5, 10) for job_id in (old, new, paused)]
    (removed,) = run(database, store, settings, keep_checkpoint_days=30)
    assert (removed.what, removed.job_id, removed.bytes >= 200) == ("checkpoints", old, True)
    assert [list(complete_checkpoints(folder)) for folder in folders] == [[], [5, 10], [5, 10]]
    assert [steps_told(database, job_id) for job_id in (old, new, paused)] == [[], [5, 10], [5, 10]]
    assert messages(database, old)[-1].startswith("Checkpoints of steps 5, 10 were removed: the job ended")


def test_the_last_ones_and_the_newest_jobs_checkpoints_stay(
    database: Database, settings: Settings, store: Store
) -> None:
    older, newer = ended(database, 2), ended(database, 1)
    folders = [add_checkpoints(database, settings, job_id, 5, 10) for job_id in (older, newer)]
    run(database, store, settings, keep_last_checkpoints=1)
    assert [list(complete_checkpoints(folder)) for folder in folders] == [[10], [10]]
    kept = checkpoint_folder(folders[1], 10)
    size = sum(file.lstat().st_size for file in kept.rglob("*"))
    run(database, store, settings, keep_checkpoint_bytes=size)
    assert [list(complete_checkpoints(folder)) for folder in folders] == [[], [10]]


def test_a_dry_run_changes_nothing(
    database: Database, settings: Settings, store: Store, tmp_path: Path
) -> None:
    job_id = ended(database, 40)
    folder = add_checkpoints(database, settings, job_id, 5)
    key = add_file(database, store, tmp_path, job_id, "adapter.tar", "adapter")
    with database.write() as session:
        logs.append_entries(session, job_id, [Entry("one more")])
    before = messages(database, job_id)
    limits = {"keep_checkpoint_days": 30, "keep_artifact_days": 30, "keep_log_days": 30}
    told = run(database, store, settings, dry_run=True, **limits)
    assert [removed.what for removed in told] == ["checkpoints", "model files", "log entries"]
    assert list(complete_checkpoints(folder)) == steps_told(database, job_id) == [5]
    assert b"".join(store.read(key, 0, 50)) == b"x" * 50
    assert messages(database, job_id) == before


def test_old_model_files_go_and_the_records_stay(
    database: Database, settings: Settings, store: Store, tmp_path: Path
) -> None:
    made = [ended(database, days) for days in (9, 5, 1)] + [ended(database, 20, owner="bob")]
    for job_id in made:
        add_file(database, store, tmp_path, job_id, "adapter.tar", "adapter")
        add_file(database, store, tmp_path, job_id, "manifest.json", "manifest")

    def left() -> list[list[str]]:
        with database.read() as session:
            return [[row.name for row in files.list_artifacts(session, job_id)] for job_id in made]

    whole, records = ["adapter.tar", "manifest.json"], ["manifest.json"]
    run(database, store, settings, keep_artifact_jobs=2)
    assert left() == [records, whole, whole, whole]
    run(database, store, settings, keep_artifact_days=15)
    assert left() == [records, whole, whole, records]
    assert "The job's 1 model files were removed" in messages(database, made[0])[-1]
    assert len(list(settings.root.glob("artifacts/jobs/*/*/adapter.tar"))) == 2
    with database.read() as session:
        assert owners.quotas(session, settings, "bob")["stored_bytes"].used == 50


def test_what_an_export_is_being_made_of_stays(
    database: Database, settings: Settings, store: Store, tmp_path: Path
) -> None:
    job_id = ended(database, 40)
    folder = add_checkpoints(database, settings, job_id, 5)
    add_file(database, store, tmp_path, job_id, "adapter.tar", "adapter")
    with database.write() as session:
        exports.add_export(session, job_id, "gguf:q8_0", 5)
    limits = {"keep_checkpoint_days": 1, "keep_artifact_days": 1, "keep_log_entries": 1}
    limited = settings.model_copy(update=limits)
    for dry_run in (True, False):
        assert collect(database, store, limited, dry_run=dry_run) == []
    assert list(complete_checkpoints(folder)) == steps_told(database, job_id) == [5]
    with database.write() as session:
        exports.cancel_exports(session, job_id)
    assert len(collect(database, store, limited, dry_run=False)) == 3


def test_logs_are_cut_at_the_front_and_say_so(database: Database, settings: Settings, store: Store) -> None:
    old, short, running = ended(database, 40), ended(database, 1), make_job(database)
    with database.write() as session:
        for job_id in (old, running):
            logs.append_entries(session, job_id, [Entry(f"entry {n}") for n in range(20)])
    run(database, store, settings, keep_log_entries=5)
    assert messages(database, old) == [
        "entry 16", "entry 17", "entry 18", "entry 19",
        "17 entries of this log were removed: the last 5 are kept.",
    ]  # fmt: skip
    with database.read() as session:
        assert logs.first_seq(session, old) == 18
        assert jobs.get_job(session, old, None).last_seq == 22
    assert (len(messages(database, short)), len(messages(database, running))) == (1, 21)
    run(database, store, settings, keep_log_days=30)
    assert len(messages(database, old)) == 1
    assert len(messages(database, short)) == 1


def age(settings: Settings, key: str, days: float = 2) -> None:
    past = time.time() - days * 86_400
    os.utime(settings.root / "artifacts" / key, (past, past))


def put(store: Store, tmp_path: Path, key: str) -> str:
    source = tmp_path / "stray"
    source.write_bytes(b"s" * 10)
    store.publish(source, key)
    return key


def test_what_a_killed_upload_left_goes_after_some_hours(
    database: Database, settings: Settings, store: Store
) -> None:
    folder = settings.root / "uploads"
    folder.mkdir()
    for name, hours in (("old", 30), ("young", 2)):
        (folder / name).write_bytes(b"u" * 9)
        os.utime(folder / name, (time.time() - hours * 3600,) * 2)
    (removed,) = run(database, store, settings, keep_unfinished_hours=24)
    assert (removed.what, removed.why, removed.bytes) == ("unfinished uploads", "old", 9)
    assert [path.name for path in folder.iterdir()] == ["young"]


def test_what_is_over_its_time_is_shown_before_it_goes(
    database: Database, settings: Settings, store: Store, tmp_path: Path
) -> None:
    over, later = utcnow() - timedelta(seconds=1), utcnow() + timedelta(hours=1)
    for upload_id, status, end in (
        ("upload_over", "pending", over),
        ("upload_done", "completed", over),
        ("upload_open", "pending", later),
    ):
        upload = UploadRow(
            id=upload_id, owner="ann", filename="r", bytes=99, mime_type="", purpose="fine-tune",
            status=status, expires_at=end,
        )  # fmt: skip
        part = UploadPartRow(
            id=f"part_{upload_id}",
            upload_id=upload_id,
            bytes=10,
            key=put(store, tmp_path, f"uploads/{upload_id}/part"),
        )
        with database.write() as session:
            session.add(upload)
            session.flush()
            if status == "pending":
                session.add(part)
    ids = {}
    for name, end in (("file over", over), ("file later", later)):
        (tmp_path / name).write_bytes(b"{}")
        ids[name] = add_dataset(database, settings, tmp_path / name)
        with database.write() as session:
            row = session.get(DatasetRow, ids[name])
            assert row is not None
            row.expires_at = end
    assert [(r.what, r.why, r.bytes) for r in run(database, store, settings)] == [
        ("files over their time", f"{ids['file over']} of ann", 2),
        ("unfinished uploads", "upload_over of ann", 10),
    ]
    with database.read() as session:
        left = [session.get(UploadRow, key) for key in ("upload_over", "upload_done", "upload_open")]
        assert [row.id for row in left if row] == ["upload_open"]
    assert not any(file.name.startswith("uploads/upload_over") for file in store.list_files())


def test_files_without_a_row_go_after_a_day(
    database: Database, settings: Settings, store: Store, tmp_path: Path
) -> None:
    job_id = make_job(database)
    named = add_file(database, store, tmp_path, job_id, "adapter.tar", "adapter")
    rows = tmp_path / "rows.jsonl"
    rows.write_bytes(b"{}")
    add_dataset(database, settings, rows)
    stray = put(store, tmp_path, f"jobs/{job_id}/lost/model-q8_0.gguf")
    gone = put(store, tmp_path, "datasets/file-000000000000000000000000/data")
    young = put(store, tmp_path, f"jobs/{job_id}/lost/young")
    foreign = put(store, tmp_path, "photos/cat.jpg")
    for key in (named, stray, gone, foreign):
        age(settings, key)
    found = run(database, store, settings)
    assert sorted(removed.why for removed in found) == sorted([gone, stray])
    left = {file.name for file in store.list_files()}
    assert {named, young, foreign} <= left
    assert left.isdisjoint({stray, gone})
    assert messages(database, job_id)[-1] == "model-q8_0.gguf of an attempt that was not counted was removed."


def test_a_store_that_the_database_does_not_know_is_left_alone(
    database: Database, settings: Settings, store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(retention.AT_LEAST + 1):
        age(settings, put(store, tmp_path, f"datasets/file-{number:024}/data"))
    assert run(database, store, settings) == []
    assert "Is it the right one" in caplog.text
    assert len(run(database, store, settings, force=True)) == retention.AT_LEAST + 1

"""The checker itself: it tells of each thing that is broken, and of nothing where all went well."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import pytest

from shared.clock import utcnow
from shared.lifecycle import ExportStatus, JobStatus
from shared.repository.logs import StoredEntry
from shared.tables import ArtifactRow, CheckpointCopy, DatasetRow, ExportTask, Job, OwnerRow
from tests.chaos.child import FROM, adapter_content, loss_of, next_state, state_after
from tests.chaos.history import Event
from tests.chaos.invariants import Rules, check
from tests.chaos.records import Download, Page, Seen, Truth, told

JOB = "ftjob-one"
STEPS = 3
RULES = Rules(max_losses=3, disk_was_full=False, one_box=True)


def events() -> list[Event]:
    """A job that is claimed, lost, claimed again and succeeds; then an export of it."""
    a, b, c = ("a",), ("b",), ("c",)
    rows = [
        ("job", "queued", 0, (), None, None),
        ("entry", "queued", 0, (), None, "1"),
        ("job", "running", 1, a, None, "w1"),
        ("entry", "running", 1, a, "a", "2"),
        ("metric", "running", 1, a, "1", "1"),
        ("checkpoint", "running", 1, a, "1.0", "1"),
        ("job", "queued", 1, (), None, None),
        ("job", "running", 2, b, None, "w2"),
        ("entry", "running", 2, b, "b", "3"),
        ("artifact", "running", 2, b, "jobs/ftjob-one/b/adapter.tar", "adapter.tar"),
        ("job", "succeeded", 2, (), None, None),
        ("results", "succeeded", 2, (), "results/ftjob-one/b/r", "file-1"),
        ("export", "succeeded", 2, (), "queued", "ex-1"),
        ("export", "succeeded", 2, c, "running", "ex-1"),
        ("entry", "succeeded", 2, c, "c", "4"),
        ("export", "succeeded", 2, (), "succeeded", "ex-1"),
    ]
    return [
        Event(number, what, JOB, status, attempt, holders, said, detail)
        for number, (what, status, attempt, holders, said, detail) in enumerate(rows)
    ]


def entry(seq: int, message: str, step: int | None = None) -> StoredEntry:
    return StoredEntry(seq, utcnow(), "info", "message", message, None if step is None else {"step": step})


def artifact(name: str, content: bytes) -> ArtifactRow:
    digest = hashlib.sha256(content).hexdigest()
    key = f"jobs/{JOB}/b/{name}"
    return ArtifactRow(job_id=JOB, name=name, kind="x", bytes=len(content), sha256=digest, key=key)


class Run(NamedTuple):
    truth: Truth
    seen: Seen


def good() -> Run:
    states = [state_after(JOB, step) for step in range(STEPS + 1)]
    files = [artifact("adapter.tar", adapter_content(states[-1])), artifact("manifest.json", b"{}")]
    results = DatasetRow(
        id="file-1", owner="ann", filename="r", bytes=2, sha256="r", status="processed", format="auto",
        key="results/r", job_id=JOB,
    )  # fmt: skip
    job = Job(
        id=JOB, owner="ann", status=JobStatus.SUCCEEDED, model="m", priority=1, attempt=2, losses=1,
        last_seq=4, user_metadata={},
        spec={"name": "chaos", "metadata": {"steps": str(STEPS), "submission": "s-1"}},
    )  # fmt: skip
    truth = Truth(
        jobs={JOB: job},
        entries={JOB: [entry(1, "Accepted."), entry(2, FROM, 0), entry(3, FROM, 1), entry(4, "exporting")]},
        metrics={JOB: [{"step": step, "loss": loss_of(states[step])} for step in range(1, STEPS + 1)]},
        checkpoints={JOB: {1}},
        artifacts=files,
        files=[results],
        exports=[
            ExportTask(id="ex-1", job_id=JOB, format="f", status=ExportStatus.SUCCEEDED, finished_at=utcnow())
        ],
        owners={"ann": OwnerRow(name="ann", stored_bytes=sum(file.bytes for file in files) + 2)},
        ended=Counter({"succeeded": 1}),
        history=events(),
        stored={file.key: (file.bytes, file.sha256) for file in files} | {"results/r": (2, "r")},
        work=[JOB, f"{JOB}/checkpoints"],
        checkpoints_on_disk={JOB: {1}},
    )
    seen = Seen(
        accepted=[("s-1", JOB)],
        pages=[Page("ann", JOB, 1, ((2, told(FROM, "message", {"step": 0})),))],
        statuses={("ann", JOB): ["queued", "running", "queued", "succeeded"]},
        endings=[(JOB, "succeeded")],
        downloads=[Download(JOB, "adapter.tar", "h", "h")],
        uploads=[("file-1", "r")],
    )
    return Run(truth, seen)


def test_a_run_in_which_all_went_well_has_nothing_broken() -> None:
    assert check(*good(), RULES) == []
    assert next_state(state_after(JOB, 2), 3) == state_after(JOB, 3)


Change = Callable[[Run], object]


def change_event(number: int, **changes: object) -> Change:
    def change(run: Run) -> None:
        history = run.truth.history
        history[number] = replace(history[number], **changes)  # type: ignore[arg-type]

    return change


def set_job(**changes: object) -> Change:
    def change(run: Run) -> None:
        for name, value in changes.items():
            setattr(run.truth.jobs[JOB], name, value)

    return change


def trained_twice(run: Run) -> None:
    """Two jobs alike whose losses differ."""
    for number in (1, 2):
        job = run.truth.jobs[JOB].model_copy(
            update={"id": f"real-{number}", "spec": {"name": "real", "metadata": {}}}
        )
        run.truth.jobs[job.id], run.truth.entries[job.id] = job, []
        run.truth.metrics[job.id] = [{"step": 1, "loss": number}]


def copied(run: Run, status: str = JobStatus.PAUSED) -> None:
    """The job has a copy of a checkpoint in the store, and is or was in this status."""
    key = f"jobs/{JOB}/b/checkpoint-1.tar"
    run.truth.copies.append(CheckpointCopy(job_id=JOB, step=1, bytes=1, sha256="c", key=key))
    run.truth.stored[key] = (1, "c")
    run.truth.jobs[JOB].status = status


def written_late(run: Run) -> None:
    key = f"jobs/{JOB}/a/checkpoint-1.tar"
    run.truth.history.append(Event(99, "copy", JOB, "running", 2, ("b",), key, "1"))


LOST = {"code": "worker_lost", "message": "", "advice": ""}
BROKEN: list[tuple[str, str, Change]] = [
    ("gone", "was accepted and is gone", lambda r: r.seen.accepted.append(("s-2", "ftjob-two"))),
    ("twice", "answered with several jobs", lambda r: r.seen.accepted.append(("s-1", "ftjob-two"))),
    (
        "made twice",
        "made 2 jobs",
        lambda r: r.truth.jobs.update(two=r.truth.jobs[JOB].model_copy(update={"id": JOB})),
    ),
    (
        "deleted",
        "nobody had asked for it",
        lambda r: r.truth.history.append(Event(99, "deleted", "x", None, 0, (), None, None)),
    ),
    ("left running", "is left running", set_job(status="running")),
    ("held", "still held by w1", set_job(worker="w1")),
    ("failure", "with failure", set_job(failure=LOST)),
    ("no reason", "failed without reason", set_job(status="failed", failure=LOST, losses=2)),
    ("disk", "failed without reason", set_job(status="failed", failure=LOST | {"code": "out_of_disk"})),
    ("cancelled", "was cancelled, and nobody", set_job(status="cancelled")),
    (
        "not cancelled",
        "its cancellation was answered",
        lambda r: (r.seen.cancelled.add(JOB), set_job(status="paused")(r)),
    ),
    ("begins late", "began as running", change_event(0, status="running")),
    ("illegal step", "went from queued to succeeded", change_event(7, status="succeeded")),
    (
        "ended twice",
        "went from succeeded to failed",
        lambda r: r.truth.history.append(replace(r.truth.history[10], status="failed")),
    ),
    (
        "stolen",
        "changed hands while it was running",
        change_event(6, status="running", holders=("z",), attempt=2),
    ),
    ("token again", "under a token that had been used", change_event(7, holders=("a",))),
    ("attempt", "went from attempt 1 to 3", change_event(7, attempt=3)),
    ("zombie entry", "entry 3 was written by a", change_event(8, told="a")),
    ("zombie metric", "metric 1 was written by 2", change_event(4, told="2")),
    ("zombie checkpoint", "checkpoint 1 was written by 1.0", change_event(5, attempt=2)),
    (
        "zombie artifact",
        "artifact adapter.tar was written by",
        change_event(9, told="jobs/ftjob-one/a/adapter.tar"),
    ),
    (
        "zombie report",
        "report None was written by a while",
        lambda r: r.truth.history.insert(
            8, replace(r.truth.history[8], what="report", told="a", detail=None)
        ),
    ),
    ("zombie copy", "copy 1 was written by jobs/ftjob-one/a/", written_late),
    ("copy left", "is of a job that has ended", lambda r: copied(r, JobStatus.SUCCEEDED)),
    ("copy gone", "has a row and is not in the store", lambda r: (copied(r), r.truth.stored.popitem())),
    ("zombie export", "entry 4 was written by c", change_event(14, holders=())),
    ("zombie end", "results file-1 was written by", change_event(11, told="results/ftjob-one/a/r")),
    ("log order", "entry 5 was written after 2", change_event(8, detail="5")),
    ("log gap", "has not the entries 1 to 4", lambda r: r.truth.entries[JOB].pop()),
    ("no file", "has a row and is not in the store", lambda r: r.truth.stored.pop("results/r")),
    ("other file", "is not what its row says", lambda r: r.truth.stored.update({"results/r": (2, "other")})),
    ("no results", "with 0 files of results", lambda r: setattr(r.truth.files[0], "job_id", None)),
    ("no adapter", "succeeded without its files", lambda r: r.truth.artifacts.pop()),
    ("wrong adapter", "its adapter is not that", lambda r: setattr(r.truth.artifacts[0], "sha256", "other")),
    ("trained twice", "came to 2 different series of losses", trained_twice),
    ("wrong metrics", "its metrics are not those", lambda r: r.truth.metrics[JOB].pop()),
    (
        "done twice",
        "there was a checkpoint of step 1",
        lambda r: r.truth.entries[JOB].__setitem__(2, entry(3, FROM, 0)),
    ),
    ("stray", "is in the store and nobody's", lambda r: r.truth.stored.update({"jobs/x": (1, "x")})),
    (
        "rows left",
        "2 rows of Metric.job_number are of",
        lambda r: r.truth.left_rows.update({"Metric.job_number": 2}),
    ),
    ("upload left", "is of an upload that is over", lambda r: r.truth.uploads.append("file-9")),
    ("work of no job", "is of no job", lambda r: r.truth.work.append("ftjob-two")),
    ("work left", "is of an attempt that is over", lambda r: r.truth.work.append(f"{JOB}/1-a")),
    ("no checkpoint", "are on no box", lambda r: r.truth.checkpoints_on_disk.clear()),
    ("bytes", "bytes, and", lambda r: setattr(r.truth.owners["ann"], "stored_bytes", 1)),
    ("ends", "jobs ended as", lambda r: r.truth.ended.update({"failed": 1})),
    ("page gap", "with gaps", lambda r: r.seen.pages.append(Page("bob", JOB, 1, ((3, "x"),)))),
    ("page", "read other entries", lambda r: r.seen.pages.append(Page("bob", JOB, 1, ((2, "x"),)))),
    ("page ahead", "read other entries", lambda r: r.seen.pages.append(Page("bob", JOB, 4, ((5, "x"),)))),
    (
        "statuses",
        "which it was not in this order",
        lambda r: r.seen.statuses.update({("bob", JOB): ["succeeded", "running"]}),
    ),
    ("end", "a stream ended", lambda r: r.seen.endings.append((JOB, "failed"))),
    ("download", "came with hash", lambda r: r.seen.downloads.append(Download(JOB, "adapter.tar", "h", "i"))),
    ("upload", "was taken with hash", lambda r: r.seen.uploads.append(("file-2", "h"))),
    (
        "export left",
        "export ex-1 of ftjob-one is left",
        lambda r: setattr(r.truth.exports[0], "finished_at", None),
    ),
    ("export twice", "went on after its end", lambda r: r.truth.history.append(r.truth.history[13])),
    ("surprise", "was surprised", lambda r: r.seen.surprises.append("GET / was answered with 500")),
]


@pytest.mark.parametrize(("expected", "change"), [b[1:] for b in BROKEN], ids=[b[0] for b in BROKEN])
def test_each_thing_that_is_broken_is_told(expected: str, change: Change) -> None:
    run = good()
    change(run)
    found = check(*run, RULES)
    assert any(expected in line for line in found), found


def test_a_copy_of_a_job_that_is_paused_is_no_orphan() -> None:
    run = good()
    copied(run)
    assert [line for line in check(*run, RULES) if "copy" in line or "store" in line] == []


def test_between_boxes_an_attempt_goes_on_from_the_copy() -> None:
    run = good()
    run.truth.entries[JOB][2] = entry(3, FROM, 0)
    apart = replace(RULES, one_box=False)
    assert check(*run, apart) == []
    key = f"jobs/{JOB}/a/checkpoint-1.tar"
    run.truth.history.insert(6, Event(99, "copy", JOB, "running", 1, ("a",), key, "1"))
    assert "there was a copy of step 1" in str(check(*run, apart))

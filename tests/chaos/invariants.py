"""What must hold after every run, whatever was done to it. Each function tells what is broken."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from shared.lifecycle import LEASED, TERMINAL, TRANSITIONS, FailureCode, JobStatus
from shared.tables import Job
from tests.chaos.child import FROM, adapter_content, loss_of, next_state, state_after
from tests.chaos.history import Event
from tests.chaos.records import SUBMISSION, Page, Seen, Truth, told

KEPT_FOLDERS = {"checkpoints", "reports"}


@dataclass(frozen=True)
class Rules:
    """What the run allowed: losses until a job fails, whether the disk was ever full, and whether all workers
    were on one box, where none of a job's checkpoints is out of reach, in the store or not."""

    max_losses: int
    disk_was_full: bool
    one_box: bool


def check(truth: Truth, seen: Seen, rules: Rules) -> list[str]:
    """All that is broken; empty when all is well."""
    checks: list[Callable[[], Iterator[str]]] = [
        lambda: accepted_jobs_are_there(truth, seen),
        lambda: jobs_have_ended(truth, seen, rules),
        lambda: lives_follow_the_table(truth.history),
        lambda: only_holders_write(truth.history),
        lambda: logs_have_no_gaps(truth),
        lambda: files_are_what_rows_say(truth),
        lambda: results_are_the_foretold(truth),
        lambda: nothing_is_done_twice(truth, "checkpoint" if rules.one_box else "copy"),
        lambda: nothing_is_orphaned(truth),
        lambda: bytes_are_counted(truth),
        lambda: ends_are_counted(truth),
        lambda: views_are_true(truth, seen),
        lambda: exports_have_ended(truth),
        lambda: iter(f"a client was surprised: {line}" for line in seen.surprises),
    ]
    return [line for run in checks for line in run()]


def accepted_jobs_are_there(truth: Truth, seen: Seen) -> Iterator[str]:
    """Each submission made one job, and it is still there, unless its owner deleted it."""
    by_submission: dict[str, set[str]] = {}
    deleted = {event.job_id for event in truth.history if event.what == "deleted"}
    for submission, job_id in seen.accepted:
        by_submission.setdefault(submission, set()).add(job_id)
        if job_id not in truth.jobs and job_id not in deleted & seen.delete_asked:
            yield f"{job_id} was accepted and is gone"
    for submission, answered in by_submission.items():
        if len(answered) > 1:
            yield f"submission {submission} was answered with several jobs: {sorted(answered)}"
    made = Counter(str(job.spec["metadata"].get(SUBMISSION)) for job in truth.jobs.values())
    for submission, count in made.items():
        if count > 1:
            yield f"submission {submission} made {count} jobs"
    for job_id in deleted - seen.delete_asked:
        yield f"{job_id} was deleted, and nobody had asked for it"


def jobs_have_ended(truth: Truth, seen: Seen, rules: Rules) -> Iterator[str]:
    """Ended once, for a reason that was given to it, or paused; and held by nobody."""
    for job in truth.jobs.values():
        if job.status not in TERMINAL | {JobStatus.PAUSED}:
            yield f"{job.id} is left {job.status} at the end"
        if (job.lease_token, job.worker, job.phase) != (None, None, None):
            yield f"{job.id} is {job.status} and still held by {job.worker}"
        if (job.failure is None) == (job.status == JobStatus.FAILED):
            yield f"{job.id} is {job.status} with failure {job.failure}"
        if job.status == JobStatus.FAILED and job.failure and not _is_excused(job, rules):
            yield f"{job.id} failed without reason: {job.failure}, {job.losses} losses"
        if job.status == JobStatus.CANCELLED and job.id not in seen.cancel_asked:
            yield f"{job.id} was cancelled, and nobody had asked for it"
    for job_id in seen.cancelled:
        if job_id in truth.jobs and truth.jobs[job_id].status not in TERMINAL:
            yield f"{job_id} is {truth.jobs[job_id].status} although its cancellation was answered"


def _is_excused(job: Job, rules: Rules) -> bool:
    code = job.failure["code"] if job.failure else None
    if code == FailureCode.WORKER_LOST:
        return job.losses >= rules.max_losses
    return code == FailureCode.OUT_OF_DISK and rules.disk_was_full


def lives_follow_the_table(history: list[Event]) -> Iterator[str]:
    """Every change of status is in the transition table, each claim is a new attempt under a new token."""
    status: dict[str, JobStatus] = {}
    attempts: dict[str, int] = {}
    holder: dict[str, str] = {}
    tokens: set[str] = set()
    for event in history:
        if event.what != "job" or event.status is None:
            continue
        job_id, now = event.job_id, JobStatus(event.status)
        before = status.get(job_id)
        if before is None and now != JobStatus.QUEUED:
            yield f"{job_id} began as {now}"
        if before is not None and now != before and now not in TRANSITIONS[before]:
            yield f"{job_id} went from {before} to {now}"
        status[job_id] = now
        if now not in LEASED:
            holder.pop(job_id, None)
            continue
        token = event.holders[0] if event.holders else ""
        if token == holder.get(job_id):
            continue
        if before != JobStatus.QUEUED:
            yield f"{job_id} changed hands while it was {before}"
        if token in tokens:
            yield f"{job_id} was claimed under a token that had been used"
        attempt = event.attempt or 0
        if attempt != attempts.get(job_id, 0) + 1:
            yield f"{job_id} went from attempt {attempts.get(job_id, 0)} to {attempt}"
        tokens.add(token)
        holder[job_id], attempts[job_id] = token, attempt


def only_holders_write(history: list[Event]) -> Iterator[str]:
    """Whatever an attempt wrote, it held the lease at that moment: one that was overtaken changed nothing."""
    last: dict[str, str] = {}
    for event in history:
        if event.what == "job" and event.status in LEASED and event.holders:
            last[event.job_id] = event.holders[0]
        if event.told is None or event.what == "export":
            continue
        if event.what in ("metric", "checkpoint"):
            # 1.0 as JSON has it is attempt 1.
            held = event.status in LEASED and float(event.told) == event.attempt
        elif event.what == "results":
            # They come with the end, which has just released the lease.
            held = event.told.split("/")[2] == last.get(event.job_id)
        else:
            token = event.told.split("/")[2] if event.what in ("artifact", "copy") else event.told
            held = token in event.holders
        if not held:
            yield (
                f"{event.job_id}: {event.what} {event.detail} was written by {event.told} while the job was "
                f"{event.status} in attempt {event.attempt}, held by {' '.join(event.holders) or 'nobody'}"
            )


def logs_have_no_gaps(truth: Truth) -> Iterator[str]:
    """seq counts from 1 without gaps, in the order of commits, up to what the job's row says."""
    last: dict[str, int] = {}
    for event in truth.history:
        if event.what != "entry":
            continue
        seq = int(event.detail or 0)
        if seq != last.get(event.job_id, 0) + 1:
            yield f"{event.job_id}: entry {seq} was written after {last.get(event.job_id, 0)}"
        last[event.job_id] = seq
    for job in truth.jobs.values():
        if [entry.seq for entry in truth.entries[job.id]] != list(range(1, job.last_seq + 1)):
            yield f"{job.id}: its log has not the entries 1 to {job.last_seq}"


def files_are_what_rows_say(truth: Truth) -> Iterator[str]:
    """Each row's file is in the store, with the row's size and hash."""
    for row in (*truth.artifacts, *truth.copies, *truth.files):
        found = truth.stored.get(row.key)
        if found is None:
            yield f"{row.key} has a row and is not in the store"
        elif found != (row.bytes, row.sha256):
            yield f"{row.key} is not what its row says: {found} for {(row.bytes, row.sha256)}"


def results_are_the_foretold(truth: Truth) -> Iterator[str]:
    """A job that succeeded made what an uninterrupted one makes: every attempt went on where it had to."""
    artifacts = {(row.job_id, row.name): row.sha256 for row in truth.artifacts}
    results = Counter(row.job_id for row in truth.files if row.job_id is not None)
    trained: set[str] = set()
    for job in truth.jobs.values():
        if job.status != JobStatus.SUCCEEDED:
            continue
        if results[job.id] != 1:
            yield f"{job.id} succeeded with {results[job.id]} files of results"
        if (job.id, "manifest.json") not in artifacts or (job.id, "adapter.tar") not in artifacts:
            yield f"{job.id} succeeded without its files"
        if job.spec["name"] == "real":
            trained.add(str([(row["step"], row["loss"]) for row in truth.metrics[job.id]]))
            continue
        steps = int(job.spec["metadata"]["steps"])
        expected = hashlib.sha256(adapter_content(state_after(job.id, steps))).hexdigest()
        if artifacts.get((job.id, "adapter.tar")) != expected:
            yield f"{job.id}: its adapter is not that of {steps} steps in a row"
        if [(row["step"], row["loss"]) for row in truth.metrics[job.id]] != list(_losses(job.id, steps)):
            yield f"{job.id}: its metrics are not those of {steps} steps in a row"
    if len(trained) > 1:
        yield f"jobs that were trained on the same came to {len(trained)} different series of losses"


def _losses(job_id: str, steps: int) -> Iterator[tuple[int, float]]:
    state = state_after(job_id, 0)
    for step in range(1, steps + 1):
        state = next_state(state, step)
        yield step, loss_of(state)


def nothing_is_done_twice(truth: Truth, what: str) -> Iterator[str]:
    """Each attempt goes on from the newest checkpoint that had been told of and that it can have."""
    newest: dict[str, int] = {}
    by_seq = {job_id: {entry.seq: entry for entry in log} for job_id, log in truth.entries.items()}
    for event in truth.history:
        if event.what == what:
            newest[event.job_id] = max(newest.get(event.job_id, 0), int(event.detail or 0))
        elif event.what == "entry" and event.job_id in truth.jobs:
            entry = by_seq[event.job_id].get(int(event.detail or 0))
            began = entry.data["step"] if entry and entry.message == FROM and entry.data else None
            if began is not None and began < newest.get(event.job_id, 0):
                yield (
                    f"{event.job_id}: attempt {event.attempt} began after step {began}, and there was a "
                    f"{what} of step {newest[event.job_id]}"
                )


def nothing_is_orphaned(truth: Truth) -> Iterator[str]:
    """No file without a row, no work folder without a job or of an attempt that is over, no row of a
    checkpoint that no box has, nor of a job that is gone."""
    for table, count in truth.left_rows.items():
        if count:
            yield f"{count} rows of {table} are of no job"
    keys = {row.key for row in (*truth.artifacts, *truth.copies, *truth.files)} | truth.part_keys
    for key in truth.stored.keys() - keys:
        yield f"{key} is in the store and nobody's"
    for name in truth.uploads:
        yield f"uploads/{name} is of an upload that is over"
    for path in truth.work:
        job_id, _, inner = path.partition("/")
        if job_id not in truth.jobs:
            yield f"work/{path} is of no job"
        elif inner and inner not in KEPT_FOLDERS:
            yield f"work/{path} is of an attempt that is over"
    for job_id, steps in truth.checkpoints.items():
        absent = steps - truth.checkpoints_on_disk.get(job_id, set())
        if absent:
            yield f"{job_id}: its checkpoints of steps {sorted(absent)} are on no box"
    for copy in truth.copies:
        if truth.jobs[copy.job_id].status in TERMINAL:
            yield f"{copy.key} is of a job that has ended"


def bytes_are_counted(truth: Truth) -> Iterator[str]:
    """What owners are told they have stored is what they have stored."""
    stored: Counter[str] = Counter()
    for row in truth.files:
        stored[row.owner] += row.bytes
    for artifact in truth.artifacts:
        stored[truth.jobs[artifact.job_id].owner] += artifact.bytes
    for owner in stored.keys() | truth.owners.keys():
        counted = truth.owners[owner].stored_bytes if owner in truth.owners else 0
        if counted != stored[owner]:
            yield f"{owner} has {stored[owner]} bytes, and {counted} are counted"


def ends_are_counted(truth: Truth) -> Iterator[str]:
    """What Prometheus is told of jobs that have ended, nobody counts again: it must be right."""
    ended = Counter(job.status for job in truth.jobs.values() if job.status in TERMINAL)
    if truth.ended != ended:
        yield f"jobs ended as {dict(ended)}, and {dict(truth.ended)} are counted"


def views_are_true(truth: Truth, seen: Seen) -> Iterator[str]:
    """Whatever a client was told is a part of what happened, in its order."""
    for page in seen.pages:
        yield from _page_is_true(truth, page)
    lives: dict[str, list[str]] = {}
    for event in truth.history:
        if event.what == "job" and event.status is not None:
            lives.setdefault(event.job_id, []).append(event.status)
    for (client, job_id), statuses in seen.statuses.items():
        life = iter(lives.get(job_id, []))
        if not all(status in life for status in statuses):
            yield f"{client} saw {job_id} as {statuses}, which it was not in this order"
    for job_id, status in seen.endings:
        if job_id in truth.jobs and truth.jobs[job_id].status != status:
            yield f"a stream ended {job_id} as {status}, and it is {truth.jobs[job_id].status}"
    for download in seen.downloads:
        if download.listed != download.got:
            yield f"{download.name} of {download.job_id} came with hash {download.got}, not {download.listed}"
    there = {row.id: row.sha256 for row in truth.files}
    for file_id, sha256 in seen.uploads:
        if there.get(file_id) != sha256:
            yield f"{file_id} was taken with hash {sha256}, and is {there.get(file_id, 'gone')}"


def _page_is_true(truth: Truth, page: Page) -> Iterator[str]:
    first = page.after + 1
    if [seq for seq, _ in page.entries] != list(range(first, first + len(page.entries))):
        yield f"{page.client} read {page.job_id} after {page.after} with gaps: {page.entries}"
    elif page.job_id in truth.jobs:
        stored = truth.entries[page.job_id][page.after : page.after + len(page.entries)]
        if [(e.seq, told(e.message, e.type, e.data)) for e in stored] != list(page.entries):
            yield f"{page.client} read other entries of {page.job_id} after {page.after} than there are"


def exports_have_ended(truth: Truth) -> Iterator[str]:
    for task in truth.exports:
        if task.finished_at is None or task.lease_token is not None:
            yield f"export {task.id} of {task.job_id} is left {task.status} at the end"
    ended: set[str] = set()
    for event in truth.history:
        if event.what != "export" or event.detail is None:
            continue
        if event.detail in ended:
            yield f"export {event.detail} of {event.job_id} went on after its end"
        if event.told in TERMINAL:
            ended.add(event.detail)

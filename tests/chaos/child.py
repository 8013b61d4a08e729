"""A child process that does in seconds what a training does in hours: `python -m tests.chaos.child`.

Lease, sink, checkpoints, store and the control over standard input are the real thing. Each step's loss
comes from a chain of hashes, so whatever a job publishes at last can be foretold: an attempt that went on
from the wrong checkpoint, or from half of one, ends with another value. A job called `real` is trained for
real.

The job's metadata says what it does: `steps`, `seconds` (a step's), and `stumble`, POINT:HOW, once. HOW is
`die`, or `freeze`: it and its supervisor stop dead, as on a machine that was cut off, until somebody wakes
them up.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from shared.events import Artifact, Checkpoint, Control, Entry, EventSink, Progress, TrainingControl
from shared.exports import artifact_name
from shared.lifecycle import Phase
from shared.plan import EngineName, Plan
from shared.spec import JobSpec
from shared.storage import Store, sync
from worker.checkpoints import FOLDER, checkpoint_folder, complete_checkpoints, discard
from worker.child import main, train
from worker.export_order import ADAPTER_FILE, LaterExport
from worker.lease import JobLease
from worker.sink import DatabaseSink
from worker.training.workdir import Workdir

SAVE_STEPS = 3
KEPT = 2
STATE = "state"
FROZEN = "frozen-"
# What each attempt says first, with the step that it goes on from.
FROM = "Going on."
# The name of a file that tells that a job has stumbled on this box.
STUMBLED = "stumbled-"
# In the midst of a transaction.
WRITING = "writing"
# The first one is the supervisor's, between claiming a job and starting its process.
POINTS = (
    "claimed", "published", "measured", "results", "finishing", "checkpoint written", "checkpoint renamed",
    "sent", "copied", WRITING,
)  # fmt: skip


def state_after(job: str, steps: int) -> str:
    """The chain's value after so many steps: what tells a job that was resumed rightly from another."""
    value = hashlib.sha256(job.encode()).hexdigest()
    for step in range(1, steps + 1):
        value = next_state(value, step)
    return value


def next_state(value: str, step: int) -> str:
    return hashlib.sha256(f"{value} {step}".encode()).hexdigest()


def loss_of(value: str) -> float:
    return int(value[:8], 16) / 2**32


def adapter_content(state: str) -> bytes:
    """Big enough to take more than one write."""
    return state.encode() * 2000


class Stumble:
    """Dies or freezes at one point of the job's first attempts."""

    def __init__(self) -> None:
        self._point = self._how = ""
        self._root = Path()

    def prepare(self, wanted: str, root: Path) -> None:
        self._root = root
        self._point, _, self._how = wanted.partition(":")

    def at(self, point: str) -> None:
        if point != self._point or not is_first(self._root.parent):
            return
        self._point = ""
        if self._how == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if point == WRITING:
            # It holds the database's one lock, and nobody can take anything over.
            os.kill(os.getpid(), signal.SIGSTOP)
            return
        # The supervisor first: one that sees its child's lease run out would kill it.
        freeze(os.getppid(), self._root)
        freeze(os.getpid(), self._root)


def is_first(job: Path) -> bool:
    """Whether the job has not stumbled here before; from now on it has."""
    try:
        (job.parents[1] / f"{STUMBLED}{job.name}").touch(exist_ok=False)
    except OSError:
        return False
    return True


def freeze(pid: int, attempt: Path) -> None:
    """Stop a process, and leave word for which attempt: it is woken up when another one has the job."""
    box = attempt.parents[2]
    with suppress(OSError):  # On a full disk: it is woken up after a while then.
        (box / f"{FROZEN}{pid}").write_text(f"{attempt.parent.name} {attempt.name.partition('-')[2]}")
    os.kill(pid, signal.SIGSTOP)


stumble = Stumble()


def pipeline(
    spec: JobSpec, plan: Plan, workdir: Workdir, sink: EventSink, control: TrainingControl
) -> list[Artifact]:
    if spec.name == "real":
        return train(spec, plan, workdir, sink, control)
    attempt, _, token = workdir.root.name.partition("-")
    stumble.prepare(spec.metadata.get("stumble", ""), workdir.root)
    if spec.name == "poison":
        os.kill(os.getpid(), signal.SIGKILL)
    sink.phase(Phase.TRAINING)
    sink.data_report({"token": token})
    steps, seconds = int(spec.metadata["steps"]), float(spec.metadata["seconds"])
    job = workdir.root.parent.name
    rows = _resume(workdir)
    step, state = len(rows), rows[-1]["state"] if rows else state_after(job, 0)
    for row in rows:
        # Told again, as the trainer does: a kill may have come between a checkpoint and the row of its step.
        sink.metrics({"attempt": int(attempt), **_told(row)})
    sink.log(Entry(FROM, data={"token": token, "step": step}))
    while step < steps:
        _wait(seconds, control)
        step, state = step + 1, next_state(state, step + 1)
        # As the last digits on another machine: two attempts' files are not to be taken for one.
        rows.append({"step": step, "state": state, "mean_token_accuracy": int(attempt) / 100})
        row = {"attempt": int(attempt), **_told(rows[-1])}
        sink.metrics(row)
        sink.progress(Progress(step=step, total_steps=steps, epoch=step / steps, loss=loss_of(state)))
        sink.log(Entry(f"step {step}", type="metrics", data={"token": token, **row}))
        if step % SAVE_STEPS == 0 or control.leaving():
            _save(workdir, sink, rows, int(attempt))
        control.check()
    sink.phase(Phase.EXPORTING)
    made = []
    for name, kind, content in (
        ("manifest.json", "manifest", f'{{"state": "{state}"}}'.encode()),
        ("adapter.tar", "adapter", adapter_content(state)),
    ):
        made.append(_publish(workdir.root / name, kind, content, sink))
        control.check()
    return made


def export(later: LaterExport, workdir: Workdir, sink: EventSink, control: Control) -> list[Artifact]:
    token = workdir.root.name.removeprefix("export-")
    sink.log(Entry("exporting", data={"token": token}))
    deadline = time.monotonic() + 0.3
    while time.monotonic() < deadline:
        control.check()
        time.sleep(0.02)
    content = later.adapter.read_bytes() + later.format.encode()
    path = workdir.root / artifact_name(later.format, later.checkpoint)
    return [_publish(path, later.format, content, sink)]


def _told(row: dict[str, Any]) -> dict[str, float | int | None]:
    return {name: row[name] for name in ("step", "mean_token_accuracy")} | {"loss": loss_of(row["state"])}


def _resume(workdir: Workdir) -> list[dict[str, Any]]:
    """The rows of the newest checkpoint, which end with the state to go on from."""
    for folder in reversed(complete_checkpoints(workdir.root / FOLDER).values()):
        rows: list[dict[str, Any]] = json.loads((folder / STATE).read_text())
        return rows
    return []


def _save(workdir: Workdir, sink: EventSink, rows: list[dict[str, Any]], attempt: int) -> None:
    """As the trainer does: aside, flushed, renamed; the oldest go."""
    folder = checkpoint_folder(workdir.root / FOLDER, len(rows))
    aside = folder.with_name(f"aside-{len(rows)}")
    aside.mkdir(parents=True, exist_ok=True)
    size = (aside / STATE).write_text(json.dumps(rows))
    (aside / ADAPTER_FILE).write_bytes(rows[-1]["state"].encode())
    sync(aside / STATE)
    stumble.at("checkpoint written")
    discard(folder)
    aside.rename(folder)
    stumble.at("checkpoint renamed")
    metrics = {"loss": loss_of(rows[-1]["state"]), "attempt": float(attempt)}
    for old in list(complete_checkpoints(folder.parent).values())[:-KEPT]:
        discard(old)
    sink.checkpoint(Checkpoint(step=len(rows), path=folder, bytes=size, metrics=metrics))


def _publish(path: Path, kind: str, content: bytes, sink: EventSink) -> Artifact:
    path.write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    artifact = Artifact(name=path.name, kind=kind, path=path, bytes=len(content), sha256=digest)
    sink.artifact(artifact)
    return artifact


def _wait(seconds: float, control: TrainingControl) -> None:
    """A step that takes its time, and is not given up half way by a request to leave."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not control.leaving():
            control.check()
        time.sleep(0.01)


def warm_up(engine: EngineName) -> None:
    """There is nothing to import."""


def hook(owner: type, name: str, before: Callable[..., None], after: Callable[..., None]) -> None:
    """Let something be done around a method: the points at which processes die are between two lines."""
    inner = getattr(owner, name)

    @functools.wraps(inner)
    def outer(*arguments: Any, **named: Any) -> Any:
        before(*arguments)
        result = inner(*arguments, **named)
        after(*arguments)
        return result

    setattr(owner, name, outer)


def _before_publishing(_store: Store, _source: Path, key: str) -> None:
    if key.startswith("results/"):
        stumble.at("measured")


def _after_publishing(_store: Store, _source: Path, key: str) -> None:
    stumble.at("results" if key.startswith("results/") else "published")


if __name__ == "__main__":
    hook(Store, "publish", _before_publishing, _after_publishing)
    hook(JobLease, "log", lambda *_: None, lambda *_: stumble.at(WRITING))
    hook(DatabaseSink, "checkpoint_copy", lambda *_: stumble.at("sent"), lambda *_: stumble.at("copied"))
    hook(DatabaseSink, "finish", lambda *_: stumble.at("finishing"), lambda *_: None)
    main(pipeline, export, warm_up)

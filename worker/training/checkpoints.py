"""Checkpoints that are complete or absent, name what they were made with, and are checked before use."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from shared.events import Checkpoint, Entry, EventSink
from shared.plan import Plan
from shared.spec import JobSpec
from shared.storage import sync
from worker.checkpoints import checkpoint_folder, complete_checkpoints, discard

# What a checkpoint is and was made with, and the hashes of its other files: written last.
RECORD = "checkpoint.json"
# What the trainer's own files lack: the rows of metrics, evaluations, and where early stopping is.
STATE = "job_state.json"
# Of the two above: a checkpoint in another one is another version's.
FORMAT = 1
# transformers puts its arguments there, as a pickle that nothing here may read.
_UNREAD = "training_args.bin"


@dataclass(frozen=True)
class Identity:
    """What a checkpoint must have been made with to be gone on from.

    `spec` and `data` are hex hashes; the model's revision and the number of rows go with the data. How an
    effective batch is split is the plan's and may change.
    """

    spec: str
    data: str
    total_steps: int
    effective_batch: int
    format: int = FORMAT

    @classmethod
    def of(
        cls, spec: JobSpec, plan: Plan, data_sha256: str, rows: int, revision: str | None, total_steps: int
    ) -> Identity:
        # Without defaults: a field that a later version adds leaves the hash as it was.
        asked = spec.model_dump_json(exclude_defaults=True)
        learnt = json.dumps([data_sha256, rows, revision])
        return cls(
            spec=hashlib.sha256(asked.encode()).hexdigest(),
            data=hashlib.sha256(learnt.encode()).hexdigest(),
            total_steps=total_steps,
            effective_batch=plan.micro_batch * plan.accumulation * plan.gpus,
        )


@dataclass(frozen=True)
class Restored:
    """A checkpoint to go on from; `state` is what `Checkpoints.publish` was given."""

    checkpoint: Checkpoint
    state: dict[str, Any]


class Checkpoints:
    """The checkpoints of one attempt, in `output`; `keep` of them stay, as `save_total_limit` has it."""

    def __init__(self, output: Path, identity: Identity, keep: int, sink: EventSink) -> None:
        self._output = output
        self._identity = identity
        self._keep = keep
        self._sink = sink
        self.aside = output / ".writing"

    def publish(
        self, step: int, state: dict[str, Any], metrics: dict[str, float], best: int | None
    ) -> Checkpoint:
        """Complete what the trainer has written aside and let it appear; then remove the oldest ones.

        Args:
            best: a step whose checkpoint stays whatever the limit.
        """
        folder = checkpoint_folder(self.aside, step)
        (folder / _UNREAD).unlink(missing_ok=True)
        (folder / STATE).write_text(json.dumps(state, allow_nan=False), encoding="utf-8")
        files = {}
        for file in sorted(f for f in folder.rglob("*") if f.is_file()):
            files[str(file.relative_to(folder))] = {"bytes": file.stat().st_size, "sha256": _sha256(file)}
            sync(file)
        created_at = datetime.now(UTC)
        record = {
            "step": step,
            "created_at": created_at.isoformat(),
            "metrics": metrics,
            "identity": asdict(self._identity),
            "files": files,
        }
        (folder / RECORD).write_text(json.dumps(record, indent=1), encoding="utf-8")
        for path in (folder / RECORD, folder):
            sync(path)
        place = checkpoint_folder(self._output, step)
        discard(place)
        folder.rename(place)
        sync(self._output)
        self._rotate(step, best)
        return Checkpoint(step, place, _size(place), metrics, created_at)

    def newest(self) -> Restored | None:
        """The newest checkpoint that can be used; those that can't are told of and removed.

        What is left is told to the sink: its own record of them may be a moment older than a kill.
        """
        shutil.rmtree(self.aside, ignore_errors=True)
        usable: list[Checkpoint] = []
        restored = None
        for step, path in reversed(complete_checkpoints(self._output).items()):
            try:
                checkpoint, state = self._read(step, path)
            except _UnusableError as error:
                self._sink.log(Entry(f"The checkpoint of step {step} can't be used: {error}.", "warning"))
                discard(path)
                continue
            usable.append(checkpoint)
            restored = restored or Restored(checkpoint, state)
        for checkpoint in reversed(usable):
            self._sink.checkpoint(checkpoint)
        return restored

    def _read(self, step: int, path: Path) -> tuple[Checkpoint, dict[str, Any]]:
        try:
            record = json.loads((path / RECORD).read_bytes())
            identity = Identity(**record["identity"])
            files = {
                path / name: (found["bytes"], found["sha256"]) for name, found in record["files"].items()
            }
            metrics, created_at = record["metrics"], datetime.fromisoformat(record["created_at"])
            if record["step"] != step:
                raise _UnusableError(f"it is one of step {record['step']}")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise _UnusableError(f"its {RECORD} can't be read") from error
        if identity != self._identity:
            wanted = asdict(self._identity)
            other = [name for name, value in asdict(identity).items() if value != wanted[name]]
            raise _UnusableError(f"it was made with another {', '.join(other).replace('_', ' ')}")
        for file, (size, sha256) in files.items():
            if not file.is_file():
                raise _UnusableError(f"{file.name} is missing")
            if file.stat().st_size != size or _sha256(file) != sha256:
                raise _UnusableError(f"{file.name} is not what was written")
        state = json.loads((path / STATE).read_bytes())
        return Checkpoint(step, path, _size(path), metrics, created_at), state

    def _rotate(self, newest: int, best: int | None) -> None:
        """Remove the oldest ones over the limit, but never the newest or the best."""
        there = complete_checkpoints(self._output)
        protected = {newest, best} & there.keys()
        over = len(there) - max(self._keep, len(protected))
        for step in [s for s in there if s not in protected][: max(over, 0)]:
            discard(there[step])


def read_checkpoint(path: Path) -> Checkpoint:
    """A complete checkpoint of this attempt, as it was told of when it was published."""
    record = json.loads((path / RECORD).read_bytes())
    created_at = datetime.fromisoformat(record["created_at"])
    return Checkpoint(record["step"], path, _size(path), record["metrics"], created_at)


class _UnusableError(Exception):
    """Why a checkpoint can't be gone on from."""


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())

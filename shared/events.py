"""What a running job tells: the sink protocol, its records, and the versions that need no database."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, Protocol

from shared.lifecycle import Phase

Level = Literal["debug", "info", "warning", "error"]
EntryType = Literal["message", "metrics", "phase"]


@dataclass(frozen=True)
class Entry:
    """One log entry before it is given its `seq` by the writer's transaction."""

    message: str
    level: Level = "info"
    type: EntryType = "message"
    data: dict[str, Any] | None = None
    time: datetime = field(default_factory=lambda: datetime.now(UTC))


@dataclass(frozen=True)
class Progress:
    """Where training is.

    `tokens_per_second` counts real tokens (no padding); `eta_seconds` is the time to the last step.
    """

    step: int
    total_steps: int
    epoch: float
    loss: float | None = None
    tokens_per_second: float | None = None
    eta_seconds: float | None = None


@dataclass(frozen=True)
class Artifact:
    """One complete file that a job produced, still in its work folder.

    `kind` is the export string (`gguf:q4_k_m`), `manifest`, `metrics`, `modelfile` or `tensorboard`; `sha256`
    is hex. One that is not `listed` is kept for later exports and handed out to nobody.
    """

    name: str
    kind: str
    path: Path
    bytes: int
    sha256: str
    listed: bool = True


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint folder in the job's work folder."""

    step: int
    path: Path
    bytes: int
    metrics: dict[str, float]
    created_at: datetime = field(default_factory=lambda: datetime.now(UTC))


class EventSink(Protocol):
    """Where the pipeline tells everything. No call blocks on the network or the disk for long."""

    def log(self, entry: Entry) -> None:
        """Append to the job's log."""

    def phase(self, phase: Phase) -> None:
        """The job enters a phase; also a log entry of type `phase`."""

    def metrics(self, row: dict[str, float | int | None]) -> None:
        """One row a step: `step` and any of epoch, loss, learning_rate, grad_norm, tokens_per_second, …"""

    def progress(self, progress: Progress) -> None:
        """Replace the job's progress."""

    def data_report(self, report: dict[str, Any]) -> None:
        """What became of the rows."""

    def checkpoint(self, checkpoint: Checkpoint) -> None:
        """A checkpoint is complete; those whose folders are gone are forgotten."""

    def artifact(self, artifact: Artifact) -> None:
        """A file is complete and to be published now. Blocks until it is in the store.

        The file is the sink's from then on: it may have been moved away when this returns.

        Raises:
            LeaseLost: this attempt may no longer publish.
        """


class Control(Protocol):
    """How the pipeline learns that it should end early."""

    def check(self) -> None:
        """Called at every step and between the parts of each phase.

        Raises:
            JobStopped: when the job was cancelled, is to pause or must be handed back.
        """


class TrainingControl(Control, Protocol):
    """A control that can wait for the end of a training step."""

    def leaving(self) -> bool:
        """Whether the job is to stop with a checkpoint: training then goes on to the end of its step."""


class GoOn:
    """A control that lets a run go to its end, for callers that stop none."""

    def check(self) -> None:
        return

    def leaving(self) -> bool:
        return False


class MemorySink:
    """Keeps everything in lists, for tests and for callers that want no database."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.phases: list[Phase] = []
        self.rows: list[dict[str, float | int | None]] = []
        self.progresses: list[Progress] = []
        self.reports: list[dict[str, Any]] = []
        self.checkpoints: list[Checkpoint] = []
        self.artifacts: list[Artifact] = []

    def log(self, entry: Entry) -> None:
        self.entries.append(entry)

    def phase(self, phase: Phase) -> None:
        self.phases.append(phase)

    def metrics(self, row: dict[str, float | int | None]) -> None:
        self.rows.append(row)

    def progress(self, progress: Progress) -> None:
        self.progresses.append(progress)

    def data_report(self, report: dict[str, Any]) -> None:
        self.reports.append(report)

    def checkpoint(self, checkpoint: Checkpoint) -> None:
        self.checkpoints.append(checkpoint)

    def artifact(self, artifact: Artifact) -> None:
        self.artifacts.append(artifact)


class JsonlSink:
    """Writes one JSON object a call to a file, for runs without a service (a benchmark, a replay)."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8")

    def close(self) -> None:
        self._file.close()

    def log(self, entry: Entry) -> None:
        self._write("log", asdict(entry))

    def phase(self, phase: Phase) -> None:
        self._write("phase", {"phase": phase})

    def metrics(self, row: dict[str, float | int | None]) -> None:
        self._write("metrics", row)

    def progress(self, progress: Progress) -> None:
        self._write("progress", asdict(progress))

    def data_report(self, report: dict[str, Any]) -> None:
        self._write("data_report", report)

    def checkpoint(self, checkpoint: Checkpoint) -> None:
        self._write("checkpoint", asdict(checkpoint))

    def artifact(self, artifact: Artifact) -> None:
        self._write("artifact", asdict(artifact))

    def _write(self, kind: str, record: dict[str, Any]) -> None:
        self._file.write(json.dumps({"event": kind, **record}, default=str, ensure_ascii=False) + "\n")
        self._file.flush()

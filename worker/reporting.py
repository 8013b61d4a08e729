"""Tells experiment trackers what a job tells: W&B, TensorBoard, MLflow, trackio.

Each has a process of its own, fed from a queue by a thread of its own. Whatever happens in there (it is not
installed, has no credentials, its server is away, it hangs), the job goes on and its log has one warning.
"""

from __future__ import annotations

import json
import math
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from shared.errors import JobFailure, JobStopped
from shared.events import Artifact, Checkpoint, Entry, EventSink, GoOn, Progress
from shared.lifecycle import Phase
from shared.spec import JobSpec
from worker.order import Order
from worker.process import ENVIRONMENT, REPORTS
from worker.reporter import BEGUN, Ending, Run
from worker.training.exports.files import tar_artifact

# What each reporter gets of the worker's environment beside what every process gets.
PREFIXES = {
    "wandb": ("WANDB_",),
    "tensorboard": (),
    "mlflow": ("MLFLOW_", "DATABRICKS_"),
    "trackio": ("TRACKIO_", "HF_"),
}
QUIET = {
    "WANDB_SILENT": "true",
    "WANDB_ERROR_REPORTING": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "PYTHONUTF8": "1",
}
# A job that goes on tells all of its steps at once.
ROWS_AHEAD = 100_000
# How long the end of a job waits for what was not sent yet: one that was stopped has to make room soon.
ENDING_SECONDS: dict[Ending, float] = {"succeeded": 20.0, "failed": 5.0, "stopped": 1.0}
# One that has not begun its run in this time is taken to be away, and is hardly waited for.
BEGINNING_SECONDS = 30.0
AWAY_SECONDS = 0.5


def reporter_environment(report_to: tuple[str, ...], environment: Mapping[str, str]) -> dict[str, str]:
    """Those of the worker's variables that the named reporters need. They hold credentials: they travel in
    the order alone, never in the environment of the process that trains."""
    prefixes = tuple(prefix for name in report_to for prefix in PREFIXES[name])
    return {k: v for k, v in environment.items() if prefixes and k.startswith(prefixes)}


@contextmanager
def reporting(order: Order, spec: JobSpec, data: Path, sink: EventSink) -> Iterator[EventSink]:
    """A sink that tells `sink` everything, and the reporters that the job names its metrics.

    What reporters write for this job alone is kept beside the attempt's folder, for the job's next attempt.

    Args:
        data: the box's data folder.
    """
    if not spec.report_to:
        yield sink
        return
    root = Path(order.workdir)
    folder = root.parent / REPORTS
    reporters = []
    for name in spec.report_to:
        run = _run_of(order.job_id, spec, folder / name, data / REPORTS)
        try:
            reporters.append(_Reporter(name, run, root, order.reporting, sink))
        except OSError as error:
            sink.log(Entry(f"Nothing is reported to {name}: {error.strerror}.", level="warning"))
    ending: Ending = "failed"
    try:
        yield ReportingSink(sink, reporters)
        ending = "succeeded"
    except JobStopped:
        ending = "stopped"
        raise
    finally:
        _end_all(reporters, ending)
    if "tensorboard" in spec.report_to:
        _publish_events(folder / "tensorboard", root / "exports", sink)


class ReportingSink:
    """An event sink that also tells reporters the metrics."""

    def __init__(self, sink: EventSink, reporters: list[_Reporter]) -> None:
        self._sink = sink
        self._reporters = reporters
        self._last: dict[str, float | int | None] = {}

    def metrics(self, row: dict[str, float | int | None]) -> None:
        self._sink.metrics(row)
        # A step that is evaluated comes a second time, with more.
        earlier = self._last if self._last.get("step") == row["step"] else {}
        new = {k: v for k, v in row.items() if k != "step" and earlier.get(k) != v}
        self._last = row
        values = {_group(k): float(v) for k, v in new.items() if v is not None and math.isfinite(v)}
        for reporter in self._reporters:
            reporter.tell(values, int(row["step"] or 0))

    def log(self, entry: Entry) -> None:
        self._sink.log(entry)

    def phase(self, phase: Phase) -> None:
        self._sink.phase(phase)

    def progress(self, progress: Progress) -> None:
        self._sink.progress(progress)

    def data_report(self, report: dict[str, Any]) -> None:
        self._sink.data_report(report)

    def checkpoint(self, checkpoint: Checkpoint) -> None:
        self._sink.checkpoint(checkpoint)

    def artifact(self, artifact: Artifact) -> None:
        self._sink.artifact(artifact)


class _Reporter:
    """A queue, the thread that empties it, and the process that the thread tells."""

    def __init__(self, name: str, run: Run, root: Path, given: dict[str, str], sink: EventSink) -> None:
        self._name = name
        self._sink = sink
        self._rows: queue.Queue[str | None] = queue.Queue(ROWS_AHEAD)
        self._warned = threading.Event()
        self._begun = threading.Event()
        self._started_at = time.monotonic()
        kept = {k: v for k, v in os.environ.items() if k in ENVIRONMENT or k.startswith("LC_")}
        own = tuple(PREFIXES[name])
        secrets = {k: v for k, v in given.items() if own and k.startswith(own)}
        reports = Path(run.folder).parent
        reports.mkdir(parents=True, exist_ok=True, mode=0o700)
        with (reports / f"{name}.log").open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "worker.reporter", name],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                text=True,
                env=kept | QUIET | secrets | {"TMPDIR": str(root / "tmp")},
            )
        self._rows.put(json.dumps(asdict(run)))
        self._feeder = threading.Thread(target=self._feed, name=f"reporter-{name}", daemon=True)
        self._feeder.start()
        self._listener = threading.Thread(target=self._listen, name=f"{name}-ends", daemon=True)
        self._listener.start()

    def tell(self, values: dict[str, float], step: int) -> None:
        """Never waits: a row that finds the queue full is left out."""
        if self._process.poll() is not None or not values:
            return
        try:
            self._rows.put_nowait(json.dumps({"values": values, "step": step}))
        except queue.Full:
            self._warn("it does not keep up, and steps are left out")

    def ask_to_end(self, ending: Ending) -> None:
        for line in (json.dumps({"end": ending}), None):
            while True:
                try:
                    self._rows.put_nowait(line)
                    break
                except queue.Full:
                    # Its end comes before a step: without it, it would wait for more, and the feeder too.
                    self._warn("it does not keep up, and steps are left out")
                    with suppress(queue.Empty):
                        self._rows.get_nowait()

    def end(self, seconds: float) -> None:
        """Wait for its end, for so long at most, then end it."""
        late = time.monotonic() - self._started_at > BEGINNING_SECONDS
        if late and not self._begun.is_set():
            seconds = min(seconds, AWAY_SECONDS)
        try:
            self._process.wait(max(seconds, 0))
        except subprocess.TimeoutExpired:
            self._warn("it had not taken everything when the job ended")
            self._process.kill()
        # Both end with the process.
        self._feeder.join()
        self._listener.join()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):
                    pipe.close()

    def _feed(self) -> None:
        stdin = self._process.stdin
        if stdin is None:
            return
        while (line := self._rows.get()) is not None:
            try:
                stdin.write(line + "\n")
                stdin.flush()
            except OSError:
                return  # It has ended: `_listen` says so.

    def _listen(self) -> None:
        stdout, word = self._process.stdout, ""
        for line in stdout or ():
            word = line.strip()
            if word == BEGUN:
                self._begun.set()
                word = ""
        code = self._process.wait()
        if word == "not installed":
            self._warn("it is not installed on this worker (the extra `reporters` has it)")
        elif code != 0:
            self._warn(f"it ended with {word or f'exit code {code}'}; look at its settings on the worker")

    def _warn(self, why: str) -> None:
        if self._warned.is_set():
            return
        self._warned.set()
        message = f"Not everything is reported to {self._name}: {why}. The job goes on."
        self._sink.log(Entry(message, level="warning", data={"reporter": self._name}))


def _publish_events(events: Path, target: Path, sink: EventSink) -> None:
    """`tensorboard.tar`, with the event files of all attempts on this box."""
    if not events.is_dir():
        return
    try:
        target.mkdir(exist_ok=True)
        # A small file at the end of a job, which is not worth doing the job again for: nothing stops it.
        sink.artifact(tar_artifact("tensorboard.tar", "tensorboard", events, target, GoOn()))
    except (OSError, JobFailure) as error:
        sink.log(Entry(f"There is no tensorboard.tar: {type(error).__name__}.", level="warning"))


def _end_all(reporters: list[_Reporter], ending: Ending) -> None:
    deadline = time.monotonic() + ENDING_SECONDS[ending]
    for reporter in reporters:
        reporter.ask_to_end(ending)
    for reporter in reporters:
        reporter.end(deadline - time.monotonic())


def _run_of(job_id: str, spec: JobSpec, folder: Path, shared: Path) -> Run:
    return Run(
        job_id=job_id,
        title=spec.name or job_id,
        config=_flat(spec.to_json()),
        folder=str(folder),
        shared=str(shared),
        wandb=spec.wandb.model_dump(mode="json") if spec.wandb else {},
    )


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{name}.")
        elif value is not None:
            found[prefix + name] = value if isinstance(value, bool | int | float | str) else json.dumps(value)
    return found


def _group(name: str) -> str:
    """`loss` -> `train/loss`, `eval_loss` -> `eval/loss`: how trackers put charts together."""
    return f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}"

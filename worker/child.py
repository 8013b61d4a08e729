"""One attempt of one job, in a process of its own that its supervisor started: `python -m worker.child`.

The order comes as one line of JSON on standard input, which then stays open: `stop` on it asks the job to
end, `leave` to end with a checkpoint, and its end means that the supervisor is gone. Started with an engine's
name as its argument, the process imports that engine's stack at once and has it when the order comes.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from sqlalchemy.exc import OperationalError

from shared.database import Database
from shared.errors import (
    InvalidRequest,
    JobFailure,
    JobStopped,
    LeaseLost,
    NoRoomYet,
    OutOfMemory,
    ProcessLost,
)
from shared.events import Artifact, Control, Entry, EventSink, TrainingControl
from shared.lifecycle import FailureCode, JobStatus
from shared.models import find_model
from shared.plan import EngineName, Plan
from shared.queue import Doorbell
from shared.repository import files, leases, logs
from shared.settings import Settings
from shared.spec import FileDataset, JobSpec
from shared.storage import Store
from shared.vault import Redactor
from worker.caches import COMPILED, PREPARED, use
from worker.checkpoints import FOLDER as CHECKPOINTS
from worker.checkpoints import complete_checkpoints
from worker.copies import copying, fetch_copy, wanted
from worker.export_order import LaterExport, read_export
from worker.lease import ExportLease, JobLease
from worker.order import Order
from worker.reporting import reporting
from worker.reservations import RESERVED, put_off
from worker.secrets import HUB_TOKEN
from worker.sink import DatabaseSink
from worker.training.failures import explain
from worker.training.workdir import Workdir

Pipeline = Callable[[JobSpec, Plan, Workdir, EventSink, TrainingControl], list[Artifact]]
Export = Callable[[LaterExport, Workdir, EventSink, Control], list[Artifact]]

# Hours of training are not lost to a store that is away for minutes.
STORE_PATIENCE_SECONDS = 1800.0
LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Attempt:
    """An order and what it takes to carry it out; the sink keeps the lease alive."""

    order: Order
    settings: Settings
    database: Database
    store: Store
    sink: DatabaseSink


class RedactingFormatter(logging.Formatter):
    """The process's own format, without the owner's secrets, in tracebacks too."""

    def __init__(self, redactor: Redactor) -> None:
        super().__init__(LOG_FORMAT)
        self._redactor = redactor

    def format(self, record: logging.LogRecord) -> str:
        return self._redactor.text(super().format(record))


class ChildControl:
    """Hears the supervisor: the order, then requests, as lines on standard input."""

    def __init__(self) -> None:
        self._stop = threading.Event()
        self._leave = threading.Event()
        self._leave_until = 0.0
        self._attempt: Future[Attempt] = Future()

    def start(self) -> None:
        threading.Thread(target=self._listen, name="control", daemon=True).start()

    def attempt(self) -> Attempt:
        """Waits for the order."""
        return self._attempt.result()

    def check(self) -> None:
        if self._stop.is_set() or self._leave.is_set():
            raise JobStopped

    def leaving(self) -> bool:
        return self._leave.is_set() and not self._stop.is_set()

    def leaves_until(self) -> float:
        """When (monotonic) it waits no longer for a copy, while it is leaving; else 0, which is at once."""
        return self._leave_until if self.leaving() else 0.0

    def _listen(self) -> None:
        first = sys.stdin.readline()
        if first:
            # Here and not on the main thread, which may be importing: the lease wants to be renewed.
            try:
                self._attempt.set_result(_begin(Order(**json.loads(first))))
            except Exception as error:  # noqa: BLE001 - the main thread raises it
                self._attempt.set_exception(error)
        for line in sys.stdin:
            asked, _, seconds = line.strip().partition(" ")
            if asked == "stop":
                self._stop.set()
            elif asked == "leave":
                self._leave_until = time.monotonic() + float(seconds)
                self._leave.set()
        # The supervisor is gone. Without it nobody watches this job: end at once, the lease brings it back.
        end_process_group()


def end_process_group() -> None:
    """End this process and all that it started, at once."""
    os.killpg(os.getpgrp(), signal.SIGKILL)


def train(
    spec: JobSpec, plan: Plan, workdir: Workdir, sink: EventSink, control: TrainingControl
) -> list[Artifact]:
    """The real pipeline. Its stack loads here, seconds after the first heartbeat."""
    from worker.training.pipeline import run

    return run(spec, plan, workdir, sink, control)


def export(later: LaterExport, workdir: Workdir, sink: EventSink, control: Control) -> list[Artifact]:
    """The real exports, of a job that has succeeded."""
    from worker.training.later import export_later

    return export_later(later, workdir, sink, control)


def warm_up(engine: EngineName) -> None:
    """Import what the pipeline will need, before there is a job."""
    from worker.training.stack import import_stack

    import_stack(engine)


def main(pipeline: Pipeline, export: Export, warm_up: Callable[[EngineName], None]) -> None:
    """Run one attempt at a job, or at an export: read the order, renew the lease, end it or give it back."""
    control = ChildControl()
    control.start()
    if len(sys.argv) > 1:
        warm_up(cast("EngineName", sys.argv[1]))
    attempt = control.attempt()
    try:
        _run(pipeline, export, attempt, control)
    except LeaseLost:
        logger.warning("Another attempt has the job: this one ends without a word.")
        end_process_group()
    # At once, for the slot: the interpreter's own way out takes seconds with the training stack loaded, and
    # closes standard input, which the control thread takes for the supervisor's end.
    sys.stderr.flush()
    os._exit(0)


def _begin(order: Order) -> Attempt:
    # A process that was started before there was a job had another folder.
    os.environ["TMPDIR"] = str(Path(order.workdir) / "tmp")
    tempfile.tempdir = None
    if HUB_TOKEN in order.secrets:
        # Other accounts are for the processes of the reporters alone.
        os.environ[HUB_TOKEN] = order.secrets[HUB_TOKEN]
    redactor = Redactor(order.secrets.values())
    for handler in logging.getLogger().handlers:
        handler.setFormatter(RedactingFormatter(redactor))
    settings = Settings(**order.settings)
    database = Database(settings.database())
    store = Store(
        settings.artifacts(),
        order.store_account,
        STORE_PATIENCE_SECONDS,
        lambda: sink.log(Entry("The artifact store does not answer; trying again.", level="warning")),
    )
    sink = DatabaseSink(
        database,
        store,
        Doorbell(settings.redis()),
        ExportLease(order.job_id, order.export_id, order.token)
        if order.export_id
        else JobLease(order.job_id, order.token),
        settings.lease_seconds,
        on_lost=end_process_group,
        redactor=redactor,
    )
    sink.start()
    return Attempt(order, settings, database, store, sink)


def _run(pipeline: Pipeline, export: Export, attempt: Attempt, control: ChildControl) -> None:
    order, settings, sink = attempt.order, attempt.settings, attempt.sink
    try:
        use(settings.root / "cache" / COMPILED)
        if order.hub_cache:
            use(Path(order.hub_cache))
        if order.export_id is not None:
            later = read_export(order, order.export_id, attempt.database, attempt.store)
            workdir = _fetch_inputs(order, settings, attempt.store, later.spec, {})
            export(later, workdir, sink, control)
        else:
            copied = fetch_copy(order, attempt.database, attempt.store, sink, settings.root / "cache")
            spec, plan, keys = _read_job(order, settings, attempt.database)
            workdir = _fetch_inputs(order, settings, attempt.store, spec, keys)
            with (
                copying(order, settings, attempt.store, sink, copied, control.leaves_until),
                reporting(order, spec, settings.root, sink) as told,
            ):
                pipeline(spec, plan, workdir, told, control)
            sink.results(workdir.root)
    except NoRoomYet as error:
        _note_wait(settings.root / "cache" / RESERVED, order, error)
        sink.give_back(error.message)
    except JobStopped:
        sink.give_back("The worker asked it to stop.")
    except ProcessLost as error:
        sink.lose(str(error), settings.max_losses)
    except OperationalError as error:
        logger.warning("The database was away as the job began: %s", error.orig)
        sink.give_back("The database was away as the job began.")
    except LeaseLost:
        raise
    except Exception as error:
        failure = explain(error)
        logger.exception("The job failed")
        if isinstance(failure, OutOfMemory):
            # Whatever the process still holds goes with it: the next attempt has one of its own.
            sink.run_out_of_memory(failure)
            return
        entry = Entry(
            f"Failed: {failure.message} {failure.advice}".strip(),
            level="error",
            data={"code": failure.code, "message": failure.message, "advice": failure.advice},
        )
        sink.finish(JobStatus.FAILED, entry, failure)
    else:
        sink.finish(JobStatus.SUCCEEDED, Entry("Succeeded."))


def _note_wait(reserved: Path, order: Order, error: NoRoomYet) -> None:
    """Before the job is in the queue again, where supervisors of this box find it."""
    try:
        put_off(reserved, order.export_id or order.job_id, error.needs)
    except OSError as failed:
        # Not one byte is left. It will be tried again all the same, only sooner.
        logger.warning("What the job waits for could not be noted: %s", failed)


def _read_job(order: Order, settings: Settings, database: Database) -> tuple[JobSpec, Plan, dict[str, str]]:
    """The spec with the server's cap of samples applied, the plan, and the uploaded files' store keys by the
    spec's field. Checkpoints that this attempt could not take over are forgotten."""
    with database.write() as session:
        job = leases.owned_job(session, order.job_id, order.token)
        spec = JobSpec.from_json(job.spec)
        plan = Plan.model_validate(job.plan)
        there = complete_checkpoints(Path(order.workdir) / CHECKPOINTS)
        if not there and (told := logs.read_checkpoints(session, order.job_id)):
            why = f"The checkpoint of step {told[-1].step} is not on this machine: the job begins anew."
            logs.append_entries(session, order.job_id, [Entry(why, level="warning")], order.token)
        logs.forget_checkpoints(session, order.job_id, list(there))
        keys = {
            name: files.get_dataset(session, dataset.file_id, job.owner).key
            for name in ("dataset", "validation_dataset")
            if isinstance(dataset := getattr(spec, name), FileDataset)
        }
    capped = min(spec.max_samples or settings.max_samples, settings.max_samples)
    return spec.model_copy(update={"max_samples": capped}), plan, keys


def _fetch_inputs(
    order: Order, settings: Settings, store: Store, spec: JobSpec, keys: dict[str, str]
) -> Workdir:
    """What was there when the job was accepted, unless somebody has removed it since.

    Raises:
        JobFailure: `invalid_dataset` or `model_unavailable`.
    """
    root = Path(order.workdir)
    try:
        fetched = {name: store.fetch(key, root / name) for name, key in keys.items()}
    except FileNotFoundError as error:
        raise JobFailure(
            FailureCode.INVALID_DATASET, "The uploaded data file is gone from the store.", "Upload it again."
        ) from error
    try:
        model = find_model(settings, spec.model)
    except InvalidRequest as error:
        raise JobFailure(
            FailureCode.MODEL_UNAVAILABLE, error.message, "GET /models lists the models of this server."
        ) from error
    folder = store.folder()
    return Workdir(
        root=root,
        cache=settings.root / "cache",
        dataset_file=fetched.get("dataset"),
        model_dir=model.path,
        validation_file=fetched.get("validation_dataset"),
        prepared_bytes=settings.data_cache_bytes,
        store=folder and folder / "jobs" / order.job_id,
        copies=wanted(settings, store),
        gpu_memory_fraction=settings.gpu_memory_fraction,
        gpus=tuple(order.gpus),
        data_cache=Path(order.hub_cache) / PREPARED if order.hub_cache else None,
    )


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format=LOG_FORMAT)
    main(train, export, warm_up)

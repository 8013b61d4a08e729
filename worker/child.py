"""One attempt of one job, in a process of its own that its supervisor started: `python -m worker.child`.

The order comes as one line of JSON on standard input, which then stays open: `cancel` or `stop` on it asks
the job to end, and its end means that the supervisor is gone.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from sqlalchemy.exc import OperationalError

from shared.database import Database
from shared.errors import InvalidRequest, JobFailure, JobStopped, LeaseLost
from shared.events import Artifact, Control, Entry, EventSink
from shared.lifecycle import FailureCode, JobStatus
from shared.models import find_model
from shared.plan import Plan
from shared.queue import Doorbell
from shared.repository import files, leases
from shared.settings import Settings
from shared.spec import FileDataset, JobSpec
from shared.storage import Store
from worker.order import Order
from worker.sink import DatabaseSink
from worker.training.failures import explain
from worker.training.workdir import Workdir

Pipeline = Callable[[JobSpec, Plan, Workdir, EventSink, Control], list[Artifact]]

logger = logging.getLogger(__name__)


class ChildControl:
    """Hears the supervisor: lines on standard input."""

    def __init__(self) -> None:
        self._stop = threading.Event()

    def start(self) -> None:
        threading.Thread(target=self._listen, name="control", daemon=True).start()

    def check(self) -> None:
        if self._stop.is_set():
            raise JobStopped

    def _listen(self) -> None:
        for line in sys.stdin:
            if line.strip() == "stop":
                self._stop.set()
        # The supervisor is gone. Without it nobody watches this job: end at once, the lease brings it back.
        end_process_group()


def end_process_group() -> None:
    """End this process and all that it started, at once."""
    os.killpg(os.getpgrp(), signal.SIGKILL)


def train(spec: JobSpec, plan: Plan, workdir: Workdir, sink: EventSink, control: Control) -> list[Artifact]:
    """The real pipeline. Its stack loads here, seconds after the first heartbeat."""
    from worker.training.pipeline import run

    return run(spec, plan, workdir, sink, control)


def main(pipeline: Pipeline) -> None:
    """Run one attempt with this pipeline: read the order, renew the lease, end the job or give it back."""
    order = Order(**json.loads(sys.stdin.readline()))
    settings = Settings(**order.settings)
    database = Database(settings.database())
    store = Store(settings.artifacts())
    doorbell = Doorbell(settings.redis())
    sink = DatabaseSink(
        database,
        store,
        doorbell,
        order.job_id,
        order.token,
        settings.lease_seconds,
        on_lost=end_process_group,
    )
    control = ChildControl()
    sink.start()
    control.start()
    try:
        _attempt(pipeline, order, settings, database, store, sink, control)
    except LeaseLost:
        logger.warning("Another attempt has the job: this one ends without a word.")
        end_process_group()
    # At once, for the slot: the interpreter's own way out takes seconds with the training stack loaded, and
    # closes standard input, which the control thread takes for the supervisor's end.
    sys.stderr.flush()
    os._exit(0)


def _attempt(
    pipeline: Pipeline,
    order: Order,
    settings: Settings,
    database: Database,
    store: Store,
    sink: DatabaseSink,
    control: ChildControl,
) -> None:
    try:
        spec, plan, keys = _read_job(order, settings, database)
        workdir = _fetch_inputs(Path(order.workdir), settings, store, spec, keys)
        pipeline(spec, plan, workdir, sink, control)
    except JobStopped:
        sink.give_back("The worker was stopped.")
    except OperationalError as error:
        logger.warning("The database was away as the job began: %s", error.orig)
        sink.give_back("The database was away as the job began.")
    except LeaseLost:
        raise
    except Exception as error:
        failure = explain(error)
        logger.exception("The job failed")
        entry = Entry(
            f"Failed: {failure.message} {failure.advice}".strip(),
            level="error",
            data={"code": failure.code, "message": failure.message, "advice": failure.advice},
        )
        sink.finish(JobStatus.FAILED, entry, failure)
    else:
        sink.finish(JobStatus.SUCCEEDED, Entry("Succeeded."))


def _read_job(order: Order, settings: Settings, database: Database) -> tuple[JobSpec, Plan, dict[str, str]]:
    """The spec with the server's cap of samples applied, the plan, and the uploaded files' store keys by the
    spec's field."""
    with database.write() as session:
        job = leases.owned_job(session, order.job_id, order.token)
        spec = JobSpec.from_json(job.spec)
        plan = Plan.model_validate(job.plan)
        keys = {
            name: files.get_dataset(session, dataset.file_id, job.owner).key
            for name in ("dataset", "validation_dataset")
            if isinstance(dataset := getattr(spec, name), FileDataset)
        }
    capped = min(spec.max_samples or settings.max_samples, settings.max_samples)
    return spec.model_copy(update={"max_samples": capped}), plan, keys


def _fetch_inputs(
    root: Path, settings: Settings, store: Store, spec: JobSpec, keys: dict[str, str]
) -> Workdir:
    """What was there when the job was accepted, unless somebody has removed it since.

    Raises:
        JobFailure: `invalid_dataset` or `model_unavailable`.
    """
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
    return Workdir(
        root=root,
        cache=settings.root / "cache",
        dataset_file=fetched.get("dataset"),
        model_dir=model.path,
        validation_file=fetched.get("validation_dataset"),
        prepared_bytes=settings.data_cache_bytes,
    )


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    main(train)

"""What the service runs on: GPUs, workers, queue, readiness, metrics."""

from __future__ import annotations

from datetime import timedelta
from importlib.metadata import version

from sqlalchemy.exc import DBAPIError

from api.context import Caller, Context
from api.metrics import BoxFigures, JobFigures, render_figures
from api.schemas import (
    GpuOut,
    ListOut,
    ModelOut,
    QueueOut,
    QuotasOut,
    ReadyOut,
    SlotOut,
    SystemOut,
    WorkerOut,
)
from shared.clock import utcnow
from shared.errors import Unavailable
from shared.lifecycle import LEASED, JobStatus
from shared.models import list_models
from shared.repository import jobs, keys, owners, tallies
from shared.settings import Settings


def models(settings: Settings) -> ListOut[ModelOut]:
    """The models on this machine that jobs may name; other ids are looked for on the hub."""
    found = [
        ModelOut(
            id=model.id,
            source=model.source,
            context_length=model.context_length,
            parameters=model.parameters,
            modules=sorted(model.modules) if model.modules is not None else None,
        )
        for model in list_models(settings)
    ]
    return ListOut(data=found)


def overview(context: Context, caller: Caller) -> SystemOut:
    """GPUs, workers and queue; an owner sees nothing of others' jobs in it."""
    since = utcnow() - timedelta(seconds=context.settings.lease_seconds)
    with context.database.read() as session:
        rows = keys.live_workers(session, since)
        held = jobs.leased_jobs(session, caller.scope)
        counts = jobs.count_by_status(session, caller.scope)
        quotas = owners.quotas(session, context.settings, caller.name)
        lately = owners.used_lately(session, caller.name)
        oldest = jobs.oldest_queued(session, caller.scope)
    workers = [
        WorkerOut(
            id=row.id,
            hostname=row.hostname,
            slots=[SlotOut(**slot) for slot in row.slots],
            jobs=[job_id for worker, job_id in held if worker == row.id],
            started_at=row.started_at,
            seen_at=row.seen_at,
        )
        for row in rows
    ]
    gpus = [
        GpuOut(worker=worker.id, **slot.model_dump())
        for worker in workers
        for slot in worker.slots
        if slot.kind == "cuda"
    ]
    queue = QueueOut(
        queued=counts.get(JobStatus.QUEUED, 0),
        running=sum(counts.get(status, 0) for status in LEASED),
        oldest_queued_at=oldest,
    )
    return SystemOut(
        version=version("tuneyard"),
        gpus=gpus,
        workers=workers,
        queue=queue,
        quotas=QuotasOut.model_validate(
            {name: {"used": quota.used, "limit": quota.limit} for name, quota in quotas.items()}
        ),
        gpu_seconds_lately=round(lately, 1),
        redis=context.doorbell.ping(),
        free_bytes=context.store.free_bytes(),
    )


def readiness(context: Context) -> ReadyOut:
    """Whether jobs can be taken: the database answers and the store can be written.

    Raises:
        Unavailable: names what is down.
    """
    try:
        with context.database.read() as session:
            jobs.oldest_queued(session, "")
        database = True
    except DBAPIError:
        database = False
    store = context.store.is_writable()
    if not (database and store):
        down = " and ".join(name for name, up in (("database", database), ("store", store)) if not up)
        raise Unavailable(f"Not ready: the {down} can't be used.", code="not_ready")
    return ReadyOut(status="ready", database=database, store=store, redis=context.doorbell.ping())


def prometheus(context: Context, caller: Caller) -> bytes:
    """Prometheus metrics: an owner's are of its jobs, an admin's of the whole service."""
    now = utcnow()
    with context.database.read() as session:
        oldest = jobs.oldest_queued(session, caller.scope)
        names = (tallies.FAILURES, tallies.WAITING, tallies.RUNNING)
        failures, waiting, running = tallies.read(session, caller.scope, names).values()
        figures = JobFigures(
            by_status=dict.fromkeys(JobStatus, 0) | jobs.count_by_status(session, caller.scope),
            oldest_queued_seconds=(now - oldest).total_seconds() if oldest else 0,
            tokens_per_second=jobs.tokens_per_second(session, caller.scope),
            failures=failures,
            waiting=waiting,
            running=running,
        )
        since = now - timedelta(seconds=context.settings.lease_seconds)
        workers = keys.live_workers(session, since)
    if not caller.admin:
        return render_figures(figures, None)
    boxes = BoxFigures(context.doorbell.depth(), context.hub.followers, workers)
    return context.metrics.render() + render_figures(figures, boxes)

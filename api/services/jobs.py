"""Jobs: accept, find, pause, resume, cancel, delete, estimate."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from api.context import Caller
from api.errors import read_body
from api.schemas import CheckpointOut, EstimateOut, JobOut, ListOut
from shared.clock import utcnow
from shared.database import Database, Session
from shared.device import Device, boxes_of
from shared.errors import InvalidRequest, MalformedRequest, NotFound, StateConflict
from shared.estimate import estimate
from shared.events import Entry
from shared.feasible import check_runnable
from shared.hub import HubConfigs
from shared.ids import new_job_id
from shared.lifecycle import JobStatus
from shared.models import ModelInfo, find_model
from shared.plan import Plan
from shared.planner import alternatives, make_plan
from shared.policy import check_spec
from shared.queue import Doorbell
from shared.repository import exports, files, jobs, keys, logs, owners
from shared.repository.jobs import Page
from shared.settings import Settings
from shared.spec import CONTROL_CHARACTERS, MAX_METADATA, FileDataset, JobSpec
from shared.storage import Store, StoreUnavailable
from shared.tables import DatasetRow, Job

METADATA_FILTER = re.compile(r"metadata\[(.{1,64})\]", re.DOTALL)


@dataclass(frozen=True)
class Filters:
    """Which jobs to list; None and empty for all."""

    status: JobStatus | None
    model: str | None
    metadata: Mapping[str, str]
    without_metadata: bool = False


def parse_spec(body: bytes) -> JobSpec:
    """The spec in a request's body, strictly read.

    Raises:
        MalformedRequest: the body is not JSON, or names a key twice.
        InvalidRequest: names the first field that is wrong, and tells of the others.
    """
    # What this parser can't take, the spec's own refuses with its place.
    with suppress(ValueError, RecursionError):
        load_json(body)
    return read_body(JobSpec, body)


def digest_of(body: bytes) -> str:
    """Tells whether two bodies say the same, however they are written; what is no JSON is taken as it is."""
    with suppress(ValueError, RecursionError, MalformedRequest):
        body = json.dumps(load_json(body), sort_keys=True, separators=(",", ":")).encode()
    return hashlib.sha256(body).hexdigest()


def load_json(body: bytes) -> Any:
    """The document in a body.

    Raises:
        MalformedRequest: it names a key twice.
        ValueError, RecursionError: it is no JSON, or nested too deep.
    """
    return json.loads(body.decode(), object_pairs_hook=_distinct)


def parse_filters(status: JobStatus | None, query: Mapping[str, str]) -> Filters:
    """Filters from the query: `model=…`, and any number of `metadata[key]=value` or `metadata=null`.

    Raises:
        InvalidRequest: a parameter that can't match anything.
    """
    metadata, without = {}, False
    for name, value in query.items():
        if CONTROL_CHARACTERS.search(name) or CONTROL_CHARACTERS.search(value):
            raise InvalidRequest("Query parameters hold no control characters.", param=name[:64].strip("\0"))
        if name == "metadata" and value == "null":
            without = True
        elif name.startswith("metadata"):
            found = METADATA_FILTER.fullmatch(name)
            if found is None:
                raise InvalidRequest("Filter by metadata as in `metadata[team]=search`.", param="metadata")
            metadata[found.group(1)] = value
    if len(metadata) > MAX_METADATA:
        raise InvalidRequest(
            f"Filter by at most {MAX_METADATA} keys of the metadata: a job has no more.", param="metadata"
        )
    if metadata and without:
        raise InvalidRequest("A job without metadata has no key of it.", param="metadata")
    return Filters(status, query.get("model"), metadata, without)


def create(
    database: Database,
    doorbell: Doorbell,
    settings: Settings,
    configs: HubConfigs,
    caller: Caller,
    body: bytes,
    idempotency_key: str | None,
    parse: Callable[[bytes], JobSpec] = parse_spec,
) -> JobOut:
    """Queue a job, or give again the one that this idempotency key made.

    Args:
        parse: what reads the spec from the body.

    Raises:
        MalformedRequest: the body is not JSON.
        InvalidRequest: the job is known to be impossible or not allowed here.
        StateConflict: the idempotency key made another job from another body.
        QuotaExceeded: the owner has used up a quota.
    """
    digest = digest_of(body)
    if idempotency_key is not None:
        # Before the body is judged, for what is allowed here may have changed since the job was made.
        with database.read() as session:
            earlier = _made_before(session, caller, idempotency_key, digest)
            if earlier is not None:
                return _job_out(session, earlier)
    spec = parse(body)
    model = _find_model(settings, configs, spec)
    check_spec(spec, settings, model, high=caller.high)
    with database.read() as session:
        boxes = _boxes(session, settings)
        dataset = _usable_datasets(session, caller, spec)
    check_runnable(spec, model, boxes)
    expected = _estimate(spec, model, dataset, boxes, with_others=False)["seconds"]
    with database.write() as session:
        _usable_datasets(session, caller, spec)
        owners.lock_owner(session, caller.name)
        if idempotency_key is not None:
            earlier = _made_before(session, caller, idempotency_key, digest)
            if earlier is not None:
                return _job_out(session, earlier)
        quotas = owners.quotas(session, settings, caller.name)
        quotas["queued_jobs"].check(1)
        quotas["gpu_hours"].check()
        quotas["stored_bytes"].check()
        job = Job(
            id=new_job_id(),
            owner=caller.name,
            status=JobStatus.QUEUED,
            model=spec.model,
            model_shape=model.shape.to_json() if model.shape else None,
            priority=jobs.PRIORITIES[spec.priority],
            expected_seconds=expected,
            spec=spec.to_json(),
            user_metadata=spec.metadata,
        )
        jobs.add_job(session, job, Entry("Accepted. Waiting for a worker."))
        if idempotency_key is not None:
            jobs.put_idempotent(session, caller.name, idempotency_key, digest, job.id)
        created = JobOut.of(job, [], [])
    # After the commit: a supervisor that comes at once must find the job.
    doorbell.ring(job.id)
    return created


def estimate_job(
    database: Database, settings: Settings, configs: HubConfigs, caller: Caller, body: bytes
) -> EstimateOut:
    """What the job would take on the best of the workers that are on line; nothing is stored.

    Raises:
        MalformedRequest: the body is not JSON.
        InvalidRequest: the job is known to be impossible or not allowed here.
    """
    spec = parse_spec(body)
    model = _find_model(settings, configs, spec)
    check_spec(spec, settings, model, high=caller.high)
    with database.read() as session:
        dataset = _usable_datasets(session, caller, spec)
        boxes = _boxes(session, settings)
    check_runnable(spec, model, boxes)
    return EstimateOut.model_validate(_estimate(spec, model, dataset, boxes, with_others=True))


def list_page(database: Database, caller: Caller, page: Page, filters: Filters) -> ListOut[JobOut]:
    """One page of the jobs that the caller may see, newest first.

    Raises:
        InvalidRequest: `after` names no job that the caller may see.
    """
    with database.read() as session:
        rows, more = jobs.list_jobs(
            session,
            caller.scope,
            page,
            status=filters.status,
            model=filters.model,
            metadata=filters.metadata,
            without_metadata=filters.without_metadata,
        )
        ids = [row.id for row in rows]
        artifacts, later = files.artifacts_of(session, ids), exports.exports_of(session, ids)
    data = [JobOut.of(row, artifacts[row.id], later[row.id]) for row in rows]
    return ListOut(data=data, has_more=more, next=data[-1].id if more else None)


def get(database: Database, caller: Caller, job_id: str) -> JobOut:
    """
    Raises:
        NotFound: absent or somebody else's.
    """
    with database.read() as session:
        return _job_out(session, jobs.get_job(session, job_id, caller.scope))


def cancel(database: Database, doorbell: Doorbell, caller: Caller, job_id: str) -> JobOut:
    """Cancel a job, or ask its worker to; once more changes nothing.

    Raises:
        NotFound: absent or somebody else's.
        StateConflict: the job failed before, or succeeded and makes no exports.
    """
    with database.write() as session:
        answer = _job_out(session, jobs.request_cancel(session, job_id, caller.scope))
    doorbell.ring(job_id)
    doorbell.tell(job_id)
    return answer


def pause(database: Database, doorbell: Doorbell, caller: Caller, job_id: str) -> JobOut:
    """Pause a job, or ask its worker to; once more changes nothing.

    Raises:
        NotFound: absent or somebody else's.
        StateConflict: the job has ended or is being cancelled.
    """
    with database.write() as session:
        answer = _job_out(session, jobs.request_pause(session, job_id, caller.scope))
    doorbell.ring(job_id)
    doorbell.tell(job_id)
    return answer


def resume(database: Database, doorbell: Doorbell, settings: Settings, caller: Caller, job_id: str) -> JobOut:
    """Put a paused job back into the queue; once more changes nothing.

    Raises:
        NotFound: absent or somebody else's.
        QuotaExceeded: the owner has as many queued jobs as it may.
        StateConflict: the job has ended, is being cancelled, or is not paused yet.
    """
    with database.write() as session:
        job = jobs.lock_job(session, job_id, caller.scope)
        if job.status == JobStatus.PAUSED:
            # Pausing is no way around the quota.
            owners.lock_owner(session, job.owner)
            owners.quotas(session, settings, job.owner)["queued_jobs"].check(1)
        job = jobs.request_resume(session, job_id, caller.scope)
        answer = _job_out(session, job)
    doorbell.ring(job_id)
    doorbell.tell(job_id)
    return answer


def delete(database: Database, store: Store, caller: Caller, job_id: str) -> None:
    """Delete a finished job: its rows, then its files.

    Raises:
        NotFound: absent or somebody else's.
        StateConflict: the job has not ended.
    """
    with database.write() as session:
        jobs.delete_job(session, job_id, caller.scope)
    with suppress(StoreUnavailable):  # `tuneyard gc` removes what no row names.
        store.delete_tree(f"jobs/{job_id}")


def list_checkpoints(database: Database, caller: Caller, job_id: str) -> ListOut[CheckpointOut]:
    """
    Raises:
        NotFound: absent or somebody else's.
    """
    with database.read() as session:
        logs.log_state(session, job_id, caller.scope)
        rows = logs.read_checkpoints(session, job_id)
    return ListOut(data=[CheckpointOut.of(row) for row in rows])


def _find_model(settings: Settings, configs: HubConfigs, spec: JobSpec) -> ModelInfo:
    """The model, with its shape where it can be had. Not in a database session: the hub may be asked."""
    model = find_model(settings, spec.model)
    if model.source == "hub" and model.shape is None:
        shape = configs.shape(spec.model, spec.model_revision)
        return model.shaped(shape) if shape else model
    return model


def _estimate(
    spec: JobSpec,
    model: ModelInfo,
    dataset: DatasetRow | None,
    boxes: list[list[Device]],
    *,
    with_others: bool,
) -> dict[str, Any]:
    """What the job will take on the best of these boxes, with the plans that lost if they are wanted."""
    report = dataset.report if dataset else None
    planned = [(plan, box) for box in boxes if (plan := make_plan(spec, model.shape, box))]
    if not planned:
        return estimate(spec, model, report, None, [])
    plan, box = max(planned, key=_preference)
    others = alternatives(spec, model.shape, box) if with_others else []
    return estimate(spec, model, report, plan, others)


def _preference(planned: tuple[Plan, list[Device]]) -> tuple[bool, float, int]:
    """The fastest of a GPU; where no speed is predicted, the one with the most memory."""
    plan, box = planned
    speed, largest = plan.tokens_per_second, max(device.memory_bytes for device in box)
    return plan.device == "cuda", speed or 0, largest if speed is None else 0


def _boxes(session: Session, settings: Settings) -> list[list[Device]]:
    """The devices of each worker on line."""
    since = utcnow() - timedelta(seconds=settings.lease_seconds)
    return boxes_of(keys.live_workers(session, since))


def _job_out(session: Session, job: Job) -> JobOut:
    later = exports.exports_of(session, [job.id])[job.id]
    return JobOut.of(job, files.list_artifacts(session, job.id), later)


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            # Readers differ in which of the two counts.
            raise MalformedRequest(f"The body is not valid JSON: it has the key {key[:100]!r} twice.")
        found[key] = value
    return found


def _made_before(session: Session, caller: Caller, key: str, digest: str) -> Job | None:
    earlier = jobs.find_idempotent(session, caller.name, key)
    if earlier is None:
        return None
    if earlier.body_hash != digest:
        raise StateConflict(
            "This Idempotency-Key was used with another body in the last 24 hours: use a new key.",
            param="Idempotency-Key",
            code="idempotency_conflict",
        )
    return jobs.get_job(session, earlier.job_id, caller.name)


def _usable_datasets(session: Session, caller: Caller, spec: JobSpec) -> DatasetRow | None:
    """Both uploaded files that a spec may name; returns the one to train on."""
    found = None
    if isinstance(spec.dataset, FileDataset):
        found = _usable_dataset(session, caller, spec.dataset, "dataset.file_id")
    if isinstance(spec.validation_dataset, FileDataset):
        _usable_dataset(session, caller, spec.validation_dataset, "validation_dataset.file_id")
    return found


def _usable_dataset(session: Session, caller: Caller, dataset: FileDataset, param: str) -> DatasetRow:
    """The uploaded file that a spec names, if it can be trained on as far as is known.

    Locked in a transaction that writes, so that it can't be deleted before the job is there.
    """
    try:
        row = files.get_dataset(session, dataset.file_id, caller.name, lock=True)
    except NotFound as error:
        raise InvalidRequest(
            f"There is no file {dataset.file_id} of yours to train on: upload it first, with POST /datasets "
            "or with POST /v1/files and the purpose fine-tune.",
            param=param,
            code="dataset_not_found",
        ) from error
    if row.status == "error":
        raise InvalidRequest(
            f"The dataset {row.id} can't be used: {row.error}",
            param=param,
            code="dataset_unusable",
        )
    return row

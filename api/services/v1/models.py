"""Models in OpenAI's shape: the base models of this server, and what the caller's jobs have made."""

from __future__ import annotations

import re

from pydantic import TypeAdapter, ValidationError

from api.context import Caller, Context
from api.schemas_v1 import ListV1, ModelDeletedV1, ModelV1, seconds
from shared.database import Session
from shared.errors import Forbidden, InvalidRequest, NotFound
from shared.lifecycle import JobStatus
from shared.model_names import TunedModel, parse_tuned_model, tuned_model
from shared.models import find_model, list_models
from shared.repository import files, jobs, logs
from shared.repository.files import Made
from shared.settings import Settings
from shared.spec import DEFAULT_MODEL, RepositoryId
from shared.tables import Job

OWNER = "tuneyard"
HUB_ID: TypeAdapter[str] = TypeAdapter(RepositoryId)
WILDCARDS = re.compile(r"[*?\[]")


def list_all(context: Context, caller: Caller) -> ListV1[ModelV1]:
    """What can be fine-tuned, and what the caller has fine-tuned and not deleted, the newest first.

    All of it, for OpenAI's clients know no pages of this list.
    """
    with context.database.read() as session:
        tuned = [_tuned(made) for made in files.made_models(session, caller.scope)]
    return ListV1.of([*(_base(name) for name in _base_models(context.settings)), *tuned])


def get(context: Context, caller: Caller, name: str) -> ModelV1:
    """A model by its name; a hub's id need not be in the list to be usable.

    Raises:
        NotFound: no such model, or somebody else's.
    """
    parsed = parse_tuned_model(name)
    if parsed is None:
        return _find_base(context.settings, name)
    with context.database.read() as session:
        job = _job_of(session, caller, name, parsed)
        if parsed.step is None:
            moment = job.finished_at or job.created_at
            return _tuned(Made(job.model, job.owner, job.spec["name"], job.id, moment))
        made = {row.step: row.created_at for row in logs.read_checkpoints(session, job.id)}
    if parsed.step not in made:
        raise _absent(name)
    return ModelV1(id=name, created=seconds(made[parsed.step]), owned_by=job.owner)


def delete(context: Context, caller: Caller, name: str) -> ModelDeletedV1:
    """Delete the files that a job has made of its model; the job, its log and its metrics stay.

    Raises:
        NotFound: no such model, or somebody else's.
        Forbidden: a base model, or a checkpoint, which goes with its job.
    """
    parsed = parse_tuned_model(name)
    if parsed is None or parsed.step is not None:
        get(context, caller, name)
        what = "A base model" if parsed is None else "A checkpoint"
        raise Forbidden(f"{what} can't be deleted here: only what a job has made can.", param="model")
    with context.database.write() as session:
        job = _job_of(session, caller, name, parsed)
        keys = files.forget_model(session, job.id)
    for key in keys:
        context.store.delete(key)
    return ModelDeletedV1(id=name)


def _base_models(settings: Settings) -> list[str]:
    """Those on this machine, those that the operator's list names in full, and the default."""
    named = [name.strip() for name in settings.model_allow.split(",") if not WILDCARDS.search(name)]
    found = [model.id for model in list_models(settings)]
    found += [name for name in (DEFAULT_MODEL, *named) if name and settings.model_allowed(name)]
    return list(dict.fromkeys(found))


def _base(name: str) -> ModelV1:
    return ModelV1(id=name, created=0, owned_by=name.partition("/")[0] if "/" in name else OWNER)


def _find_base(settings: Settings, name: str) -> ModelV1:
    if name in _base_models(settings):
        return _base(name)
    try:
        find_model(settings, name)
    except InvalidRequest as error:
        raise _absent(name) from error
    try:
        HUB_ID.validate_python(name)
    except ValidationError:
        raise _absent(name) from None
    if "/" not in name:
        # Ids of the hub without an owner are old and few; a client that asks for `gpt-4o` wants to be told.
        raise _absent(name)
    return _base(name)


def _job_of(session: Session, caller: Caller, name: str, parsed: TunedModel) -> Job:
    try:
        job = jobs.get_job(session, parsed.job_id, caller.scope)
    except NotFound as error:
        raise _absent(name) from error
    whole = tuned_model(job.model, job.owner, job.spec["name"], job.id, parsed.step)
    there = parsed.step is not None or (
        job.status == JobStatus.SUCCEEDED and files.has_model(session, job.id)
    )
    if whole != name or not there:
        raise _absent(name)
    return job


def _tuned(made: Made) -> ModelV1:
    name = tuned_model(made.model, made.owner, made.job_name, made.job_id)
    return ModelV1(id=name, created=seconds(made.moment), owned_by=made.owner)


def _absent(name: str) -> NotFound:
    return NotFound(f"The model {name[:200]!r} does not exist.", param="model", code="model_not_found")

"""Which GGUF a model's name stands for, and asking the inference process for its answer."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from api.context import Caller
from shared.database import Database
from shared.errors import InvalidRequest, NotFound, RateLimited, TuneyardError, Unavailable
from shared.exports import artifact_name
from shared.ids import JOB_ID
from shared.inference import Event, Failed, Generation, Started, from_line
from shared.lifecycle import TERMINAL
from shared.model_names import parse_tuned_model, tuned_model
from shared.repository import files, jobs
from shared.spec import JobSpec
from shared.tables import Job

# The smallest first: they answer the soonest.
FORMATS = ("gguf:q4_k_m", "gguf:q5_k_m", "gguf:q8_0", "gguf:f16")
MAX_LINE = 1 << 20
# When to ask a busy server again.
RETRY_SECONDS = 2
# The inference process bounds an answer's time itself.
SLACK_SECONDS = 15.0


@dataclass(frozen=True)
class Servable:
    """A model that can answer: the name it was asked by, its file, and how it was trained to be asked."""

    name: str
    key: str
    size: int
    own_calls: bool


def find_servable(database: Database, caller: Caller, name: str) -> Servable:
    """The model of this name: `ft:…`, `…:ckpt-step-N`, or a job's id.

    Raises:
        NotFound: there is none, or it is somebody else's.
        InvalidRequest: it has no GGUF.
    """
    tuned = parse_tuned_model(name)
    job_id = tuned.job_id if tuned else name
    step = tuned.step if tuned else None
    with database.read() as session:
        try:
            job = jobs.get_job(session, job_id if JOB_ID.fullmatch(job_id) else "", caller.scope)
        except NotFound:
            raise _no_model(name) from None
        if tuned and name != tuned_model(job.model, job.owner, job.spec["name"], job.id, step):
            raise _no_model(name)
        rows = {row.name: row for row in files.list_artifacts(session, job.id)}
    found = next((rows[n] for n in (artifact_name(f, step) for f in FORMATS) if n in rows), None)
    if found is None:
        raise _no_gguf(job, step)
    spec = JobSpec.model_validate(job.spec, strict=False)
    own_calls = spec.chat_template == "model" and spec.tool_call_style == "template"
    return Servable(name, found.key, found.bytes, own_calls)


def _no_model(name: str) -> NotFound:
    return NotFound(
        f"There is no fine-tuned model {name[:200]!r} of yours. A job's fine_tuned_model is its name; base "
        "models don't answer here.",
        param="model",
        code="model_not_found",
    )


def _no_gguf(job: Job, step: int | None) -> InvalidRequest:
    if step is None and job.status not in TERMINAL:
        what = f"The job is {job.status}: its model answers once a GGUF was exported."
    else:
        which = f"the checkpoint of step {step}" if step is not None else "this job"
        checkpoint = f', "checkpoint": {step}' if step is not None else ""
        option = f" --checkpoint {step}" if step is not None else ""
        what = (
            f"There is no GGUF of {which} to answer from. Export one first: POST /jobs/{job.id}/exports "
            f'{{"format": "gguf:q4_k_m"{checkpoint}}}, or `tuneyard export {job.id} gguf:q4_k_m{option}`.'
        )
    return InvalidRequest(what, param="model", code="no_gguf")


class Answering:
    """An answer under way. Whoever has it closes it, which gives the rest up."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, param: str, patience: float
    ) -> None:
        """`patience`: seconds after which an event that does not come will not come."""
        self._reader = reader
        self._patience = patience
        self._writer = writer
        self._param = param

    @classmethod
    async def begin(cls, socket: Path, asked: Generation, param: str) -> tuple[Self, Started]:
        """Ask, and wait until the model has taken the prompt.

        Args:
            param: the field that holds the prompt, for errors.

        Raises:
            TuneyardError: why there will be no answer.
        """
        try:
            reader, writer = await asyncio.open_unix_connection(socket, limit=MAX_LINE)
        except OSError:
            raise Unavailable(
                "The process that answers from models doesn't run on this server. Its operator starts it "
                "with `tuneyard serve`, or `tuneyard inference` beside the API.",
                code="inference_unavailable",
            ) from None
        answering = cls(reader, writer, param, asked.seconds + SLACK_SECONDS)
        try:
            writer.write(asked.to_line())
            await writer.drain()
            first = await answering.next()
        except BaseException:
            answering.close()
            raise
        if not isinstance(first, Started):
            answering.close()
            raise TuneyardError("The inference process answered out of turn.")
        return answering, first

    async def next(self) -> Event:
        """The next event.

        Raises:
            TuneyardError: why there is none.
        """
        try:
            async with asyncio.timeout(self._patience):
                line = await self._reader.readline()
        except (ConnectionError, TimeoutError):
            line = b""
        event = from_line(line) if line.endswith(b"\n") else Failed("away", "The inference process ended.")
        if isinstance(event, Failed):
            raise self._error(event)
        return event

    def close(self) -> None:
        self._writer.close()

    def _error(self, failed: Failed) -> TuneyardError:
        if failed.kind == "busy":
            return RateLimited(failed.message, {"retry-after": str(RETRY_SECONDS)})
        if failed.kind == "too_long":
            return InvalidRequest(failed.message, param=self._param, code="context_length_exceeded")
        if failed.kind == "unusable":
            return InvalidRequest(failed.message, param="model", code="model_unusable")
        return Unavailable(f"{failed.message} Try again.", code="inference_failed")

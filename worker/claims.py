"""Which of the waiting jobs this box takes next, and onto which of its free slots."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from itertools import islice
from typing import Self

from pydantic import ValidationError

from shared.clock import utcnow
from shared.cost import GIB
from shared.database import Database
from shared.device import Device, boxes_of
from shared.errors import InvalidRequest, Unavailable
from shared.events import Entry
from shared.fairness import LEAST_CHARGE_SECONDS
from shared.feasible import check_runnable
from shared.ids import new_token
from shared.lifecycle import FailureCode
from shared.models import ModelInfo
from shared.plan import Plan
from shared.planner import candidates, cheaper_plan, groups, least_memory, make_plan
from shared.repository import keys, leases, logs, queue
from shared.savings import memory_advice
from shared.settings import Settings
from shared.shape import ModelShape
from shared.spec import JobSpec
from shared.tables import Job
from worker.gpus import measure_free
from worker.reservations import RESERVED, still_put_off

# Jobs looked at in one go, of all owners and of one; more than this many that fit nowhere hold up those
# behind them.
LOOK_AT = 500
LOOK_AT_EACH = 100
# Jobs of one owner that are read at a time: mostly the first one is taken.
READ = 10

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Match:
    """A job's place: these slots, under this plan."""

    devices: tuple[Device, ...]
    plan: Plan


@dataclass(frozen=True)
class Wanted:
    """What a waiting job asks for, and the shape of its model where that is known.

    `too_large` are the plans under which it has run out of memory: the next one takes less.
    """

    spec: JobSpec
    shape: ModelShape | None
    too_large: tuple[Plan, ...] = ()

    @classmethod
    def of(cls, job: Job) -> Self:
        """
        Raises:
            ValidationError: this version does not understand the spec.
        """
        return cls(
            JobSpec.from_json(job.spec),
            ModelShape.from_json(job.model_shape) if job.model_shape else None,
            tuple(Plan.model_validate(plan) for plan in leases.plans_too_large(job)),
        )

    def plan(self, devices: Sequence[Device]) -> Plan | None:
        if self.too_large:
            return cheaper_plan(self.spec, self.shape, devices, self.too_large)
        return make_plan(self.spec, self.shape, devices)

    def exhausted(self, devices: Sequence[Device]) -> bool:
        """Whether it has run out of memory and these devices have nothing cheaper, however much is free."""
        empty = [replace(device, memory_bytes=0) for device in devices]
        return bool(self.too_large) and find_match(self, empty) is None

    def need(self, devices: Sequence[Device]) -> str:
        """The least memory that has to be free on one of these devices, or on each of them, for the log."""
        least = least_memory(self.spec, self.shape, devices, self.too_large)
        if least is None:
            return "How much the job needs is not known, for its model's config is not."
        each = " on each GPU" if self.spec.gpus > 1 else ""
        return f"The job needs {least / GIB:.1f} GiB{each} at the least, the margin that plans keep in it."


@dataclass
class Waiting:
    """For how long a job has found no place here, in seconds, added up from look to look.

    When (monotonic) it was `seen` in this one and `before`; None where this box's own jobs had its GPUs.
    """

    seconds: float = 0.0
    seen: float | None = None
    before: float | None = None

    def look_again(self) -> None:
        self.before, self.seen = self.seen, None

    def see(self) -> None:
        """It finds no place, and none of this box's own jobs is in its way."""
        self.seen = time.monotonic()
        self.seconds += 0 if self.before is None else self.seen - self.before


class Claims:
    """Claims jobs in the queue's order (shared/fairness.py) for the slots that they fit.

    A GPU counts with the memory that is free on it now, whoever has the rest. A job that fits none of this
    box's slots is left to other workers, one whose GPU somebody outside uses waits, and so does one that was
    put off until there is room on this box's disk; none holds up those behind it. A job that asks for several
    GPUs, and has to wait for jobs of this box alone, keeps the free ones that it fits for itself.
    """

    def __init__(self, settings: Settings, database: Database, worker: str, slots: Sequence[Device]) -> None:
        self._settings = settings
        self._database = database
        self._worker = worker
        self._slots = slots
        # The jobs that found no place here and were told so.
        self._waits: dict[str, Waiting] = {}
        self._reserved = settings.root / "cache" / RESERVED
        self._put_off: set[str] = set()

    def fill(self, free: Sequence[Device]) -> Iterator[tuple[Job, tuple[Device, ...]]]:
        """Claim what the free slots can take; each job comes under its lease, with its plan."""
        self._look_again()
        left = {slot.index: slot for slot in free}
        if not left:
            return
        with self._database.read() as session:
            fair = queue.offer(session, self._settings, self._read_line)
            queued = queue.still_queued(session, list(self._waits)) if self._waits else set()
        self._waits = {job_id: waiting for job_id, waiting in self._waits.items() if job_id in queued}
        if fair.is_empty:
            return
        self._put_off = still_put_off(self._reserved)
        try:
            measured = {device.index: device for device in measure_free(free)}
        except Unavailable as error:
            logger.warning("Nothing is claimed: %s", error)
            return
        for job in islice(fair, LOOK_AT):
            try:
                wanted = Wanted.of(job)
            except ValidationError as error:
                self._refuse_unreadable(job, error)
                continue
            match = find_match(wanted, [measured[index] for index in left])
            if match is None:
                if self._waits_for_own_jobs(wanted, left, measured):
                    for index in _kept(wanted, left, measured):
                        del left[index]
                else:
                    self._wait(job, wanted, left, measured)
                if not left:
                    return
                continue
            claimed = self._claim(job.id, match.plan)
            if claimed is not None:
                fair.take(wanted.spec.gpus * LEAST_CHARGE_SECONDS)
                yield claimed, tuple(left.pop(device.index) for device in match.devices)
                if not left:
                    return

    def _look_again(self) -> None:
        for waiting in self._waits.values():
            waiting.look_again()

    def first(self, limit: int) -> list[Job]:
        """The waiting jobs that are next, claimed or not."""
        self._put_off = still_put_off(self._reserved)
        with self._database.read() as session:
            fair = queue.offer(session, self._settings, self._read_line)
        return list(islice(fair, limit))

    def _read_line(self, priority: int, owner: str) -> Iterator[Job]:
        """The first of an owner's queued jobs of one priority."""
        last = None
        for _ in range(LOOK_AT_EACH // READ):
            with self._database.read() as session:
                jobs = queue.read_line(session, priority, owner, last, READ)
            yield from (job for job in jobs if job.id not in self._put_off)
            if len(jobs) < READ:
                return
            last = jobs[-1]

    def _waits_for_own_jobs(
        self, wanted: Wanted, left: Collection[int], measured: Mapping[int, Device]
    ) -> bool:
        """Whether the job could run here once more of this box's own jobs have ended, whoever uses the GPUs
        outside: it is a queue like any other."""
        then = [measured[slot.index] if slot.index in left else slot for slot in self._slots]
        return len(left) < len(self._slots) and find_match(wanted, then) is not None

    def _claim(self, job_id: str, plan: Plan) -> Job | None:
        expires_at = utcnow() + timedelta(seconds=self._settings.lease_seconds)
        with self._database.write() as session:
            job = leases.claim(session, job_id, self._worker, new_token(), expires_at)
            if job is not None:
                if leases.plans_too_large(job):
                    entry = Entry(f"Trying with less memory: {plan.reason}", data={"plan": plan.model_dump()})
                    logs.append_entries(session, job.id, [entry])
                job.plan = plan.model_dump()
                job.plan_history = [*job.plan_history, {"attempt": job.attempt, "plan": job.plan}]
        return job

    def _wait(self, job: Job, wanted: Wanted, left: Collection[int], measured: dict[int, Device]) -> None:
        """Tell the job why it waits, once, and end it when that has taken too long.

        Args:
            left: slots that no job of this box has.
        """
        if not candidates(wanted.spec, wanted.shape, self._slots):
            # Not the job's fault, and not for ever: another worker may come.
            if job.id not in self._waits:
                self._tell_once(
                    job, f"{self._lacking(wanted)} It waits for a worker on line that can run it."
                )
            return
        if wanted.exhausted(self._slots) and not self._fits_elsewhere(wanted):
            last = wanted.too_large[-1]
            why = f"The job ran out of memory, and no plan takes less than the last one ({last.reason})."
            self._refuse(job, FailureCode.OUT_OF_MEMORY, why, memory_advice(wanted.spec, last.device))
            return
        kind, free = self._slots[0].kind, ""
        if find_match(wanted, self._slots) is None:
            device = "GPU" if kind == "cuda" else "slot"
            why = f"No {device} of worker {self._worker} has the memory for this job."
        else:
            gpus = wanted.spec.gpus
            fitting = [slot for slot in self._slots if gpus > 1 or find_match(wanted, [slot])]
            busy = [slot for slot in fitting if slot.index in left]
            usage = "; ".join(_usage(slot, measured[slot.index]) for slot in busy)
            why = f"Not enough GPU memory is free on worker {self._worker}: {usage}. {wanted.need(busy)}"
            free = "Submit it again when the GPU is free (its operator sees in nvidia-smi what uses it). "
        waiting = self._tell_once(job, f"{why} {self._patience()}")
        waiting.see()
        over = waiting.seconds >= self._settings.busy_gpu_wait_seconds
        if waiting.before is not None and over and not self._fits_elsewhere(wanted):
            waited = f"{why} It waited {waiting.seconds:.0f} s."
            advice = f"{free}{memory_advice(wanted.spec, kind)}"
            self._refuse(job, FailureCode.OUT_OF_MEMORY, waited, advice)

    def _tell_once(self, job: Job, message: str) -> Waiting:
        """The job's waiting here, which begins with this entry in its log."""
        waiting = self._waits.get(job.id)
        if waiting is None:
            waiting = self._waits[job.id] = Waiting()
            with self._database.write() as session:
                if leases.lock_queued(session, job.id):
                    logs.append_entries(session, job.id, [Entry(message, level="warning")])
        return waiting

    def _lacking(self, wanted: Wanted) -> str:
        """What this box lacks for a job that none of its slots could run with any memory."""
        gpus, there = wanted.spec.gpus, sum(slot.kind == "cuda" for slot in self._slots)
        if gpus > max(there, 1):
            return f"The job asks for {gpus} GPUs, and worker {self._worker} has {there}."
        model = ModelInfo(wanted.spec.model, "hub")
        try:
            check_runnable(
                wanted.spec,
                model.shaped(wanted.shape) if wanted.shape else model,
                [*self._other_boxes(), self._slots],
            )
        except InvalidRequest as error:
            return error.message
        return f"Worker {self._worker} has nothing that runs what the job names."

    def _patience(self) -> str:
        """What comes of a job that finds no place."""
        seconds = self._settings.busy_gpu_wait_seconds
        return (
            f"It waits for {seconds:.0f} s at most (TUNEYARD_BUSY_GPU_WAIT_SECONDS), without the time in "
            "which this worker's own jobs have the GPUs, while those behind it that fit run. Then, if no "
            "other worker on line has a place for it, it fails with out_of_memory."
        )

    def _fits_elsewhere(self, wanted: Wanted) -> bool:
        """Whether another worker on line has a place for it, taken or not."""
        return any(find_match(wanted, box) is not None for box in self._other_boxes())

    def _other_boxes(self) -> list[list[Device]]:
        """The devices of each other worker on line."""
        since = utcnow() - timedelta(seconds=self._settings.lease_seconds)
        with self._database.read() as session:
            workers = keys.live_workers(session, since)
        return boxes_of(worker for worker in workers if worker.id != self._worker)

    def _refuse_unreadable(self, job: Job, error: ValidationError) -> None:
        """A job whose spec this version does not understand would be met again for ever."""
        self._refuse(
            job,
            FailureCode.INTERNAL_ERROR,
            f"This worker can't read the job's spec ({error.error_count()} fields).",
            "API and worker are of different versions: upgrade both and submit it again.",
        )

    def _refuse(self, job: Job, code: FailureCode, message: str, advice: str) -> None:
        with self._database.write() as session:
            locked = leases.lock_queued(session, job.id)
            if locked is not None:
                leases.fail(session, locked, code, message, advice)
                logger.error("Job %s: %s", job.id, message)


def find_match(wanted: Wanted, devices: Sequence[Device]) -> Match | None:
    """The job's place on these devices of one box: the fastest that it fits, the first of equal ones; where
    no speed is predicted the one with the most memory."""
    gpus = wanted.spec.gpus
    places = groups(gpus, devices) if gpus > 1 else [(device,) for device in devices]
    found = [Match(place, plan) for place in places if (plan := wanted.plan(place))]
    return max(found, key=_preference, default=None)


def _preference(match: Match) -> tuple[float, int]:
    speed = match.plan.tokens_per_second
    return (0, match.devices[-1].memory_bytes) if speed is None else (speed, 0)


def _kept(wanted: Wanted, left: Collection[int], measured: Mapping[int, Device]) -> list[int]:
    """Those of the free slots that a job for several GPUs keeps for itself: each that it would fit."""
    gpus = wanted.spec.gpus
    return [i for i in left if gpus > 1 and find_match(wanted, [measured[i]] * gpus) is not None]


def _usage(slot: Device, measured: Device) -> str:
    most, free = slot.memory_bytes / GIB, measured.memory_bytes / GIB
    return (
        f"GPU {slot.index} has {free:.1f} GiB free of the {most:.1f} GiB that jobs may take, the rest is in "
        "use outside Tuneyard"
    )

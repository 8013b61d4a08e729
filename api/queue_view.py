"""The queue as a job's owner sees it: its place, and when it is expected to start."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import NamedTuple

from api.schemas import QueuePlaceOut
from shared.clock import utcnow
from shared.database import Database, Session
from shared.fairness import LEAST_CHARGE_SECONDS, FairQueue, Line
from shared.forecast import expected_starts
from shared.repository import jobs, keys, owners, queue
from shared.repository.queue import Waiting
from shared.settings import Settings

# One look at the whole queue serves all who ask in this time, or in so many times what it took: 10,000 queued
# jobs take 0.1 s. It is taken anew sooner for a job that it has not seen.
LOOK_SECONDS = 1.0
LOOK_TIMES, LOOK_TIMES_FOR_NEW = 20.0, 5.0
# A job that a free slot has not taken for so long waits for something that is not known here.
IDLE_SECONDS = 60.0


class _Place(NamedTuple):
    """A job's place: its number from 1 and when it is expected to start, or the quota that holds it."""

    position: int | None
    start: datetime | None
    held_by: str | None


@dataclass(frozen=True)
class _Look:
    """The queue at one moment, and how long it took to look."""

    taken_at: float
    took: float
    places: dict[str, _Place]


class QueueView:
    """Tells places in the queue. Safe to share between threads."""

    def __init__(self, database: Database, settings: Settings) -> None:
        self._database = database
        self._settings = settings
        self._lock = threading.Lock()
        self._look = _Look(-math.inf, 0.0, {})

    def place(self, job_id: str) -> QueuePlaceOut | None:
        """Where a queued job stands, as of a moment ago; None for one that was not queued then."""
        with self._lock:
            look, now = self._look, time.monotonic()
            old = max(LOOK_SECONDS, LOOK_TIMES * look.took)
            if now - look.taken_at > (old if job_id in look.places else LOOK_TIMES_FOR_NEW * look.took):
                with self._database.read() as session:
                    places = _places(session, self._settings)
                look = self._look = _Look(now, time.monotonic() - now, places)
        found = look.places.get(job_id)
        if found is None:
            return None
        position, start, held_by = found
        return QueuePlaceOut(position=position, of=len(look.places), expected_start=start, held_by=held_by)

    def forget(self) -> None:
        """What was seen is out of date."""
        with self._lock:
            self._look = _Look(-math.inf, 0.0, {})


def _places(session: Session, settings: Settings) -> dict[str, _Place]:
    found = queue.waiting(session)
    standings = owners.standings(session, settings, {job.owner for job in found})
    held_by = {owner: standing.held_by for owner, standing in standings.items()}
    fair = FairQueue(_lines(found), standings, lambda job: job.place)
    ordered = list(_all_taken(fair))
    now = utcnow()
    boxes = _boxes(session, settings, now)
    starts = expected_starts(boxes, [(job.gpus, job.seconds) for job in ordered])
    places = {
        job.id: _Place(position, _start(job, seconds, now), None)
        for position, (job, seconds) in enumerate(zip(ordered, starts, strict=True), start=1)
    }
    for job in found:
        if job.id not in places:
            places[job.id] = _Place(None, None, held_by[job.owner])
    return places


def _lines(found: list[Waiting]) -> dict[tuple[int, str], Line[Waiting]]:
    by_owner: dict[tuple[int, str], list[Waiting]] = {}
    for job in found:
        by_owner.setdefault((job.priority, job.owner), []).append(job)
    return {key: Line(line[0].place, iter(line)) for key, line in by_owner.items()}


def _all_taken(fair: FairQueue[Waiting]) -> Iterator[Waiting]:
    """The whole queue, each job charged with what it is expected to use before the next one is chosen."""
    for job in fair:
        fair.take(job.gpus * max(job.seconds or 0, LEAST_CHARGE_SECONDS))
        yield job


def _boxes(session: Session, settings: Settings, now: datetime) -> list[list[float]]:
    """Of each worker on line, seconds until each slot is free."""
    live = keys.live_workers(session, now - timedelta(seconds=settings.lease_seconds))
    boxes = {worker.id: [0.0] * len(worker.slots) for worker in live}
    for held in jobs.held_slots(session):
        box = boxes.get(held.worker)
        if box is None:
            continue
        seconds = held.eta_seconds
        if seconds is None and held.expected_seconds is not None:
            left = held.expected_seconds - (now - held.since).total_seconds()
            seconds = left if left > 0 else None
        for _ in range(min(held.gpus, box.count(0.0))):
            box[box.index(0.0)] = math.inf if seconds is None else max(seconds, 1.0)
    return list(boxes.values())


def _start(job: Waiting, seconds: float | None, now: datetime) -> datetime | None:
    if seconds is None or (seconds == 0 and (now - job.created_at).total_seconds() > IDLE_SECONDS):
        return None
    return now + timedelta(seconds=seconds)

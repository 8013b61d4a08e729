"""The protocol of claims and leases as a small machine, every state of which is looked at.

It has a few jobs, and workers that take one at a time. What a worker believes (`Attempt`) and what is true
(`Job`) are apart, which is what leases are about. There is no clock: a lease may run out at any moment, so
all clocks and delays are covered, and a process may do nothing for as long as all others do something: that
is how one freezes and wakes up. One that loses its supervisor while it is frozen wakes up as a ghost.

`explore` visits every state that can be reached, and ends at the first in which something is broken.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

from shared.lifecycle import LEASED, TERMINAL, TRANSITIONS, JobStatus

QUEUED, RUNNING, PAUSING, PAUSED, CANCELLING, SUCCEEDED, FAILED, CANCELLED = (
    JobStatus.QUEUED, JobStatus.RUNNING, JobStatus.PAUSING, JobStatus.PAUSED, JobStatus.CANCELLING,
    JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED,
)  # fmt: skip


class Attempt(NamedTuple):
    """What a process believes: that it runs this attempt of this job."""

    job: int
    number: int


class Job(NamedTuple):
    """A row. `holder` is the attempt whose token it bears, 0 for none; `wrote` the attempt that wrote an
    entry in the last step; `file` the attempt that its artifact's row names, `content` the one whose bytes
    are there."""

    status: JobStatus = QUEUED
    attempt: int = 0
    holder: int = 0
    losses: int = 0
    wrote: int = 0
    file: int = 0
    content: int = 0
    cancel_answered: bool = False


class World(NamedTuple):
    """Workers that run nothing are not in `running`; `ghosts` run without a supervisor."""

    jobs: tuple[Job, ...]
    running: tuple[Attempt, ...] = ()
    ghosts: tuple[Attempt, ...] = ()
    pauses: int = 0


class Bounds(NamedTuple):
    """How far the machine goes: jobs, workers, attempts a job, requests to pause in all."""

    jobs: int
    workers: int
    attempts: int
    pauses: int


class Guards(NamedTuple):
    """What keeps the protocol right. Without any one of them the explorer finds what it is there for."""

    token_is_checked: bool = True
    only_queued_are_claimed: bool = True
    attempts_have_files_of_their_own: bool = True
    ended_is_for_good: bool = True


class Action(NamedTuple):
    """Something that is done about a job, by one of its attempts or (0) by nobody in particular."""

    what: str
    job: int
    number: int = 0


MAX_LOSSES = 2
Step = tuple[Action, World]


def start(bounds: Bounds) -> World:
    return World((Job(),) * bounds.jobs)


def steps(world: World, bounds: Bounds, guards: Guards) -> Iterator[Step]:
    """Every step that may come next, and where it leads."""
    for number, job in enumerate(world.jobs):
        for name, after in _requests(job, can_pause=world.pauses < bounds.pauses):
            paused = world._replace(pauses=world.pauses + (name == "pause"))
            yield Action(name, number), _put(paused, number, after)
        if job.status in LEASED:
            # Its holder may be dead, frozen, cut off, or only slow.
            yield Action("its lease runs out", number), _put(world, number, _lose(job))
        if len(world.running) < bounds.workers and job.attempt < bounds.attempts:
            yield from _claim(world, number, job, guards)
    for attempt in set(world.running):
        yield from _supervised(world, attempt, guards)
    for ghost in set(world.ghosts):
        yield from _writes(world, ghost, world._replace(ghosts=_without(world.ghosts, ghost)), guards)


def _requests(job: Job, *, can_pause: bool) -> Iterator[tuple[str, Job]]:
    """What an owner may ask for, as the routes allow it."""
    if job.status in (QUEUED, PAUSED):
        yield "cancel", _end(job, CANCELLED)._replace(cancel_answered=True)
    if job.status in (RUNNING, PAUSING):
        yield "cancel", job._replace(status=CANCELLING, cancel_answered=True)
    if can_pause and job.status == QUEUED:
        yield "pause", job._replace(status=PAUSED)
    if can_pause and job.status == RUNNING:
        yield "pause", job._replace(status=PAUSING)
    if job.status == PAUSED:
        yield "resume", job._replace(status=QUEUED)


def _claim(world: World, number: int, job: Job, guards: Guards) -> Iterator[Step]:
    if job.status == QUEUED or (not guards.only_queued_are_claimed and job.status == RUNNING):
        attempt = job.attempt + 1
        claimed = job._replace(status=RUNNING, attempt=attempt, holder=attempt)
        running = (*world.running, Attempt(number, attempt))
        yield Action("claim", number, attempt), _put(world._replace(running=running), number, claimed)


def _supervised(world: World, attempt: Attempt, guards: Guards) -> Iterator[Step]:
    """What may become of a process and its supervisor, and what they do."""
    job = world.jobs[attempt.job]
    gone = world._replace(running=_without(world.running, attempt))
    yield Action("dies with its supervisor", *attempt), gone
    yield Action("loses its supervisor", *attempt), gone._replace(ghosts=(*world.ghosts, attempt))
    if _holds(job, attempt, guards):
        yield Action("dies, and its supervisor tells", *attempt), _put(gone, attempt.job, _lose(job))
        yield Action("is given back", *attempt), _put(gone, attempt.job, _give_back(job))
    yield from _writes(world, attempt, gone, guards)


def _writes(world: World, attempt: Attempt, gone: World, guards: Guards) -> Iterator[Step]:
    """What a process does to the world, and how it ends itself; `gone` is the world without it."""
    job = world.jobs[attempt.job]
    if not guards.attempts_have_files_of_their_own:
        # The store knows nothing of leases.
        yield (
            Action("stores its file", *attempt),
            _put(world, attempt.job, job._replace(content=attempt.number)),
        )
    if not _holds(job, attempt, guards):
        yield Action("finds its lease lost", *attempt), gone
        return
    yield Action("writes", *attempt), _put(world, attempt.job, job._replace(wrote=attempt.number))
    published = job._replace(file=attempt.number, content=attempt.number)
    yield Action("publishes", *attempt), _put(world, attempt.job, published)
    if job.file == attempt.number:
        yield Action("succeeds", *attempt), _put(gone, attempt.job, _end(job, SUCCEEDED))
    yield Action("fails", *attempt), _put(gone, attempt.job, _end(job, FAILED))
    yield Action("loses one of its processes, and tells", *attempt), _put(gone, attempt.job, _lose(job))


def _holds(job: Job, attempt: Attempt, guards: Guards) -> bool:
    """The guard of every write: the job bears this attempt's token, and is leased."""
    leased = job.status in LEASED or not guards.ended_is_for_good
    if not guards.token_is_checked:
        return leased
    # An ended job bears no token; it is the status that says so here, as it does in the code.
    holder = job.holder if guards.ended_is_for_good else job.holder or job.attempt
    return leased and holder == attempt.number


def _give_back(job: Job) -> Job:
    if job.status == CANCELLING:
        return _end(job, CANCELLED)
    return job._replace(status=PAUSED if job.status == PAUSING else QUEUED, holder=0)


def _lose(job: Job) -> Job:
    job = job._replace(losses=job.losses + 1)
    return _end(job, FAILED) if job.status == RUNNING and job.losses >= MAX_LOSSES else _give_back(job)


def _end(job: Job, status: JobStatus) -> Job:
    return job._replace(status=status, holder=0)


def _put(world: World, number: int, job: Job) -> World:
    return world._replace(jobs=(*world.jobs[:number], job, *world.jobs[number + 1 :]))


def _without(attempts: tuple[Attempt, ...], one: Attempt) -> tuple[Attempt, ...]:
    index = attempts.index(one)
    return attempts[:index] + attempts[index + 1 :]


def broken(before: World, after: World) -> Iterator[str]:
    """What a step breaks."""
    for number, (was, job) in enumerate(zip(before.jobs, after.jobs, strict=True)):
        if was.status in TERMINAL and job != was:
            yield f"job {number} changed after its end"
        if job.status != was.status and job.status not in TRANSITIONS[was.status]:
            yield f"job {number} went from {was.status} to {job.status}"
        if (job.holder != 0) != (job.status in LEASED):
            yield f"job {number} is {job.status} and held by {job.holder}"
        if job.attempt > was.attempt and was.status != QUEUED:
            yield f"job {number} was claimed while it was {was.status}"
        if job.wrote not in (0, was.holder):
            yield f"job {number}: attempt {job.wrote} wrote while {was.holder} held it"
        if job.file not in (was.file, was.holder):
            yield f"job {number}: attempt {job.file} published while {was.holder} held it"
        if job.file not in (0, job.content):
            yield f"job {number}: the row names attempt {job.file}'s file, and {job.content}'s is there"
        if job.status == SUCCEEDED and job.file != job.attempt:
            yield f"job {number} succeeded in attempt {job.attempt} with the file of {job.file}"
        if was.cancel_answered and job.status not in TERMINAL | {CANCELLING}:
            yield f"job {number} is {job.status} although its cancellation was answered"


class Explored(NamedTuple):
    """How many states and steps there are, and a shortest way to the first broken one."""

    states: int
    steps: int
    broken: str | None = None
    way: tuple[Action, ...] = ()


def explore(bounds: Bounds, guards: Guards) -> Explored:
    """Visit every state, those that are near first."""
    came_from: dict[World, tuple[World, Action] | None] = {start(bounds): None}
    waiting = deque(came_from)
    taken = 0
    while waiting:
        world = waiting.popleft()
        for action, after in steps(world, bounds, guards):
            taken += 1
            wrong = next(broken(world, after), None)
            if wrong is not None:
                return Explored(len(came_from), taken, wrong, (*_way(came_from, world), action))
            after = _canonical(after)
            if after not in came_from:
                came_from[after] = (world, action)
                waiting.append(after)
    return Explored(len(came_from), taken)


def _canonical(world: World) -> World:
    """Of states that differ only in names, or in what no later step depends on, one is enough."""
    world = world._replace(jobs=tuple(_essential(job) for job in world.jobs))

    def of(number: int, attempts: tuple[Attempt, ...]) -> tuple[int, ...]:
        return tuple(sorted(a.number for a in attempts if a.job == number))

    numbers = range(len(world.jobs))
    order = sorted(numbers, key=lambda n: (world.jobs[n], of(n, world.running), of(n, world.ghosts)))
    place = {number: index for index, number in enumerate(order)}

    def renamed(attempts: tuple[Attempt, ...]) -> tuple[Attempt, ...]:
        return tuple(sorted(Attempt(place[a.job], a.number) for a in attempts))

    jobs = tuple(world.jobs[number] for number in order)
    return World(jobs, renamed(world.running), renamed(world.ghosts), world.pauses)


def _essential(job: Job) -> Job:
    """Who wrote last was looked at when it was written; an ended job is only not to change any more."""
    job = job._replace(wrote=0)
    return job._replace(losses=0, cancel_answered=False) if job.status in TERMINAL else job


def _way(came_from: dict[World, tuple[World, Action] | None], world: World) -> tuple[Action, ...]:
    found = []
    while (step := came_from[world]) is not None:
        world, action = step
        found.append(action)
    return tuple(reversed(found))

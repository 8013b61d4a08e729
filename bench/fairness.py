"""Waiting times on a shared box: first come, first served, beside the order that the claim uses.

    python -m bench.fairness [--seed N] [--days N]

Simulates eight owners of different habits on eight GPUs, without training anything. Ours is FairQueue and the
accounting of shared/fairness.py, which the claim uses too. An owner's speed-up is its mean time from post to
end on a GPU of its own, divided by what it is here: under 1 it would be better off alone. Jain's index is
taken of these: 1 where all gain alike, 1/8 where one has all the gain.
"""

from __future__ import annotations

import argparse
import heapq
import random
import statistics
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice

from rich.console import Console
from rich.table import Table

from shared.fairness import (
    LEAST_CHARGE_SECONDS,
    FairQueue,
    Line,
    Standing,
    counted,
    counted_while_running,
    faded,
)

GPUS = 8
HOUR = 3600.0
DAY = 24 * HOUR
NORMAL = 1


@dataclass(frozen=True)
class SimulatedJob:
    owner: str
    posted: float
    seconds: float
    number: int


@dataclass
class Box:
    """The GPUs and their queue at one moment of the simulation."""

    now: float = 0.0
    waiting: dict[str, deque[SimulatedJob]] = field(default_factory=dict)
    # End, start and job of those that run.
    running: list[tuple[float, int, float, SimulatedJob]] = field(default_factory=list)
    # GPU-seconds of ended jobs by owner, as they counted at the time beside them.
    used: dict[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def free(self) -> int:
        return GPUS - len(self.running)

    def end(self) -> None:
        """The job that ends next does so."""
        self.now, _, start, job = heapq.heappop(self.running)
        seconds, at = self.used.get(job.owner, (0.0, self.now))
        self.used[job.owner] = (faded(seconds, self.now - at) + counted(1, self.now - start), self.now)

    def start(self, job: SimulatedJob) -> None:
        self.waiting[job.owner].remove(job)
        heapq.heappush(self.running, (self.now + job.seconds, job.number, self.now, job))


Order = Callable[[Box], Sequence[SimulatedJob]]


def first_come(box: Box) -> list[SimulatedJob]:
    """The jobs to start now by age alone."""
    heads = [job for line in box.waiting.values() for job in islice(line, box.free)]
    return sorted(heads, key=lambda job: job.number)[: box.free]


def fair(box: Box) -> list[SimulatedJob]:
    """The jobs to start now as the claim would have it."""
    standings = {}
    for owner in box.waiting:
        seconds, at = box.used.get(owner, (0.0, box.now))
        running = (box.now - start for _, _, start, job in box.running if job.owner == owner)
        standings[owner] = Standing(
            faded(seconds, box.now - at) + sum(counted_while_running(1, ago) for ago in running)
        )
    lines = {
        (NORMAL, owner): Line(line[0].number, iter(tuple(islice(line, box.free))))
        for owner, line in box.waiting.items()
        if line
    }
    queue = FairQueue(lines, standings, lambda job: job.number)
    chosen = []
    for job in queue:
        queue.take(LEAST_CHARGE_SECONDS)
        chosen.append(job)
        if len(chosen) == box.free:
            break
    return chosen


def simulate(jobs: Sequence[SimulatedJob], order: Order) -> dict[str, list[tuple[float, float]]]:
    """Seconds waited and run of every job, by owner."""
    box = Box(waiting={job.owner: deque() for job in jobs})
    done: dict[str, list[tuple[float, float]]] = {job.owner: [] for job in jobs}
    coming = deque(sorted(jobs, key=lambda job: job.number))
    while coming or box.running:
        if coming and (not box.running or coming[0].posted <= box.running[0][0]):
            box.now = coming[0].posted
            while coming and coming[0].posted == box.now:
                job = coming.popleft()
                box.waiting[job.owner].append(job)
        else:
            box.end()
        if box.free:
            for job in order(box):
                box.start(job)
                done[job.owner].append((box.now - job.posted, job.seconds))
    return done


def workload(seed: int, days: float) -> list[SimulatedJob]:
    """Eight owners: one floods the queue, one posts a batch a night, one comes late, one posts small jobs."""
    chance = random.Random(seed)
    posts: list[tuple[float, str, float]] = []

    def post(owner: str, at: float, minutes: float) -> None:
        posts.append((at, owner, chance.lognormvariate(0, 0.6) * minutes * 60 / 1.197))

    for _ in range(int(140 * days)):
        post("flood", HOUR, 30)
    for day in range(int(days)):
        for _ in range(40):
            post("nightly", day * DAY, 30)
    for _ in range(int(14 * days)):
        post("latecomer", days * DAY / 3, 30)
    for number in range(1, 5):
        for _ in range(int(28 * days)):
            post(f"steady {number}", chance.uniform(0, days * DAY), 30)
    for _ in range(int(100 * days)):
        post("small jobs", chance.uniform(0, days * DAY), 5)
    posts.sort()
    return [SimulatedJob(owner, at, seconds, n) for n, (at, owner, seconds) in enumerate(posts)]


def alone(jobs: Sequence[SimulatedJob]) -> dict[str, float]:
    """Mean seconds from post to end, by owner, on one GPU that is the owner's alone."""
    free: dict[str, float] = {}
    took: dict[str, list[float]] = {}
    for job in jobs:
        end = max(free.get(job.owner, 0.0), job.posted) + job.seconds
        free[job.owner] = end
        took.setdefault(job.owner, []).append(end - job.posted)
    return {owner: statistics.fmean(values) for owner, values in took.items()}


def jain(values: Sequence[float]) -> float:
    """Jain's index of fairness: 1 for equal values, 1/n where one has everything."""
    return sum(values) ** 2 / (len(values) * sum(value * value for value in values))


def speed_ups(jobs: Sequence[SimulatedJob], done: dict[str, list[tuple[float, float]]]) -> dict[str, float]:
    own = alone(jobs)
    return {
        owner: own[owner] / statistics.fmean(w + ran for w, ran in found) for owner, found in done.items()
    }


def report(jobs: Sequence[SimulatedJob]) -> tuple[Table, dict[str, float]]:
    """Waiting times by owner under both orders, and Jain's index of each."""
    results = {"first come": simulate(jobs, first_come), "ours": simulate(jobs, fair)}
    gains = {name: speed_ups(jobs, done) for name, done in results.items()}
    table = Table(
        title=f"{len(jobs):,} jobs on {GPUS} GPUs: minutes waited, and speed-up over a GPU of one's own"
    )
    table.add_column("owner")
    table.add_column("jobs", justify="right")
    for name in results:
        for figure in ("mean", "p50", "p95", "speed-up"):
            table.add_column(f"{name}: {figure}", justify="right")
    for owner in sorted({job.owner for job in jobs}):
        cells = []
        for name, done in results.items():
            waits = sorted(wait / 60 for wait, _ in done[owner])
            cuts = statistics.quantiles(waits, n=20)
            cells += [f"{v:,.0f}" for v in (statistics.fmean(waits), cuts[9], cuts[18])]
            cells.append(f"{gains[name][owner]:.2f}")
        table.add_row(owner, str(len(results["ours"][owner])), *cells)
    return table, {name: jain(list(gained.values())) for name, gained in gains.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--days", type=float, default=14)
    arguments = parser.parse_args()
    table, indices = report(workload(arguments.seed, arguments.days))
    console = Console(width=160)
    console.print(table)
    for name, index in indices.items():
        console.print(f"Jain's index, {name}: {index:.3f}")


if __name__ == "__main__":
    main()

"""One run: faults for a while, then peace until all has ended, then the check."""

from __future__ import annotations

import os
import re
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from shared.database import Database
from shared.lifecycle import JobStatus
from shared.settings import Settings
from shared.storage import Store
from tests.chaos import real
from tests.chaos.clients import Client, working
from tests.chaos.cluster import Cluster
from tests.chaos.faults import Faults, schedule
from tests.chaos.invariants import Rules, check
from tests.chaos.records import Seen, Truth, read_truth
from tests.postgresql import PostgreSQL
from worker.retention import STRAY_SECONDS, collect
from worker.sweep import SWEEP_SECONDS, sweep

SETTLE_SECONDS = 120.0
SWEPT_SECONDS = 20.0
OWN_FAULTS = ("stumbled", "Exception in ASGI application", "Exception in thread")
ERROR = re.compile(r"[a-z][\w.]*(Error|Exception|Interrupt|Exit)?: |\w+Error")
LOOK_SECONDS = 0.05
SETTLE_LOOK_SECONDS = 0.3


@dataclass(frozen=True)
class Plan:
    """What to run. `gap` is the mean time between faults, in seconds."""

    seed: int
    seconds: float
    workers: int
    slots: int
    clients: int
    gap: float
    step_seconds: float
    most_open: int
    stumbling: float
    max_losses: int
    small_disk: bool
    planned: list[dict[str, Any]]
    real: int
    models: Path | None = None
    postgresql: bool = False


@dataclass
class Report:
    """What a run comes to."""

    seconds: float
    faults: Counter[str]
    truth: Truth
    seen: Seen
    strays: int
    broken: list[str] = field(default_factory=list)

    @property
    def attempts(self) -> int:
        """Of jobs and exports, deleted ones included."""
        claims = {
            e.job_id + " ".join(e.holders[:1]) for e in self.truth.history if e.what == "job" and e.holders
        }
        exports = [e for e in self.truth.history if e.what == "export" and e.told == "running"]
        return len(claims) + len(exports)

    @property
    def trained(self) -> int:
        """Jobs that were trained for real to their end."""
        done = [job for job in self.truth.jobs.values() if job.status == JobStatus.SUCCEEDED]
        return sum(job.spec["name"] == "real" for job in done)

    @property
    def jobs(self) -> Counter[str]:
        statuses = Counter(job.status for job in self.truth.jobs.values())
        statuses["deleted"] = sum(event.what == "deleted" for event in self.truth.history)
        return statuses


def run(plan: Plan, root: Path, aside: Path) -> Report:
    """
    Raises:
        RuntimeError: the cluster did not start.
    """
    server = PostgreSQL() if plan.postgresql else None
    try:
        return _run(plan, root, aside, server)
    finally:
        if server:
            server.close()


def _run(plan: Plan, root: Path, aside: Path, server: PostgreSQL | None) -> Report:
    began = time.monotonic()
    random = Random(plan.seed)
    cluster = Cluster(
        root, aside, plan.workers, plan.slots, plan.max_losses, Random(random.random()), plan.models, server
    )
    seen, lock = Seen(), threading.Lock()
    try:
        owners = [f"owner-{number}" for number in range(plan.clients)]
        clients = [
            Client(
                name, key, cluster.url, Random(random.random()), seen, threading.Event(), lock,
                plan.step_seconds, plan.most_open, plan.stumbling,
            )
            for number, (name, key) in enumerate(cluster.start(owners).items())
        ]  # fmt: skip
        # One has poison, another the jobs that stumble, one at a time: who takes them over must be awake.
        clients[0].planned += plan.planned[:1]
        clients[1].planned += plan.planned[1:]
        if plan.real:
            file_id = str(clients[2].upload(real.rows()))
            clients[2].planned += [real.spec(file_id) for _ in range(plan.real)]
        faults = Faults(
            cluster, Random(random.random()), plan.small_disk, lambda: [job_id for _, job_id in seen.accepted]
        )
        with working(clients):
            _storm(plan, cluster, faults, clients, Random(random.random()))
        faults.relieve()
        cluster.restore_database()
        unsettled = _settle(cluster, clients)
        for client in clients:
            client.read_all()
            client.close()
        late = cluster.stop()
    finally:
        cluster.end()
    faults.counts["freeze at a chosen point"] = len(cluster.self_frozen)
    settings = cluster.settings
    database = Database(settings.database())
    strays = _collect(database, settings, cluster.boxes)
    truth = read_truth(database, settings, cluster.boxes)
    database.close()
    report = Report(time.monotonic() - began, faults.counts, truth, seen, strays)
    report.broken = [
        *unsettled,
        *late,
        *check(truth, seen, Rules(plan.max_losses, faults.counts["disk full"] > 0, len(cluster.boxes) == 1)),
        *_stumbled(aside),
        *([] if report.jobs[JobStatus.SUCCEEDED] else ["not one job succeeded"]),
        *(["no job that was trained for real succeeded"] if plan.real and not report.trained else []),
        *(f"{kind} found nothing to hit" for kind in faults.kinds() if not faults.counts[kind]),
    ]
    return report


def _storm(plan: Plan, cluster: Cluster, faults: Faults, clients: list[Client], random: Random) -> None:
    began = time.monotonic()
    waiting = schedule(random, faults.kinds(), plan.seconds, plan.gap)
    longest = plan.seconds + SETTLE_SECONDS
    while waiting or time.monotonic() - began < plan.seconds or any(client.planned for client in clients):
        cluster.tend()
        faults.tend()
        if waiting and time.monotonic() - began >= waiting[0][0] and faults.inject(waiting[0][1]):
            waiting.pop(0)
        elif waiting and time.monotonic() - began >= waiting[0][0] + 2 * plan.gap:
            # It finds nothing to hit just now: later, when there may be.
            waiting.append((time.monotonic() - began + plan.gap, waiting.pop(0)[1]))
        if time.monotonic() - began > longest:
            return
        time.sleep(LOOK_SECONDS)


def _settle(cluster: Cluster, clients: list[Client]) -> list[str]:
    """Peace: everything runs, what is frozen wakes up, and everything that was asked for ends."""
    faults_end = time.monotonic()
    while time.monotonic() - faults_end < SETTLE_SECONDS:
        cluster.tend()
        running = all(part.is_running() for part in cluster.parts) and cluster.answers()
        done = [client.is_done() for client in clients]
        if running and all(done) and not cluster.frozen:
            return []
        time.sleep(SETTLE_LOOK_SECONDS)
    return [f"not all had ended {SETTLE_SECONDS:.0f} s after the last fault"]


def _collect(database: Database, settings: Settings, boxes: list[Path]) -> int:
    """Let a day pass for what lies about, then clean up as Tuneyard does; how many files were nobody's."""
    for box in boxes:
        _age(box / "work", SWEEP_SECONDS)
        if (box / "work").is_dir():
            sweep(database, box / "work")
    for thread in threading.enumerate():
        if thread is not threading.main_thread() and not thread.daemon:
            thread.join(SWEPT_SECONDS)
    for folder in (settings.root / "artifacts", settings.root / "uploads"):
        _age(folder, STRAY_SECONDS)
    removed = collect(database, Store(settings.artifacts()), settings, dry_run=False)
    return sum(item.what == "files without a row" for item in removed)


def _age(folder: Path, seconds: float) -> None:
    old = time.time() - 2 * seconds
    for path in folder.rglob("*"):
        os.utime(path, (old, old), follow_symlinks=False)


def _stumbled(aside: Path) -> list[str]:
    """What supervisors and the API report of themselves as a fault of their own, with the error."""
    found = []
    for log in sorted(aside.glob("*.log")):
        told = ""
        for line in log.read_text(errors="replace").splitlines():
            if any(words in line for words in OWN_FAULTS):
                told = line
            elif told and ERROR.match(line):
                found.append(f"{log.name}: {told} {line}")
                told = ""
    return found

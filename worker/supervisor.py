"""The supervisor: one torch-free process per box that claims jobs and watches their children."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from datetime import timedelta
from pathlib import Path

from sqlalchemy.exc import DBAPIError

from shared.clock import utcnow
from shared.database import Database
from shared.device import Device
from shared.plan import Plan
from shared.queue import Doorbell
from shared.repository import keys, leases
from shared.settings import Settings
from shared.spec import JobSpec
from shared.storage import account
from shared.tables import Job, WorkerRow
from worker.caches import COMPILED
from worker.checkpoints import FOLDER as CHECKPOINTS
from worker.checkpoints import take_over
from worker.claims import Claims
from worker.copies import remove_in_background as remove_copies
from worker.doorbell import Listener
from worker.exports import Exports
from worker.launch import Child
from worker.order import Order
from worker.preempt import preempt
from worker.process import Process
from worker.reporting import reporter_environment
from worker.requests import heed_requests
from worker.retention import collect_in_background
from worker.secrets import OwnerSecrets
from worker.settle import keep_checkpoints, settle
from worker.standby import Standbys
from worker.sweep import SWEEP_SECONDS, Sweeper, remove_in_background
from worker.usage import Usage

SEEN_SECONDS = 5.0
COLLECT_SECONDS = 3600.0
# A process that dies sooner than this has hardly begun its job.
QUICK_DEATH_SECONDS = 20.0
LONGEST_PAUSE_SECONDS = 120.0
KILLED_SECONDS = 5.0
# Of the grace time, what children may wait for copies of checkpoints; the rest is for giving their jobs back.
SHARE_OF_GRACE = 0.9

logger = logging.getLogger(__name__)


class Supervisor:
    """Runs until `stop()`; everything it knows of a job it reads from the database.

    `child_module` is what each attempt's process runs (`python -m`).
    """

    def __init__(
        self,
        settings: Settings,
        database: Database,
        doorbell: Doorbell,
        slots: list[Device],
        child_module: str = "worker.child",
    ) -> None:
        self._child_module = child_module
        self._settings = settings
        self._database = database
        self._doorbell = doorbell
        self._slots = slots
        self._children: list[Child] = []
        self._wake = threading.Event()
        self._stopping = False
        self._listener = Listener(doorbell, self._wake.set)
        self._worker = WorkerRow(
            id=f"{socket.gethostname()}-{os.getpid()}",
            hostname=socket.gethostname(),
            slots=[slot.to_json() for slot in slots],
        )
        self._seen = self._swept = -SWEEP_SECONDS
        # Not as it starts: whoever starts it with the wrong settings has an hour to see it.
        self._collected = time.monotonic()
        self._ticked_at = time.time()
        # Monotonic times before which nothing is recovered, or claimed.
        self._recover_after = self._claim_after = 0.0
        self._quick_deaths = 0
        self._claims = Claims(settings, database, self._worker.id, slots)
        self._secrets = OwnerSecrets(settings, database)
        self._usage = Usage(slots)
        self._sweeper = Sweeper(database, settings.root)
        self._work = settings.root / "work"
        self._compile_cache = settings.root / "cache" / COMPILED
        self._exports = Exports(
            settings, database, doorbell, self._worker.id, self._start_process, self._secrets
        )
        self._standbys = Standbys(settings.standby, slots, self._work, self._start_process)

    def run(self) -> None:
        """Claim and watch until asked to stop; then hand back what runs."""
        self._work.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._listener.start()
        self._usage.start()
        try:
            while not self._stopping:
                self._guarded_tick()
                self._wake.wait(timeout=self._pause())
                self._wake.clear()
        finally:
            # First of all: who has a grace time spends it from now on.
            self._hand_back_all()
            self._listener.stop()
            self._usage.stop()
            self._sweeper.join(KILLED_SECONDS)

    def stop(self) -> None:
        """Ask `run` to end. Takes a lock: call it from a thread, not from a signal handler."""
        self._stopping = True
        self._wake.set()

    def tick(self) -> None:
        """One look at everything: children, requests, lost leases, free slots."""
        now = time.monotonic()
        # Whoever is silent for a lease is taken to be gone.
        if now - self._seen >= min(SEEN_SECONDS, self._settings.lease_seconds / 4):
            self._show_up()
            self._seen = now
        self._reap()
        heed_requests(self._database, self._children, self._settings)
        self._reap()
        if now >= self._recover_after:
            self._recover_lost()
        if now - self._swept >= SWEEP_SECONDS:
            self._sweeper.begin()
            remove_copies(self._database, self._settings)
            self._swept = now
        if now - self._collected >= COLLECT_SECONDS:
            collect_in_background(self._database, self._settings)
            self._collected = now
        if now >= self._claim_after:
            self._claim()
            if self._settings.preemption:
                preempt(self._database, self._claims, self._children, self._free_slots())
        self._exports.tend(recover=now >= self._recover_after)
        self._standbys.tend(self._free_slots())

    def _guarded_tick(self) -> None:
        """A tick that can't end the supervisor, and with it all jobs of this box."""
        wall = time.time()
        if wall - self._ticked_at > self._settings.lease_seconds / 2:
            # The machine slept: children renew their leases now, before anybody takes them for lost.
            self._spare_leases()
        self._ticked_at = wall
        try:
            self.tick()
        except DBAPIError as error:
            # Running children try again by themselves; claims wait until the database is back.
            logger.warning("The database is away, trying again: %s", error.orig)
            self._spare_leases()
        except Exception:
            logger.exception("The supervisor stumbled and goes on")

    def _spare_leases(self) -> None:
        self._recover_after = time.monotonic() + self._settings.lease_seconds

    def _pause(self) -> float:
        """How long to sleep: shorter while a child has been asked to stop, for its time is limited."""
        asked = any(child.asked for child in self._children)
        return min(0.2, self._settings.poll_seconds) if asked else self._settings.poll_seconds

    def _show_up(self) -> None:
        with self._database.write() as session:
            self._worker.seen_at, self._worker.gpus = utcnow(), self._usage.gpus
            keys.put_worker(session, WorkerRow(**self._worker.model_dump()))

    def _reap(self) -> None:
        """Settle the children that have ended."""
        for child in [c for c in self._children if c.exit_code() is not None]:
            self._settle(child, asked=child.asked)

    def _settle(self, child: Child, *, asked: bool) -> None:
        """An attempt is over: see to its job, then clean up."""
        if settle(self._database, child, self._settings.max_losses, asked=asked):
            self._quick_deaths = 0
        elif not asked:
            self._slow_down(child)
        self._doorbell.tell(child.job_id)
        child.close()
        self._children.remove(child)
        # Else the sweep tries again.
        if keep_checkpoints(child.workdir):
            remove_in_background(child.workdir)

    def _slow_down(self, child: Child) -> None:
        """After a death that came soon: what killed it may kill whatever is claimed next."""
        quick = time.monotonic() - child.started_at < QUICK_DEATH_SECONDS
        self._quick_deaths = self._quick_deaths + 1 if quick else 0
        pause = min(self._settings.retry_seconds * self._quick_deaths, LONGEST_PAUSE_SECONDS)
        self._claim_after = time.monotonic() + pause

    def _recover_lost(self) -> None:
        """Give back the jobs whose lease has run out, whoever held it."""
        with self._database.write() as session:
            lost = leases.expired_leases(session, utcnow())
            tokens = {job.lease_token for job in lost}
            for job in lost:
                why = f"Worker {job.worker} was not heard of in time."
                leases.lose(session, job, why, self._settings.max_losses)
        for job in lost:
            logger.warning("Job %s: its lease ran out", job.id)
            self._doorbell.tell(job.id)
        for child in [c for c in self._children if c.token in tokens]:
            child.kill()

    def _claim(self) -> None:
        """Fill the free slots with the jobs that fit them."""
        for job, devices in self._claims.fill(self._free_slots()):
            self._start(job, devices)
            if self._stopping or time.monotonic() < self._claim_after:
                return

    def _free_slots(self) -> list[Device]:
        busy = {device for child in self._children for device in child.devices}
        return [slot for slot in self._slots if slot not in busy]

    def _start_process(
        self, folder: Path, device: Device, arguments: list[str], hub_cache: Path | None = None
    ) -> Process:
        return Process(
            self._child_module, arguments, folder, device, self._compile_cache, self._wake.set, hub_cache
        )

    def _start(self, job: Job, devices: tuple[Device, ...]) -> None:
        token = str(job.lease_token)
        workdir = self._work / job.id / f"{job.attempt}-{token}"
        gpus = tuple(device.index for device in devices if device.kind == "cuda")
        given = self._secrets.of(job.owner)
        hub_cache = self._secrets.hub_cache(job.owner, given)
        private = str(hub_cache) if hub_cache else None
        settings = self._settings.model_dump(mode="json", exclude={"secrets_key"})
        report_to = JobSpec.from_json(job.spec).report_to
        # The owner's own accounts come before the worker's.
        reporting = reporter_environment(report_to, {**os.environ, **given})
        order = Order(
            job.id, token, str(workdir), settings, gpus, None, reporting, private, given, account(os.environ)
        )
        self._doorbell.tell(job.id)
        engine = Plan.model_validate(job.plan).engine if job.plan else "reference"
        try:
            # A process that waited has the caches that all owners share.
            process = None if hub_cache else self._standbys.take(engine, devices[0], workdir)
            process = process or self._start_process(workdir, devices[0], [], hub_cache)
            try:
                take_over(workdir.parent, workdir / CHECKPOINTS)
            except OSError:
                process.close()
                raise
            child = Child(process, order, devices)
        except OSError as error:
            # The disk is full or the machine is out of processes: not the job's fault, and no better at once.
            logger.error("Job %s could not be started: %s", job.id, error)
            self._claim_after = time.monotonic() + self._settings.retry_seconds
            with self._database.write() as session:
                owned = leases.owned_job(session, job.id, token)
                leases.give_back(session, owned, f"The worker could not start it ({error.strerror}).")
            return
        limit = JobSpec.from_json(job.spec).time_limit_seconds
        if limit is not None:
            child.deadline = utcnow() + timedelta(seconds=limit - job.run_seconds)
        self._children.append(child)
        names = ", ".join(f"{device.name} ({device.index})" for device in devices)
        logger.info("Job %s: attempt %d on %s, process %d", job.id, job.attempt, names, child.pid)

    def _is_busy(self) -> bool:
        return self._exports.is_running() or any(c.exit_code() is None for c in self._children)

    def _hand_back_all(self) -> None:
        """Let every child leave with a checkpoint, give their jobs back and sign off."""
        self._standbys.close()
        grace = self._settings.checkpoint_grace_seconds
        for child in self._children:
            child.ask_to_leave(grace * SHARE_OF_GRACE)
        self._exports.ask_to_stop()
        deadline = time.monotonic() + grace
        while self._is_busy() and time.monotonic() < deadline:
            try:
                heed_requests(self._database, self._children, self._settings)
            except DBAPIError as error:
                logger.warning("The database is away as the worker stops: %s", error.orig)
            self._wake.wait(timeout=0.1)
            self._wake.clear()
        self._exports.close(KILLED_SECONDS)
        for child in list(self._children):
            child.kill()
            child.await_exit(KILLED_SECONDS)
            try:
                self._settle(child, asked=True)
            except DBAPIError as error:
                # Its lease runs out by itself.
                logger.warning("Job %s could not be given back: %s", child.job_id, error.orig)
        try:
            with self._database.write() as session:
                keys.remove_worker(session, self._worker.id)
        except DBAPIError as error:
            logger.warning("Could not sign off: %s", error.orig)

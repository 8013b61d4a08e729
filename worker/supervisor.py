"""The supervisor: one torch-free process per box that claims jobs and watches their children."""

from __future__ import annotations

import logging
import os
import shutil
import socket
import threading
import time
from datetime import timedelta

from sqlalchemy.exc import DBAPIError

from shared.clock import utcnow
from shared.database import Database
from shared.errors import LeaseLost
from shared.events import Entry
from shared.ids import JOB_ID, new_token
from shared.lifecycle import LEASED, FailureCode, JobStatus
from shared.planner import Device, make_plan
from shared.queue import Doorbell
from shared.repository import keys, leases, logs
from shared.repository.jobs import set_status
from shared.settings import Settings
from shared.spec import JobSpec
from shared.tables import WorkerRow
from worker.doorbell import Listener
from worker.launch import Child
from worker.order import Order

SEEN_SECONDS = 5.0
SWEEP_SECONDS = 30.0
CHECKPOINTS = "checkpoints"

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
        self._work = settings.root / "work"

    def run(self) -> None:
        """Claim and watch until asked to stop; then hand back what runs."""
        self._work.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._listener.start()
        try:
            while not self._stopping:
                try:
                    self.tick()
                except DBAPIError as error:
                    # Running children go on by themselves; claims wait until the database is back.
                    logger.warning("The database is away, trying again: %s", error.orig)
                self._wake.wait(timeout=self._pause())
                self._wake.clear()
        finally:
            self._listener.stop()
            self._hand_back_all()

    def stop(self) -> None:
        """Ask `run` to end. Takes a lock: call it from a thread, not from a signal handler."""
        self._stopping = True
        self._wake.set()

    def tick(self) -> None:
        """One look at everything: children, requests, lost leases, free slots."""
        now = time.monotonic()
        if now - self._seen >= SEEN_SECONDS:
            self._show_up()
            self._seen = now
        self._reap()
        self._heed_requests()
        self._recover_lost()
        if now - self._swept >= SWEEP_SECONDS:
            self._sweep()
            self._swept = now
        self._claim()

    def _pause(self) -> float:
        """How long to sleep: shorter while a child has been asked to stop, for its time is limited."""
        asked = any(child.stop_asked_at is not None for child in self._children)
        return min(0.2, self._settings.poll_seconds) if asked else self._settings.poll_seconds

    def _show_up(self) -> None:
        with self._database.write() as session:
            self._worker.seen_at = utcnow()
            keys.put_worker(session, WorkerRow(**self._worker.model_dump()))

    def _reap(self) -> None:
        """Settle the children that have ended."""
        for child in [c for c in self._children if c.exit_code() is not None]:
            self._settle(child, asked=child.stop_asked_at is not None)

    def _settle(self, child: Child, *, asked: bool) -> None:
        """An attempt is over: if it did not end its job itself, give the job back, then clean up."""
        code = child.exit_code()
        how = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
        words = child.last_words()
        why = f"The job's process ended unexpectedly ({how}{': ' + words if words else ''})."
        try:
            with self._database.write() as session:
                job = leases.owned_job(session, child.job_id, child.token)
                if asked:
                    leases.give_back(session, job, "The worker was stopped.")
                else:
                    leases.lose(session, job, why, self._settings.max_losses)
        except LeaseLost:
            logger.info("Job %s: its process has ended it (%s)", child.job_id, how)
        else:
            logger.warning("Job %s: %s", child.job_id, why)
        self._doorbell.tell(child.job_id)
        child.close()
        self._children.remove(child)
        self._keep_checkpoints(child)
        shutil.rmtree(child.workdir, ignore_errors=True)

    def _keep_checkpoints(self, child: Child) -> None:
        """Complete checkpoints outlive the attempt; the job's folder goes when the job is deleted."""
        for found in sorted((child.workdir / CHECKPOINTS).glob("checkpoint-*")):
            target = child.workdir.parent / CHECKPOINTS / found.name
            target.parent.mkdir(exist_ok=True)
            shutil.rmtree(target, ignore_errors=True)
            found.rename(target)

    def _heed_requests(self) -> None:
        """Stop children whose job is being cancelled, has run out of time or has ended elsewhere."""
        if not self._children:
            return
        with self._database.read() as session:
            statuses = leases.statuses(session, [child.job_id for child in self._children])
        for child in list(self._children):
            status = statuses.get(child.job_id)
            if status is None or status not in LEASED:
                # Deleted, or taken from us: whatever it does now is dropped.
                child.kill()
            elif status == JobStatus.CANCELLING:
                child.ask_to_stop()
            elif self._is_over_time(child):
                self._time_out(child)
            asked = child.stop_asked_at
            if asked is not None and time.monotonic() - asked > self._settings.stop_grace_seconds:
                child.kill()
        self._reap()

    def _is_over_time(self, child: Child) -> bool:
        return child.deadline is not None and utcnow() > child.deadline

    def _time_out(self, child: Child) -> None:
        message = "The job ran for longer than its time_limit_seconds."
        advice = "Raise time_limit_seconds, or train on fewer samples, epochs or steps."
        failure = {"code": FailureCode.TIMED_OUT, "message": message, "advice": advice}
        try:
            with self._database.write() as session:
                job = leases.owned_job(session, child.job_id, child.token)
                set_status(job, JobStatus.FAILED, failure=failure)
                logs.append_entries(session, job.id, [Entry(message, level="error", data=failure)])
        except LeaseLost:
            logger.info("Job %s ended as its time ran out", child.job_id)
        child.kill()

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
        """Fill the free slots with the next jobs."""
        busy = {child.device for child in self._children}
        for device in [slot for slot in self._slots if slot not in busy]:
            if self._stopping or not self._claim_for(device):
                return

    def _claim_for(self, device: Device) -> bool:
        token = new_token()
        expires_at = utcnow() + timedelta(seconds=self._settings.lease_seconds)
        with self._database.write() as session:
            job = leases.claim_next(session, self._worker.id, token, expires_at)
            if job is None:
                return False
            spec = JobSpec.from_json(job.spec)
            plan = make_plan(spec, [device])
            job.plan = plan.model_dump() if plan else None
            job.plan_history = [*job.plan_history, {"attempt": job.attempt, "plan": job.plan}]
        self._doorbell.tell(job.id)
        workdir = self._work / job.id / f"{job.attempt}-{token}"
        workdir.mkdir(parents=True, mode=0o700)
        order = Order(job.id, token, str(workdir), self._settings.model_dump(mode="json"))
        child = Child(self._child_module, order, device, self._wake.set)
        if spec.time_limit_seconds is not None and job.started_at is not None:
            child.deadline = job.started_at + timedelta(seconds=spec.time_limit_seconds)
        self._children.append(child)
        logger.info("Job %s: attempt %d on %s, process %d", job.id, job.attempt, device.name, child.pid)
        return True

    def _sweep(self) -> None:
        """Remove the work folders of jobs that were deleted, and of attempts that nobody runs any more."""
        folders = [f for f in self._work.iterdir() if JOB_ID.fullmatch(f.name)]
        with self._database.read() as session:
            tokens = leases.tokens(session, [f.name for f in folders])
        for folder in folders:
            if folder.name not in tokens:
                shutil.rmtree(folder, ignore_errors=True)
                continue
            for attempt in folder.iterdir():
                current = tokens[folder.name]
                held = attempt.name == CHECKPOINTS or (current and attempt.name.endswith(f"-{current}"))
                # A claim that is newer than what was read of it above has a new folder.
                if not held and time.time() - attempt.stat().st_mtime > SWEEP_SECONDS:
                    shutil.rmtree(attempt, ignore_errors=True)

    def _hand_back_all(self) -> None:
        """Stop every child, give their jobs back and sign off."""
        for child in self._children:
            child.ask_to_stop()
        deadline = time.monotonic() + self._settings.stop_grace_seconds
        while any(c.exit_code() is None for c in self._children) and time.monotonic() < deadline:
            self._wake.wait(timeout=0.1)
            self._wake.clear()
        for child in list(self._children):
            child.kill()
            self._settle(child, asked=True)
        with self._database.write() as session:
            keys.remove_worker(session, self._worker.id)

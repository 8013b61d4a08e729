"""Exports of finished jobs: one at a time on each box, on its CPU, beside the jobs that train."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

from sqlalchemy.exc import DBAPIError

from shared.clock import utcnow
from shared.database import Database
from shared.device import Device
from shared.errors import LeaseLost
from shared.ids import new_token
from shared.lifecycle import ExportStatus
from shared.queue import Doorbell
from shared.repository import exports, jobs, keys
from shared.settings import Settings
from shared.storage import account
from shared.tables import ExportTask
from worker.export_order import checkpoint_weights
from worker.launch import Child
from worker.order import Order
from worker.process import Process
from worker.reservations import RESERVED, still_put_off
from worker.secrets import OwnerSecrets
from worker.sweep import EXPORT_PREFIX, remove_in_background

CPU = Device("cpu", 0, "CPU", 0)

logger = logging.getLogger(__name__)


class Exports:
    """The supervisor's second hand: claims an export when none runs, and watches its child."""

    def __init__(
        self,
        settings: Settings,
        database: Database,
        doorbell: Doorbell,
        worker: str,
        start: Callable[[Path, Device, list[str], Path | None], Process],
        secrets: OwnerSecrets,
    ) -> None:
        self._settings = settings
        self._database = database
        self._doorbell = doorbell
        self._worker = worker
        self._start_process = start
        self._secrets = secrets
        self._work = settings.root / "work"
        self._child: Child | None = None
        self._export_id = ""
        self._claim_after = 0.0

    def tend(self, *, recover: bool) -> None:
        """See to the export that runs, or start the next.

        Args:
            recover: whether leases that ran out may be taken for lost.
        """
        if self._child is not None:
            self._watch(self._child)
        with self._database.read() as session:
            if not exports.any_under_way(session):
                return
        if recover:
            self._recover_lost()
        if self._child is None and time.monotonic() >= self._claim_after:
            self._claim()

    def ask_to_stop(self) -> None:
        if self._child is not None:
            self._child.ask_to_stop()

    def is_running(self) -> bool:
        """Whether there is an export to wait for: one that was asked to stop has its time to do so."""
        child = self._child
        if child is None or child.exit_code() is not None:
            return False
        asked = child.stop_asked_at
        return asked is None or time.monotonic() - asked < self._settings.stop_grace_seconds

    def close(self, seconds: float) -> None:
        """End what still runs, and give it back."""
        child = self._child
        if child is None:
            return
        child.kill()
        child.await_exit(seconds)
        try:
            self._settle(child, asked=True)
        except DBAPIError as error:
            # Its lease runs out by itself.
            logger.warning("Export %s could not be given back: %s", self._export_id, error.orig)

    def _watch(self, child: Child) -> None:
        if child.exit_code() is not None:
            self._settle(child, asked=False)
            return
        with self._database.read() as session:
            task = session.get(ExportTask, self._export_id)
            ended = task is None or task.status in (ExportStatus.CANCELLED, ExportStatus.QUEUED)
            lost = (
                task is not None and task.status == ExportStatus.RUNNING and task.lease_token != child.token
            )
        if ended or lost:
            # Cancelled, deleted or another's: whatever it still does is dropped.
            child.kill()

    def _settle(self, child: Child, *, asked: bool) -> None:
        """The child has ended: if it did not end its export itself, give that back."""
        words = child.last_words()
        why = f"its process ended unexpectedly{': ' + words if words else ''}."
        try:
            with self._database.write() as session:
                task = exports.owned_export(session, child.job_id, self._export_id, child.token)
                if asked:
                    exports.give_back(session, task, "the worker was stopped.")
                else:
                    exports.lose(session, task, why, self._settings.max_losses)
                    self._pause()
        except LeaseLost:
            logger.info("Export %s: its process has ended it", self._export_id)
        self._doorbell.tell(child.job_id)
        child.close()
        remove_in_background(child.workdir)
        self._child = None

    def _recover_lost(self) -> None:
        with self._database.write() as session:
            for task in exports.expired_exports(session, utcnow()):
                why = f"worker {task.worker} was not heard of in time."
                exports.lose(session, task, why, self._settings.max_losses)

    def _claim(self) -> None:
        lease = timedelta(seconds=self._settings.lease_seconds)
        put_off = still_put_off(self._settings.root / "cache" / RESERVED)
        with self._database.write() as session:
            expires_at = utcnow() + lease
            task = exports.claim_export(session, self._worker, new_token(), expires_at, self._has, put_off)
            if task is None:
                live = [w.id for w in keys.live_workers(session, utcnow() - lease)]
                exports.fail_unmakeable(session, live)
        if task is not None:
            self._start(task)

    def _has(self, task: ExportTask) -> bool:
        step = task.checkpoint
        return step is None or checkpoint_weights(self._work, task.job_id, step).is_file()

    def _start(self, task: ExportTask) -> None:
        token = str(task.lease_token)
        folder = self._work / task.job_id / f"{EXPORT_PREFIX}{token}"
        with self._database.read() as session:
            owner = jobs.get_job(session, task.job_id, None).owner
        given = self._secrets.of(owner)
        hub_cache = self._secrets.hub_cache(owner, given)
        order = Order(
            task.job_id,
            token,
            str(folder),
            self._settings.model_dump(mode="json", exclude={"secrets_key"}),
            export_id=task.id,
            hub_cache=str(hub_cache) if hub_cache else None,
            secrets=given,
            store_account=account(os.environ),
        )
        try:
            child = Child(self._start_process(folder, CPU, [], hub_cache), order, ())
        except OSError as error:
            logger.error("Export %s could not be started: %s", task.id, error)
            self._pause()
            with self._database.write() as session:
                owned = exports.owned_export(session, task.job_id, task.id, token)
                exports.give_back(session, owned, f"the worker could not start it ({error.strerror}).")
            return
        self._child, self._export_id = child, task.id
        logger.info(
            "Export %s of job %s: attempt %d, process %d", task.id, task.job_id, task.attempt, child.pid
        )

    def _pause(self) -> None:
        self._claim_after = time.monotonic() + self._settings.retry_seconds

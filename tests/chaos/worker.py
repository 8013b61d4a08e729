"""A supervisor, whose children are those of `tests.chaos.child`: `python -m tests.chaos.worker N`."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading

import worker.supervisor
import worker.sweep
from shared.database import Database
from shared.device import Device
from shared.queue import Doorbell
from shared.settings import Settings, ensure_private_dir
from shared.tables import Job
from tests.chaos.child import freeze, hook, is_first
from worker.supervisor import Supervisor

# Half a minute would be longer than a short run: what is removed while others work is to be part of it.
SWEEP_SECONDS = 2.0


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("alembic").setLevel(logging.WARNING)
    worker.supervisor.SWEEP_SECONDS = worker.sweep.SWEEP_SECONDS = SWEEP_SECONDS
    hook(Supervisor, "_start", _before_start, lambda *_: None)
    settings = Settings()
    ensure_private_dir(settings.root)
    slots = [Device("cpu", number, "CPU", 8 << 30) for number in range(int(sys.argv[1]))]
    database = Database(settings.database())
    doorbell = Doorbell(settings.redis())
    supervisor = Supervisor(settings, database, doorbell, slots, "tests.chaos.child")
    signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=supervisor.stop).start())
    threading.Thread(target=_end_with_parent, args=(supervisor,), daemon=True).start()
    supervisor.run()
    doorbell.close()
    database.close()


def _before_start(_supervisor: Supervisor, job: Job, *_: object) -> None:
    stumble = job.spec["metadata"].get("stumble", "")
    attempt = Settings().root / "work" / job.id / f"{job.attempt}-{job.lease_token}"
    if not stumble.startswith("claimed:") or not is_first(attempt.parent):
        return
    if stumble.endswith("die"):
        os.kill(os.getpid(), signal.SIGKILL)
    freeze(os.getpid(), attempt)


def _end_with_parent(supervisor: Supervisor) -> None:
    sys.stdin.read()
    supervisor.stop()


if __name__ == "__main__":
    main()

"""The processes under test: a Valkey, an API and several supervisors, each of which can be killed and frozen.

What dies is started again a little later, and what was frozen is woken up, as long as `tend` is called.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import BinaryIO

import httpx
import psutil
from sqlalchemy.exc import DBAPIError

from shared.database import Database
from shared.errors import TuneyardError
from shared.lifecycle import JobStatus
from shared.repository import keys, leases
from shared.settings import Settings
from shared.valkey import EmbeddedValkey
from tests.chaos.child import FROZEN
from tests.chaos.history import record_history
from tests.postgresql import PostgreSQL

# A process renews its lease only once it has been started, which takes long on a machine that has much to do.
LEASE_STARTS = 3
SHORTEST_LEASE, LONGEST_LEASE = 2.5, 8.0
READY_SECONDS = 60.0
NOTICE_SECONDS = 0.3
# At most, if nobody takes over what a frozen process had.
SELF_FROZEN_SECONDS = 30.0
# Of one that may hold the database's lock: some wait for it for longer than they wait for a database.
LOCKED_SECONDS = 18.0
STOP_SECONDS = 30.0
PR_SET_CHILD_SUBREAPER = 36
CHILD = "tests.chaos.child"


@dataclass
class Part:
    """A process of the cluster, and from when on it may be started again."""

    name: str
    arguments: list[str]
    environment: dict[str, str]
    fds: tuple[int, ...] = ()
    process: subprocess.Popen[bytes] | None = None
    start_after: float = 0.0

    def is_running(self) -> bool:
        return self.process is not None and self.process.poll() is None


@dataclass
class Frozen:
    """A stopped process, and when it goes on. With `job` and `token` once somebody else has the job."""

    process: psutil.Process
    wake_at: float
    job: str = ""
    token: str = ""
    is_child: bool = False


@dataclass
class Cluster:
    """Workers share one database, queue and store; each two of them also a box: a data folder.

    `root` is the data folder of the API and of the first box, `aside` where logs go, which no full disk
    stops.
    """

    root: Path
    aside: Path
    workers: int
    slots: int
    max_losses: int
    random: Random
    models: Path | None = None
    # The database's server; without one it is a SQLite file.
    server: PostgreSQL | None = None
    parts: list[Part] = field(default_factory=list)
    frozen: list[Frozen] = field(default_factory=list)
    # Jobs whose processes froze themselves at a chosen point, or else those processes.
    self_frozen: set[str] = field(default_factory=set)
    restarts: int = 0

    def __post_init__(self) -> None:
        # Children of a supervisor that was killed become this process's own, and none is lost sight of.
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        self.aside.mkdir(parents=True, exist_ok=True)
        count = -(-self.workers // 2)
        self.boxes = [self.root, *(self.root / f"box-{number}" for number in range(1, count))]
        database_url = self.server.create() if self.server else None
        self.settings = Settings(data_dir=self.root, database_url=database_url)
        self.valkey = EmbeddedValkey(self.settings.valkey_socket(), self.root / "valkey")
        self._valkey_after = self._notice_after = 0.0
        self._server_after: float | None = None
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=512)
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._logs: list[BinaryIO] = []
        began = time.monotonic()
        subprocess.run([sys.executable, "-c", f"import {CHILD}"], check=True)
        took = (time.monotonic() - began) * min(self.workers * self.slots, 4) ** 0.5
        self.lease_seconds = min(max(LEASE_STARTS * took, SHORTEST_LEASE), LONGEST_LEASE)
        # Beyond the lease, and beyond the moment at which somebody notices.
        self.freeze_seconds = self.lease_seconds + 2.0

    def start(self, owners: list[str]) -> dict[str, str]:
        """Start everything and wait for the API; the owners' keys by name."""
        database = Database(self.settings.database())
        database.migrate()
        record_history(database)
        with database.write() as session:
            found = {owner: keys.create_key(session, owner, admin=False) for owner in owners}
        database.close()
        self.valkey.start()
        fd = self._listener.fileno()
        arguments = ["-m", "cli.main", "api", "--fd", str(fd), "--watch-stdin"]
        self.api = self._add("api", arguments, self.root, (fd,))
        self.supervisors = [
            self._add(
                f"worker-{number}", ["-m", "tests.chaos.worker", str(self.slots)], self.boxes[number // 2]
            )
            for number in range(self.workers)
        ]
        for part in self.parts:
            self._start(part)
        deadline = time.monotonic() + READY_SECONDS
        while not self.answers():
            if time.monotonic() > deadline or not self.api.is_running():
                raise RuntimeError(f"The API did not start: see {self.aside}")
            time.sleep(0.1)
        return found

    def tend(self) -> None:
        """Start again what has died, wake up what was frozen for long enough."""
        now = time.monotonic()
        for part in self.parts:
            if part.is_running():
                continue
            if part.process is not None:
                part.process = None
                part.start_after = max(part.start_after, now + self.random.uniform(0, 1))
            elif now >= part.start_after:
                self.restarts += 1
                self._start(part)
        if not self.valkey.is_running() and now >= self._valkey_after:
            self._valkey_after = now + 1
            with contextlib.suppress(TuneyardError, OSError):
                self.valkey.start()
        if self._server_after is not None and now >= self._server_after:
            self.restore_database()
        if now >= self._notice_after:
            # Reads all of /proc: not at every look.
            self._notice_after = now + NOTICE_SECONDS
            self._notice_frozen()
            self._notice_taken_over()
        for frozen in [f for f in self.frozen if now >= f.wake_at]:
            self._wake(frozen)

    def children(self) -> list[psutil.Process]:
        """The jobs' processes that run, those of killed supervisors included."""
        found = []
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if process.status() != psutil.STATUS_ZOMBIE and CHILD in process.cmdline():
                    found.append(process)
        return found

    def freeze(self, pid: int, seconds: float) -> bool:
        """Stop a process dead for a while."""
        try:
            process = psutil.Process(pid)
            process.suspend()
        except psutil.Error:
            return False
        self.frozen.append(Frozen(process, time.monotonic() + seconds))
        return True

    def wake_all(self) -> None:
        self._notice_frozen()
        for frozen in list(self.frozen):
            self._wake(frozen)

    def kill_valkey(self, *, wipe: bool) -> None:
        if self.valkey.process is not None:
            self.valkey.process.kill()
            self.valkey.process.wait()
        self._valkey_after = time.monotonic() + self.random.uniform(0, 2)
        if wipe:
            shutil.rmtree(self.root / "valkey", ignore_errors=True)

    def kill_database(self) -> bool:
        """Whether there was a server to kill."""
        if self.server is None or self._server_after is not None:
            return False
        self.server.kill()
        self._server_after = time.monotonic() + self.random.uniform(0, 3)
        return True

    def restore_database(self) -> None:
        if self.server is not None and self._server_after is not None:
            self._server_after = None
            self.server.start()

    def stop(self) -> list[str]:
        """Stop everything as an operator does; what did not stop cleanly."""
        self.wake_all()
        late = []
        for part in self.parts:
            if part.process is not None:
                part.process.terminate()
        deadline = time.monotonic() + STOP_SECONDS
        for part in self.parts:
            if part.process is None:
                continue
            with contextlib.suppress(subprocess.TimeoutExpired):
                part.process.wait(max(deadline - time.monotonic(), 0.1))
            # uvicorn ends by the signal that it was sent, once it has stopped.
            if part.process.poll() != (-signal.SIGTERM if part is self.api else 0):
                late.append(f"{part.name} ended with {part.process.poll()} when it was asked to stop")
        late += [f"{' '.join(child.cmdline())} outlived its supervisor" for child in self.children()]
        self.end()
        return late

    def end(self) -> None:
        """Leave no process behind, whatever happened, but the database's server."""
        spared: set[int] = set()
        with contextlib.suppress(psutil.Error, FileNotFoundError):
            if self.server:
                server = psutil.Process(self.server.pid)
                spared = {server.pid, *(process.pid for process in server.children(recursive=True))}
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if process.pid not in spared:
                    process.kill()
        for part in self.parts:
            if part.process is not None:
                part.process.wait()
                if part.process.stdin is not None:
                    part.process.stdin.close()
        self.valkey.stop()
        self._listener.close()
        for log in self._logs:
            log.close()

    def _add(self, name: str, arguments: list[str], box: Path, fds: tuple[int, ...] = ()) -> Part:
        box.mkdir(parents=True, exist_ok=True, mode=0o700)
        environment = {k: v for k, v in os.environ.items() if not k.startswith("TUNEYARD_")}
        given: dict[str, object] = {
            "DATA_DIR": box,
            "DATABASE_URL": self.settings.database(),
            "REDIS_URL": self.settings.redis(),
            "ARTIFACTS_URL": self.settings.artifacts(),
            "LEASE_SECONDS": self.lease_seconds,
            "POLL_SECONDS": 0.25,
            "RETRY_SECONDS": 0.05,
            "STOP_GRACE_SECONDS": 1.5,
            "CHECKPOINT_GRACE_SECONDS": 5,
            "MAX_LOSSES": self.max_losses,
            "MAX_QUEUED_JOBS": 100_000,
            "STANDBY": "reference",
            # As where boxes have no common disk.
            "STORE_CHECKPOINTS": "on",
        }
        if self.models is not None:
            given["MODELS_ROOT"] = self.models
        environment |= {f"TUNEYARD_{key}": str(value) for key, value in given.items()}
        part = Part(name, arguments, environment, fds)
        self.parts.append(part)
        return part

    def _start(self, part: Part) -> None:
        log = (self.aside / f"{part.name}.log").open("ab")
        self._logs.append(log)
        part.process = subprocess.Popen(
            [sys.executable, *part.arguments],
            env=part.environment,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            pass_fds=part.fds,
            start_new_session=True,
        )

    def _notice_frozen(self) -> None:
        """Some freeze themselves, and their supervisor, at the worst moment that there is."""
        known = {frozen.process.pid for frozen in self.frozen}
        supervisors = [
            psutil.Process(p.process.pid) for p in self.supervisors if p.process and p.is_running()
        ]
        for process in (*self.children(), *supervisors):
            with contextlib.suppress(psutil.Error):
                if process.pid in known or process.status() != psutil.STATUS_STOPPED:
                    continue
                self.frozen.append(self._self_frozen(process))
        if all(p.process and p.process.pid in {f.process.pid for f in self.frozen} for p in self.supervisors):
            # Nobody is left to take anything over: the first one goes on as if nothing had been.
            first = min(self.frozen, key=lambda f: f.wake_at)
            for frozen in [f for f in self.frozen if f.job == first.job]:
                frozen.wake_at = 0

    def _self_frozen(self, process: psutil.Process) -> Frozen:
        note = next((f for box in self.boxes if (f := box / f"{FROZEN}{process.pid}").is_file()), None)
        job, _, token = note.read_text().partition(" ") if note else ("", "", "")
        self.self_frozen.add(job or str(process.pid))
        patience = self.random.uniform(self.freeze_seconds, LOCKED_SECONDS)
        wake_at = time.monotonic() + (SELF_FROZEN_SECONDS if job else patience)
        return Frozen(process, wake_at, job, token, is_child=CHILD in process.cmdline())

    def _notice_taken_over(self) -> None:
        """Who froze itself goes on when another attempt is under way: children first, to have their say."""
        waiting = [f for f in self.frozen if f.job and f.wake_at > time.monotonic() + self.lease_seconds]
        if not waiting:
            return
        with contextlib.closing(Database(self.settings.database())) as database:
            try:
                with database.read() as session:
                    holders = leases.holders(session, [frozen.job for frozen in waiting])
            except DBAPIError:
                return  # It is away just now.
        for frozen in waiting:
            held = holders.get(frozen.job)
            if held is None or (held.token != frozen.token and held.status != JobStatus.QUEUED):
                delay = self.random.uniform(0, 1) + (0 if frozen.is_child else 1.5)
                frozen.wake_at = time.monotonic() + delay

    def _wake(self, frozen: Frozen) -> None:
        self.frozen.remove(frozen)
        with contextlib.suppress(psutil.Error):
            frozen.process.resume()

    def answers(self) -> bool:
        try:
            return httpx.get(f"{self.url}/healthz", timeout=2, trust_env=False).is_success
        except httpx.TransportError:
            return False

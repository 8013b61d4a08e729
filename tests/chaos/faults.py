"""What is done to the cluster, and when: each kind by name, and a schedule that a seed makes."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

import psutil
from redis import Redis, RedisError
from rq import Queue
from rq.serializers import JSONSerializer

from shared.ids import new_job_id
from shared.queue import QUEUE, TASK, Doorbell
from tests.chaos.cluster import Cluster, Part
from tests.chaos.disk import empty, fill

FULL_SECONDS = 1.5
DEAF_SECONDS = 2.0


@dataclass
class Faults:
    """Injects faults and counts them. Each kind tells whether it found something to hit."""

    cluster: Cluster
    random: Random
    small_disk: bool
    jobs: Callable[[], list[str]]
    counts: Counter[str] = field(default_factory=Counter)
    _full_until: float | None = None
    _deaf_until: float = 0.0

    def kinds(self) -> list[str]:
        found = [name for name in KINDS if name != "disk full" or self.small_disk]
        found = [name for name in found if name != "kill database" or self.cluster.server]
        return [name for name in found if name != "cut off" or self.cluster.workers > 1]

    def inject(self, kind: str) -> bool:
        hit = KINDS[kind](self)
        self.counts[kind] += hit
        return hit

    def tend(self) -> None:
        """End what lasts for a while only."""
        now = time.monotonic()
        if self._full_until is not None and now >= self._full_until:
            self.relieve()
        if now < self._deaf_until:
            self._steal_messages()

    def relieve(self) -> None:
        """Give the disk back."""
        if self.small_disk:
            empty(self.cluster.root)
        self._full_until = None

    def kill_child(self) -> bool:
        children = self.cluster.children()
        return bool(children) and _send(self.random.choice(children), signal.SIGKILL)

    def kill_worker(self) -> bool:
        return self._send_part(self._a_worker(), signal.SIGKILL)

    def stop_worker(self) -> bool:
        """As an upgrade does."""
        return self._send_part(self._a_worker(), signal.SIGTERM)

    def kill_api(self) -> bool:
        return self._send_part(self.cluster.api, signal.SIGKILL)

    def kill_valkey(self) -> bool:
        self.cluster.kill_valkey(wipe=False)
        return True

    def kill_database(self) -> bool:
        """A server of its own, without a word to its clients, and back within seconds."""
        return self.cluster.kill_database()

    def lose_valkey(self) -> bool:
        """With all that it had on the disk."""
        self.cluster.kill_valkey(wipe=True)
        return True

    def wipe_valkey(self) -> bool:
        return self._with_redis(lambda redis: redis.flushall())

    def freeze_child(self) -> bool:
        children = self.cluster.children()
        return bool(children) and self.cluster.freeze(
            self.random.choice(children).pid, self.cluster.freeze_seconds
        )

    def freeze_worker(self) -> bool:
        return self._freeze_part(self._a_worker(), self.cluster.freeze_seconds)

    def cut_off(self) -> bool:
        """A worker with all its children: they come back in any order, and find their jobs to be others'."""
        part = self._a_worker()
        if part.process is None or not part.is_running():
            return False
        with contextlib.suppress(psutil.Error):
            children = psutil.Process(part.process.pid).children()
            if self._freeze_part(part, self.cluster.freeze_seconds + self.random.uniform(0, 0.5)):
                for child in children:
                    self.cluster.freeze(child.pid, self.cluster.freeze_seconds + self.random.uniform(0, 0.5))
                return bool(children)
        return False

    def freeze_api(self) -> bool:
        return self._freeze_part(self.cluster.api, self.random.uniform(0.5, 2))

    def freeze_valkey(self) -> bool:
        process = self.cluster.valkey.process
        return process is not None and self.cluster.freeze(process.pid, self.random.uniform(1, 3))

    def ring_twice(self) -> bool:
        """Wake-ups for jobs that wait, run, have ended and never were, several times each."""
        known = self.jobs()
        doorbell = Doorbell(self.cluster.settings.redis())
        try:
            rung = [doorbell.ring(self.random.choice(known)) for _ in range(10)] if known else [False]
            return all([*rung, doorbell.ring(new_job_id())])
        finally:
            doorbell.close()

    def ring_never(self) -> bool:
        self._deaf_until = time.monotonic() + DEAF_SECONDS
        return True

    def forge(self) -> bool:
        """Messages that are none of ours."""

        def send(redis: Redis) -> None:
            queue = Queue(QUEUE, connection=redis, serializer=JSONSerializer)
            queue.enqueue_call("os.system", args=("exit 1",))
            queue.enqueue_call(TASK, args=("../../etc/passwd",))
            redis.rpush(queue.key, "no-such-message", b"\xff\xfe")

        return self._with_redis(send)

    def fill_disk(self) -> bool:
        self._full_until = time.monotonic() + FULL_SECONDS
        threading.Thread(target=fill, args=(self.cluster.root,)).start()
        return True

    def _a_worker(self) -> Part:
        return self.random.choice(self.cluster.supervisors)

    def _send_part(self, part: Part, number: signal.Signals) -> bool:
        if part.process is None or not part.is_running():
            return False
        part.process.send_signal(number)
        return True

    def _freeze_part(self, part: Part, seconds: float) -> bool:
        if part.process is None or not part.is_running():
            return False
        return self.cluster.freeze(part.process.pid, seconds)

    def _steal_messages(self) -> None:
        self._with_redis(lambda redis: redis.delete(f"rq:queue:{QUEUE}"))

    def _with_redis(self, do: Callable[[Redis], object]) -> bool:
        with Redis.from_url(self.cluster.settings.redis(), socket_timeout=0.5) as redis:
            try:
                do(redis)
            except RedisError:
                return False
        return True


KINDS: dict[str, Callable[[Faults], bool]] = {
    "kill child": Faults.kill_child,
    "kill worker": Faults.kill_worker,
    "kill API": Faults.kill_api,
    "kill Valkey": Faults.kill_valkey,
    "kill database": Faults.kill_database,
    "stop worker": Faults.stop_worker,
    "freeze child": Faults.freeze_child,
    "freeze worker": Faults.freeze_worker,
    "cut off": Faults.cut_off,
    "freeze API": Faults.freeze_api,
    "freeze Valkey": Faults.freeze_valkey,
    "wipe Valkey": Faults.wipe_valkey,
    "lose Valkey": Faults.lose_valkey,
    "wake-ups twice": Faults.ring_twice,
    "wake-ups never": Faults.ring_never,
    "forged wake-ups": Faults.forge,
    "disk full": Faults.fill_disk,
}


def _send(process: psutil.Process, number: signal.Signals) -> bool:
    with contextlib.suppress(psutil.Error):
        process.send_signal(number)
        return True
    return False


def schedule(random: Random, kinds: list[str], seconds: float, gap: float) -> list[tuple[float, str]]:
    """When (seconds from the start) what is done: every kind comes once before any comes again."""
    found: list[tuple[float, str]] = []
    at = gap
    while at < seconds or len(found) < len(kinds):
        for kind in random.sample(kinds, len(kinds)):
            found.append((at, kind))
            at += random.uniform(0.5, 1.5) * gap
    return [item for item in found if item[0] < seconds or item in found[: len(kinds)]]

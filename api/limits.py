"""How many requests an owner may have open, and a key may make under `/v1`, in this process."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from shared.errors import QuotaExceeded, RateLimited


@dataclass
class _Bucket:
    left: float
    seen: float


class RateLimiter:
    """A bucket for each key: it holds a minute's requests, and fills as fast as they may be made.

    Not safe between threads: one event loop has it.
    """

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit = per_minute
        self._clock = clock
        self._buckets: dict[int | None, _Bucket] = {}

    def take(self, key_id: int | None) -> dict[str, str]:
        """Count a request of this key; returns the headers that say what is left.

        Raises:
            RateLimited: nothing is left; it has the headers too.
        """
        if not self._limit:
            return {}
        now = self._clock()
        bucket = self._buckets.setdefault(key_id, _Bucket(self._limit, now))
        rate = self._limit / 60
        bucket.left = min(self._limit, bucket.left + (now - bucket.seen) * rate)
        bucket.seen = now
        allowed = bucket.left >= 1
        if allowed:
            bucket.left -= 1
        headers = {
            "x-ratelimit-limit-requests": str(self._limit),
            "x-ratelimit-remaining-requests": str(int(bucket.left)),
            "x-ratelimit-reset-requests": f"{math.ceil((self._limit - bucket.left) / rate * 1000)}ms",
        }
        if not allowed:
            wait = math.ceil((1 - bucket.left) / rate)
            raise RateLimited(
                f"This key may make {self._limit} requests a minute: try again in {wait} s.",
                headers | {"retry-after": str(wait)},
            )
        return headers


@dataclass(frozen=True)
class OpenRequests:
    """How many requests of each owner this process has open: answers that are followed, bodies that come."""

    limit: int
    _open: Counter[str] = field(default_factory=Counter)

    @contextmanager
    def one(self, owner: str) -> Iterator[None]:
        """Count one of the owner's until the block ends. On the event loop alone.

        Raises:
            QuotaExceeded: the owner has as many as one may.
        """
        if self._open[owner] >= self.limit:
            raise QuotaExceeded(
                f"You have {self.limit} requests open, which is this server's limit for one owner. End some "
                "of the streams, downloads or uploads first.",
                code="too_many_requests",
            )
        self._open[owner] += 1
        try:
            yield
        finally:
            self._open[owner] -= 1
            if not self._open[owner]:
                del self._open[owner]

"""News of running jobs, for those who wait: long polls and followers of a log.

One subscriber per process hears from Redis which job has news; one reader per followed job then reads the
new entries from the database, once for all its followers. With Redis away the readers look every second.
Everything here runs on the event loop, but for the reads, which run in threads.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from anyio import CapacityLimiter, to_thread
from pydantic_core import to_json
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from shared.clock import isoformat
from shared.database import Database
from shared.errors import NotFound
from shared.lifecycle import TERMINAL, JobStatus
from shared.queue import CONNECT_TIMEOUT_SECONDS, NEWS_CHANNEL
from shared.repository import logs
from shared.repository.logs import StoredEntry

# How often a reader looks by itself: with Redis away, and with Redis there, for news that were not told.
LOOK_SECONDS_ALONE = 1.0
LOOK_SECONDS = 5.0
RECONNECT_SECONDS = 1.0
LISTEN_SECONDS = 15.0
CANCEL_SECONDS = 0.05
READER_THREADS = 8
PAGE = 500
# So often followers are woken without a change.
KEEP_ALIVE_SECONDS = 15.0
BUFFER_LINES = 2000
BUFFER_BYTES = 4 << 20

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Line:
    """A log entry as a server-sent event, serialised once for all followers."""

    seq: int
    event: bytes


@dataclass(frozen=True)
class Look:
    """What one look into the database found."""

    status: JobStatus
    last_seq: int
    lines: list[Line]


def entry_json(row: StoredEntry) -> dict[str, Any]:
    """The entry in the contract's shape."""
    return {
        "seq": row.seq,
        "time": isoformat(row.time),
        "level": row.level,
        "type": row.type,
        "message": row.message,
        "data": row.data,
    }


def read_lines(database: Database, job_id: str, after: int) -> list[Line]:
    """One page of entries with seq > `after`, oldest first."""
    with database.read() as session:
        return [_line(row) for row in logs.read_entries(session, job_id, after, PAGE)]


class Hub:
    """Who follows which job in this process."""

    def __init__(self, database: Database, redis_url: str) -> None:
        self._database = database
        self._redis_url = redis_url
        self._tails: dict[str, Tail] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._limiter = CapacityLimiter(READER_THREADS)
        self.connected = False
        self.closed = False

    def start(self) -> None:
        """Begin to listen to Redis."""
        self._spawn(self._listen())

    def close(self) -> None:
        """End every wait, so that the server can stop; followers are told to come back."""
        self.closed = True
        for tail in self._tails.values():
            tail.close()

    async def stop(self) -> None:
        """End all tasks and wait until they have ended."""
        self.close()
        while self._tasks:
            for task in self._tasks:
                task.cancel()
            # A client library may swallow a cancellation that meets it while it connects: ask again.
            await asyncio.wait(self._tasks, timeout=CANCEL_SECONDS)

    @property
    def followers(self) -> int:
        return sum(tail.followers for tail in self._tails.values())

    @property
    def readers(self) -> int:
        """Jobs that are followed."""
        return len(self._tails)

    @asynccontextmanager
    async def follow(self, job_id: str) -> AsyncIterator[Tail]:
        """The job's tail, which is kept up to date for as long as anybody follows it."""
        tail = self._tails.get(job_id)
        if tail is None:
            tail = Tail(self._database, job_id, self._limiter, lambda: self.connected)
            self._tails[job_id] = tail
            tail.task = self._spawn(tail.run())
            if self.closed:
                tail.close()
        tail.followers += 1
        try:
            yield tail
        finally:
            tail.followers -= 1
            if tail.followers == 0:
                del self._tails[job_id]
                tail.stop()

    def _spawn(self, work: Any) -> asyncio.Task[None]:
        task: asyncio.Task[None] = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _listen(self) -> None:
        while not self.closed:
            client = Redis.from_url(
                self._redis_url,
                socket_connect_timeout=CONNECT_TIMEOUT_SECONDS,
                health_check_interval=LISTEN_SECONDS,
                retry=Retry(NoBackoff(), 0),
            )
            try:
                await self._hear(client)
            except (RedisError, OSError) as error:
                if self.connected:
                    logger.warning("Redis is away, looking into the database instead: %s", error)
                self.connected = False
            finally:
                await client.aclose()
            self._wake_all()
            await asyncio.sleep(RECONNECT_SECONDS)

    async def _hear(self, client: Redis) -> None:
        async with client.pubsub(ignore_subscribe_messages=True) as pubsub:
            await pubsub.subscribe(NEWS_CHANNEL)
            self.connected = True
            self._wake_all()
            while True:
                message = await pubsub.get_message(timeout=LISTEN_SECONDS)
                if message is None or not isinstance(message["data"], bytes):
                    continue
                tail = self._tails.get(message["data"].decode(errors="replace"))
                if tail is not None:
                    tail.wake()

    def _wake_all(self) -> None:
        for tail in self._tails.values():
            tail.wake()


class Tail:
    """The end of one job's log: its newest entries, in memory, and whether there will be more."""

    def __init__(
        self, database: Database, job_id: str, limiter: CapacityLimiter, connected: Callable[[], bool]
    ) -> None:
        self._database = database
        self._job_id = job_id
        self._limiter = limiter
        self._connected = connected
        self._lines: deque[Line] = deque()
        self._bytes = 0
        self._news = asyncio.Event()
        self._changed = asyncio.Event()
        # One timer for all followers: one for each would cost more than the entries themselves.
        self._beat = asyncio.get_running_loop().call_later(KEEP_ALIVE_SECONDS, self._wake_followers)
        self.task: asyncio.Task[None] | None = None
        self.followers = 0
        # None until the first look; then the newest seq that the buffer has, or had.
        self.last_seq: int | None = None
        self.status: JobStatus | None = None
        self.ended = False
        self.closed = False

    def wake(self) -> None:
        """There is news: look soon."""
        self._news.set()

    def close(self) -> None:
        """Nothing more will come from here, though the job may go on."""
        self.closed = True
        self._tell()

    def stop(self) -> None:
        self._beat.cancel()
        if self.task is not None:
            self.task.cancel()

    def take(self, after: int) -> list[Line] | None:
        """Entries with seq > `after` from memory; None if some of them are there no longer, or not yet."""
        if self.last_seq is None:
            return []
        if after >= self.last_seq:
            return []
        if after + 1 < self.first_seq:
            return None
        newest: list[Line] = []
        for line in reversed(self._lines):
            if line.seq <= after:
                break
            newest.append(line)
        newest.reverse()
        return newest

    @property
    def first_seq(self) -> int:
        """The oldest seq in memory, or the next one to come."""
        return self._lines[0].seq if self._lines else (self.last_seq or 0) + 1

    def is_beyond(self, after: int) -> bool:
        """Whether waiting for something after this seq is over."""
        return self.closed or self.ended or (self.last_seq is not None and self.last_seq > after)

    async def changed(self, seconds: float) -> bool:
        """Wait for a change; False when there was none in this time."""
        changed = self._changed
        try:
            async with asyncio.timeout(seconds):
                await changed.wait()
        except TimeoutError:
            return False
        return True

    async def next_change(self) -> None:
        """Wait for a change, or the beat."""
        await self._changed.wait()

    async def run(self) -> None:
        """Look whenever there is news, and every so often without, until the job has ended."""
        try:
            await self._watch()
        except Exception:
            # The boundary of one job's reader: its followers must not wait for what never comes.
            logger.exception("The reader of %s failed", self._job_id)
            self.close()

    async def _watch(self) -> None:
        while not (self.ended or self.closed):
            self._news.clear()
            try:
                more = await self._look()
            except NotFound:
                # Deleted: there is no ending to tell.
                self.close()
                return
            except (DBAPIError, PoolTimeout) as error:
                logger.warning("Could not look for news of %s: %s", self._job_id, error)
                more = False
                await asyncio.sleep(LOOK_SECONDS_ALONE)
            if more:
                continue
            seconds = LOOK_SECONDS if self._connected() else LOOK_SECONDS_ALONE
            try:
                async with asyncio.timeout(seconds):
                    await self._news.wait()
            except TimeoutError:
                continue

    async def _look(self) -> bool:
        """Take in what is new; True when there is more already."""
        found = await to_thread.run_sync(self._read, self.last_seq, limiter=self._limiter)
        before = (self.last_seq, self.status)
        if self.last_seq is None:
            self.last_seq = found.last_seq
        for line in found.lines:
            self._lines.append(line)
            self._bytes += len(line.event)
            self.last_seq = line.seq
        while self._lines and (len(self._lines) > BUFFER_LINES or self._bytes > BUFFER_BYTES):
            self._bytes -= len(self._lines.popleft().event)
        self.status = found.status
        self.ended = found.status in TERMINAL and self.last_seq >= found.last_seq
        if before != (self.last_seq, self.status) or self.ended:
            self._tell()
        return bool(found.lines) and self.last_seq < found.last_seq

    def _read(self, after: int | None) -> Look:
        with self._database.read() as session:
            # The status first: entries that are committed in between belong to it or come after it.
            status, last_seq = logs.log_state(session, self._job_id, None)
            rows = [] if after is None else logs.read_entries(session, self._job_id, after, PAGE)
            return Look(status, last_seq, [_line(row) for row in rows])

    def _wake_followers(self) -> None:
        self._beat = asyncio.get_running_loop().call_later(KEEP_ALIVE_SECONDS, self._wake_followers)
        self._tell()

    def _tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


def _line(row: StoredEntry) -> Line:
    # An entry is one line of JSON, so one data field; NaN can't be said in JSON.
    data = to_json(entry_json(row), inf_nan_mode="null")
    return Line(row.seq, b"id: %d\ndata: %b\n\n" % (row.seq, data))

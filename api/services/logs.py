"""A job's log: pages, long polls and followers; and its metrics."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any

from anyio import to_thread
from pydantic_core import to_json

from api.context import Caller
from api.news import Hub, Tail, entry_json, read_lines
from shared.database import Database
from shared.lifecycle import TERMINAL, JobStatus
from shared.repository import keys, logs

# How often a stream, which may go on for hours, asks whether its key is still good.
CHECK_SECONDS = 10.0
METRICS_PAGE = 2000
KEEP_ALIVE = b": keep-alive\n\n"

Write = Callable[[bytes], Awaitable[None]]


@dataclass(frozen=True)
class LogPage:
    """Part of a log. `has_more` tells of entries that are there already, `first_seq` of the oldest kept."""

    data: list[dict[str, Any]]
    next: int
    first_seq: int
    has_more: bool
    status: JobStatus

    def to_json(self) -> bytes:
        content = {
            "data": self.data,
            "next": self.next,
            "first_seq": self.first_seq,
            "has_more": self.has_more,
            "status": self.status,
        }
        return to_json(content, inf_nan_mode="null")


def read_page(database: Database, job_id: str, owner: str | None, after: int, limit: int) -> LogPage:
    """Up to `limit` entries with seq > `after`, oldest first.

    Raises:
        NotFound: the job is absent or somebody else's.
    """
    with database.read() as session:
        status, last_seq = logs.log_state(session, job_id, owner)
        data = [entry_json(row) for row in logs.read_entries(session, job_id, after, limit)]
        first = logs.first_seq(session, job_id)
    reached = data[-1]["seq"] if data else after
    return LogPage(data, reached, first, reached < last_seq, status)


async def wait_page(
    hub: Hub, database: Database, job_id: str, owner: str | None, after: int, limit: int, seconds: float
) -> LogPage:
    """The same, but waits up to `seconds` for the first entry, unless the job has ended.

    Raises:
        NotFound: the job is absent or somebody else's.
    """
    page = await to_thread.run_sync(read_page, database, job_id, owner, after, limit)
    if page.data or page.status in TERMINAL or seconds == 0:
        return page
    async with hub.follow(job_id) as tail:
        await _wait_beyond(tail, after, seconds)
    return await to_thread.run_sync(read_page, database, job_id, owner, after, limit)


async def follow(hub: Hub, database: Database, caller: Caller, job_id: str, after: int, write: Write) -> None:
    """Write the log from `after` on as server-sent events until the job has ended, then its end.

    A follower takes from the tail's memory what it has not sent yet, and from the database what is there no
    longer, so that it may be as slow as it likes without holding up anything. A key that is revoked meanwhile
    ends it within seconds.
    """
    clock = asyncio.get_running_loop().time
    checked = clock()
    # By a change that has nothing for this follower, or by the beat that is there for that.
    woken = False
    async with hub.follow(job_id) as tail:
        while not tail.closed:
            if clock() - checked > CHECK_SECONDS:
                if not await to_thread.run_sync(_is_allowed, database, caller):
                    return
                checked = clock()
            lines = tail.take(after)
            if lines is None:
                lines = await to_thread.run_sync(read_lines, database, job_id, after)
                # Cut off by retention, or deleted: go on with what there is.
                after = after if lines else tail.first_seq - 1
            if lines:
                after, woken = lines[-1].seq, False
                await write(b"".join(line.event for line in lines))
            elif tail.ended and after >= (tail.last_seq or 0):
                await write(b'event: end\ndata: {"status":"%b"}\n\n' % str(tail.status).encode())
                return
            else:
                if woken:
                    await write(KEEP_ALIVE)
                await tail.next_change()
                woken = True


def read_metrics(database: Database, caller: Caller, job_id: str) -> Iterator[bytes]:
    """`{"data": [one row a step, oldest first]}` in pieces: a long job has a million rows.

    Raises:
        NotFound: absent or somebody else's.
    """
    with database.read() as session:
        logs.log_state(session, job_id, caller.scope)
    return _metrics_json(database, job_id)


def _metrics_json(database: Database, job_id: str) -> Iterator[bytes]:
    yield b'{"data":['
    after, begun = -1, b""
    while True:
        with database.read() as session:
            rows = logs.read_metrics(session, job_id, after, METRICS_PAGE)
        if rows:
            yield begun + b",".join(to_json(row, inf_nan_mode="null") for row in rows)
            after, begun = int(rows[-1]["step"]), b","
        if len(rows) < METRICS_PAGE:
            break
    yield b"]}"


def _is_allowed(database: Database, caller: Caller) -> bool:
    with database.read() as session:
        return caller.key_id is not None and keys.is_live(session, caller.key_id)


async def _wait_beyond(tail: Tail, after: int, seconds: float) -> None:
    deadline = asyncio.get_running_loop().time() + seconds
    while not tail.is_beyond(after):
        left = deadline - asyncio.get_running_loop().time()
        if left <= 0 or not await tail.changed(left):
            return

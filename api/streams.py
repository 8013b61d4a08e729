"""Responses that are written piece by piece and end when the client goes."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any, TypeVar

import anyio
from anyio import to_thread
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from api.services.artifacts import Content
from api.services.logs import Write

T = TypeVar("T")


class EventStream(Response):
    """Server-sent events: calls `follow` with a function that writes."""

    media_type = "text/event-stream"

    def __init__(self, follow: Callable[[Write], Awaitable[None]]) -> None:
        # `no-transform` and the nginx header keep proxies from holding entries back.
        super().__init__(headers={"cache-control": "no-cache, no-transform", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._follow = follow

    async def __call__(self, _scope: Scope, receive: Receive, send: Send) -> None:
        await _start(self, send)
        await _until_gone(receive, lambda: self._write(send))

    async def _write(self, send: Send) -> None:
        async def write(data: bytes) -> None:
            await send({"type": "http.response.body", "body": data, "more_body": True})

        await self._follow(write)
        await _end(send)


class FileStream(Response):
    """An open file, which is closed when it was sent, or when the client has gone."""

    def __init__(self, content: Content, status: int, headers: Mapping[str, str]) -> None:
        super().__init__(status_code=status, headers=headers)
        self._content = content

    async def __call__(self, _scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await _start(self, send)
            await _until_gone(receive, lambda: self._write(send))
        finally:
            self._content.rest.close()

    async def _write(self, send: Send) -> None:
        chunk: bytes | None = self._content.first
        while chunk:
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
            chunk = await to_thread.run_sync(next, self._content.rest, None)
        await _end(send)


async def _until_gone(receive: Receive, work: Callable[[], Awaitable[None]]) -> None:
    """Do the work, or give it up when the client closes the connection."""
    async with anyio.create_task_group() as group:

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            group.cancel_scope.cancel()

        group.start_soon(watch)
        try:
            await work()
        finally:
            group.cancel_scope.cancel()


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T | None:
    """What the work comes to; None where the client closes the connection first, and the work is given up."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    tasks = (asyncio.create_task(work), asyncio.create_task(watch()))
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return tasks[0].result() if tasks[0].done() else None
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _start(response: Response, send: Send) -> None:
    await send(
        {"type": "http.response.start", "status": response.status_code, "headers": response.raw_headers}
    )


async def _end(send: Send) -> None:
    await send({"type": "http.response.body", "body": b"", "more_body": False})

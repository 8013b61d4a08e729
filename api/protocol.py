"""The HTTP protocol with limits on what a client may do to a connection, with a key or without one.

uvicorn waits for ever for a request's head and body and for a client to take its answer, and keeps a head of
any size. Here each connection has time for them, and a process has a limited number of connections.
"""

from __future__ import annotations

import asyncio
import logging
import resource

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

# File descriptors that are left to the database, the store, the queue and the log.
RESERVED_FILES = 256
MOST_FILES = 65_536

logger = logging.getLogger(__name__)


class BoundedProtocol(HttpToolsProtocol):
    """One connection. Times in seconds; who exceeds one is cut off without an answer."""

    # From the connection, and from each answer, to the end of the next request's head.
    head_seconds = 30.0
    # In this time a body brings at least so many bytes, or ends.
    body_seconds = 60.0
    body_bytes = 4096
    # In this time a client takes something of an answer that waits for it.
    send_seconds = 60.0
    # Of a head, of trailers, of what frames a body: all that the parser has made nothing of yet.
    most_unparsed = 64 << 10

    _head: asyncio.TimerHandle | None = None
    _body: asyncio.TimerHandle | None = None
    _send: asyncio.TimerHandle | None = None
    _unparsed = 0
    _received = 0
    _unsent = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > most_connections():
            logger.warning("Too many connections: one was closed")
            transport.abort()
            return
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._head, self._body, self._send):
            _cancel(timer)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._unparsed += len(data)
        self._received += len(data)
        super().data_received(data)
        if self._unparsed > self.most_unparsed:
            logger.warning("A request's head is over %d bytes", self.most_unparsed)
            self.transport.abort()

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._body is None:
            super().on_header(name, value)
        # A trailer, after the body: nothing reads it.

    def on_headers_complete(self) -> None:
        self._unparsed = 0
        _cancel(self._head)
        self._await_body()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._unparsed = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._unparsed = 0
        _cancel(self._body)
        self._body = None
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.cycle.response_complete:
            # Also for a body that comes on after its answer: no byte of it prolongs this.
            self._await_head()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._await_room()

    def resume_writing(self) -> None:
        _cancel(self._send)
        super().resume_writing()

    def _await_head(self) -> None:
        _cancel(self._head)
        self._unsent = self.transport.get_write_buffer_size()
        self._head = self.loop.call_later(self.head_seconds, self._head_is_late)

    def _head_is_late(self) -> None:
        if 0 < self.transport.get_write_buffer_size() < self._unsent:
            self._await_head()  # It still takes its last answer.
        else:
            self.transport.abort()

    def _await_body(self) -> None:
        self._received = 0
        self._body = self.loop.call_later(self.body_seconds, self._body_is_late)

    def _body_is_late(self) -> None:
        if self._received >= self.body_bytes or self.flow.read_paused:
            self._await_body()  # It comes, or this side has not asked for more.
        else:
            self.transport.abort()

    def _await_room(self) -> None:
        self._unsent = self.transport.get_write_buffer_size()
        self._send = self.loop.call_later(self.send_seconds, self._room_is_late)

    def _room_is_late(self) -> None:
        if self.transport.get_write_buffer_size() < self._unsent:
            self._await_room()
        else:
            self.transport.abort()


def raise_file_limit() -> None:
    """Let this process open as many files as it may, up to `MOST_FILES`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < MOST_FILES:
        wanted = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def most_connections() -> int:
    """How many clients may be connected at once."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = MOST_FILES if soft == resource.RLIM_INFINITY else soft
    return max(files - RESERVED_FILES, files // 2)


def _cancel(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()

"""Followers of a log, on a real server: in time, without loss, and gone when they go."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import AsyncMock

import httpx
import pytest

from api import news
from api.context import Caller
from api.news import Hub, Tail
from api.protocol import BoundedProtocol
from api.services import logs as log_service
from shared.database import Database
from shared.repository import keys
from shared.repository.jobs import delete_job
from shared.settings import Settings
from shared.valkey import EmbeddedValkey
from tests.api.conftest import SPEC, Live, eventually, finish, serve
from tests.conftest import wait_for
from tests.samples import make_job

STREAM = {"accept": "text/event-stream"}
ANN = Caller("ann", admin=False)
END = 'event: end\ndata: {"status":"succeeded"}\n\n'


class Follower(threading.Thread):
    """A client that reads one job's stream to its end."""

    def __init__(self, live: Live, job_id: str, after: int = 0) -> None:
        super().__init__()
        self.text = ""
        self.headers: httpx.Headers | None = None
        self._live = live
        self._path = f"/jobs/{job_id}/logs?after={after}"
        self.start()

    def run(self) -> None:
        with self._live.client() as client, client.stream("GET", self._path, headers=STREAM) as answer:
            self.headers = answer.headers
            for piece in answer.iter_text():
                self.text += piece

    @property
    def seqs(self) -> list[int]:
        return [int(line[4:]) for line in self.text.splitlines() if line.startswith("id: ")]


def test_followers_get_every_entry_once_and_the_end(live: Live) -> None:
    with live.client() as client:
        job_id = client.post("/jobs", json=SPEC).json()["id"]
    followers = [Follower(live, job_id, after=n % 2) for n in range(8)]
    wait_for(lambda: live.context.hub.followers == 8)
    assert live.context.hub.readers == 1
    for n in range(30):
        live.append(job_id, f"line {n}", f"again {n}")
    late = Follower(live, job_id)
    live.finish(job_id)
    for follower in [*followers, late]:
        follower.join(20)
        assert follower.text.endswith(END)
    assert all(follower.seqs == list(range(1 + n % 2, 62)) for n, follower in enumerate(followers))
    assert late.seqs == list(range(1, 62))
    wait_for(lambda: (live.context.hub.followers, live.context.hub.readers) == (0, 0))


def test_news_come_at_once(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    # The looks that the reader takes by itself would find them too, but not in the test's time.
    monkeypatch.setattr(news, "LOOK_SECONDS", 600.0)
    monkeypatch.setattr(news, "LOOK_SECONDS_ALONE", 600.0)
    with live.client() as client:
        job_id = client.post("/jobs", json=SPEC).json()["id"]
    follower = Follower(live, job_id)
    wait_for(lambda: follower.seqs == [1] and live.context.hub.connected)
    live.append(job_id, "news")
    wait_for(lambda: follower.seqs == [1, 2])
    live.finish(job_id)
    follower.join(20)


def test_a_key_that_is_revoked_ends_its_streams(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_service, "CHECK_SECONDS", 0.0)
    with live.client() as client:
        job_id = client.post("/jobs", json=SPEC).json()["id"]
    follower = Follower(live, job_id)
    wait_for(lambda: follower.seqs == [1])
    with live.database.write() as session:
        ann = next(key for key in keys.list_keys(session) if key.name == "ann")
        keys.revoke_key(session, ann.id or 0)
    live.append(job_id, "not for that key")
    follower.join(20)
    assert follower.seqs == [1]
    assert "event: end" not in follower.text


def test_clients_that_go_leave_nothing_behind(live: Live) -> None:
    with live.client() as client:
        job_id = client.post("/jobs", json=SPEC).json()["id"]
    hub = live.context.hub
    tasks = len(hub._tasks)
    for _ in range(3):
        connections = [_open_stream(live, job_id) for _ in range(20)]
        wait_for(lambda: hub.followers == 20)
        for connection in connections:
            connection.close()
        # At once, not at the next entry or keep-alive.
        wait_for(lambda: hub.followers == 0 and hub.readers == 0 and len(hub._tasks) == tasks)
    assert not [thread for thread in threading.enumerate() if "Follower" in thread.name]


def test_a_client_that_takes_nothing_holds_up_nobody(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BoundedProtocol, "send_seconds", 0.5)
    with live.client() as client:
        job_id = client.post("/jobs", json=SPEC).json()["id"]
    stuck = _open_stream(live, job_id)
    quick = Follower(live, job_id)
    wait_for(lambda: live.context.hub.followers == 2)
    # More than all buffers between the two hold, and more than the tail keeps.
    text = "x" * 50_000
    for n in range(20):
        live.append(job_id, *[f"{n} {text}" for _ in range(20)])
        wait_for(lambda n=n: quick.seqs[-1:] == [1 + 20 * (n + 1)])
    # The one that is stuck is given up in the end.
    wait_for(lambda: live.context.hub.followers == 1)
    stuck.close()
    live.finish(job_id)
    quick.join(20)
    assert quick.seqs == list(range(1, 402))


def test_a_slow_client_gets_everything(live: Live) -> None:
    with live.client() as client:
        job_id = client.post("/jobs", json=SPEC).json()["id"]
    slow = _open_stream(live, job_id)
    wait_for(lambda: live.context.hub.followers == 1)
    text = "x" * 50_000
    for n in range(15):
        live.append(job_id, *[f"{n} {text}" for _ in range(20)])
    live.finish(job_id)
    slow.settimeout(20)
    received = bytearray()
    while b"event: end" not in received[-200:]:
        received += slow.recv(1 << 20)
    slow.close()
    assert received.count(b"\nid: ") == 301


def _open_stream(live: Live, job_id: str) -> socket.socket:
    """A connection that asked for the stream and reads nothing of it."""
    connection = socket.create_connection(("127.0.0.1", live.port), timeout=10)
    request = (
        f"GET /jobs/{job_id}/logs HTTP/1.1\r\nHost: localhost\r\nAccept: text/event-stream\r\n"
        f"Authorization: Bearer {live.key}\r\n\r\n"
    )
    connection.sendall(request.encode())
    return connection


@pytest.fixture
def own_valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedValkey]:
    folder: Path = tmp_path_factory.mktemp("own")
    with EmbeddedValkey(folder / "run" / "v.sock", folder / "data") as server:
        yield server


def test_redis_may_go_and_come_back(
    settings: Settings, database: Database, owner_keys: dict[str, str], own_valkey: EmbeddedValkey
) -> None:
    apart = settings.model_copy(update={"redis_url": own_valkey.url})
    with serve(apart, database, owner_keys["ann"]) as live:
        with live.client() as client:
            job_id = client.post("/jobs", json=SPEC).json()["id"]
        follower = Follower(live, job_id)
        wait_for(lambda: live.context.hub.connected and follower.seqs == [1])
        own_valkey.stop()
        wait_for(lambda: not live.context.hub.connected)
        live.append(job_id, "while Redis is away")
        wait_for(lambda: follower.seqs == [1, 2])
        with live.client() as client:
            assert client.post("/jobs", json=SPEC).status_code == 201
            assert client.get("/readyz").json()["redis"] is False
        own_valkey.start()
        wait_for(lambda: live.context.hub.connected)
        live.append(job_id, "Redis is back")
        wait_for(lambda: follower.seqs == [1, 2, 3])
        live.finish(job_id)
        follower.join(20)
        assert follower.text.endswith(END)


def test_the_server_stops_at_once_with_followers_and_polls(
    settings: Settings, database: Database, owner_keys: dict[str, str]
) -> None:
    with serve(settings, database, owner_keys["ann"]) as live:
        with live.client() as client:
            job_id = client.post("/jobs", json=SPEC).json()["id"]
        followers = [Follower(live, job_id) for _ in range(3)]
        wait_for(lambda: live.context.hub.followers == 3)
        started = time.monotonic()
        live.stop()
        assert time.monotonic() - started < 5
    for follower in followers:
        follower.join(5)
        # No ending is told, for the job has not ended: a client comes back with its Last-Event-ID.
        assert "event: end" not in follower.text


async def _as_awaitable(value: object) -> object:
    return value


@pytest.mark.anyio
async def test_a_job_that_is_deleted_ends_its_followers(database: Database, settings: Settings) -> None:
    hub = Hub(database, settings.redis())
    job_id = make_job(database)
    written: list[bytes] = []

    async def write(data: bytes) -> None:
        written.append(data)

    follower = asyncio.create_task(log_service.follow(hub, database, ANN, job_id, 0, write))
    await eventually(lambda: _as_awaitable(written))
    finish(database, job_id)
    with database.write() as session:
        delete_job(session, job_id, None)
    async with asyncio.timeout(10):
        await follower
    assert b"event: end" not in b"".join(written)
    await hub.stop()


@pytest.mark.anyio
async def test_a_reader_that_fails_ends_its_followers(
    database: Database, settings: Settings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> None:
        raise ValueError("not an entry")

    hub = Hub(database, settings.redis())
    job_id = make_job(database)
    monkeypatch.setattr(Tail, "_read", broken)
    async with asyncio.timeout(10):
        await log_service.follow(hub, database, ANN, job_id, 0, AsyncMock())
    assert "not an entry" in caplog.text
    assert hub.followers == 0
    await hub.stop()


@pytest.mark.anyio
async def test_a_quiet_stream_is_kept_alive(
    database: Database, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(news, "KEEP_ALIVE_SECONDS", 0.05)
    hub = Hub(database, settings.redis())
    job_id = make_job(database)
    written: list[bytes] = []

    async def write(data: bytes) -> None:
        written.append(data)

    follower = asyncio.create_task(log_service.follow(hub, database, ANN, job_id, 1, write))
    await eventually(lambda: _as_awaitable(len(written) >= 3))
    assert set(written) == {b": keep-alive\n\n"}
    follower.cancel()
    await asyncio.wait([follower])
    assert hub.followers == 0
    await hub.stop()

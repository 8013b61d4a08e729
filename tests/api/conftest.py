"""The real application, called in process or served on a free loopback port."""

from __future__ import annotations

import asyncio
import hashlib
import socket
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from api.app import create_app
from api.context import Context
from api.server import Server
from shared.database import Database
from shared.events import Entry
from shared.lifecycle import JobStatus
from shared.queue import Doorbell
from shared.repository import files, jobs, keys, logs
from shared.settings import Settings
from shared.tables import ArtifactRow
from shared.valkey import EmbeddedValkey
from tests.conftest import PATIENCE, Databases, wait_for

URL = "http://localhost"
SPEC: dict[str, Any] = {"model": "bundled/smollm2-135m-instruct", "max_seq_length": 512}
GOOD_ROW = b'{"messages":[{"role":"user","content":"hi"},{"role":"assistant","content":"hello %d"}]}\n'


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(autouse=True)
def _no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test asks the hub for a model's config."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def owner_keys(database: Database) -> dict[str, str]:
    """API keys of two owners and an admin."""
    return create_keys(database)


def create_keys(database: Database) -> dict[str, str]:
    with database.write() as session:
        return {name: keys.create_key(session, name, admin=name == "root") for name in ("ann", "bob", "root")}


@dataclass
class Api:
    """An application that has started, and a client for each owner."""

    app: FastAPI
    database: Database
    ann: httpx.AsyncClient
    bob: httpx.AsyncClient
    root: httpx.AsyncClient
    nobody: httpx.AsyncClient

    @property
    def context(self) -> Context:
        context: Context = self.app.state.context
        return context

    async def create(self, **spec: Any) -> str:
        answer = await self.ann.post("/jobs", json=SPEC | spec)
        assert answer.status_code == 201, answer.text
        job_id: str = answer.json()["id"]
        return job_id

    def append(self, job_id: str, *messages: str) -> None:
        with self.database.write() as session:
            logs.append_entries(session, job_id, [Entry(message) for message in messages])

    def finish(self, job_id: str, status: JobStatus = JobStatus.SUCCEEDED) -> None:
        finish(self.database, job_id, status)

    def publish(self, job_id: str, name: str, content: bytes, folder: Path) -> ArtifactRow:
        return publish(self.context, job_id, name, content, folder)


def publish(context: Context, job_id: str, name: str, content: bytes, folder: Path) -> ArtifactRow:
    """Put a complete file into the store and the table."""
    source = folder / "artifact"
    source.write_bytes(content)
    key = f"jobs/{job_id}/attempt/{name}"
    context.store.publish(source, key)
    digest = hashlib.sha256(content).hexdigest()
    row = ArtifactRow(job_id=job_id, name=name, kind="adapter", bytes=len(content), sha256=digest, key=key)
    with context.database.write() as session:
        files.put_artifact(session, row)
    return row


def finish(database: Database, job_id: str, status: JobStatus = JobStatus.SUCCEEDED) -> None:
    with database.write() as session:
        job = jobs.lock_job(session, job_id, None)
        if job.status == JobStatus.QUEUED:
            jobs.set_status(job, JobStatus.RUNNING, worker="box-1", lease_token="token")
        jobs.set_status(job, status)


@asynccontextmanager
async def started(settings: Settings, database: Database, keys_of: dict[str, str]) -> AsyncIterator[Api]:
    """The application of these settings until the block ends."""
    app = create_app(settings)
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(app.router.lifespan_context(app))
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)

        async def client(name: str | None) -> httpx.AsyncClient:
            headers = {"Authorization": f"Bearer {keys_of[name]}"} if name else {}
            made = httpx.AsyncClient(transport=transport, base_url=URL, headers=headers)
            return await stack.enter_async_context(made)

        names = ("ann", "bob", "root", None)
        yield Api(app, database, *[await client(name) for name in names])


@pytest.fixture
async def api(settings: Settings, database: Database, owner_keys: dict[str, str]) -> AsyncIterator[Api]:
    async with started(settings, database, owner_keys) as running:
        yield running


@pytest.fixture(scope="module")
def shared_box(
    tmp_path_factory: pytest.TempPathFactory, valkey: EmbeddedValkey, databases: Databases
) -> Iterator[tuple[Settings, Database, dict[str, str]]]:
    """What an application of a whole module starts with, and its owners' keys."""
    url = databases.create()
    settings = Settings(
        data_dir=tmp_path_factory.mktemp("shared") / "data", database_url=url, redis_url=valkey.url
    )
    database = databases.open(settings)
    yield settings, database, create_keys(database)
    database.close()
    databases.drop(url)


@pytest.fixture(scope="module")
async def shared_api(shared_box: tuple[Settings, Database, dict[str, str]]) -> AsyncIterator[Api]:
    """One application for those tests of a module to which it does not matter what others left in it."""
    async with started(*shared_box) as running:
        yield running


@dataclass
class Live:
    """The application behind a real server, in a thread of its own."""

    server: Server
    app: FastAPI
    port: int
    key: str
    database: Database
    doorbell: Doorbell
    thread: threading.Thread

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def context(self) -> Context:
        context: Context = self.app.state.context
        return context

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"}

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, headers=self.headers, timeout=PATIENCE)

    def append(self, job_id: str, *messages: str) -> None:
        with self.database.write() as session:
            logs.append_entries(session, job_id, [Entry(message) for message in messages])
        self.doorbell.tell(job_id)

    def finish(self, job_id: str) -> None:
        finish(self.database, job_id)
        self.doorbell.tell(job_id)

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(20)


@contextmanager
def serve(settings: Settings, database: Database, key: str) -> Iterator[Live]:
    """Serve on a free port of the loopback until the block ends."""
    app = create_app(settings)
    server = Server(app, settings)
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    doorbell = Doorbell(settings.redis())
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="server")
    thread.start()
    live = Live(server, app, listener.getsockname()[1], key, database, doorbell, thread)
    try:
        wait_for(lambda: server.started)
        yield live
    finally:
        live.stop()
        doorbell.close()
        listener.close()
    assert not thread.is_alive()


@pytest.fixture
def live(settings: Settings, database: Database, owner_keys: dict[str, str]) -> Iterator[Live]:
    with serve(settings, database, owner_keys["ann"]) as running:
        yield running


@pytest.fixture(scope="module")
def shared_live(shared_box: tuple[Settings, Database, dict[str, str]]) -> Iterator[Live]:
    """As `shared_api`, behind a server."""
    settings, database, owners = shared_box
    with serve(settings, database, owners["ann"]) as running:
        yield running


async def eventually(look: Callable[[], Awaitable[Any]], seconds: float = PATIENCE) -> Any:
    """As `wait_for`, for what must be awaited."""
    deadline = time.monotonic() + seconds
    while not (seen := await look()):
        if time.monotonic() > deadline:
            pytest.fail(f"not within {seconds} s; last seen: {seen!r}")
        await asyncio.sleep(0.01)
    return seen


def error_of(answer: httpx.Response, status: int) -> dict[str, Any]:
    """The error, whose shape is checked on the way."""
    assert answer.status_code == status, answer.text
    body = answer.json()
    assert set(body) == {"error"}
    error: dict[str, Any] = body["error"]
    assert set(error) == {"code", "message", "param", "type"}
    assert error["message"]
    assert "Traceback" not in error["message"]
    return error

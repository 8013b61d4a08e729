"""The service measured: requests, followers of a log, claims, memory.

    python bench/service.py [--seconds 4] [--follow-seconds 20] [--claims 10] [--only requests,follow,claims]

Starts real servers (`tuneyard serve`, SQLite, the embedded Valkey) in folders of their own and loads them
over the loopback, each measurement for a bounded time. The load comes from this machine too: what clients
and emitter take of its cores, the server does not have.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

from shared.clock import utcnow
from shared.database import Database
from shared.events import Entry
from shared.ids import new_token
from shared.lifecycle import JobStatus
from shared.queue import Doorbell
from shared.repository import leases, logs, queue
from shared.settings import Settings
from shared.storage import Store
from worker.lease import JobLease
from worker.sink import DatabaseSink

CLIENTS = (1, 20, 200)
FOLLOWERS = 200
ENTRIES_A_SECOND = 50
LOG_ENTRIES = 200
READY_SECONDS = 60
MAX_REQUESTS = 50_000
SPEC = b'{"model":"bundled/smollm2-135m-instruct","max_seq_length":512}'
SENT = re.compile(rb'"sent_ns":(\d+)')


@dataclass
class Running:
    """A server in a folder of its own."""

    port: int
    key: str
    settings: Settings
    process: subprocess.Popen[str]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, headers={"Authorization": f"Bearer {self.key}"}, timeout=30)

    def api_memory(self) -> int:
        """Resident bytes of the API process."""
        for child in Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split():
            if b"api\0--fd" in Path(f"/proc/{child}/cmdline").read_bytes():
                pages = int(Path(f"/proc/{child}/statm").read_text().split()[1])
                return pages * os.sysconf("SC_PAGE_SIZE")
        raise RuntimeError("the server has no API process")


@dataclass
class Times:
    """Latencies of one measurement, in milliseconds."""

    values: list[float] = field(default_factory=list)
    seconds: float = 0.0
    failed: int = 0

    def quantile(self, share: float) -> float:
        ordered = sorted(self.values)
        return ordered[min(int(len(ordered) * share), len(ordered) - 1)] if ordered else float("nan")


class Connection:
    """One keep-alive connection that costs the client next to nothing, so that the server is measured."""

    def __init__(self, running: Running) -> None:
        self._port = running.port
        self._head = f"Host: 127.0.0.1\r\nAuthorization: Bearer {running.key}\r\n"

    async def __aenter__(self) -> Connection:
        self.reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port, limit=1 << 22)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._writer.close()

    def send(self, method: str, path: str, body: bytes = b"", accept: str = "*/*") -> None:
        head = (
            f"{method} {path} HTTP/1.1\r\n{self._head}Accept: {accept}\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        self._writer.write(head.encode() + body)

    async def head(self) -> bytes:
        return await self.reader.readuntil(b"\r\n\r\n")

    async def request(self, method: str, path: str, body: bytes = b"") -> int:
        """The status of an answer that has been read to its end."""
        self.send(method, path, body)
        head = await self.head()
        length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r")[0])
        await self.reader.readexactly(length)
        return int(head[9:12])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=4, help="of each request measurement")
    parser.add_argument("--follow-seconds", type=float, default=20, help="of the followers' measurement")
    parser.add_argument("--claims", type=int, default=10, help="jobs to wait for being claimed")
    parser.add_argument("--only", default="requests,follow,claims", help="which measurements")
    arguments = parser.parse_args()
    console = Console()
    parts = arguments.only.split(",")
    if "requests" in parts or "follow" in parts:
        with server("--no-worker") as running:
            time.sleep(2)
            idle = running.api_memory()
            if "requests" in parts:
                console.print(measure_requests(running, arguments.seconds))
            if "follow" in parts:
                console.print(measure_followers(running, arguments.follow_seconds))
            console.print(memory_table(idle, running.api_memory()))
    if "claims" in parts:
        with server("--workers", "1") as running:
            console.print(measure_claims(running, arguments.claims))


@contextmanager
def server(*options: str) -> Iterator[Running]:
    """`tuneyard serve` on a free port, until the block ends."""
    with tempfile.TemporaryDirectory(prefix="ty-bench-") as folder:
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("TUNEYARD_")},
            "TUNEYARD_MAX_QUEUED_JOBS": str(10**9),
        }
        command = [sys.executable, "-m", "cli.main", "serve", "--port", "0", "--data-dir", folder, *options]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
        )
        try:
            if process.stdout is None:
                raise RuntimeError("the server has no output")
            found = re.search(r"http://127\.0\.0\.1:(\d+)", process.stdout.readline())
            if found is None:
                raise RuntimeError("the server did not start: run `tuneyard serve` to see why")
            settings = Settings(data_dir=Path(folder))
            key = settings.local_key_file.read_text().strip()
            yield Running(int(found.group(1)), key, settings, process)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(READY_SECONDS)


def measure_requests(running: Running, seconds: float) -> Table:
    """Requests a second and their latencies, for each number of clients."""
    with running.client() as client:
        job_id = client.post("/jobs", content=SPEC).json()["id"]
    database = Database(running.settings.database())
    with database.write() as session:
        data = {"step": 1, "loss": 1.2345, "learning_rate": 2e-4, "epoch": 0.01, "tokens_per_second": 1234.5}
        logs.append_entries(session, job_id, [Entry("step", type="metrics", data=data)] * LOG_ENTRIES)
    database.close()
    table = Table(
        "request", "clients", "requests", "per second", "p50 ms", "p99 ms", "failed", title="Requests"
    )
    for name, method, path, body in (
        ("POST /jobs", "POST", "/jobs", SPEC),
        (f"GET logs, {LOG_ENTRIES}", "GET", f"/jobs/{job_id}/logs?after=1", b""),
        ("GET logs, none", "GET", f"/jobs/{job_id}/logs?after={LOG_ENTRIES + 1}", b""),
    ):
        for clients in CLIENTS:
            times = asyncio.run(load(running, clients, seconds, method, path, body))
            table.add_row(
                name,
                str(clients),
                str(len(times.values)),
                f"{len(times.values) / times.seconds:,.0f}",
                f"{times.quantile(0.5):.1f}",
                f"{times.quantile(0.99):.1f}",
                str(times.failed),
            )
    return table


async def load(running: Running, clients: int, seconds: float, method: str, path: str, body: bytes) -> Times:
    """Each client sends one request after the other until the time is over."""
    times = Times()

    async def client() -> None:
        async with Connection(running) as connection:
            await connection.request("GET", "/healthz")
            while time.perf_counter() < deadline and len(times.values) < MAX_REQUESTS:
                begun = time.perf_counter()
                status = await connection.request(method, path, body)
                times.values.append((time.perf_counter() - begun) * 1000)
                times.failed += status >= 400

    started = time.perf_counter()
    deadline = started + seconds
    await asyncio.gather(*[client() for _ in range(clients)])
    times.seconds = time.perf_counter() - started
    return times


def measure_followers(running: Running, seconds: float) -> Table:
    """The delay from a pipeline's emit to the receipt by each of the followers of one log."""
    database = Database(running.settings.database())
    with running.client() as client:
        # Nothing else may be claimed by the emitter.
        with database.write() as session:
            _cancel_queued(session)
        job_id = client.post("/jobs", content=SPEC).json()["id"]
    times = Times()
    context = multiprocessing.get_context("spawn")
    emitter = context.Process(target=emit, args=(str(running.settings.root), job_id, seconds))
    ended = asyncio.run(follow(running, job_id, emitter.start, times))
    emitter.join()
    database.close()
    expected = int(seconds * ENTRIES_A_SECOND) * FOLLOWERS
    table = Table("figure", "value", title="Emit to receipt of a server-sent event")
    table.add_row("followers", str(FOLLOWERS))
    table.add_row("entries a second", str(ENTRIES_A_SECOND))
    table.add_row("events received / sent", f"{len(times.values):,} / {expected:,}")
    table.add_row("streams that ended well", f"{ended} / {FOLLOWERS}")
    for name, share in (("p50", 0.5), ("p99", 0.99), ("p99.9", 0.999), ("max", 1.0)):
        table.add_row(f"{name} ms", f"{times.quantile(share):.0f}")
    return table


def _cancel_queued(session: Any) -> None:
    for job in queue.waiting(session):
        leases.claim(session, job.id, "bench", new_token(), utcnow() + timedelta(hours=1))


async def follow(
    running: Running, job_id: str, start: Callable[[], Awaitable[None] | None], times: Times
) -> int:
    """Follow with all clients, then start the emitter; how many streams came to their end."""
    path = f"/jobs/{job_id}/logs?after=1"

    async def follower(ready: asyncio.Semaphore) -> bool:
        async with Connection(running) as connection:
            connection.send("GET", path, accept="text/event-stream")
            await connection.head()
            ready.release()
            last = b""
            while chunk := await connection.reader.read(1 << 20):
                now = time.monotonic_ns()
                times.values += [(now - int(sent)) / 1e6 for sent in SENT.findall(chunk)]
                last = (last + chunk)[-200:]
                if b"event: end" in last:
                    return True
            return False

    ready = asyncio.Semaphore(0)
    followers = [asyncio.create_task(follower(ready)) for _ in range(FOLLOWERS)]
    for _ in followers:
        await ready.acquire()
    start()
    return sum(await asyncio.gather(*followers))


def emit(root: str, job_id: str, seconds: float) -> None:
    """In a process of its own, as a job's child is: claim the job and log to it through the real sink."""
    settings = Settings(data_dir=Path(root))
    database = Database(settings.database())
    doorbell = Doorbell(settings.redis())
    token = new_token()
    with database.write() as session:
        if leases.claim(session, job_id, "bench", token, utcnow() + timedelta(seconds=30)) is None:
            raise RuntimeError("somebody else has the emitter's job")
    sink = DatabaseSink(
        database, Store(settings.artifacts()), doorbell, JobLease(job_id, token), 30, on_lost=sys.exit
    )
    sink.start()
    started = time.monotonic()
    for n in range(int(seconds * ENTRIES_A_SECOND)):
        time.sleep(max(0.0, started + n / ENTRIES_A_SECOND - time.monotonic()))
        data = {"step": n, "loss": 1.2345, "learning_rate": 2e-4, "sent_ns": time.monotonic_ns()}
        sink.log(Entry(f"step {n}", type="metrics", data=data))
    sink.finish(JobStatus.SUCCEEDED, Entry("Done."))
    doorbell.close()
    database.close()


def measure_claims(running: Running, count: int) -> Table:
    """From the moment that a client sends POST /jobs to the moment that the worker has claimed the job."""
    times = Times()
    with running.client() as client:
        while not client.get("/system").json()["workers"]:
            time.sleep(0.1)
        for _ in range(count):
            sent = time.time()
            job_id = client.post("/jobs", content=SPEC).json()["id"]
            page = client.get(f"/jobs/{job_id}/logs", params={"after": 1, "wait": 20}).json()
            claimed = datetime.fromisoformat(page["data"][0]["time"]).astimezone(UTC).timestamp()
            times.values.append((claimed - sent) * 1000)
            client.post(f"/jobs/{job_id}/cancel")
            while client.get(f"/jobs/{job_id}").json()["status"] == "cancelling":
                time.sleep(0.1)
    table = Table("figure", "value", title="Submit to claimed, on an idle box")
    table.add_row("jobs", str(count))
    for name, share in (("p50", 0.5), ("max", 1.0)):
        table.add_row(f"{name} ms", f"{times.quantile(share):.0f}")
    return table


def memory_table(idle: int, after: int) -> Table:
    table = Table("figure", "value", title="Memory of the API process")
    table.add_row("idle MB", f"{idle / 1e6:.0f}")
    table.add_row("after the load MB", f"{after / 1e6:.0f}")
    return table


if __name__ == "__main__":
    main()

"""The service measured: requests, followers of a log, claims, memory.

    python -m bench.service [--small] [--seconds 4] [--follow-seconds 20] [--claims 10] [--only PART,PART]

Starts real servers (`tuneyard serve`, SQLite, the embedded Valkey) in folders of their own and loads them
over the loopback, each measurement for a bounded time. The load comes from this machine too: what clients
and emitter take of its cores, the server does not have. Parts: requests, follow, claims, storage, and how
everything grows with owners, queued, finished, entries and spread (log entries of one job, and of many).
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import re
import sys
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench.growth import AXES, SPEC, growth_table, storage_table
from bench.serving import Connection, Running, Times, server
from shared.clock import utcnow
from shared.database import Database
from shared.events import Entry
from shared.ids import new_token
from shared.lifecycle import JobStatus
from shared.queue import Doorbell
from shared.repository import leases, logs
from shared.settings import Settings
from shared.storage import Store
from worker.lease import JobLease
from worker.sink import DatabaseSink

PARTS = ("requests", "follow", "claims", "storage", *AXES)
CLIENTS = (1, 20, 200)
FOLLOWERS = (50, 200, 500)
ENTRIES_A_SECOND = 50
LOG_ENTRIES = 200
MAX_REQUESTS = 50_000
SENT = re.compile(rb'"sent_ns":(\d+)')


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=4, help="of each request measurement")
    parser.add_argument("--follow-seconds", type=float, default=20, help="of each followers' measurement")
    parser.add_argument("--claims", type=int, default=10, help="jobs to wait for being claimed")
    parser.add_argument("--only", default=",".join(PARTS), help="which measurements")
    parser.add_argument("--small", action="store_true", help="a tenth of everything")
    arguments = parser.parse_args()
    console = Console(width=120)
    parts = arguments.only.split(",")
    if "requests" in parts:
        with server("--no-worker") as running:
            time.sleep(2)
            idle = running.api_memory()
            console.print(measure_requests(running, arguments.seconds))
            console.print(memory_table(idle, running.api_memory()))
    if "follow" in parts:
        shrink = 10 if arguments.small else 1
        counts = [count // shrink for count in FOLLOWERS]
        console.print(measure_followers(counts, arguments.follow_seconds / shrink))
    if "claims" in parts:
        with server("--workers", "1") as running:
            console.print(measure_claims(running, arguments.claims))
    if "storage" in parts:
        console.print(storage_table())
    for axis in AXES:
        if axis in parts:
            console.print(growth_table(axis, small=arguments.small))


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


def measure_followers(counts: list[int], seconds: float) -> Table:
    """The delay from a pipeline's emit to the receipt by each of the followers of one log."""
    table = Table(
        "figure", *map(str, counts), title=f"Followers of one log, {ENTRIES_A_SECOND} entries a second"
    )
    columns = []
    for count in counts:
        with server("--no-worker") as running:
            with running.client() as client:
                job_id = client.post("/jobs", content=SPEC).json()["id"]
            times = Times()
            emitter = multiprocessing.get_context("spawn").Process(
                target=emit, args=(str(running.settings.root), job_id, seconds)
            )
            idle, began = running.api_memory(), running.api_seconds()
            ended = asyncio.run(follow(running, count, job_id, emitter.start, times))
            emitter.join()
            sent = int(seconds * ENTRIES_A_SECOND) * count
            columns.append(
                {
                    "events received / sent": f"{len(times.values):,} / {sent:,}",
                    "streams that ended well": str(ended),
                    "p50 / p99 ms": f"{times.quantile(0.5):.0f} / {times.quantile(0.99):.0f}",
                    "p99.9 / max ms": f"{times.quantile(0.999):.0f} / {times.quantile(1.0):.0f}",
                    "API memory before / after, MB": f"{idle / 1e6:.0f} / {running.api_memory() / 1e6:.0f}",
                    "API processor seconds a second": f"{(running.api_seconds() - began) / seconds:.2f}",
                }
            )
    for name in columns[0]:
        table.add_row(name, *[column[name] for column in columns])
    return table


async def follow(
    running: Running, count: int, job_id: str, start: Callable[[], Awaitable[None] | None], times: Times
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
    followers = [asyncio.create_task(follower(ready)) for _ in range(count)]
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

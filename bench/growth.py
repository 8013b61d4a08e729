"""How the service's latencies and memory grow with owners, queue, history and logs."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

from rich.markup import escape
from rich.table import Table
from sqlalchemy import text

from bench.population import Population, Size, messages, metrics, populate
from bench.serving import Connection, Running, Times, server
from shared.database import Database
from shared.device import Device
from shared.events import Entry
from shared.queue import Doorbell
from shared.repository import leases, logs
from shared.settings import Settings
from shared.storage import Store
from shared.tables import Job
from worker.claims import Claims
from worker.retention import collect
from worker.supervisor import Supervisor

AXES: dict[str, tuple[str, tuple[int, int, int]]] = {
    "owners": ("owners", (1, 10, 100)),
    "queued": ("queued jobs", (100, 1_000, 10_000)),
    "finished": ("finished jobs", (100, 1_000, 10_000)),
    "entries": ("log entries of one job", (10_000, 100_000, 1_000_000)),
    "spread": ("log entries of many jobs", (10_000, 100_000, 1_000_000)),
}
SMALL = 10
# Each measurement ends after so long, or so many.
SECONDS = 0.5
LEAST, MOST = 8, 200
SPEC = b'{"model":"bundled/smollm2-135m-instruct","max_seq_length":512}'
STORED = 20_000

T = TypeVar("T")


def growth_table(axis: str, *, small: bool) -> Table:
    """One axis: its three sizes side by side, everything else as it is in `Size`."""
    title, sizes = AXES[axis]
    base = Size()
    if small:
        sizes = (max(sizes[0] // SMALL, 1), sizes[1] // SMALL, sizes[2] // SMALL)
        base = Size(owners=3, queued=20, finished=50, entries=100)
    columns = [measure(replace(base, **{axis: size})) for size in sizes]
    table = Table("ms: p50 / p99 / processor's", *[f"{size:,}" for size in sizes], title=f"By {title}")
    for name in columns[0]:
        table.add_row(escape(name), *[column[name] for column in columns])
    return table


def measure(size: Size) -> dict[str, str]:
    """Everything that is measured at one size, by name."""
    with server("--no-worker") as running:
        database = Database(running.settings.database())
        population = populate(database, size)
        cells = {}
        for name, method, path, admin in requests(population, size.entries):
            key = running.key if admin else population.key
            cells[name] = _cell(asyncio.run(_repeat_request(replace(running, key=key), method, path)))
        for name, times in inside(database, running.settings):
            cells[name] = _cell(times)
        cells["API memory, MB"] = f"{running.api_memory() / 1e6:.0f}"
        cells["database, MB"] = f"{_file_bytes(database) / 1e6:.1f}"
        database.close()
    return cells


def requests(population: Population, entries: int) -> Iterator[tuple[str, str, str, bool]]:
    """Name, method and path of each request, and whether an admin sends it."""
    mine, logged = population.finished, population.logged
    yield "GET /jobs", "GET", "/jobs", False
    yield "GET /jobs, last page", "GET", f"/jobs?after={mine[min(20, len(mine) - 1)]}", False
    yield "GET /jobs as admin", "GET", "/jobs", True
    yield "GET /jobs as admin, last page", "GET", f"/jobs?after={mine[min(2, len(mine) - 1)]}", True
    yield "GET /jobs?status=failed", "GET", "/jobs?status=failed", False
    yield "GET /jobs?model=, absent", "GET", "/jobs?model=local/none", False
    yield "GET /jobs?metadata[k]=, rare", "GET", "/jobs?metadata[rare]=r0", False
    yield "GET /jobs?metadata[k]=, frequent", "GET", "/jobs?metadata[team]=team-0", False
    yield "GET /jobs/{id}, queued", "GET", f"/jobs/{population.queued[-1]}", False
    yield "GET logs, front", "GET", f"/jobs/{logged}/logs?after=0&limit=20", False
    yield "GET logs, middle", "GET", f"/jobs/{logged}/logs?after={entries // 2}&limit=20", False
    yield "GET logs, end", "GET", f"/jobs/{logged}/logs?after={entries - 20}&limit=20", False
    yield "GET /jobs/{id}/metrics", "GET", f"/jobs/{mine[0]}/metrics", False
    yield "GET /v1/fine_tuning/jobs", "GET", "/v1/fine_tuning/jobs", False
    yield "GET /v1/fine_tuning/jobs/{id}/events", "GET", f"/v1/fine_tuning/jobs/{logged}/events", False
    yield "GET /system", "GET", "/system", False
    yield "GET /metrics as admin", "GET", "/metrics", True
    yield "POST /jobs", "POST", "/jobs", False


def inside(database: Database, settings: Settings) -> Iterator[tuple[str, Times]]:
    """What the worker does, in this process."""
    box = Device("cpu", 0, "CPU (x86_64, 2 cores)", 64 << 30)
    claims = Claims(settings, database, "bench", [box])

    def claim() -> Job:
        return next(claims.fill([box]))[0]

    def give_back(job: Job) -> None:
        with database.write() as session:
            leases.give_back(session, leases.owned_job(session, job.id, str(job.lease_token)), "Measured.")

    yield "claim", _repeat(claim, give_back)
    doorbell = Doorbell(settings.redis())
    supervisor = Supervisor(settings, database, doorbell, [])
    (settings.root / "work").mkdir(exist_ok=True)
    yield "supervisor's tick, no free slot", _repeat(supervisor.tick)
    doorbell.close()
    store = Store(settings.artifacts())
    keeping = settings.model_copy(update={"keep_artifact_days": 30, "keep_log_entries": 2_000_000})
    yield "retention's scan", _repeat(lambda: collect(database, store, keeping, dry_run=True))


def storage_table() -> Table:
    """Bytes of the database file for each entry of a log."""
    table = Table("entries", "message and data, bytes", "in the database, bytes", title="Storage of logs")
    for name, entries, job_count in (
        ("messages of one job", list(messages(STORED)), 1),
        ("measures of one job", list(metrics(STORED)), 1),
        ("measures of 100 jobs side by side", list(metrics(STORED)), 100),
    ):
        plain = sum(len(e.message) + len(json.dumps(e.data or "")) for e in entries) / STORED
        table.add_row(name, f"{plain:.0f}", f"{bytes_per_entry(entries, job_count):.0f}")
    return table


def bytes_per_entry(entries: Sequence[Entry], job_count: int) -> float:
    """What an entry adds to the database's file, written ten at a time for each job in turn."""
    with TemporaryDirectory(prefix="ty-bench-") as folder:
        database = Database(Settings(data_dir=Path(folder)).database())
        database.migrate()
        population = populate(database, Size(owners=1, queued=job_count, finished=1, entries=1))
        before = _file_bytes(database)
        each = len(entries) // job_count
        with database.write() as session:
            for begin in range(0, each, 10):
                for job_id in population.queued:
                    logs.append_entries(session, job_id, entries[begin : begin + 10])
        added = _file_bytes(database) - before
        database.close()
    return added / (each * job_count)


def _file_bytes(database: Database) -> int:
    with database.read() as session:
        return int(
            session.connection()
            .execute(text("SELECT page_count * page_size FROM pragma_page_count, pragma_page_size"))
            .scalar_one()
        )


async def _repeat_request(running: Running, method: str, path: str) -> Times:
    times = Times()
    body = SPEC if method == "POST" else b""
    before = running.api_seconds()
    async with Connection(running) as connection:
        # The first one may find everything cold; it counts as the others do.
        while _goes_on(times):
            begun = time.perf_counter()
            status = await connection.request(method, path, body)
            times.add(time.perf_counter() - begun)
            assert status < 400, f"{method} {path}: {status}"
    times.processor = running.api_seconds() - before
    return times


def _repeat(work: Callable[[], T], tidy: Callable[[T], object] = lambda _: None) -> Times:
    times = Times()
    while _goes_on(times):
        begun, used = time.perf_counter(), time.process_time()
        result = work()
        times.add(time.perf_counter() - begun)
        times.processor += time.process_time() - used
        tidy(result)
    return times


def _goes_on(times: Times) -> bool:
    count = len(times.values)
    return count < LEAST or (count < MOST and sum(times.values) < SECONDS * 1000)


def _cell(times: Times) -> str:
    processor = times.processor * 1000 / len(times.values)
    return f"{times.quantile(0.5):.1f} / {times.quantile(0.99):.1f} / {processor:.1f}"

"""Fault tests: `python -m tests.chaos`, or `make chaos`.

Runs a cluster under a schedule of faults that the seed makes, then checks what must hold and prints a report.
Ends with 1 if anything is broken, and then keeps the folder of the run.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.chaos.child import POINTS
from tests.chaos.disk import enter_namespace, mount_small_disk
from tests.chaos.protocol import Bounds, Explored, Guards, explore
from tests.chaos.real import make_models
from tests.chaos.run import Plan, Report, run
from tests.postgresql import MISSING, find_program

DISK_MEGABYTES = 192
MEGABYTES_A_MINUTE = 20
# More than the tests visit each time.
MODELS = (Bounds(jobs=2, workers=3, attempts=2, pauses=1), Bounds(jobs=2, workers=2, attempts=3, pauses=0))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=1)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--real", type=int, default=0, help="so many jobs are trained for real")
    parser.add_argument("--short", action="store_true", help="the form that `make test` runs")
    parser.add_argument("--keep", action="store_true", help="keep the run's folder also if nothing is broken")
    parser.add_argument("--database", choices=("sqlite", "postgresql"), default="sqlite")
    given = parser.parse_args()
    if given.database == "postgresql" and find_program("pg_ctl") is None:
        parser.error(MISSING)
    if given.database == "sqlite" or os.getuid() == 0:
        # In a user's own namespace PostgreSQL takes that user for root, whom it refuses.
        enter_namespace()
    # So that whoever stops it finds no process of it left.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    explored = [] if given.short else [explore(bounds, Guards()) for bounds in MODELS]
    folder = Path(tempfile.mkdtemp(prefix="tuneyard-chaos-"))
    root = folder / "data"
    root.mkdir(mode=0o700)
    small_disk = mount_small_disk(root, DISK_MEGABYTES + int(MEGABYTES_A_MINUTE * given.minutes))
    plan = _plan(given, folder, small_disk=small_disk)
    print(f"Seed {plan.seed}, in {folder}", flush=True)
    report = run(plan, root, folder / "logs")
    report.broken += [
        f"the model of leases: {found.broken}, by {found.way}" for found in explored if found.broken
    ]
    _print(plan, report, explored)
    if report.broken or given.keep:
        kept = Path(f"{folder}-kept")
        shutil.copytree(folder, kept, ignore=lambda _, names: [n for n in names if n.endswith(".sock")])
        print(f"Seed {plan.seed}, {len(report.broken)} broken. What was left is in {kept}")
    if small_disk:
        subprocess.run(["umount", "-l", str(root)], check=True)  # noqa: S607 - as the tool to mount
    shutil.rmtree(folder)
    return 1 if report.broken else 0


def _plan(given: argparse.Namespace, folder: Path, *, small_disk: bool) -> Plan:
    poison = {"name": "poison", "metadata": {"steps": "3", "seconds": "0"}}
    planned: list[dict[str, Any]] = [poison]
    for point in ("published", "finishing") if given.short else POINTS:
        metadata = {"steps": "4", "seconds": "0.05", "stumble": f"{point}:freeze"}
        planned.append({"name": "chaos", "metadata": metadata})
    return Plan(
        seed=given.seed,
        seconds=18 if given.short else given.minutes * 60,
        workers=given.workers,
        slots=1 if given.short or given.workers > 2 else 2,
        clients=3,
        gap=0.9 if given.short else 2,
        step_seconds=0.1 if given.short else 0.2,
        most_open=2 if given.short else 4,
        stumbling=0 if given.short else 0.25,
        max_losses=4 if given.short else 8,
        small_disk=small_disk,
        planned=planned,
        real=given.real,
        models=make_models(folder / "models") if given.real else None,
        postgresql=given.database == "postgresql",
    )


def _print(plan: Plan, report: Report, explored: list[Explored]) -> None:
    kind = "PostgreSQL" if plan.postgresql else "SQLite"
    table = Table(
        title=f"Chaos: seed {plan.seed}, {plan.workers} workers, {kind}, {report.seconds:.0f} s", min_width=60
    )
    table.add_column("what")
    table.add_column("count", justify="right")
    for fault, count in report.faults.items():
        table.add_row(f"fault: {fault}", str(count))
    if not plan.small_disk:
        table.add_row("fault: disk full", "skipped: this machine lets nobody mount a small disk")
    jobs = report.jobs
    rows: list[tuple[str, object]] = [
        ("faults injected", report.faults.total()),
        ("jobs", f"{jobs.total()} ({', '.join(f'{n} {status}' for status, n in sorted(jobs.items()) if n)})"),
        ("trained for real", report.trained),
        ("attempts", report.attempts),
        ("log entries", sum(event.what == "entry" for event in report.truth.history)),
        ("pages and streams read by clients", len(report.seen.pages)),
        ("downloads", len(report.seen.downloads)),
        ("files without a row, removed by gc", report.strays),
        *(
            ("states of the model of leases", f"{found.states:,} in {found.steps:,} steps")
            for found in explored
        ),
        ("invariants broken", len(report.broken)),
    ]
    for name, value in rows:
        table.add_row(name, str(value))
    console = Console(width=100)
    console.print(table)
    for line in report.broken[:40]:
        console.print(f"broken: {line}", markup=False, highlight=False)


if __name__ == "__main__":
    sys.exit(main())

"""`tuneyard export`: another file of a job that has succeeded."""

from __future__ import annotations

import time
from typing import Annotated

import typer
from rich.console import Console

from cli.client import Client, Json
from cli.connect import connect
from cli.render import human_bytes, log_line

POLL_SECONDS = 0.5
UNDER_WAY = ("queued", "running")

console = Console()


def export(
    job_id: Annotated[str, typer.Argument(help="Id of a job that has succeeded.")],
    fmt: Annotated[str, typer.Argument(metavar="FORMAT", help="adapter, merged_16bit, gguf:q4_k_m, …")],
    checkpoint: Annotated[
        int | None, typer.Option(min=1, help="Step of a checkpoint; default: the adapter at the end.")
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Wait for it, and print its log.")] = False,
) -> None:
    """Make another file of a job that has succeeded."""
    with connect() as client:
        task = client.export(job_id, fmt, checkpoint)
        if follow:
            task = _follow(client, job_id, task)
    if task["artifact"]:
        artifact = task["artifact"]
        console.print(f"{artifact['name']}: {human_bytes(artifact['bytes'])}", highlight=False)
    else:
        console.print(task["status"])
    if task["status"] in ("failed", "cancelled"):
        raise typer.Exit(1)


def _follow(client: Client, job_id: str, task: Json) -> Json:
    """Print what the log says from the moment when the export was asked for, until it has ended."""
    after, begun = 0, False
    while True:
        # The state first: what it says is in the log by then.
        found = next(t for t in client.exports(job_id) if t["id"] == task["id"])
        for entry in client.logs(job_id, after=after):
            after = entry["seq"]
            begun = begun or (entry["data"] or {}).get("export") == task["id"]
            if begun:
                console.print(log_line(entry), markup=False, highlight=False, soft_wrap=True)
        if found["status"] not in UNDER_WAY:
            return found
        time.sleep(POLL_SECONDS)

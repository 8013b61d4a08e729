"""`tuneyard gc`: remove what the settings say is old, on the database and this machine, without a server."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from cli.render import human_bytes, table
from shared.settings import Settings

console = Console()


def gc(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would be removed.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Remove files without a row even if most of the store's are.")
    ] = False,
) -> None:
    """Remove checkpoints, model files, log entries and caches that the settings say are old, and stray files.

    Workers do the same every hour.
    """
    from cli.database import opened_database
    from shared.storage import Store
    from worker.retention import collect

    settings = Settings()
    with opened_database(settings) as database:
        found = collect(database, Store(settings.artifacts()), settings, dry_run=dry_run, force=force)
    rows = ((r.what, r.job_id or "-", human_bytes(r.bytes) if r.bytes else "-", r.why) for r in found)
    table(console, ("what", "job", "size", "why"), rows)
    done = "would be removed" if dry_run else "removed"
    console.print(f"{human_bytes(sum(r.bytes for r in found))} {done}.", highlight=False)

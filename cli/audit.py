"""`tuneyard audit`: who did what, for admins."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from cli.connect import connect
from cli.render import table

console = Console()


def audit(
    owner: Annotated[str | None, typer.Option(help="Only what this owner did.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=100)] = 20,
) -> None:
    """Show who changed what, newest first; needs an admin key."""
    with connect() as client:
        page = client.audit(owner=owner, limit=limit)
    names = ("time", "owner", "key", "action", "object", "result", "address")
    table(console, names, ([entry[name] for name in names] for entry in page["data"]))

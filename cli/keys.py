"""`tuneyard keys`: API keys, on the database itself, without a server."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer
from rich.console import Console

from cli.render import table
from shared.clock import isoformat
from shared.database import Database
from shared.errors import InvalidRequest
from shared.repository import keys
from shared.settings import Settings, ensure_private_dir

app = typer.Typer(no_args_is_help=True, help="Make, list and revoke API keys.")
console = Console()

OWNER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,99}")


@app.command()
def create(
    name: Annotated[str, typer.Argument(help="The owner of all that is made with this key.")],
    admin: Annotated[bool, typer.Option("--admin", help="The key may see and end everybody's jobs.")] = False,
) -> None:
    """Make a key. It is shown this once: only its hash is kept."""
    if not OWNER_NAME.fullmatch(name):
        raise InvalidRequest("NAME is 1 to 100 letters, digits, '.', '_', '-' or '@'.")
    with opened_database() as database, database.write() as session:
        key = keys.create_key(session, name, admin=admin)
    console.print(f"A key for {name}. Keep it: it is not shown again.", highlight=False)
    print(key)


@app.command("list")
def list_keys() -> None:
    """List the keys; the keys themselves are not kept."""
    with opened_database() as database, database.read() as session:
        found = keys.list_keys(session)
    rows = (
        (
            key.id,
            key.name,
            f"{key.hint}…",
            "admin" if key.admin else "owner",
            isoformat(key.created_at),
            f"revoked {isoformat(key.revoked_at)}" if key.revoked_at else "valid",
        )
        for key in found
    )
    table(console, ("number", "owner", "key", "rights", "made", "state"), rows)


@app.command()
def revoke(number: Annotated[int, typer.Argument(help="The key's number in `tuneyard keys list`.")]) -> None:
    """Revoke a key: from now on it opens nothing."""
    with opened_database() as database, database.write() as session:
        key = keys.revoke_key(session, number)
    console.print(f"Key {number} of {key.name} is revoked.", highlight=False)


@contextmanager
def opened_database() -> Iterator[Database]:
    """The settings' database, brought up to date."""
    settings = Settings()
    ensure_private_dir(settings.root)
    database = Database(settings.database())
    try:
        database.migrate()
        yield database
    finally:
        database.close()

"""`tuneyard keys`: API keys, on the database itself, without a server."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from cli.render import table
from shared.clock import isoformat, utcnow
from shared.errors import InvalidRequest
from shared.settings import Settings

if TYPE_CHECKING:
    from shared.database import Session

app = typer.Typer(no_args_is_help=True, help="Make, list and revoke API keys, and set their owners' quotas.")
console = Console()

# What the columns take.
MAX_LIMITS = {"queued_jobs": 2**31, "running_jobs": 2**31, "gpu_hours": 1e9, "stored_bytes": 2**63}
OWNER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,99}")


@app.command()
def create(
    name: Annotated[str, typer.Argument(help="The owner of all that is made with this key.")],
    admin: Annotated[bool, typer.Option("--admin", help="The key may see and end everybody's jobs.")] = False,
    high: Annotated[
        bool, typer.Option("--high", help="The key may post jobs of high priority, as admin keys may.")
    ] = False,
) -> None:
    """Make a key. It is shown this once: only its hash is kept."""
    from cli.database import opened_database
    from shared.repository import keys

    if not OWNER_NAME.fullmatch(name):
        raise InvalidRequest("NAME is 1 to 100 letters, digits, '.', '_', '-' or '@'.")
    with opened_database(Settings()) as database, database.write() as session:
        key = keys.create_key(session, name, admin=admin, high=high)
        rights = f"{' --admin' if admin else ''}{' --high' if high else ''}"
        _record(session, f"keys create{rights}", name)
    console.print(f"A key for {name}. Keep it: it is not shown again.", highlight=False)
    print(key)


@app.command("list")
def list_keys() -> None:
    """List the keys; the keys themselves are not kept."""
    from cli.database import opened_database
    from shared.repository import keys

    with opened_database(Settings()) as database, database.read() as session:
        found = keys.list_keys(session)
    rows = (
        (
            key.id,
            key.name,
            f"{key.hint}…",
            "admin" if key.admin else "owner, high priority" if key.high else "owner",
            isoformat(key.created_at),
            f"revoked {isoformat(key.revoked_at)}" if key.revoked_at else "valid",
        )
        for key in found
    )
    table(console, ("number", "owner", "key", "rights", "made", "state"), rows)


@app.command()
def revoke(number: Annotated[int, typer.Argument(help="The key's number in `tuneyard keys list`.")]) -> None:
    """Revoke a key: from now on it opens nothing."""
    from cli.database import opened_database
    from shared.repository import keys

    with opened_database(Settings()) as database, database.write() as session:
        key = keys.revoke_key(session, number)
        _record(session, "keys revoke", f"{key.name}/{number}")
    console.print(f"Key {number} of {key.name} is revoked.", highlight=False)


Limit = Annotated[
    str | None, typer.Option(metavar="N", help="A number, `unlimited`, or `default` for the settings' own.")
]


@app.command()
def quota(
    name: Annotated[str, typer.Argument(help="The owner.")],
    queued_jobs: Limit = None,
    running_jobs: Limit = None,
    gpu_hours: Limit = None,
    stored_bytes: Limit = None,
) -> None:
    """Show what an owner has used, and give it limits of its own."""
    from cli.database import opened_database
    from shared.repository import owners

    settings = Settings()
    given = {
        "queued_jobs": queued_jobs,
        "running_jobs": running_jobs,
        "gpu_hours": gpu_hours,
        "stored_bytes": stored_bytes,
    }
    limits = {quota: _limit(quota, text) for quota, text in given.items() if text is not None}
    with opened_database(settings) as database:
        if limits:
            with database.write() as session:
                owners.set_quotas(session, name, limits)
                _record(session, "keys quota", name)
        with database.read() as session:
            found = owners.quotas(session, settings, name)
            lately = owners.used_lately(session, name)
    rows = (
        (quota.name, f"{quota.used:,.10g}", "unlimited" if quota.limit is None else f"{quota.limit:,.10g}")
        for quota in found.values()
    )
    table(console, ("quota", "used", "limit"), rows)
    console.print(f"GPU-seconds lately (half-life one day): {lately:,.0f}", highlight=False)


def _limit(quota: str, text: str) -> float | None:
    from shared.repository import owners

    if text in ("default", "unlimited"):
        return None if text == "default" else owners.UNLIMITED
    try:
        number = float(text) if quota == "gpu_hours" else int(text)
    except ValueError:
        number = -1
    if not 0 <= number < MAX_LIMITS[quota]:
        raise InvalidRequest(
            f"--{quota.replace('_', '-')}: {text} is no number from 0, `unlimited` or `default`."
        )
    return number


def _record(session: Session, action: str, name: str) -> None:
    """In the audit log, what the box's user does. The colon tells it from any owner."""
    from shared.repository import audit
    from shared.tables import AuditEntry

    owner = f"box:{os.getuid()}"
    audit.add_entries(session, [AuditEntry(time=utcnow(), owner=owner, action=action, object=name, result=0)])

"""`tuneyard webhooks`: where the news of one's jobs goes."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer
from rich.console import Console

from cli.connect import connect
from cli.render import table

app = typer.Typer(no_args_is_help=True, help="Register, list, try and delete webhooks.")
console = Console()

PREFIX = "fine_tuning.job."


class Event(StrEnum):
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


WebhookId = Annotated[str, typer.Argument(help="A webhook's id, we_….")]


@app.command()
def create(
    url: Annotated[str, typer.Argument(help="Where events are posted to.")],
    name: Annotated[str, typer.Option(help="What to call it.")] = "webhook",
    event: Annotated[
        list[Event] | None, typer.Option(help="Only jobs that ended so; may be repeated.")
    ] = None,
) -> None:
    """Register a webhook and print the secret that signs its events. The secret is shown this once."""
    events = [PREFIX + name for name in event or Event]
    with connect() as client:
        made = client.create_webhook(name, url, events)
    console.print(f"Webhook {made['id']}. Keep its secret: it is not shown again.", highlight=False)
    print(made["signing_secret"])


@app.command("list")
def list_webhooks(limit: Annotated[int, typer.Option(min=1, max=100)] = 20) -> None:
    """List webhooks, newest first, with what went wrong the last time."""
    with connect() as client:
        page = client.webhooks(limit=limit)
    rows = (
        (
            hook["id"],
            hook["name"],
            hook["url"],
            ", ".join(kind.removeprefix(PREFIX) for kind in hook["event_types"]),
            hook["last_error"] or "",
        )
        for hook in page["data"]
    )
    table(console, ("id", "name", "url", "events", "last error"), rows)


@app.command()
def test(webhook_id: WebhookId) -> None:
    """Send a test event now, and print the status of the answer."""
    with connect() as client:
        answer = client.test_webhook(webhook_id, PREFIX + Event.SUCCEEDED)
    console.print(f"The answer was {answer['status_code']}.", highlight=False)


@app.command()
def delete(webhook_id: WebhookId) -> None:
    """Delete a webhook, with what it has not taken yet."""
    with connect() as client:
        client.delete_webhook(webhook_id)

"""`tuneyard secrets`: tokens for one's own jobs. They are set, and never shown."""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from rich.console import Console

from cli.connect import connect
from cli.render import table

app = typer.Typer(no_args_is_help=True, help="Set, list and remove the secrets that your jobs get.")
console = Console()

Name = Annotated[str, typer.Argument(help="hub_token or wandb_api_key.")]


@app.command("set")
def set_secret(name: Name) -> None:
    """Set a secret; its value is asked for, or read from standard input."""
    # Never an argument: other users of the box see those.
    value = typer.prompt(name, hide_input=True) if sys.stdin.isatty() else sys.stdin.read()
    with connect() as client:
        client.set_secret(name, value.strip())
    console.print(f"{name} is set, for your jobs that start from now on.", highlight=False)


@app.command("list")
def list_secrets() -> None:
    """List the secrets that are set, by name."""
    with connect() as client:
        found = client.secrets()
    table(console, ("name", "set"), ((s["name"], s["updated_at"]) for s in found))


@app.command()
def rm(name: Name) -> None:
    """Remove a secret."""
    with connect() as client:
        client.remove_secret(name)

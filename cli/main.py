"""The `tuneyard` command."""

from __future__ import annotations

import sys
from collections.abc import Callable

import typer
from rich.console import Console

from cli import datasets, demo, jobs, keys, serve
from cli.client import ApiError, ConnectionFailed
from shared.errors import TuneyardError

app = typer.Typer(
    name="tuneyard",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="A self-hosted fine-tuning job service for a team's shared GPU box.",
)
COMMANDS: tuple[Callable[..., None], ...] = (
    serve.serve,
    serve.api,
    serve.worker,
    demo.demo,
    jobs.submit,
    jobs.jobs,
    jobs.show,
    jobs.logs,
    jobs.cancel,
    jobs.artifacts,
    jobs.download,
    jobs.estimate,
)
for command in COMMANDS:
    app.command()(command)
app.add_typer(datasets.app, name="datasets")
app.add_typer(keys.app, name="keys")


def main() -> None:
    """Run the command; an error that we know ends it with one line and exit code 1."""
    try:
        app()
    except (ApiError, ConnectionFailed, TuneyardError) as error:
        Console(stderr=True).print(
            f"Error: {error}", style="red", markup=False, highlight=False, soft_wrap=True
        )
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()

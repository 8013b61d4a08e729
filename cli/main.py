"""The `tuneyard` command.

A command imports what it needs of the server when it runs: each of them would take the time of all.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NoReturn

import typer
from pydantic import ValidationError
from rich.console import Console

from cli import audit, chat, datasets, demo, exports, gc, jobs, keys, secrets, serve, webhooks
from cli.client import ApiError, ConnectionFailed
from cli.render import visible
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
    serve.inference,
    demo.demo,
    jobs.submit,
    jobs.jobs,
    jobs.show,
    jobs.logs,
    jobs.cancel,
    jobs.pause,
    jobs.resume,
    jobs.move,
    jobs.artifacts,
    jobs.download,
    jobs.estimate,
    exports.export,
    chat.chat,
    gc.gc,
    audit.audit,
)
for command in COMMANDS:
    app.command()(command)
app.add_typer(datasets.app, name="datasets")
app.add_typer(keys.app, name="keys")
app.add_typer(webhooks.app, name="webhooks")
app.add_typer(secrets.app, name="secrets")


def main() -> None:
    """Run the command; an error that we know ends it with one line and exit code 1."""
    try:
        app()
    except ValidationError as error:
        # Settings: the only pydantic model that a command builds from what its user wrote.
        wrong = (
            f"TUNEYARD_{str(e['loc'][0]).upper()}: {e['msg'].removeprefix('Value error, ')}"
            for e in error.errors()
        )
        _fail("; ".join(wrong))
    except (ApiError, ConnectionFailed, TuneyardError, OSError) as error:
        _fail(str(error))
    except KeyboardInterrupt:
        sys.exit(130)


def _fail(message: str) -> NoReturn:
    Console(stderr=True).print(
        f"Error: {visible(message)}", style="red", markup=False, highlight=False, soft_wrap=True
    )
    sys.exit(1)


if __name__ == "__main__":
    main()

"""`tuneyard datasets`: data files, uploaded ones and those of this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from cli.connect import connect
from cli.inspect import inspect
from cli.render import human_bytes, table, visible

app = typer.Typer(no_args_is_help=True, help="Upload, list, show, delete and inspect data files.")
app.command()(inspect)
console = Console()

DatasetId = Annotated[str, typer.Argument(help="A dataset's id, file-….")]


@app.command()
def upload(
    file: Annotated[Path, typer.Argument(exists=True, dir_okay=False)],
    format_name: Annotated[str, typer.Option("--format", help="auto, or the name of a format.")] = "auto",
) -> None:
    """Upload a data file and print its id."""
    with connect() as client:
        answer = client.upload(file, format_name)
    console.print(answer["id"], highlight=False)
    if answer["status"] == "error":
        console.print(f"The file can't be used: {visible(answer['error'])}", style="red", markup=False)
        raise typer.Exit(1)


@app.command("list")
def list_datasets(limit: Annotated[int, typer.Option(min=1, max=100)] = 20) -> None:
    """List uploaded files, newest first."""
    with connect() as client:
        page = client.datasets(limit=limit)
    rows = ((d["id"], d["status"], d["format"], human_bytes(d["bytes"]), d["filename"]) for d in page["data"])
    table(console, ("id", "status", "format", "size", "file"), rows)


@app.command()
def show(dataset_id: DatasetId) -> None:
    """Print what was found in an uploaded file, as JSON."""
    with connect() as client:
        print(json.dumps(client.dataset(dataset_id), indent=2, ensure_ascii=False))


@app.command()
def delete(dataset_id: DatasetId) -> None:
    """Delete an uploaded file that no unfinished job uses."""
    with connect() as client:
        client.delete_dataset(dataset_id)

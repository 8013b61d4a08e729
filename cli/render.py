"""What the commands print: tables, log lines, and a progress bar for a followed job."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

Json = dict[str, Any]
# What others wrote must not move the cursor or colour the terminal.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
LEVEL_STYLES = {"warning": "yellow", "error": "red", "debug": "dim"}


def table(console: Console, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Print rows; on a pipe one line a row, columns between tabs, so that scripts can cut them."""
    if not console.is_terminal:
        for row in rows:
            print("\t".join(_cell(c) for c in row))  # rich would make spaces of the tabs
        return
    shown = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        shown.add_column(column, overflow="fold")
    for row in rows:
        shown.add_row(*(escape(_cell(c)) for c in row))
    console.print(shown)


def log_line(entry: Json) -> str:
    """One entry as a line: time, then the metrics as the training script printed them, or the message."""
    return f"{entry['time'][11:19]}  {visible(entry['message'])}"


def visible(text: str) -> str:
    """The text with control characters written out, which a terminal would obey."""
    return _CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", text)


def human_bytes(count: float | None) -> str:
    """A size in units of 1024, as `df -h` does."""
    if count is None:
        return "-"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def human_seconds(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Follower:
    """Prints a job's log as it comes, under it a bar with step, loss and time left (on a terminal)."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f} steps"),
            TextColumn("loss {task.fields[loss]}"),
            TextColumn("ETA {task.fields[eta]}"),
            console=console,
            transient=True,
        )
        self._task = self._progress.add_task("waiting", total=1, loss="-", eta="-", visible=False)

    def __enter__(self) -> Follower:
        if self._console.is_terminal:
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._console.is_terminal:
            self._progress.stop()

    def show(self, entry: Json) -> None:
        style = LEVEL_STYLES.get(entry["level"])
        self._console.print(log_line(entry), style=style, markup=False, highlight=False, soft_wrap=True)
        data = entry.get("data") or {}
        if entry["type"] == "phase":
            self._progress.update(self._task, description=str(data.get("phase", "")).replace("_", " "))
        if entry["type"] == "metrics" and "step" in data and "total_steps" in data:
            loss = data.get("loss")
            self._progress.update(
                self._task,
                visible=True,
                completed=data["step"],
                total=data["total_steps"],
                loss="-" if loss is None else f"{loss:.3f}",
                eta=human_seconds(data.get("eta_seconds")),
            )


def _cell(value: Any) -> str:
    return "-" if value is None else visible(str(value))

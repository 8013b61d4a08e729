"""`tuneyard datasets inspect`: a local file as training would take it, without any server."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.text import Text

from cli.render import visible
from shared.data.chatml import Span, TrainOn, render
from shared.data.conversation import REASONS, Conversation, Dropped
from shared.data.inspect import first_usable, inspect_file, row_at
from shared.errors import DatasetError, TuneyardError
from shared.models import find_model
from shared.settings import Settings
from shared.spec import DataFormat, JobSpec

Json = dict[str, Any]

NEEDED = ("torch", "transformers", "datasets")
NOTHING = "file-" + "0" * 24
BAR = 40
TRAINED, NOT_TRAINED = "green", "dim"

console = Console()


def inspect(
    file: Annotated[Path, typer.Argument(help="A data file on this machine.", metavar="FILE")],
    data_format: Annotated[DataFormat, typer.Option("--format", help="The rows' format.")] = "auto",
    model: Annotated[
        str | None, typer.Option(help="Count tokens as this model does: bundled/…, local/NAME or a hub id.")
    ] = None,
    train_on: Annotated[TrainOn, typer.Option(help="What is trained of a conversation.")] = "assistant",
    chat_template: Annotated[
        Literal["chatml", "model"], typer.Option(help="With --model: how conversations are written out.")
    ] = "chatml",
    tool_call_style: Annotated[
        Literal["functioncall", "template"], typer.Option(help="With --model: how calls are written.")
    ] = "functioncall",
    max_seq_length: Annotated[
        int, typer.Option(help="With --model: the most tokens of one row.", show_default=True)
    ] = JobSpec().max_seq_length,
    row: Annotated[
        int | None,
        typer.Option(min=1, help="Show the row of this line (JSON array, Parquet: of this number)."),
    ] = None,
) -> None:
    """Show what training would make of a file, without a server: its report and one conversation."""
    try:
        report = inspect_file(file, data_format, train_on).to_json()
        shown = row_at(file, report["format"], row) if row else first_usable(file, report["format"], train_on)
    except DatasetError as error:
        where = f" (line {error.line})" if error.line and f"line {error.line}" not in str(error) else ""
        raise TuneyardError(f"{file}: {error}{where}") from None
    except OSError as error:
        raise TuneyardError(f"{file} can't be read: {error.strerror}.") from None
    if model is None:
        _show_rows(file, report)
        _show_characters(report)
        if isinstance(shown, Dropped):
            return _show_conversation(shown.line, shown.reason, [], "")
        return _show_conversation(shown.line, None, _chatml(shown, train_on), "as ChatML")
    job = {
        "model": model,
        "dataset": {"source": "file", "file_id": NOTHING, "format": data_format},
        "train_on": train_on,
        "chat_template": chat_template,
        "tool_call_style": tool_call_style,
        "max_seq_length": max_seq_length,
    }
    found = _with_model(file, model, job, row)
    _show_rows(file, found["report"])
    _show_characters(report)
    _show_tokens(found)
    spans = [Span(span["text"], span["trained"]) for span in found["conversation"]["spans"]]
    how = f"{found['conversation']['tokens']:,} tokens, {found['conversation']['trained']:,} of them trained"
    return _show_conversation(found["conversation"]["line"], found["conversation"]["dropped"], spans, how)


def _chatml(conversation: Conversation, train_on: TrainOn) -> list[Span]:
    if conversation.plain:
        return [Span(turn.content, True) for turn in conversation.turns]
    return render(conversation, train_on)


def _with_model(file: Path, model: str, job: Json, row: int | None) -> Json:
    """What `worker.training.inspect` finds, in a process of its own: it loads the training stack."""
    settings = Settings()
    model_dir = find_model(settings, model).path
    try:
        spec = JobSpec.model_validate(job)
    except ValidationError as error:
        why = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise TuneyardError(f"--model {model}: {why}.") from None
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise TuneyardError(
            f"--model needs the worker's packages, and {', '.join(missing)} are not installed here: run "
            "`pip install 'tuneyard[worker]'`, or leave --model out."
        )
    arguments = ["--spec", json.dumps(spec.to_json()), "--cache", str(settings.root / "cache")]
    arguments += ["--model-dir", str(model_dir)] if model_dir else []
    arguments += ["--line", str(row)] if row else []
    with Console(stderr=True).status(f"Tokenising with {model} …"):
        done = subprocess.run(
            [sys.executable, "-m", "worker.training.inspect", str(file.absolute()), *arguments],
            # Started there, it can't take a file of the user's folder for one of its modules.
            cwd=Path(__file__).resolve().parents[1],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
    try:
        answer: Json = json.loads(done.stdout)
    except ValueError:
        last = (done.stderr.strip().splitlines() or [f"it ended with code {done.returncode}"])[-1]
        raise TuneyardError(f"The tokens could not be counted: {last[:500]}") from None
    if "error" in answer:
        raise TuneyardError(answer["error"])
    return answer


def _say(text: str, style: str | None = None) -> None:
    console.print(visible(text), style=style, markup=False, highlight=False, soft_wrap=True)


def _show_rows(file: Path, report: Json) -> None:
    read, used, dropped = report["rows_read"], report["rows_used"], report["rows_dropped"]
    _say(f"{file}: {report['format']}, {read:,} rows read, {used:,} used, {dropped:,} dropped", "bold")
    for reason, counted in report["dropped"].items():
        _say(f"  dropped {counted['count']:,} {reason}: {counted['meaning']} ({_lines(counted)})", "yellow")
    for name, counted in report["notes"].items():
        _say(f"  noted {counted['count']:,} {name} ({_lines(counted)})")
    with_tools = f"{report['tools']:,} tools in {report['rows_with_tools']:,} rows"
    _say(f"turns: {report['turns']:,}, {with_tools}, {report['calls']:,} calls")


def _lines(counted: Json) -> str:
    lines = ", ".join(str(line) for line in dict.fromkeys(counted["lines"]))
    more = ", …" if counted["count"] > len(counted["lines"]) else ""
    return f"line{'s' if ',' in lines else ''} {lines}{more}"


def _show_characters(report: Json) -> None:
    _say(f"characters per row: {_quantiles(report['characters_per_row'])}")


def _quantiles(values: Json) -> str:
    return ", ".join(f"{name} {value:,}" for name, value in values.items())


def _show_tokens(found: Json) -> None:
    tokens, packing = found["report"]["tokens"], found["report"]["packing"]
    revision = f" at {found['model']['revision']}" if found["model"]["revision"] else ""
    _say(f"\nwith {found['model']['id']}{revision}:", "bold")
    for warning in found["warnings"]:
        _say(f"  {warning}", "yellow")
    wanted = ("min", "p50", "p90", "p95", "p99", "max")
    _say(f"tokens per row: {_quantiles({name: tokens[name] for name in wanted})}")
    most = max(bin_["rows"] for bin_ in tokens["histogram"])
    for bin_ in tokens["histogram"]:
        bar = "█" * -(-bin_["rows"] * BAR // most)
        _say(f"  {bin_['from']:>7,} - {bin_['to']:>7,}  {bar:<{BAR}} {bin_['rows']:,}")
    _say(f"tokens: {tokens['total']:,}, {tokens['trained']:,} trained ({tokens['trained_share']:.1%})")
    _say(
        f"packed: {packing['rows']:,} rows of {packing['row_length']:,} tokens, efficiency "
        f"{packing['efficiency']:.1%}, {found['report']['total_steps']:,} steps with the default settings"
    )


def _show_conversation(line: int, dropped: str | None, spans: Iterable[Span], how: str) -> None:
    """The conversation: coloured, or with the trained parts in angle quotes where there are no colours."""
    coloured = console.color_system is not None and not console.no_color
    key = f"[{TRAINED}]trained[/], [{NOT_TRAINED}]not trained[/]" if coloured else "‹trained›, not trained"
    text = Text()
    for trained, group in groupby(spans, key=lambda span: span.trained):
        piece = visible("".join(span.text for span in group))
        if piece:
            marked = piece if coloured or not trained else f"‹{piece}›"
            text.append(marked, style=TRAINED if trained else NOT_TRAINED)
    console.print()
    if dropped:
        _say(f"line {line} is not used: {REASONS[dropped]} ({dropped})", "yellow")
    if text:
        how = f", {how}" if how else ""
        console.print(f"line {line}{how} - {key}:", highlight=False, soft_wrap=True)
        console.print(text, soft_wrap=True)

"""`tuneyard chat`: a few words with a finished job's model."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Annotated, Any

import typer
from rich.console import Console

from cli.client import Client
from cli.connect import connect
from shared.model_names import parse_tuned_model, tuned_model

Json = dict[str, Any]

console = Console()


def chat(
    job: Annotated[str, typer.Argument(help="A job's id, ftjob-…, or a model's name, ft:….")],
    message: Annotated[
        str | None, typer.Option("--message", "-m", help="Say this, print the answer, and end.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="A system text to begin with.")] = None,
    checkpoint: Annotated[
        int | None, typer.Option(min=1, metavar="STEP", help="The checkpoint of this step, if it has a GGUF.")
    ] = None,
    temperature: Annotated[float, typer.Option(min=0, max=2, help="0: the likeliest word each time.")] = 0.7,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="The most tokens of one answer.")] = None,
) -> None:
    """Talk with what a job made, through its GGUF on the server."""
    with connect() as client:
        body: Json = {"model": _model(client, job, checkpoint), "temperature": temperature, "stream": True}
        body |= {"max_tokens": max_tokens} if max_tokens else {}
        messages: list[Json] = [{"role": "system", "content": system}] if system else []
        for said in _questions(message):
            messages.append({"role": "user", "content": said})
            answer = _print_answer(client, body | {"messages": messages})
            messages.append({"role": "assistant", "content": answer})


def _model(client: Client, job: str, checkpoint: int | None) -> str:
    if checkpoint is None:
        return job
    tuned = parse_tuned_model(job)
    found = client.job(tuned.job_id if tuned else job)
    return tuned_model(found["spec"]["model"], found["owner"], found["spec"]["name"], found["id"], checkpoint)


def _questions(message: str | None) -> Iterator[str]:
    """The one message; else what standard input holds, line by line from a person at a terminal."""
    if message is not None:
        yield message
    elif not sys.stdin.isatty():
        yield sys.stdin.read()
    else:
        console.print("An empty line or Ctrl-D ends it.", style="dim")
        while said := _asked():
            yield said


def _asked() -> str:
    try:
        return console.input("[bold]you>[/] ").strip()
    except EOFError:
        return ""


def _print_answer(client: Client, body: Json) -> str:
    """Print the answer as it comes, and return it."""
    answer = ""
    for chunk in client.chat(body):
        for choice in chunk["choices"]:
            text = choice["delta"].get("content") or ""
            answer += text
            print(text, end="", flush=True)
            if choice["finish_reason"] == "length":
                print(" […]", end="")
    print(flush=True)
    return answer

"""The commands about jobs: from submit and estimate to download."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console

from cli.client import Client
from cli.connect import connect
from cli.render import Follower, human_bytes, human_seconds, log_line, table
from shared.errors import InvalidRequest
from shared.ids import DATASET_ID
from shared.spec import DEFAULT_MODEL, HUB_ID

Json = dict[str, Any]
JobId = Annotated[str, typer.Argument(help="A job's id, ftjob-….")]

console = Console()

SpecFile = Annotated[
    Path | None, typer.Option("--spec", exists=True, dir_okay=False, help="A job spec as a JSON file.")
]
Model = Annotated[str | None, typer.Option(help=f"Model id; default {DEFAULT_MODEL}.")]
DatasetName = Annotated[
    str | None,
    typer.Option(help="A local file (uploaded first), an uploaded file-… id, or a hub data set id."),
]
MaxSamples = Annotated[int | None, typer.Option(min=1, help="Train on the first N usable rows.")]
Merge = Annotated[bool, typer.Option("--merge", help="Export the merged 16-bit model as well.")]
Gguf = Annotated[
    list[str] | None,
    typer.Option(metavar="QUANT", help="Export a GGUF: f16, q8_0, q5_k_m or q4_k_m. May be repeated."),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="FIELD=VALUE", help="Any field of the spec, dotted: training.max_steps=100."
    ),
]


def submit(
    spec: SpecFile = None,
    model: Model = None,
    dataset: DatasetName = None,
    name: Annotated[str | None, typer.Option(help="A name of your own for the job.")] = None,
    max_samples: MaxSamples = None,
    merge: Merge = False,
    gguf: Gguf = None,
    assign: Set = None,
    priority: Annotated[str | None, typer.Option(help="low, normal or high.")] = None,
    idempotency_key: Annotated[
        str | None, typer.Option(help="Posting again with this key makes no second job (24 h).")
    ] = None,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Follow the log until the job ends.")
    ] = False,
) -> None:
    """Post a fine-tuning job and print its id."""
    with connect() as client:
        body = build_spec(client, spec, model, dataset, max_samples, merge, gguf, assign)
        body |= {k: v for k, v in {"name": name, "priority": priority}.items() if v is not None}
        job = client.submit(body, idempotency_key)
        console.print(job["id"], highlight=False)
        if follow:
            follow_job(client, job["id"])


def estimate(
    spec: SpecFile = None,
    model: Model = None,
    dataset: DatasetName = None,
    max_samples: MaxSamples = None,
    merge: Merge = False,
    gguf: Gguf = None,
    assign: Set = None,
) -> None:
    """Show what a job would take, without posting it."""
    with connect() as client:
        body = build_spec(client, spec, model, dataset, max_samples, merge, gguf, assign)
        answer = client.estimate(body)
    table(console, ("what", "estimate"), _estimate_rows(answer, body))
    if answer["alternatives"]:
        console.print()
        columns = ("engine", "quantization", "precision", "batch", "recomputed", "tokens/s", "memory", "")
        lost = [_plan_row(other, other["reason"]) for other in answer["alternatives"]]
        table(console, columns, [_plan_row(answer["plan"], "taken"), *lost])


def jobs(
    status: Annotated[str | None, typer.Option(help="Only jobs in this status.")] = None,
    model: Annotated[str | None, typer.Option(help="Only jobs of this model.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=100)] = 20,
) -> None:
    """List jobs, newest first."""
    with connect() as client:
        page = client.jobs(status=status, model=model, limit=limit)
    rows = (
        (job["id"], job["status"], job["owner"], _steps(job), job["spec"]["model"], job["spec"]["name"])
        for job in page["data"]
    )
    table(console, ("id", "status", "owner", "steps", "model", "name"), rows)


def show(job_id: JobId) -> None:
    """Print a job as JSON."""
    with connect() as client:
        print(json.dumps(client.job(job_id), indent=2, ensure_ascii=False))


def logs(
    job_id: JobId,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job ends.")] = False,
    after: Annotated[int, typer.Option(min=0, help="Start after this entry.")] = 0,
) -> None:
    """Print a job's log."""
    with connect() as client:
        if follow:
            follow_job(client, job_id, after)
            return
        for entry in client.logs(job_id, after=after):
            console.print(log_line(entry), markup=False, highlight=False, soft_wrap=True)


def cancel(job_id: JobId) -> None:
    """Cancel a job: a queued one at once, a running one at its next step."""
    with connect() as client:
        console.print(client.cancel(job_id)["status"])


def pause(job_id: JobId) -> None:
    """Pause a job: a queued one at once, a running one at the end of its step, with a checkpoint."""
    with connect() as client:
        console.print(client.pause(job_id)["status"])


def resume(job_id: JobId) -> None:
    """Put a paused job back into the queue; it goes on from its last checkpoint."""
    with connect() as client:
        console.print(client.resume(job_id)["status"])


def move(
    job_id: JobId,
    first: Annotated[bool, typer.Option("--first", help="Before all your other jobs.")] = False,
    last: Annotated[bool, typer.Option("--last", help="Behind all your other jobs.")] = False,
    before: Annotated[str | None, typer.Option(metavar="JOB_ID", help="Before this job of yours.")] = None,
) -> None:
    """Move a queued job among your own of the same priority; nobody else's place changes."""
    if first + last + (before is not None) != 1:
        raise InvalidRequest("Give one of --first, --last and --before JOB_ID.")
    with connect() as client:
        place = {"before": before} if before is not None else {"to": "first" if first else "last"}
        queue = client.move(job_id, place)["queue"]
    console.print(_place(queue) if queue else "It has just left the queue.", highlight=False)


def artifacts(job_id: JobId) -> None:
    """List the files that a job has made."""
    with connect() as client:
        found = client.artifacts(job_id)
    rows = ((a["name"], a["kind"], human_bytes(a["bytes"]), a["sha256"]) for a in found)
    table(console, ("name", "kind", "size", "sha256"), rows)


def download(
    job_id: JobId,
    names: Annotated[list[str] | None, typer.Argument(help="Names of artifacts; default all.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to download into.")] = Path(),
) -> None:
    """Download a job's files; each is checked against its hash."""
    with connect() as client:
        for name in names or [a["name"] for a in client.artifacts(job_id)]:
            console.print(str(client.download(job_id, name, output)), highlight=False, soft_wrap=True)


def follow_job(client: Client, job_id: str, after: int = 0) -> None:
    """Print the log until the job ends.

    Raises:
        typer.Exit: with code 1 when the job did not succeed.
    """
    with Follower(console) as follower:
        for entry in client.logs(job_id, follow=True, after=after):
            follower.show(entry)
    status = client.job(job_id)["status"]
    if status != "succeeded":
        console.print(f"The job {status}.", style="red")
        raise typer.Exit(1)


def build_spec(
    client: Client,
    spec_file: Path | None,
    model: str | None,
    dataset: str | None,
    max_samples: int | None,
    merge: bool,
    gguf: list[str] | None,
    assignments: list[str] | None,
) -> Json:
    """The spec that the options describe, over the one in the file. What is not given stays the server's.

    Raises:
        InvalidRequest: the file is no JSON object, or an assignment has no `=`.
    """
    spec = _read_spec(spec_file)
    if model is not None:
        spec["model"] = model
    if dataset is not None:
        spec["dataset"] = _dataset(client, dataset)
    if max_samples is not None:
        spec["max_samples"] = max_samples
    wanted = [*(["merged_16bit"] if merge else []), *(f"gguf:{quant}" for quant in gguf or [])]
    if wanted:
        spec["exports"] = list(dict.fromkeys([*spec.get("exports", ["adapter"]), *wanted]))
    for assignment in assignments or []:
        _assign(spec, assignment)
    return spec


def _estimate_rows(answer: Json, body: Json) -> list[tuple[str, Any]]:
    """What is expected, or why it can't be known yet.

    Args:
        body: the spec that was asked about.
    """
    plan = answer["plan"]
    dataset = body.get("dataset") or {"source": "hub"}
    is_hub = not isinstance(dataset, dict) or dataset.get("source") != "file"
    rows = "the hub's rows are read, which the job does" if is_hub else "the file has been checked"
    no_plan = "not known: no worker is on line to plan for"
    if plan and plan["tokens_per_second"] is None:
        no_plan = "not known: the model's config could not be read"
    no_time = no_plan if plan is None or plan["tokens_per_second"] is None else "not known without the steps"
    found = [
        ("plan", plan["reason"] if plan else None, "no worker is on line to plan for"),
        ("tokens an epoch", answer["tokens"], f"not known before {rows}"),
        (
            "optimiser steps",
            answer["steps"],
            "not known without the tokens, unless training.max_steps is set",
        ),
        ("training time", answer["seconds"] and human_seconds(answer["seconds"]), no_time),
        ("peak memory", answer["peak_memory_bytes"] and human_bytes(answer["peak_memory_bytes"]), no_plan),
        (
            "disk",
            answer["disk_bytes"] and human_bytes(answer["disk_bytes"]),
            "not known without the model's size",
        ),
    ]
    return [(what, why if value is None else value) for what, value, why in found]


def _plan_row(plan: Json, outcome: str) -> tuple[str, ...]:
    return (
        plan["engine"],
        plan["quantization"],
        plan["precision"],
        f"{plan['micro_batch']} x {plan['accumulation']}",
        plan["gradient_checkpointing"],
        f"{plan['tokens_per_second']:,.0f}",
        human_bytes(plan["peak_memory_bytes"]),
        outcome,
    )


def _read_spec(path: Path | None) -> Json:
    if path is None:
        return {}
    try:
        spec = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InvalidRequest(f"{path} is no JSON: {error}") from error
    if not isinstance(spec, dict):
        raise InvalidRequest(f"{path} must hold one JSON object, a job spec.")
    return spec


def _dataset(client: Client, name: str) -> Json:
    if DATASET_ID.fullmatch(name):
        return {"source": "file", "file_id": name}
    if not Path(name).is_file():
        if not HUB_ID.fullmatch(name):
            raise InvalidRequest(f"There is no file {name}, and it is no hub id (owner/name) either.")
        return {"source": "hub", "id": name}
    uploaded = client.upload(Path(name))
    if uploaded["status"] == "error":
        raise InvalidRequest(f"{name} can't be used: {uploaded['error']}")
    return {"source": "file", "file_id": uploaded["id"]}


def _assign(spec: Json, assignment: str) -> None:
    field, equals, text = assignment.partition("=")
    if not equals:
        raise InvalidRequest(f"{assignment}: write FIELD=VALUE, as in training.max_steps=100.")
    try:
        value = json.loads(text, parse_constant=_no_number)
    except ValueError:
        value = text  # A bare word is a string: --set priority=low.
    *parents, last = field.split(".")
    for parent in parents:
        spec = spec.setdefault(parent, {})
    spec[last] = value


def _no_number(name: str) -> NoReturn:
    raise InvalidRequest(f"{name} is no number that a job can have.")


def _place(queue: Json) -> str:
    if queue["position"] is None:
        return f"Waits for your quota of {queue['held_by']}."
    start = queue["expected_start"]
    return f"Place {queue['position']} of {queue['of']} in the queue" + (
        f", expected to start at {start}." if start else "."
    )


def _steps(job: Json) -> str:
    progress = job["progress"]
    return f"{progress['step']}/{progress['total_steps']}" if progress else "-"

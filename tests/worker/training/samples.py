"""Sample rows, specs and a way to run the pipeline, for the tests of this folder."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shared.errors import JobStopped
from shared.events import Artifact, MemorySink
from shared.plan import Plan
from shared.spec import JobSpec
from worker.training.pipeline import run
from worker.training.workdir import Workdir

CITIES = ("Lisbon", "Oslo", "Nairobi", "Quito", "Hanoi", "Perth", "Łódź", "Århus")
SYSTEM = (
    "You are a helpful assistant with access to the following functions. Use them if required -\n"
    '{\n    "name": "get_tide",\n    "description": "Height of the tide at a harbour",\n'
    '    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}\n}'
)


def conversations(count: int) -> list[dict[str, Any]]:
    """Rows of the `messages` format, written for these tests."""
    rows = []
    for number in range(count):
        city = CITIES[number % len(CITIES)]
        height = number % 7
        call = json.dumps(
            {"name": "get_tide", "arguments": {"city": city, "day": number}}, ensure_ascii=False
        )
        rows.append(
            {
                "messages": [
                    {"role": "system", "content": SYSTEM},
                    {"role": "user", "content": f"How high is the tide in {city} on day {number}?"},
                    {"role": "assistant", "content": f"<functioncall> {call}"},
                    {"role": "tool", "content": json.dumps({"metres": height})},
                    {"role": "assistant", "content": f"On day {number} it is {height} metres in {city}."},
                ]
            }
        )
    return rows


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def make_spec(training: dict[str, Any] | None = None, **fields: Any) -> JobSpec:
    """A short job on the tiny model; keyword arguments replace fields."""
    short = {
        "max_steps": 4,
        "learning_rate": 1e-3,
        "logging_steps": 2,
        "gradient_accumulation_steps": 1,
        "save_steps": 2,
    }
    values: dict[str, Any] = {
        "model": "local/tiny",
        "dataset": {"source": "file", "file_id": "file-" + "a" * 24, "format": "messages"},
        "max_seq_length": 256,
        "training": short | (training or {}),
    }
    return JobSpec.model_validate_json(json.dumps(values | fields))


def plan_for(spec: JobSpec, **fields: Any) -> Plan:
    values: dict[str, Any] = {
        "engine": "reference",
        "device": "cpu",
        "quantization": "none",
        "precision": "fp32",
        "micro_batch": spec.training.per_device_train_batch_size,
        "accumulation": spec.training.gradient_accumulation_steps,
        "gradient_checkpointing": "none",
        "reason": "a test",
    }
    return Plan(**values | fields)


class Running:
    """A control that lets the job run until `stop` is set, or `leave` for a stop with a checkpoint."""

    def __init__(self) -> None:
        self.checks = 0
        self.stop = self.leave = False

    def check(self) -> None:
        self.checks += 1
        if self.stop or self.leave:
            raise JobStopped

    def leaving(self) -> bool:
        return self.leave and not self.stop


@dataclass
class Outcome:
    """What a run of the pipeline told and left."""

    spec: JobSpec
    workdir: Workdir
    sink: MemorySink
    artifacts: list[Artifact] = field(default_factory=list)

    def path(self, name: str) -> Path:
        return self.workdir.root / "exports" / name


def new_workdir(folder: Path, model: Path | None, rows: int = 24) -> Workdir:
    """An attempt's folders under `folder`, with sample rows as its data."""
    root = folder / "attempt"
    root.mkdir(parents=True)
    return Workdir(
        root=root,
        cache=folder / "cache",
        dataset_file=write_rows(folder / "rows.jsonl", conversations(rows)),
        model_dir=model,
    )


def run_job(
    spec: JobSpec,
    workdir: Workdir,
    sink: MemorySink | None = None,
    control: Running | None = None,
    **plan: Any,
) -> Outcome:
    """The whole pipeline."""
    outcome = Outcome(spec, workdir, sink or MemorySink())
    outcome.artifacts = run(spec, plan_for(spec, **plan), workdir, outcome.sink, control or Running())
    return outcome

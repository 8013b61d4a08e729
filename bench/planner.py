"""The planner's predictions beside what a GPU really takes.

    python -m bench.planner --measure OUT.jsonl [--models FOLDER] [--engine NAME] [--seconds N]
    python -m bench.planner --table OUT.jsonl

`--measure` trains a few steps at each of 24 points, each in a process of its own that is forked from one that
has imported the engine's stack, and adds one line a point; points that the file has are left out, so that it
can be broken off and gone on with. `--table` needs neither torch nor a GPU. `--points tiny`: on a CPU.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.standins import CONFIGS, make_model, train_standin, write_rows
from shared.cost import GIB, Way, peak_bytes, tokens_per_second
from shared.device import Device
from shared.plan import Checkpointing, EngineName, Plan, Precision, Quantization
from shared.shape import ModelShape
from shared.spec import JobSpec

STEPS = 5
ROWS = 700
POINT_SECONDS = 150
# Processes that import the engine's stack while another measures.
AHEAD = 3
MEMORY_BOUND, SPEED_BOUND = 0.10, 0.25


@dataclass(frozen=True)
class Point:
    """One way to train one model: what is predicted and measured."""

    engine: EngineName
    model: str
    quantization: Quantization
    precision: Precision
    micro_batch: int
    length: int
    checkpointing: Checkpointing
    dropout: float = 0.05
    device: str = "cuda"

    def spec(self) -> JobSpec:
        fields = {
            "max_seq_length": self.length,
            "dataset": {"source": "file", "file_id": "file-" + "0" * 24, "format": "messages"},
            "train_on": "all",
            "lora": {"dropout": self.dropout},
            "training": {
                "max_steps": STEPS,
                "per_device_train_batch_size": self.micro_batch,
                "gradient_accumulation_steps": 1,
            },
        }
        return JobSpec.from_json(fields)

    def plan(self) -> Plan:
        return Plan(
            engine=self.engine,
            device="cuda" if self.device == "cuda" else "cpu",
            quantization=self.quantization,
            precision=self.precision,
            micro_batch=self.micro_batch,
            accumulation=1,
            gradient_checkpointing=self.checkpointing,
            reason="to be measured",
        )

    def way(self) -> Way:
        plan = self.plan()
        return Way(
            plan.engine,
            plan.device,
            plan.quantization,
            plan.precision,
            plan.micro_batch,
            1,
            self.checkpointing,
        )


# Two sizes, both quantisations, micro-batches of 1 to 4, rows of 1,024 to 8,192 tokens, all checkpointings.
POINTS = (
    Point("reference", "4b", "none", "bf16", 2, 4096, "all"),
    Point("reference", "4b", "4bit", "bf16", 2, 4096, "all"),
    Point("reference", "4b", "none", "bf16", 1, 2048, "none"),
    Point("reference", "4b", "4bit", "bf16", 1, 8192, "all"),
    Point("reference", "1b", "none", "bf16", 4, 2048, "none"),
    Point("reference", "1b", "4bit", "bf16", 1, 4096, "none"),
    Point("reference", "1b", "none", "bf16", 2, 4096, "some"),
    Point("compiled", "4b", "none", "bf16", 2, 4096, "none"),
    Point("compiled", "4b", "none", "bf16", 1, 4096, "none", dropout=0.0),
    Point("compiled", "4b", "none", "bf16", 1, 8192, "some"),
    Point("compiled", "4b", "none", "bf16", 4, 4096, "all"),
    Point("compiled", "4b", "none", "bf16", 4, 1024, "none"),
    Point("compiled", "4b", "none", "fp8", 2, 4096, "none"),
    Point("compiled", "1b", "none", "bf16", 4, 4096, "none"),
    Point("compiled", "1b", "none", "bf16", 2, 8192, "some"),
    Point("compiled", "1b", "none", "bf16", 1, 1024, "all"),
    Point("unsloth", "4b", "4bit", "bf16", 2, 4096, "all"),
    Point("unsloth", "4b", "4bit", "bf16", 2, 4096, "all", dropout=0.0),
    Point("unsloth", "4b", "none", "bf16", 2, 4096, "all"),
    Point("unsloth", "4b", "4bit", "bf16", 4, 2048, "all"),
    Point("unsloth", "4b", "4bit", "bf16", 1, 4096, "none"),
    Point("unsloth", "4b", "none", "bf16", 1, 1024, "all"),
    Point("unsloth", "1b", "none", "bf16", 4, 4096, "all"),
    Point("unsloth", "1b", "4bit", "bf16", 2, 8192, "all"),
)
TINY = (
    Point("reference", "tiny", "none", "fp32", 1, 512, "none", device="cpu"),
    Point("reference", "tiny", "none", "fp32", 2, 512, "all", device="cpu"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--measure", type=Path, metavar="OUT.jsonl", help="measure, and add lines to this file")
    what.add_argument("--table", type=Path, metavar="OUT.jsonl", help="print what was measured and predicted")
    parser.add_argument("--points", choices=("all", "tiny"), default="all")
    parser.add_argument("--engine", help="the points of this engine alone")
    parser.add_argument("--models", type=Path, default=Path(tempfile.gettempdir()) / "tuneyard-standins")
    parser.add_argument("--seconds", type=float, default=1e9, help="start no point after so long")
    parser.add_argument("--one-engine", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.table:
        print_table(read_lines(arguments.table))
        return
    points = [
        point
        for point in (POINTS if arguments.points == "all" else TINY)
        if arguments.engine in (None, point.engine)
    ]
    if arguments.one_engine:
        measure_all(points, arguments.models, arguments.measure, time.monotonic() + arguments.seconds)
        return
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    began = time.monotonic()
    for engine in dict.fromkeys(point.engine for point in points):
        left = arguments.seconds - (time.monotonic() - began)
        command = [sys.executable, "-m", "bench.planner", "--one-engine", "--measure", str(arguments.measure)]
        command += ["--points", arguments.points, "--engine", engine, "--models", str(arguments.models)]
        subprocess.run([*command, "--seconds", str(left)], check=True)
    print_table(read_lines(arguments.measure))


def measure_all(points: list[Point], models: Path, output: Path, deadline: float) -> None:
    """Measure the points of one engine that the file lacks, and add them to it."""
    from worker.training.stack import import_stack

    known = [line["point"] for line in read_lines(output)]
    missing = [point for point in points if asdict(point) not in known]
    if not missing:
        return
    models.mkdir(parents=True, exist_ok=True)
    # In processes of their own too: this one must not touch the GPU before it forks.
    for model in dict.fromkeys(point.model for point in missing):
        making = multiprocessing.get_context("spawn").Process(target=make_model, args=(model, models))
        making.start()
        making.join()
        assert making.exitcode == 0
    write_rows(models / "rows.jsonl", ROWS)
    import_stack(missing[0].engine)
    apart = [Apart(point, models) for point in missing]
    for number, point in enumerate(missing):
        if time.monotonic() > deadline:
            break
        for ahead in apart[number : number + 1 + AHEAD]:
            ahead.start()
        began = time.monotonic()
        found = apart[number].measured()
        line = {"point": asdict(point), **found, "seconds": round(time.monotonic() - began, 1)}
        print(json.dumps(line), flush=True)
        with output.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


class Apart:
    """A point in a process of its own, so that each finds an empty GPU.

    A fork of this one is quickest; where the import has opened the GPU already, a fork could not use it. A
    new process has to import anew: it is started ahead, and waits with its imports done.
    """

    def __init__(self, point: Point, models: Path) -> None:
        import torch

        opened = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        context: Any = multiprocessing.get_context("spawn" if opened else "fork")
        self._here, self._there = context.Pipe()
        self._process = context.Process(target=report_point, args=(point, models, self._there), daemon=True)

    def start(self) -> None:
        if self._process.pid is None:
            self._process.start()
            self._there.close()

    def measured(self) -> dict[str, Any]:
        """Let it measure, and give what it found, or its error."""
        found: dict[str, Any] = {"error": f"no result within {POINT_SECONDS} s"}
        try:
            self._here.send("measure")
            if self._here.poll(POINT_SECONDS):
                found = self._here.recv()
        except (EOFError, OSError):
            found = {"error": "the process ended without a result"}
        self._process.join(10)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        return found


def report_point(point: Point, models: Path, told: Connection) -> None:
    """Send what `measure` finds, or its error, for the other points are to go on."""
    from worker.training.stack import import_stack

    import_stack(point.engine)
    told.recv()
    try:
        told.send(measure(point, models))
    except Exception as error:  # noqa: BLE001 - the boundary of a process; what went wrong is in the file
        told.send({"error": f"{type(error).__name__}: {str(error)[:300]}"})
    told.close()


def measure(point: Point, models: Path) -> dict[str, Any]:
    """Train as a job does; the median speed of the last steps, and the peak of the memory."""
    plan = point.plan()
    result = train_standin(point.spec(), plan, point.model, models, models / "rows.jsonl").result
    import torch

    speeds = [float(row["tokens_per_second"] or 0) for row in result.history]
    return {
        "tokens_per_second": statistics.median(speeds[2:]),
        "peak_memory_bytes": result.used["peak_memory_bytes"],
        "used": result.used,
        "torch": torch.__version__,
        "gpu": torch.cuda.get_device_name() if plan.device == "cuda" else f"CPU ({os.cpu_count()} cores)",
        "gpu_bytes": torch.cuda.get_device_properties(0).total_memory if plan.device == "cuda" else 0,
    }


def read_lines(path: Path) -> list[dict[str, Any]]:
    """What was measured so far; points that failed are tried again."""
    if not path.exists():
        return []
    lines = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
    return [line for line in lines if "error" not in line]


def compared(lines: list[dict[str, Any]]) -> Iterator[tuple[Point, dict[str, Any], int, float]]:
    """Each point with its measurement and the predicted peak in bytes and tokens a second."""
    for line in lines:
        point = Point(**line["point"])
        shape = ModelShape.from_config(CONFIGS[point.model])
        assert shape is not None
        device = Device(point.plan().device, 0, line["gpu"], line["gpu_bytes"])
        yield (
            point,
            line,
            peak_bytes(point.way(), shape, point.spec()),
            tokens_per_second(point.way(), shape, point.spec(), device),
        )


def print_table(lines: list[dict[str, Any]]) -> None:
    table = Table(box=None, header_style="bold")
    for column in ("engine", "model", "weights", "drop", "batch", "recomputed"):
        table.add_column(column)
    for column in ("GiB", "predicted", "off", "tokens/s", "predicted", "off"):
        table.add_column(column, justify="right")
    memory_off, speed_off = [], []
    for point, line, peak, speed in compared(lines):
        memory_off.append(peak / line["peak_memory_bytes"] - 1)
        speed_off.append(speed / line["tokens_per_second"] - 1)
        table.add_row(
            point.engine,
            point.model,
            point.precision if point.quantization == "none" else point.quantization,
            str(point.dropout),
            f"{point.micro_batch} x {point.length}",
            point.checkpointing,
            f"{line['peak_memory_bytes'] / GIB:.2f}",
            f"{peak / GIB:.2f}",
            f"{memory_off[-1]:+.0%}",
            f"{line['tokens_per_second']:,.0f}",
            f"{speed:,.0f}",
            f"{speed_off[-1]:+.0%}",
        )
    console = Console(width=max(Console().width, 130))
    console.print(table)
    if lines:
        console.print(
            f"{len(lines)} points on {lines[0]['gpu']}, torch {lines[0]['torch']}. "
            f"Memory within {MEMORY_BOUND:.0%} at {sum(abs(x) <= MEMORY_BOUND for x in memory_off)}, speed "
            f"within {SPEED_BOUND:.0%} at {sum(abs(x) <= SPEED_BOUND for x in speed_off)} of them."
        )


if __name__ == "__main__":
    main()

"""From a job's claim to its first optimiser step, in parts: a fresh process, and one that waited warm.

    python -m bench.coldstart [--model-dir DIR] [--engine reference] [--device cuda] [--rows 2000]

Runs the pipeline in processes like a worker's children, without a database: one that starts at the claim with
nothing compiled before, one that starts at the claim, and one that has waited with its imports done. Data and
model cache are warm, the prepared data is not. Prints the seconds of each part and what the waiting one held.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from shared.errors import JobStopped
from shared.events import GoOn, MemorySink
from shared.lifecycle import Phase
from shared.plan import Plan
from shared.spec import BUNDLED_MODEL, JobSpec
from worker.training.bundled import bundled_model
from worker.training.workdir import Workdir

PARTS = ("process", "imports", "model files, tokenizer", "data", "model", "first step")
QUESTIONS = ("How high is the tide in {} on day {}?", "When does the ferry leave {} on day {}?")
CITIES = ("Lisbon", "Oslo", "Nairobi", "Quito", "Hanoi", "Perth")


class Marks(MemorySink):
    """Notes when what happened, and ends the run after the first step."""

    def __init__(self) -> None:
        super().__init__()
        self.times: dict[str, float] = {}

    def phase(self, phase: Phase) -> None:
        self.times[phase] = time.time()

    def metrics(self, row: dict[str, float | int | None]) -> None:
        super().metrics(row)
        self.times["first step"] = time.time()
        raise JobStopped


def child() -> None:
    """What a worker's child does: import what its argument names, then read an order and run it."""
    times = {"process": time.time()}
    from worker.training import stack

    waits = sys.argv[2] == "waits"
    if waits:
        stack.import_stack(sys.argv[3])  # type: ignore[arg-type]
        print(json.dumps(_held()), flush=True)
    order = json.loads(sys.stdin.readline())
    times["order"] = time.time()
    spec, plan = JobSpec.from_json(order["spec"]), Plan(**order["plan"])
    root = Path(order["root"])
    os.environ["TMPDIR"] = tempfile.tempdir = str(root)
    sink = Marks()
    stack.import_stack(plan.engine)
    times["imports"] = time.time()
    from worker.training import pipeline

    prepared = pipeline.prepare_data

    def prepare_data(*arguments: Any, **named: Any) -> Any:
        times["data begins"] = time.time()
        found = prepared(*arguments, **named)
        times["data"] = time.time()
        return found

    pipeline.prepare_data = prepare_data
    workdir = Workdir(
        root=root,
        cache=Path(order["cache"]),
        dataset_file=Path(order["data"]),
        model_dir=Path(order["model"]) if order["model"] else None,
    )
    try:
        pipeline.run(spec, plan, workdir, sink, GoOn())
    except JobStopped:
        print(json.dumps({**times, **sink.times, "loss": sink.rows[0]["loss"]}), flush=True)
    os._exit(0)


def _held() -> dict[str, Any]:
    import torch

    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "memory_mib": pages * os.sysconf("SC_PAGE_SIZE") >> 20,
        "cuda_initialised": torch.cuda.is_initialized(),
        "gpu_used_mib": _gpu_used(),
    }


def _gpu_used() -> int | None:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    command = [tool, "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--id=0"]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0])


def measure(order: dict[str, Any], compiled: Path, waits: bool) -> tuple[dict[str, float], dict[str, Any]]:
    """Seconds of each part, and what the process held while it waited."""
    order = {**order, "root": tempfile.mkdtemp(dir=order["cache"])}
    shutil.rmtree(Path(order["cache"]) / "data", ignore_errors=True)
    environment = os.environ | {
        "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
        "CUDA_VISIBLE_DEVICES": "0" if order["plan"]["device"] == "cuda" else "",
        "TORCHINDUCTOR_CACHE_DIR": str(compiled / "inductor"),
        "TRITON_CACHE_DIR": str(compiled / "triton"),
        "UNSLOTH_COMPILE_LOCATION": str(compiled / "unsloth"),
        "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "true",
    }
    command = [sys.executable, "-m", "bench.coldstart", "--child", "waits" if waits else "starts"]
    began = time.time()
    with subprocess.Popen(
        [*command, order["plan"]["engine"]],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    ) as process:
        if process.stdin is None or process.stdout is None:
            raise RuntimeError("the process has no pipes")
        answers: list[dict[str, Any]] = []
        if waits:
            answers.append(_answer(process.stdout))
            began = time.time()
        process.stdin.write(json.dumps(order) + "\n")
        process.stdin.flush()
        times = _answer(process.stdout)
    process_ready = max(began, times["order"])
    ends = [process_ready, times["imports"], times["data begins"], times["data"]]
    ends += [times["training"], times["first step"]]
    starts = [began, *ends[:-1]]
    parts = {part: end - start for part, start, end in zip(PARTS, starts, ends, strict=True)}
    return {**parts, "claim to first step": ends[-1] - began}, answers[0] if answers else {}


def _answer(stream: Any) -> dict[str, Any]:
    """The next line that is JSON: libraries print too."""
    for line in stream:
        if line.startswith("{"):
            found: dict[str, Any] = json.loads(line)
            return found
    raise SystemExit("The process ended without an answer; its errors are above.")


def write_rows(path: Path, rows: int) -> None:
    with path.open("w", encoding="utf-8") as file:
        for number in range(rows):
            city = CITIES[number % len(CITIES)]
            question = QUESTIONS[number % len(QUESTIONS)].format(city, number)
            answer = f"In {city} it is so on day {number}: " + f"{number} and {city}, " * (number % 29)
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": turns}) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model-dir", type=Path, help="a folder with a model; default: the bundled one")
    parser.add_argument("--engine", default="reference", choices=("reference", "compiled", "unsloth"))
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU")
    parser.add_argument("--quantization", default="none", choices=("none", "4bit"))
    parser.add_argument("--checkpointing", default="none", choices=("none", "some", "all"))
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--length", type=int, help="tokens of a packed row; default 4096 on a GPU, else 512")
    parser.add_argument("--cache", type=Path, help="where the bundled model is kept, converted")
    arguments = parser.parse_args()
    device = arguments.device or ("cuda" if shutil.which("nvidia-smi") else "cpu")
    length = arguments.length or (4096 if device == "cuda" else 512)
    cache = (arguments.cache or Path(tempfile.mkdtemp(prefix="coldstart-"))).absolute()
    cache.mkdir(parents=True, exist_ok=True)
    write_rows(cache / "rows.jsonl", arguments.rows)
    spec = {
        "model": "local/measured" if arguments.model_dir else BUNDLED_MODEL,
        "dataset": {"source": "file", "file_id": f"file-{'0' * 24}"},
        "max_seq_length": length,
    }
    batch = {"micro_batch": 1, "accumulation": 8 if device == "cuda" else 1}
    plan = Plan(
        engine=arguments.engine,
        device=device,
        quantization=arguments.quantization,
        precision="bf16" if device == "cuda" else "fp32",
        gradient_checkpointing=arguments.checkpointing,
        reason="",
        **batch,
    )
    order = {
        "spec": JobSpec.model_validate_json(json.dumps(spec)).to_json(),
        "plan": plan.model_dump(),
        "cache": str(cache),
        "data": str(cache / "rows.jsonl"),
        "model": str(arguments.model_dir.absolute()) if arguments.model_dir else None,
    }
    if not arguments.model_dir:
        bundled_model(cache, GoOn())
    compiled = Path(tempfile.mkdtemp(prefix="compiled-", dir=cache))
    found, held = {}, {}
    used_before = _gpu_used()
    for name, waits in (("fresh, nothing compiled", False), ("fresh", False), ("standby", True)):
        found[name], held = measure(order, compiled, waits)
    _show(found, f"{arguments.engine} on {device}, {arguments.rows} rows of up to {length} tokens")
    Console().print(
        f"The standby holds {held['memory_mib']} MiB; of the GPU's memory {used_before} MiB are used without "
        f"it, {held['gpu_used_mib']} MiB with it; CUDA initialised: {held['cuda_initialised']}."
    )


def _show(found: dict[str, dict[str, float]], title: str) -> None:
    table = Table(title=f"Seconds from claim to first step: {title}")
    table.add_column("part")
    for name in found:
        table.add_column(name, justify="right")
    for part in (*PARTS, "claim to first step"):
        table.add_row(part, *(f"{parts[part]:.1f}" for parts in found.values()))
    Console(width=max(Console().width, 120)).print(table)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child()
    main()

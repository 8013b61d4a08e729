"""How fast each way of training the same job is, side by side: one GPU, one visit, one table.

    python -m bench.train OUT.jsonl [--models FOLDER] [--only NAME ...] [--model 4b] [--steps 8]
    python -m bench.train OUT.jsonl --table

The job is the default one on a model of random weights: rows of 4,096 tokens, 2 x 4 rows a step, LoRA r 16
on seven modules with dropout 0.05, AdamW in 8 bits. `trl` is TRL and PEFT as they come, `seed` the settings
of the script that Tuneyard replaces on plain Unsloth; both tokenise and pack by themselves. The others go
through Tuneyard's own loop. Each runs in a process of its own, and adds a line to OUT.jsonl.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.standins import CONFIGS, make_model, train_standin, write_rows
from shared.plan import Plan
from shared.planner import make_plan
from shared.shape import ModelShape
from shared.spec import TARGET_MODULES, JobSpec
from worker.gpus import probe_gpus

ROWS = 2500
LENGTH, MICRO_BATCH, ACCUMULATION = 4096, 2, 4
WARM_UP_STEPS = 3
WAY_SECONDS = 150


@dataclass(frozen=True)
class Way:
    """One row of the table; `fields` of the plan, None for what the planner picks."""

    name: str
    fields: dict[str, Any] | None
    rival: bool = False


WAYS = (
    Way("trl", {}, rival=True),
    Way("seed", {}, rival=True),
    Way("unsloth 4-bit", {"engine": "unsloth", "quantization": "4bit", "gradient_checkpointing": "all"}),
    Way("unsloth 16-bit", {"engine": "unsloth", "gradient_checkpointing": "all"}),
    Way("compiled", {"engine": "compiled"}),
    Way("compiled fp8", {"engine": "compiled", "precision": "fp8"}),
    Way("reference", {"engine": "reference", "gradient_checkpointing": "all"}),
    Way("auto", None),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, metavar="OUT.jsonl")
    parser.add_argument("--table", action="store_true", help="print what the file has, and measure nothing")
    parser.add_argument("--models", type=Path, default=Path(tempfile.gettempdir()) / "tuneyard-standins")
    parser.add_argument("--model", default="4b", choices=sorted(CONFIGS))
    parser.add_argument("--only", nargs="+", choices=[way.name for way in WAYS])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        way = next(way for way in WAYS if way.name == arguments.one)
        found = (rival if way.rival else ours)(way, arguments.model, arguments.models, arguments.steps)
        with arguments.output.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"name": way.name, **found}) + "\n")
        return
    if not arguments.table:
        measure(arguments)
    print_table([json.loads(line) for line in arguments.output.read_text().splitlines()])


def measure(arguments: argparse.Namespace) -> None:
    """Each way in a process of its own; one that fails says so in the file, and the others go on."""
    arguments.models.mkdir(parents=True, exist_ok=True)
    make = (
        f"from bench.standins import make_model as m; from pathlib import Path as P; m({arguments.model!r}, "
    )
    subprocess.run([sys.executable, "-c", f"{make}P({str(arguments.models)!r}))"], check=True)
    write_rows(arguments.models / "train-rows.jsonl", ROWS)
    os.environ |= {"HF_HUB_OFFLINE": "1"}
    for way in WAYS:
        if arguments.only and way.name not in arguments.only:
            continue
        command = [sys.executable, "-m", "bench.train", str(arguments.output), "--one", way.name]
        command += ["--models", str(arguments.models), "--model", arguments.model]
        command += ["--steps", str(arguments.steps)]
        try:
            said = subprocess.run(command, capture_output=True, text=True, timeout=WAY_SECONDS, check=False)
            error = said.stderr.strip().splitlines()[-1:] if said.returncode else []
        except subprocess.TimeoutExpired:
            error = [f"not done within {WAY_SECONDS} s"]
        if error:
            with arguments.output.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"name": way.name, "error": error[0][:300]}) + "\n")


def spec_of(steps: int) -> JobSpec:
    return JobSpec.from_json(
        {
            "max_seq_length": LENGTH,
            "dataset": {"source": "file", "file_id": "file-" + "0" * 24, "format": "messages"},
            # As the script does, which masks nothing.
            "train_on": "all",
            "training": {
                "max_steps": steps,
                "per_device_train_batch_size": MICRO_BATCH,
                "gradient_accumulation_steps": ACCUMULATION,
                "logging_steps": 1,
            },
        }
    )


def ours(way: Way, model_name: str, models: Path, steps: int) -> dict[str, Any]:
    """Through Tuneyard's own loop, as a job runs."""
    began = time.monotonic()
    spec, plan = spec_of(steps), plan_of(way, model_name, steps)
    run = train_standin(spec, plan, model_name, models, models / "train-rows.jsonl")
    import torch

    result = run.result
    first = result.history[0]
    first_step = result.used["tokens"] / steps / float(first["tokens_per_second"] or 1)
    return {
        "plan": plan.model_dump(),
        "tokens_per_second": statistics.median(
            float(row["tokens_per_second"] or 0) for row in result.history[WARM_UP_STEPS:]
        ),
        "peak_memory_bytes": result.used["peak_memory_bytes"],
        "seconds": {
            "import": round(run.imported - began, 1),
            "data": round(run.prepared - run.imported, 1),
            "load": round(run.loaded - run.prepared, 1),
            "first step": round(first_step, 1),
        },
        "losses": [round(float(row["loss"] or 0), 4) for row in result.history],
        "used": result.used,
        **versions(torch),
    }


def plan_of(way: Way, model_name: str, steps: int) -> Plan:
    gpus = probe_gpus()
    if way.fields is not None:
        fields = {
            "device": "cuda" if gpus else "cpu",
            "quantization": "none",
            "precision": "bf16" if gpus else "fp32",
            "micro_batch": MICRO_BATCH,
            "accumulation": ACCUMULATION,
            "gradient_checkpointing": "none",
            "reason": way.name,
        }
        return Plan.model_validate(fields | way.fields)
    shape = ModelShape.from_config(CONFIGS[model_name])
    plan = make_plan(spec_of(steps), shape, gpus[:1])
    assert plan is not None
    return plan


def rival(way: Way, model_name: str, models: Path, steps: int) -> dict[str, Any]:
    """TRL's own way with its own tokenising and packing: on transformers and PEFT, or on plain Unsloth."""
    began = time.monotonic()
    if way.name == "seed":
        import unsloth  # noqa: F401
    import datasets
    import torch
    import transformers
    import trl

    imported = time.monotonic()
    path = str(make_model(model_name, models))
    model, more = (load_on_unsloth if way.name == "seed" else load_as_it_comes)(path)
    loaded = time.monotonic()
    steps_at: list[float] = []

    class Clock(transformers.TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            torch.cuda.synchronize()
            steps_at.append(time.monotonic())

    with tempfile.TemporaryDirectory() as folder:
        trainer = trl.SFTTrainer(
            model=model,
            processing_class=transformers.AutoTokenizer.from_pretrained(path),
            train_dataset=datasets.Dataset.from_list(as_text(models / "train-rows.jsonl")),
            args=rival_arguments(folder, steps),
            callbacks=[Clock()],
            **more,
        )
        rows = trainer.train_dataset
        tokens = sum(len(ids) for ids in rows["input_ids"]) / len(rows) * MICRO_BATCH * ACCUMULATION
        torch.cuda.reset_peak_memory_stats()
        started = time.monotonic()
        trainer.train()
    spans = [after - before for before, after in itertools.pairwise(steps_at)]
    return {
        "tokens_per_second": tokens / statistics.median(spans[WARM_UP_STEPS - 1 :]),
        "peak_memory_bytes": torch.cuda.max_memory_reserved(),
        "seconds": {
            "import": round(imported - began, 1),
            "data": round(started - loaded, 1),
            "load": round(loaded - imported, 1),
            "first step": round(steps_at[0] - started, 1),
        },
        "losses": [round(row["loss"], 4) for row in trainer.state.log_history if "loss" in row],
        **versions(torch),
    }


def rival_arguments(folder: str, steps: int) -> Any:
    import trl

    return trl.SFTConfig(
        output_dir=folder,
        per_device_train_batch_size=MICRO_BATCH,
        gradient_accumulation_steps=ACCUMULATION,
        max_steps=steps,
        learning_rate=2e-4,
        logging_steps=1,
        optim="adamw_8bit",
        bf16=True,
        seed=42,
        report_to="none",
        save_strategy="no",
        packing=True,
        max_length=LENGTH,
        dataset_text_field="text",
    )


def load_on_unsloth(path: str) -> tuple[Any, dict[str, Any]]:
    from unsloth import FastLanguageModel

    model, _ = FastLanguageModel.from_pretrained(path, max_seq_length=LENGTH, load_in_4bit=True)
    adapted = FastLanguageModel.get_peft_model(
        model,
        r=16,
        target_modules=list(TARGET_MODULES),
        lora_alpha=32,
        lora_dropout=0.05,
        bias="none",
        use_gradient_checkpointing="unsloth",
        random_state=42,
    )
    return adapted, {}


def load_as_it_comes(path: str) -> tuple[Any, dict[str, Any]]:
    import peft
    import torch
    import transformers

    four_bit = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.bfloat16, device_map={"": 0}, quantization_config=four_bit
    )
    adapter = peft.LoraConfig(
        r=16, lora_alpha=32, lora_dropout=0.05, target_modules=list(TARGET_MODULES), task_type="CAUSAL_LM"
    )
    return model, {"peft_config": adapter}


def as_text(rows: Path) -> list[dict[str, str]]:
    """The conversations in ChatML, as the script writes them."""
    found = []
    for line in rows.read_text(encoding="utf-8").splitlines():
        turns = json.loads(line)["messages"]
        found.append({"text": "".join(f"<|im_start|>{t['role']}\n{t['content']}<|im_end|>\n" for t in turns)})
    return found


def versions(torch: Any) -> dict[str, str]:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return {"gpu": gpu, "torch": torch.__version__}


def print_table(lines: list[dict[str, Any]]) -> None:
    table = Table(box=None, header_style="bold")
    table.add_column("way")
    for column in ("tokens/s", "peak GiB", "import", "load", "first step", "loss: first", "last"):
        table.add_column(column, justify="right")
    for line in lines:
        if "error" in line:
            table.add_row(line["name"], f"failed: {line['error']}")
            continue
        seconds = line["seconds"]
        table.add_row(
            line["name"],
            f"{line['tokens_per_second']:,.0f}",
            f"{line['peak_memory_bytes'] / 2**30:.1f}",
            *(f"{seconds[part]:.1f} s" for part in ("import", "load", "first step")),
            f"{line['losses'][0]:.4f}",
            f"{line['losses'][-1]:.4f}",
        )
    console = Console(width=max(Console().width, 120))
    console.print(table)
    measured = [line for line in lines if "error" not in line]
    if measured:
        console.print(f"{measured[0]['gpu']}, torch {measured[0]['torch']}.")


if __name__ == "__main__":
    main()

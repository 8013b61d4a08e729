"""`tuneyard datasets inspect`: a local file, without a server."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from cli import inspect as command
from cli.main import app
from shared.errors import TuneyardError
from shared.spec import BUNDLED_MODEL
from tests.cli.command import run_command

QUESTION = "<|im_start|>user\nHow\x1b[31m old?<|im_end|>\n<|im_start|>assistant\n"
TOKENS: dict[str, Any] = {
    "model": {"id": "team/model", "revision": "c0ffee"},
    "warnings": ["a warning"],
    "report": {
        "format": "messages", "rows_read": 9, "rows_used": 8, "rows_dropped": 1,
        "dropped": {"too_long": {"count": 1, "lines": [7], "meaning": "more tokens than max_seq_length"}},
        "notes": {}, "turns": 16, "tools": 0, "rows_with_tools": 0, "calls": 0, "total_steps": 3,
        "tokens": {
            "total": 800, "trained": 200, "trained_share": 0.25, "min": 20, "mean": 100.0, "p50": 90,
            "p90": 190, "p95": 195, "p99": 200, "max": 200,
            "histogram": [{"from": 0, "to": 100, "rows": 7}, {"from": 100, "to": 200, "rows": 1}],
        },
        "packing": {"enabled": True, "rows": 1, "row_length": 4096, "efficiency": 0.1953},
    },
    "conversation": {
        "line": 3, "dropped": None, "tokens": 20, "trained": 2,
        "spans": [{"text": QUESTION, "trained": False}, {"text": "42<|im_end|>", "trained": True}],
    },
}  # fmt: skip


def chat(question: str, *answers: tuple[str, int]) -> dict[str, Any]:
    said = [{"role": "assistant", "content": text, "weight": weight} for text, weight in answers]
    return {"messages": [{"role": "user", "content": question}, *said]}


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def inspect(*arguments: str | Path) -> str:
    result = CliRunner().invoke(app, ["datasets", "inspect", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_the_report_of_a_file(tmp_path: Path) -> None:
    call = ('<functioncall> {"name": "f", "arguments": {}}', 1)
    file = write(tmp_path / "rows", chat("a", ("b", 1)), chat("a", ("b", 1)), chat("c", call), {"no": 1})
    lines = inspect(file).splitlines()
    assert lines[:4] == [
        f"{file}: messages, 4 rows read, 2 used, 2 dropped",
        "  dropped 1 duplicate: the same conversation as an earlier row (line 2)",
        "  dropped 1 wrong_format: the row lacks the columns of the file's format (line 4)",
        "turns: 4, 0 tools in 0 rows, 1 calls",
    ]
    assert lines[4].startswith("characters per row: min 62, p50 62, ")


def test_trained_text_can_be_told_on_a_pipe(tmp_path: Path) -> None:
    file = write(tmp_path / "rows", chat("q", ("unlearnt", 0), ("learnt", 1)))
    shown = inspect(file).split(":\n", 1)[1]
    assert shown == (
        "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\nunlearnt<|im_end|>\n"
        "<|im_start|>assistant\n‹learnt<|im_end|>›\n"
    )
    everything = inspect(file, "--train-on", "all").split(":\n", 1)[1]
    assert everything.startswith(
        "‹<|im_start|>user\nq<|im_end|>›\n<|im_start|>assistant\nunlearnt<|im_end|>‹\n"
    )


def test_a_plain_text_has_no_headers(tmp_path: Path) -> None:
    assert inspect(write(tmp_path / "rows", {"text": "as it is"})).endswith(":\n‹as it is›\n")


def test_the_row_that_is_asked_for(tmp_path: Path) -> None:
    file = write(tmp_path / "rows", chat("a", ("first", 1)), chat("b", ("second", 1)), {"messages": 5})
    assert "first" in inspect(file)
    second = inspect(file, "--row", "2")
    assert "line 2, as ChatML" in second
    assert "second" in second
    assert "first" not in second
    assert inspect(file, "--row", "3").endswith(
        "line 3 is not used: a number, object or picture where text belongs (not_text)\n"
    )
    with pytest.raises(TuneyardError, match=r"No row begins at line 4\."):
        inspect(file, "--row", "4")


def test_the_format_that_is_asked_for(tmp_path: Path) -> None:
    file = write(tmp_path / "rows", {"text": "a text", "prompt": "p", "completion": "c"})
    assert ": prompt_completion, " in inspect(file)
    assert ": text, " in inspect(file, "--format", "text")


def test_a_terminal_shows_colours_and_no_control_characters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = Console(file=io.StringIO(), force_terminal=True, color_system="standard", width=200)
    monkeypatch.setattr(command, "console", screen)
    monkeypatch.delenv("NO_COLOR", raising=False)
    inspect(write(tmp_path / "rows", chat("q\x1b]0;title\x07", ("a", 1))))
    shown = screen.file.getvalue()  # type: ignore[attr-defined]
    assert "\x1b[2mq\\x1b]0;title\\x07<|im_end|>\x1b[0m" in shown
    assert "\x1b[32ma<|im_end|>\x1b[0m" in shown
    assert "‹" not in shown


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"text": "a"}\n{"text"\n', "Not valid JSON at line 2: Expecting ':' delimiter (column 8)."),
        (b"", "The file is empty: it holds nothing but white space."),
        (b'\n{"text": ""}\n', "None of the 1 rows can be used. Most often (1 rows): no turn has any text."
         " (line 2)"),
    ],
)  # fmt: skip
def test_a_bad_file_gives_one_line(tmp_path: Path, content: bytes, said: str) -> None:
    file = tmp_path / "rows"
    file.write_bytes(content)
    assert run("inspect", file) == (1, "", f"Error: {file}: {said}\n")


def test_no_file(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    assert run("inspect", gone) == (1, "", f"Error: {gone} can't be read: No such file or directory.\n")


def run(*arguments: str | Path) -> tuple[int, str, str]:
    done = run_command(dict(os.environ), "datasets", *map(str, arguments))
    return done.returncode, done.stdout, done.stderr


def answering(monkeypatch: pytest.MonkeyPatch, stdout: str, stderr: str = "", code: int = 0) -> list[Any]:
    """Stands in for the process that has the training stack; returns what it is started with."""
    started: list[Any] = []

    def answer(arguments: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        started.append((arguments, options))
        return subprocess.CompletedProcess(arguments, code, stdout, stderr)

    monkeypatch.setattr(subprocess, "run", answer)
    return started


def test_what_the_model_makes_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = answering(monkeypatch, json.dumps(TOKENS))
    file = write(tmp_path / "rows", chat("a", ("b", 1)))
    shown = inspect(file, "--model", "team/model", "--train-on", "all", "--row", "1")
    ((arguments, options),) = started
    assert arguments[1:4] == ["-m", "worker.training.inspect", str(file)]
    assert (Path(options["cwd"]) / "worker" / "training" / "inspect.py").is_file()
    spec = json.loads(arguments[arguments.index("--spec") + 1])
    assert (spec["model"], spec["train_on"], spec["dataset"]["format"]) == ("team/model", "all", "auto")
    assert arguments[-2:] == ["--line", "1"]
    assert shown.splitlines() == [
        f"{file}: messages, 9 rows read, 8 used, 1 dropped",
        "  dropped 1 too_long: more tokens than max_seq_length (line 7)",
        "turns: 16, 0 tools in 0 rows, 0 calls",
        "characters per row: min 62, p50 62, p90 62, p95 62, p99 62, max 62",
        "",
        "with team/model at c0ffee:",
        "  a warning",
        "tokens per row: min 20, p50 90, p90 190, p95 195, p99 200, max 200",
        f"        0 -     100  {'█' * 40} 7",
        f"      100 -     200  {'█' * 6:40} 1",
        "tokens: 800, 200 trained (25.0%)",
        "packed: 1 rows of 4,096 tokens, efficiency 19.5%, 3 steps with the default settings",
        "",
        "line 3, 20 tokens, 2 of them trained - ‹trained›, not trained:",
        "<|im_start|>user",
        "How\\x1b[31m old?<|im_end|>",
        "<|im_start|>assistant",
        "‹42<|im_end|>›",
    ]


def test_the_template_and_the_length_that_a_job_would_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = answering(monkeypatch, json.dumps(TOKENS))
    file = write(tmp_path / "rows", chat("a", ("b", 1)))
    own = ("--chat-template", "model", "--tool-call-style", "template", "--max-seq-length", "512")
    inspect(file, "--model", "team/model", *own)
    ((arguments, _),) = started
    spec = json.loads(arguments[arguments.index("--spec") + 1])
    assert (spec["chat_template"], spec["tool_call_style"]) == ("model", "template")
    assert spec["max_seq_length"] == 512
    with pytest.raises(TuneyardError, match="set chat_template to model too"):
        inspect(file, "--model", "team/model", "--tool-call-style", "template")


@pytest.mark.parametrize(
    ("stdout", "stderr", "said"),
    [
        ('{"error": "It is gated. Set HF_TOKEN."}', "", r"^It is gated\. Set HF_TOKEN\.$"),
        ("", "Traceback\nMemoryError: too much\n", "could not be counted: MemoryError: too much"),
        ("", "", "it ended with code -9"),
    ],
)
def test_a_model_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stdout: str, stderr: str, said: str
) -> None:
    answering(monkeypatch, stdout, stderr, -9)
    with pytest.raises(TuneyardError, match=said):
        inspect(write(tmp_path / "rows", chat("a", ("b", 1))), "--model", BUNDLED_MODEL)


def test_without_the_workers_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    file = write(tmp_path / "rows", chat("a", ("b", 1)))
    with pytest.raises(TuneyardError, match=r"pip install 'tuneyard\[worker\]'"):
        inspect(file, "--model", "team/model")
    assert "1 used" in inspect(file)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("../secret", r"--model \.\./secret: must be an id like 'owner/name'"),
        ("local/none", "no folder of local models"),
        ("bundled/none", "There is no bundled model"),
    ],
)
def test_a_model_that_can_not_be_meant(tmp_path: Path, model: str, said: str) -> None:
    with pytest.raises(TuneyardError, match=said):
        inspect(write(tmp_path / "rows", chat("a", ("b", 1))), "--model", model)

"""What training would make of a local file: the same as a job makes of it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from shared.data.chatml import render
from shared.data.formats import parse_row
from shared.events import MemorySink
from tests.worker.training.data_samples import chat_row, tokenizer
from tests.worker.training.samples import Running, conversations, make_spec, write_rows
from worker.training.data import prepare_data
from worker.training.inspect import main, spans
from worker.training.models import load_tokenizer, resolve_model
from worker.training.templates import chatml
from worker.training.tokenize import Encoder
from worker.training.workdir import Workdir

pytestmark = pytest.mark.train

FILE_SPEC = make_spec(training={"max_steps": None}, max_seq_length=2048)


def answer(
    capsys: pytest.CaptureFixture[str], model: Path, file: Path, *more: str
) -> tuple[int, dict[str, Any]]:
    arguments = [str(file), "--spec", json.dumps(FILE_SPEC.to_json()), "--cache", str(file.parent / "cache")]
    code = main([*arguments, "--model-dir", str(model), *more])
    return code, json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("kind", ["chatml", "added", "plain", "llama", "metaspace"])
def test_spans_read_back_from_tokens_are_those_of_the_template(kind: str) -> None:
    model = tokenizer(kind)
    template = chatml(model, "assistant")
    row = parse_row(chat_row(" What? \n é 🙂 <|im_end|>", " A 🙂 word.\n "), "messages", 1)
    assert not hasattr(row, "reason")
    tokens = Encoder(model, template).encode([row])[0]  # type: ignore[list-item]
    assert tokens is not None
    found = spans(model, tokens)
    assert [span["trained"] for span in found] == [False, True]
    wanted = "".join(s.text for s in render(row, "assistant", template.bos, template.eos))  # type: ignore[arg-type]
    if not template.escape:
        assert "".join(span["text"] for span in found).replace("\ufffd", "") == wanted
    assert found[1]["text"].strip().startswith("A 🙂 word.")
    assert found[1]["text"].endswith(template.eos or "<|im_end|>")


def test_the_report_is_the_jobs(tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = conversations(8)
    long = chat_row("how long?", "very " * 3000)
    file = write_rows(tmp_path / "rows", [{"messages": []}, *rows, long, rows[0]])
    code, found = answer(capsys, tiny_model, file)
    assert code == 0
    model = resolve_model(FILE_SPEC, Workdir(tmp_path, tmp_path, model_dir=tiny_model), Running())
    data = prepare_data(FILE_SPEC, file, load_tokenizer(model), MemorySink(), Running(), 2048)
    assert found["report"] == data.report
    assert {reason: c["lines"] for reason, c in found["report"]["dropped"].items()} == {
        "duplicate": [11],
        "empty": [1],
        "too_long": [10],
    }
    assert found["model"] == {"id": "local/tiny", "revision": None}
    assert found["warnings"] == []
    shown = found["conversation"]
    assert (shown["line"], shown["dropped"]) == (2, None)
    answers = [span["text"] for span in shown["spans"] if span["trained"]]
    said = [turn["content"] for turn in rows[0]["messages"] if turn["role"] == "assistant"]
    assert answers == [f"{text}<|im_end|>" for text in said]


@pytest.mark.parametrize(
    ("line", "dropped", "has_text"), [("1", "empty", False), ("3", "too_long", True), ("2", None, True)]
)
def test_the_row_that_is_asked_for(
    tmp_path: Path,
    tiny_model: Path,
    capsys: pytest.CaptureFixture[str],
    line: str,
    dropped: str | None,
    has_text: bool,
) -> None:
    file = write_rows(
        tmp_path / "rows", [{"messages": []}, chat_row("a", "b"), chat_row("c", "very " * 3000)]
    )
    _, found = answer(capsys, tiny_model, file, "--line", line)
    assert found["conversation"]["dropped"] == dropped
    assert bool(found["conversation"]["spans"]) == has_text


def test_the_models_own_template_is_shown(
    tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "own"
    shutil.copytree(tiny_model, model)
    source = "{% for m in messages %}[{{ m.role }}] {{ m.content }}<|im_end|>{% endfor %}"
    (model / "chat_template.jinja").write_text(source, encoding="utf-8")
    spec = FILE_SPEC.model_copy(update={"chat_template": "model"})
    file = write_rows(tmp_path / "rows", [chat_row("a", "b")])
    cache = str(tmp_path / "cache")
    main([str(file), "--spec", json.dumps(spec.to_json()), "--cache", cache, "--model-dir", str(model)])
    found = json.loads(capsys.readouterr().out)["conversation"]
    assert "[user] a" in found["spans"][0]["text"]
    assert (found["tokens"], found["dropped"]) != (0, "not_rendered")


@pytest.mark.parametrize(
    ("rows", "more", "said"),
    [
        ([{"messages": []}], [], "None of the 1 rows can be used"),
        ([chat_row("a", "b")], ["--line", "5"], "No row begins at line 5."),
    ],
)
def test_what_can_not_be_shown_is_said(
    tmp_path: Path,
    tiny_model: Path,
    capsys: pytest.CaptureFixture[str],
    rows: list[dict[str, Any]],
    more: list[str],
    said: str,
) -> None:
    code, found = answer(capsys, tiny_model, write_rows(tmp_path / "rows", rows), *more)
    assert code == 1
    assert said in found["error"]


def test_the_command_with_a_local_model(tmp_path: Path, tiny_model: Path) -> None:
    # Started in a folder whose files are called as modules are, it takes none of them.
    (tmp_path / "worker.py").write_text("raise SystemExit('the wrong one')\n", encoding="utf-8")
    file = write_rows(tmp_path / "rows", conversations(4))
    program = str(Path(sys.executable).with_name("tuneyard"))
    done = subprocess.run(
        [program, "datasets", "inspect", file.name, "--model", f"local/{tiny_model.name}"],
        cwd=tmp_path,
        env={
            **os.environ,
            "TUNEYARD_MODELS_ROOT": str(tiny_model.parent),
            "TUNEYARD_DATA_DIR": str(tmp_path / "data"),
        },
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "rows: messages, 4 rows read, 4 used, 0 dropped" in done.stdout
    assert f"with local/{tiny_model.name}:" in done.stdout
    assert "packed: 1 rows of 2,048 tokens" in done.stdout
    assert "‹On day 0 it is 0 metres in Lisbon.<|im_end|>›" in done.stdout

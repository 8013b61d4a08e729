"""What was trained on, and what the exported tokenizer and llama.cpp make of the same conversations."""

from __future__ import annotations

import itertools
import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest
import transformers
from cyllama.llama.llama_cpp import LlamaChatMessage, LlamaModel, disable_logging
from gguf import GGUFReader

from shared.events import MemorySink
from tests.worker.training.samples import (
    Outcome,
    Running,
    conversations,
    make_spec,
    new_workdir,
    run_job,
    write_rows,
)
from worker.training.data import prepare_data

pytestmark = pytest.mark.train

# As many models have it: tools in the system turn, calls and results with marks of their own.
OWN = (
    "{{ bos_token }}{% if tools or messages[0].role == 'system' %}<|im_start|>system\n"
    "{% if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}"
    "{% if tools %}# Tools{% for t in tools %}\n{{ t | tojson }}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endif %}{% for m in messages %}"
    "{% if m.role == 'tool' %}<|im_start|>user\n<result>{{ m.content }}</result><|im_end|>\n"
    "{% elif m.role != 'system' %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}</call>{% endfor %}<|im_end|>\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOOL = {
    "type": "function",
    "function": {
        "name": "get_tide",
        "description": "Height of the tide",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


def with_calls(count: int) -> list[dict[str, Any]]:
    """Rows with OpenAI's tools and calls."""
    rows = []
    for number in range(count):
        function = {"name": "get_tide", "arguments": {"city": f"Łódź {number}"}}
        messages = [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": f"Tide number {number}?"},
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"type": "function", "function": function}],
            },
            {"role": "tool", "content": f'{{"metres": {number}}}'},
            {"role": "assistant", "content": f"It's {number} metres."},
        ]
        rows.append({"messages": messages, "tools": [TOOL]})
    return rows


def run_with(folder: Path, model: Path, rows: list[dict[str, Any]], **fields: Any) -> Outcome:
    own = folder / "models" / "tiny"
    shutil.copytree(model, own)
    tokenizer = transformers.AutoTokenizer.from_pretrained(own)
    tokenizer.chat_template = OWN
    tokenizer.save_pretrained(own)
    workdir = new_workdir(folder, own)
    assert workdir.dataset_file is not None
    write_rows(workdir.dataset_file, rows)
    return run_job(make_spec({"max_steps": 1}, exports=["merged_16bit", "gguf:f16"], **fields), workdir)


def trained_on(outcome: Outcome) -> set[tuple[int, ...]]:
    """The documents in the rows that the job packed, out of its cache."""
    workdir = outcome.workdir
    assert workdir.model_dir is not None
    tokenizer = transformers.AutoTokenizer.from_pretrained(workdir.model_dir)
    data = prepare_data(
        outcome.spec,
        workdir.dataset_file,
        tokenizer,
        MemorySink(),
        Running(),
        2048,
        workdir.cache / "data",
    )
    assert data.report["from_cache"]
    assert data.report["rows_dropped"] == 0
    found = set()
    for row in data.train:
        ends = list(itertools.accumulate(row["seq_lengths"]))
        found |= {tuple(row["input_ids"][a:b]) for a, b in zip([0, *ends], ends, strict=False)}
    return found


def exported_tokenizer(outcome: Outcome, folder: Path) -> Any:
    with tarfile.open(outcome.path("merged_16bit.tar")) as tar:
        tar.extractall(folder, filter="data")
    return transformers.AutoTokenizer.from_pretrained(folder / "merged_16bit")


def rendered(tokenizer: Any, row: dict[str, Any]) -> tuple[int, ...]:
    return tuple(tokenizer.apply_chat_template(row["messages"], tools=row.get("tools"), return_dict=False))


@pytest.mark.usefixtures("warm")
def test_chatml_is_the_same_in_training_tokenizer_and_llama_cpp(tmp_path: Path, tiny_model: Path) -> None:
    plain = conversations(12)
    rows = [*plain, *with_calls(12)]
    outcome = run_with(tmp_path, tiny_model, rows)
    tokenizer = exported_tokenizer(outcome, tmp_path)
    documents = trained_on(outcome)
    assert len(documents) == 24
    assert {rendered(tokenizer, row) for row in rows} == documents
    disable_logging()
    model = LlamaModel(str(outcome.path("model-f16.gguf")))
    for row in plain:
        messages = [LlamaChatMessage(role=m["role"], content=m["content"]) for m in row["messages"]]
        text = model.chat_apply_template(model.get_default_chat_template(), messages, False)
        # llama.cpp's own ChatML goes on to the next line at once; the template does so before the next turn.
        assert text.removesuffix("\n") == tokenizer.apply_chat_template(row["messages"], tokenize=False)


@pytest.mark.parametrize("style", ["functioncall", "template"])
@pytest.mark.usefixtures("warm")
def test_a_models_own_template_is_trained_and_exported(tmp_path: Path, tiny_model: Path, style: str) -> None:
    rows = with_calls(24) if style == "template" else conversations(24)
    outcome = run_with(tmp_path, tiny_model, rows, chat_template="model", tool_call_style=style)
    tokenizer = exported_tokenizer(outcome, tmp_path)
    assert tokenizer.chat_template == OWN
    assert tokenizer.eos_token == "<|im_end|>"
    documents = trained_on(outcome)
    assert len(documents) == 24
    assert {rendered(tokenizer, row) for row in rows} == documents
    text = tokenizer.decode(min(documents))
    assert ("<call>" in text, "<functioncall>" in text) == (style == "template", style != "template")
    reader = GGUFReader(outcome.path("model-f16.gguf"))
    assert reader.get_field("tokenizer.chat_template").contents() == OWN
    tokens = reader.get_field("tokenizer.ggml.tokens").contents()
    assert tokens[reader.get_field("tokenizer.ggml.eos_token_id").contents()] == "<|im_end|>"
    told = outcome.path("Modelfile").read_text(encoding="utf-8")
    assert "TEMPLATE" not in told
    assert told.endswith('PARAMETER stop "<|im_end|>"\n')
    manifest = json.loads(outcome.path("manifest.json").read_text(encoding="utf-8"))
    assert (manifest["chat_template"], manifest["stop_token"]) == (OWN, "<|im_end|>")
    card = (tmp_path / "merged_16bit" / "README.md").read_text(encoding="utf-8")
    assert ("as that template has them" in card) == (style == "template")

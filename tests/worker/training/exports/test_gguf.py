"""GGUF files and llama.cpp: the same tokens, and nothing broken gets through."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import transformers
from cyllama.llama.llama_cpp import LlamaModel, disable_logging

from shared.data.chatml import CHATML_TEMPLATE
from shared.errors import JobFailure, JobStopped
from shared.events import Artifact, MemorySink
from shared.exports import artifact_name
from shared.lifecycle import FailureCode
from tests.worker.training.samples import CITIES, Running
from worker.training.exports.gguf import check_gguf, export_ggufs
from worker.training.generate import generate, tokenize_chat
from worker.training.models import settle_tokenizer

pytestmark = pytest.mark.train


@pytest.fixture(scope="module")
def chat_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model's folder with the ChatML template."""
    folder = tmp_path_factory.mktemp("chat") / "tiny"
    shutil.copytree(tiny_model, folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    settle_tokenizer(tokenizer, CHATML_TEMPLATE, "<|im_end|>")
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["add_bos_token"] = False
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def gguf(chat_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("gguf")
    sink = MemorySink()
    made = export_ggufs(chat_model, "Tiny", {"gguf:f16": "model-f16.gguf"}, target, sink, Running())
    assert made == sink.artifacts
    return made[0].path


def test_llama_cpp_reads_a_chat_as_it_was_trained(gguf: Path, chat_model: Path) -> None:
    disable_logging()
    model = LlamaModel(str(gguf))
    tokenizer = transformers.AutoTokenizer.from_pretrained(chat_model)
    for city in CITIES:
        messages = [
            {"role": "system", "content": "You are a helpful assistant."},
            {"role": "user", "content": f"How high is the tide in {city} on day 3?"},
        ]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        seen = tokenize_chat(model, model.get_vocab(), messages[1]["content"], messages[0]["content"])
        # Words may be cut otherwise: llama.cpp knows this kind of vocabulary by scores, not by merges.
        assert tokenizer.decode(seen) == tokenizer.decode(ids)
        assert [i for i in seen if i >= len(tokenizer) - 2] == [i for i in ids if i >= len(tokenizer) - 2]


def test_the_command_answers_a_prompt(gguf: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "worker.training.generate",
        str(gguf),
        "Hello",
        "--max-tokens",
        "4",
        "--json",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    answer = json.loads(done.stdout)
    assert 1 <= answer["tokens"] <= 4
    assert done.stderr == ""
    assert generate(str(gguf), "Hello", max_tokens=4).text == answer["text"]


def test_the_command_loads_no_torch(gguf: Path) -> None:
    code = (
        "import sys; from worker.training.generate import generate; "
        f"generate({str(gguf)!r}, 'Hello', max_tokens=1); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


class TakingSink(MemorySink):
    """Takes files away as a store does that lies on the same disk."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder

    def artifact(self, artifact: Artifact) -> None:
        super().artifact(artifact)
        artifact.path.rename(self._folder / artifact.name)


@pytest.mark.usefixtures("warm")
def test_all_kinds_are_made_though_each_is_taken_away_at_once(chat_model: Path, tmp_path: Path) -> None:
    work, taken = tmp_path / "work", tmp_path / "taken"
    work.mkdir()
    taken.mkdir()
    kinds = ["gguf:f16", "gguf:q8_0", "gguf:q4_k_m"]
    files = {kind: artifact_name(kind) for kind in kinds}
    made = export_ggufs(chat_model, "Tiny", files, work, TakingSink(taken), Running())
    assert [a.kind for a in made] == kinds
    assert sorted(p.name for p in taken.iterdir()) == [
        "model-f16.gguf",
        "model-q4_k_m.gguf",
        "model-q8_0.gguf",
    ]
    assert list(work.iterdir()) == []


class _StopOnce(Running):
    """Stops the job when this file is there: the conversion is done, and a quantisation under way."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self._file = file

    def check(self) -> None:
        self.stop = self._file.exists()
        super().check()


@pytest.mark.usefixtures("warm")
def test_a_stop_in_the_middle_leaves_nothing(chat_model: Path, tmp_path: Path) -> None:
    sink = MemorySink()
    files = {"gguf:q8_0": "model-q8_0.gguf", "gguf:q4_k_m": "model-q4_k_m.gguf"}
    with pytest.raises(JobStopped):
        export_ggufs(chat_model, "Tiny", files, tmp_path, sink, _StopOnce(tmp_path / "model-q4_k_m.gguf"))
    assert [a.name for a in sink.artifacts] == ["model-q8_0.gguf"]
    assert [p.name for p in tmp_path.iterdir()] == ["model-q8_0.gguf"]


@pytest.mark.usefixtures("warm")
def test_a_gguf_without_template_is_not_published(tmp_path: Path, tiny_model: Path) -> None:
    sink = MemorySink()
    with pytest.raises(JobFailure, match="no chat template"):
        export_ggufs(tiny_model, "Tiny", {"gguf:f16": "model-f16.gguf"}, tmp_path, sink, Running())
    assert sink.artifacts == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("warm")
def test_a_gguf_that_is_cut_off_is_not_published(tmp_path: Path, gguf: Path) -> None:
    broken = tmp_path / "model-f16.gguf"
    content = gguf.read_bytes()
    broken.write_bytes(content[: len(content) // 2])
    with pytest.raises(JobFailure) as caught:
        check_gguf(broken, Running())
    assert caught.value.code == FailureCode.EXPORT_FAILED
    assert "model-f16.gguf" in caught.value.message
    assert "data is not within the file bounds" in caught.value.message


@pytest.mark.usefixtures("warm")
def test_a_model_that_llama_cpp_does_not_know_fails_with_its_words(tmp_path: Path, chat_model: Path) -> None:
    folder = tmp_path / "unknown"
    shutil.copytree(chat_model, folder)
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = ["NeverHeardOfForCausalLM"]
    (folder / "config.json").write_text(json.dumps(config))
    (tmp_path / "out").mkdir()
    with pytest.raises(JobFailure, match="NeverHeardOfForCausalLM is not supported"):
        export_ggufs(
            folder, "Unknown", {"gguf:q8_0": "model-q8_0.gguf"}, tmp_path / "out", MemorySink(), Running()
        )
    assert list((tmp_path / "out").iterdir()) == []

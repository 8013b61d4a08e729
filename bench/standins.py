"""Models with random weights and rows of random words, for measuring without a hub."""

from __future__ import annotations

import json
import random
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.events import GoOn, MemorySink
from shared.plan import Plan
from shared.spec import JobSpec

if TYPE_CHECKING:
    from worker.training.trainer import TrainingResult

# The default model's shape, one of a fifth of its size, and one for trying a bench on a CPU.
CONFIGS: dict[str, dict[str, Any]] = {
    "4b": {
        "model_type": "llama", "hidden_size": 3072, "intermediate_size": 9216, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128_256,
        "max_position_embeddings": 131_072, "rope_theta": 500_000.0, "tie_word_embeddings": False,
    },
    "1b": {
        "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128_256,
        "max_position_embeddings": 131_072, "rope_theta": 500_000.0, "tie_word_embeddings": True,
    },
    "tiny": {
        "model_type": "llama", "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 8192,
        "max_position_embeddings": 8192, "tie_word_embeddings": False,
    },
}  # fmt: skip
ROLES = (("system", 4.4), ("user", 3.0), ("assistant", 3.6), ("tool", 2.8), ("assistant", 3.9))


def words() -> list[str]:
    """4,000 words, the same ones each time."""
    drawn = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    return ["".join(drawn.choices(letters, k=drawn.randint(2, 9))) for _ in range(4000)]


def write_rows(path: Path, count: int) -> Path:
    """Conversations of the `messages` format, of about 290 tokens each in `make_model`'s tokenizer."""
    drawn, known = random.Random(1), words()

    def text(mu: float) -> str:
        return " ".join(drawn.choices(known, k=max(3, int(drawn.lognormvariate(mu, 0.6)))))

    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            messages = [{"role": role, "content": text(mu)} for role, mu in ROLES]
            file.write(json.dumps({"messages": messages}) + "\n")
    return path


def make_model(name: str, folder: Path) -> Path:
    """The model of this name in `folder/NAME`, unless it is there; bf16, made on a GPU where there is one."""
    import torch
    import transformers

    target = folder / name
    if (target / "tokenizer.json").is_file():
        return target
    fields = {key: value for key, value in CONFIGS[name].items() if key != "model_type"}
    config = transformers.LlamaConfig(**fields, bos_token_id=0, eos_token_id=2, pad_token_id=3)
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            model = transformers.LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(usual)
    model.save_pretrained(target, max_shard_size="2GB")
    _tokenizer().save_pretrained(target)
    return target


@dataclass(frozen=True)
class Run:
    """What a training did, and the moments (monotonic) when libraries, data and model were there."""

    result: TrainingResult
    imported: float
    prepared: float
    loaded: float


def train_standin(spec: JobSpec, plan: Plan, name: str, models: Path, rows: Path) -> Run:
    """Train the model of this name through Tuneyard's own loop, as a job does."""
    from worker.training.stack import import_stack

    import_stack(plan.engine)
    from worker.training.data import prepare_data
    from worker.training.engines import engine_of
    from worker.training.models import ResolvedModel, load_tokenizer, settle_tokenizer
    from worker.training.trainer import train

    imported = time.monotonic()
    sink, control = MemorySink(), GoOn()
    model = ResolvedModel(f"local/{name}", make_model(name, models), config=CONFIGS[name])
    tokenizer = load_tokenizer(model)
    data = prepare_data(spec, rows, tokenizer, sink, control, model.context_length, cache=models / "cache")
    settle_tokenizer(tokenizer, data.chat_template, data.stop_token)
    prepared = time.monotonic()
    trained = engine_of(plan).load_model(spec, plan, model)
    loaded = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        result = train(spec, plan, trained, tokenizer, data, Path(folder), sink, control)
    return Run(result, imported, prepared, loaded)


def _tokenizer() -> Any:
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    drawn, known = random.Random(2), words()
    trainer = trainers.BpeTrainer(
        vocab_size=8000,
        special_tokens=["<|begin|>", "<|im_start|>", "<|im_end|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator((" ".join(drawn.choices(known, k=50)) for _ in range(2000)), trainer)
    special = {"bos_token": "<|begin|>", "eos_token": "<|im_end|>", "pad_token": "<|pad|>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=raw, **special)

"""A tiny random Llama with a tokenizer that llama.cpp knows: 1.3 million weights, made in a second."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, trainers

from tests.worker.training.samples import conversations
from tests.worker.training.warm import fork_programs


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


def make_tiny_model(folder: Path) -> Path:
    """Folder of a random Llama: hidden 256, 2 layers, so that llama.cpp's K-quants apply in full."""
    tokenizer = _tokenizer()
    transformers.set_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=256,
        num_hidden_layers=2,
        intermediate_size=512,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(tokenizer),
        max_position_embeddings=2048,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=False,
    )
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _tokenizer() -> Any:
    """A byte-fallback BPE as Llama 2 has it, with ChatML's two tokens, trained on the sample rows."""
    raw = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    first = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=800, special_tokens=first, show_progress=False)
    text = [
        m["content"] + "\nuser\nassistant\nsystem\ntool\n" for r in conversations(40) for m in r["messages"]
    ]
    raw.train_from_iterator(text, trainer)
    # The byte tokens are ordinary ones that the fallback uses; the trainer would have them special.
    state = json.loads(raw.to_str())
    state["added_tokens"] = [t for t in state["added_tokens"] if not t["content"].startswith("<0x")]
    raw = Tokenizer.from_str(json.dumps(state))
    raw.add_special_tokens(
        [
            AddedToken("<|im_start|>", special=True, normalized=False),
            AddedToken("<|im_end|>", special=True, normalized=False),
        ]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="<unk>", bos_token="<s>", eos_token="</s>", model_max_length=2048
    )


@pytest.fixture
def warm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks and tools are forked from a process that has torch loaded, and don't import it again."""
    fork_tools(monkeypatch)


def fork_tools(patch: pytest.MonkeyPatch) -> None:
    for module in ("ranks", "processes"):
        patch.setattr(f"worker.training.{module}.subprocess", fork_programs())


@pytest.fixture(scope="session")
def broken_model(tiny_model: Path) -> Path:
    """The tiny model with a weight that is no number, so that the first loss is none either."""
    folder = tiny_model.with_name("broken")
    shutil.copytree(tiny_model, folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder

"""Small tokenizers and rows for the data tests."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

CORPUS = [
    "You are a helpful assistant. The weather in Tokyo is sunny with 22 degrees.",
    "word answer question",
]


@cache
def tokenizer(kind: str = "chatml") -> Any:
    """Byte level: `chatml`, `added` (its tokens on top), `plain` (BOS, no ChatML); else Llama-2's way."""
    if kind in ("llama", "metaspace"):
        return _llama(first_only=kind == "metaspace")
    special = {
        "chatml": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        "added": ["<|endoftext|>"],
        "plain": ["<unk>", "<s>", "</s>"],
    }[kind]
    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    model.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=900,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    if kind == "added":
        # Ids beyond the vocabulary, out of order, with a token that isn't special among them.
        model.add_tokens(["<tool_call>"])
        model.add_special_tokens(["<|im_end|>"])
        model.add_tokens(["</tool_call>"])
        model.add_special_tokens(["<|im_start|>"])
        return transformers.PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<|im_end|>")
    if kind == "chatml":
        model.post_processor = processors.ByteLevel(trim_offsets=True)
        return transformers.PreTrainedTokenizerFast(
            tokenizer_object=model, bos_token="<|im_start|>", eos_token="<|im_end|>"
        )
    return _with_bos(model)


def _llama(first_only: bool) -> Any:
    """Characters, a few merges, and bytes for what it doesn't know.

    Args:
        first_only: Mistral's way: a space before the text's first word, but none after a control token.
    """
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{number:02X}>" for number in range(256)), "▁"]
    pieces += [chr(number) for number in range(33, 127)]
    merges = [("a", "n"), ("e", "r"), ("i", "m"), ("▁", "w"), ("▁", "a")]
    pieces += ["".join(merge) for merge in merges]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    model = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if first_only:
        model.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        model.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    model.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    model.add_special_tokens(["<unk>", "<s>", "</s>"])
    return _with_bos(model)


def _with_bos(model: Tokenizer) -> Any:
    model.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def chat_row(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path

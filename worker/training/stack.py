"""Importing the training stack, before there is a job for it."""

from __future__ import annotations

import gc
import importlib
from collections.abc import Iterator
from contextlib import contextmanager

from shared.plan import EngineName

# In this order. What transformers and TRL load only when it is first used stands here by its full name.
PLAIN = (
    "torch",
    "transformers",
    "datasets",
    "accelerate",
    "peft",
    "trl.trainer.sft_trainer",
    "transformers.models.llama.modeling_llama",
    "worker.training.pipeline",
    "worker.training.job_trainer",
    "worker.training.callbacks",
    "worker.training.engines.reference",
    "worker.training.head_loss",
)
COMPILED = (
    "torch._inductor.compile_fx",
    "worker.training.engines.attention",
    "worker.training.engines.layers",
)


def import_stack(engine: EngineName) -> None:
    """Import all that a job of this engine imports; takes seconds on a CPU box, up to a minute with Unsloth.

    No memory of a GPU is taken. A process imports for one engine only: Unsloth changes transformers and TRL,
    and has to be imported before both.
    """
    with _no_collection():
        if engine == "unsloth":
            from worker.training.engines import unsloth

            unsloth.import_stack()
        for name in PLAIN + (COMPILED if engine == "compiled" else ()):
            importlib.import_module(name)


@contextmanager
def _no_collection() -> Iterator[None]:
    """What is imported stays: looking through it for garbage again and again is time lost."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()

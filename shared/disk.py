"""How much disk a job needs: what `estimate` tells and what a worker checks before it trains."""

from __future__ import annotations

import math
from dataclasses import dataclass

from shared.spec import JobSpec

BYTES_PER_WEIGHT = {
    "merged_16bit": 2.0,
    "gguf:f16": 2.0,
    "gguf:q8_0": 1.0625,
    "gguf:q5_k_m": 0.71,
    "gguf:q4_k_m": 0.61,
}
# The adapter's weights are float32; beside them a checkpoint has the optimizer's two moments of each.
ADAPTER_BYTES = 4.0
OPTIMIZER_BYTES = {"adamw_8bit": 2.1, "adamw_torch": 8.0}
# Tokenizer, configuration, card and manifest: they come with every folder and every file.
SMALL_FILES_BYTES = 32 * 1024 * 1024


@dataclass(frozen=True)
class DiskNeed:
    """Bytes at the moment when the most is there, by what they are for.

    `files` are the artifacts by name of their export; `linked` is what a GGUF shares with the file that the
    others are made from. `one_checkpoint` is counted in `checkpoints`.
    """

    checkpoints: int
    one_checkpoint: int
    adapter: int
    merged: int
    conversion: int
    files: dict[str, int]
    linked: int

    @property
    def work(self) -> int:
        """In the work folder, if finished files go to another disk one by one."""
        kept = self.checkpoints + self.adapter + self.merged + self.conversion
        return kept + max((size for kind, size in self.files.items() if kind != "gguf:f16"), default=0)

    @property
    def store(self) -> int:
        """In the store."""
        return sum(self.files.values())

    @property
    def total(self) -> int:
        """On one disk that holds both."""
        return self.checkpoints + self.adapter + self.merged + self.conversion + self.store - self.linked


def disk_need(
    spec: JobSpec,
    parameters: int,
    adapter_parameters: int | None = None,
    *,
    steps: int | None = None,
    trained: bool = False,
) -> DiskNeed:
    """What the job will need.

    Args:
        parameters: weights of the base model.
        adapter_parameters: weights of the adapter; None takes a guess from the model's size.
        steps: optimiser steps of the whole job, if that is known.
        trained: training is over: exports alone are counted.
    """
    adapter = adapter_parameters if adapter_parameters is not None else _guess_adapter(spec, parameters)
    adapter_bytes = math.ceil(adapter * ADAPTER_BYTES) + SMALL_FILES_BYTES
    files: dict[str, int] = {
        kind: adapter_bytes
        if kind == "adapter"
        else math.ceil(parameters * BYTES_PER_WEIGHT[kind]) + SMALL_FILES_BYTES
        # Without being asked for it is kept all the same, for exports that are asked for later.
        for kind in dict.fromkeys(("adapter", *spec.exports))
    }
    sixteen_bit = 2 * parameters + SMALL_FILES_BYTES
    ggufs = any(kind.startswith("gguf:") for kind in spec.exports)
    one_checkpoint = adapter_bytes + math.ceil(adapter * OPTIMIZER_BYTES[spec.training.optim])
    return DiskNeed(
        one_checkpoint=one_checkpoint,
        checkpoints=0 if trained else _most_checkpoints(spec, steps) * one_checkpoint,
        adapter=adapter_bytes,
        merged=sixteen_bit if ggufs or "merged_16bit" in spec.exports else 0,
        conversion=sixteen_bit if ggufs else 0,
        files=files,
        linked=files.get("gguf:f16", 0),
    )


def _most_checkpoints(spec: JobSpec, steps: int | None) -> int:
    """One more than are kept, for the oldest goes when the newest is written, and the best step's."""
    training = spec.training
    most = training.save_total_limit + 1 + (training.early_stopping_patience is not None)
    steps = steps or training.max_steps
    # The last step has one too.
    return min(most, math.ceil(steps / training.save_steps)) if steps else most


def _guess_adapter(spec: JobSpec, parameters: int) -> int:
    """For transformers of 0.1 to 70 billion weights within a factor of two, on seven modules a layer."""
    return math.ceil(40 * spec.lora.r * math.sqrt(parameters))

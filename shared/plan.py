"""The plan: how a spec will be run on the hardware at hand."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

EngineName = Literal["reference", "compiled", "unsloth"]
Quantization = Literal["none", "4bit"]
Precision = Literal["bf16", "fp32", "fp8"]
# Which decoder layers' activations are computed again in the backward pass; "some": every second one.
Checkpointing = Literal["none", "some", "all"]


class Plan(BaseModel):
    """Everything the planner decides. The effective batch and the sequence length stay the spec's.

    `micro_batch` rows x `accumulation` x `gpus` = the spec's effective batch; `device` is what the job will
    run on. `peak_memory_bytes` (of one GPU) and `tokens_per_second` (of all GPUs) are the planner's
    predictions, None where it has none.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    engine: EngineName
    device: Literal["cpu", "cuda"]
    quantization: Quantization
    precision: Precision
    micro_batch: int
    accumulation: int
    gradient_checkpointing: Checkpointing
    gpus: int = 1
    peak_memory_bytes: int | None = None
    tokens_per_second: float | None = None
    reason: str

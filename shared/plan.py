"""The plan: how a spec will be run on the hardware at hand."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict


class Plan(BaseModel):
    """Everything the planner decides. The effective batch and the sequence length stay the spec's.

    `micro_batch` rows x `accumulation` = the spec's effective batch; `device` is what the job will run on.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    engine: Literal["reference"]
    device: Literal["cpu", "cuda"]
    quantization: Literal["none"]
    precision: Literal["bf16", "fp32"]
    micro_batch: int
    accumulation: int
    gradient_checkpointing: bool
    reason: str

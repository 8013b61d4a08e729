"""The planner: from a spec, a model and the devices at hand to a plan, and to what the job will take.

Torch-free. Every plan keeps the spec's effective batch and sequence length.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

from shared.models import ModelInfo
from shared.plan import EngineName, Plan
from shared.spec import JobSpec
from shared.tables import WorkerRow

# Without the model's tokenizer: what byte-pair vocabularies of 32k to 128k entries make of English and JSON.
CHARACTERS_PER_TOKEN = 3.6
# Best-fit packing of rows much shorter than the sequence leaves about this share of the slots empty.
PACKING_WASTE = 0.03
# Above this many tokens in one micro-batch, activations are recomputed rather than kept.
CHECKPOINTING_TOKENS = 2048
BYTES_PER_WEIGHT = {
    "adapter": 0.0,
    "merged_16bit": 2.0,
    "gguf:f16": 2.0,
    "gguf:q8_0": 1.0625,
    "gguf:q5_k_m": 0.71,
    "gguf:q4_k_m": 0.61,
}


@dataclass(frozen=True)
class Device:
    """One slot of a worker: a GPU (`index` as CUDA counts it) or the CPU. Memory in bytes.

    `engines` are those that the worker has installed and this device can run.
    """

    kind: Literal["cpu", "cuda"]
    index: int
    name: str
    memory_bytes: int
    engines: tuple[EngineName, ...] = ("reference",)

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> Self:
        return cls(**stored | {"engines": tuple(stored["engines"])})

    def to_json(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "index": self.index,
            "name": self.name,
            "memory_bytes": self.memory_bytes,
            "engines": list(self.engines),
        }


def devices_of(workers: Iterable[WorkerRow]) -> list[Device]:
    """The slots of all workers on line."""
    return [Device.from_json(slot) for worker in workers for slot in worker.slots]


def make_plan(spec: JobSpec, devices: Sequence[Device]) -> Plan | None:
    """The plan on the best of these devices, or None while there is none to plan for."""
    if not devices:
        return None
    device = max(devices, key=lambda d: (d.kind == "cuda", d.memory_bytes))
    precision = spec.precision
    if precision == "auto":
        precision = "bf16" if device.kind == "cuda" else "fp32"
    tokens = spec.training.per_device_train_batch_size * spec.max_seq_length
    return Plan(
        engine="reference",
        device=device.kind,
        quantization="none",
        precision=precision,
        micro_batch=spec.training.per_device_train_batch_size,
        accumulation=spec.training.gradient_accumulation_steps,
        gradient_checkpointing="all" if tokens > CHECKPOINTING_TOKENS else "none",
        reason=f"The reference engine in {precision} on {device.name}: batch "
        f"{spec.training.per_device_train_batch_size} x {spec.training.gradient_accumulation_steps} "
        f"of {spec.max_seq_length} tokens.",
    )


def estimate(
    spec: JobSpec, model: ModelInfo, report: dict[str, Any] | None, plan: Plan | None
) -> dict[str, Any]:
    """What the job will take, None where it can't be known before it runs.

    Args:
        report: the uploaded dataset's report (`rows_used`, `characters`), None for a dataset not seen yet.

    Returns:
        `tokens` (an epoch's), `steps` (the whole job's optimiser steps), `disk_bytes` (all exports); time
        and memory are not predicted yet.
    """
    tokens, rows = _tokens_and_rows(spec, report)
    return {
        "plan": plan.model_dump() if plan else None,
        "alternatives": [],
        "tokens": tokens,
        "steps": count_steps(spec, rows),
        "seconds": None,
        "peak_memory_bytes": None,
        "disk_bytes": _disk_bytes(spec, model),
    }


def count_steps(spec: JobSpec, rows: int | None) -> int | None:
    """Optimiser steps of the whole job over `rows` training rows (packed ones where packing is on)."""
    training = spec.training
    if training.max_steps is not None:
        return training.max_steps
    if rows is None:
        return None
    batch = training.per_device_train_batch_size * training.gradient_accumulation_steps
    return math.ceil(math.ceil(rows / batch) * training.num_train_epochs)


def _tokens_and_rows(spec: JobSpec, report: dict[str, Any] | None) -> tuple[int | None, int | None]:
    if report is None:
        return None, None
    usable = int(report["rows_used"])
    used = math.ceil(min(usable, spec.max_samples or usable) * (1 - spec.validation_fraction))
    tokens = math.ceil(report["characters"] / CHARACTERS_PER_TOKEN * used / max(usable, 1))
    packed = math.ceil(tokens / spec.max_seq_length / (1 - PACKING_WASTE))
    return tokens, packed if spec.packing else used


def _disk_bytes(spec: JobSpec, model: ModelInfo) -> int | None:
    if model.parameters is None:
        return None
    return math.ceil(sum(BYTES_PER_WEIGHT[kind] for kind in spec.exports) * model.parameters)

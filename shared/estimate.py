"""What a job will take: tokens, steps, time, memory and disk, as far as it can be known before it runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from shared.cost import FILL
from shared.disk import disk_need
from shared.models import ModelInfo
from shared.plan import Plan
from shared.spec import JobSpec

# Without the model's tokenizer: what byte-pair vocabularies of 32k to 128k entries make of English and JSON.
CHARACTERS_PER_TOKEN = 3.6
# Best-fit packing of rows much shorter than the sequence leaves about this share of the slots empty.
PACKING_WASTE = 0.03


def estimate(
    spec: JobSpec,
    model: ModelInfo,
    report: dict[str, Any] | None,
    plan: Plan | None,
    alternatives: Sequence[Plan],
) -> dict[str, Any]:
    """What the job will take, None where it can't be known before it runs.

    Args:
        report: the uploaded dataset's report (`rows_used`, `characters`), None for a dataset not seen yet.

    Returns:
        `tokens` (an epoch's), `steps` (the whole job's optimiser steps), `seconds` (of training alone),
        `peak_memory_bytes` (of one GPU), `disk_bytes` (exports, checkpoints, and room to merge in).
    """
    tokens, rows = _tokens_and_rows(spec, report)
    steps = count_steps(spec, rows)
    return {
        "plan": plan,
        "alternatives": list(alternatives),
        "tokens": tokens,
        "steps": steps,
        "seconds": _seconds(spec, tokens, rows, steps, plan),
        "peak_memory_bytes": plan.peak_memory_bytes if plan else None,
        "disk_bytes": disk_bytes(spec, model, steps),
    }


def count_steps(spec: JobSpec, rows: int | None) -> int | None:
    """Optimiser steps of the whole job over `rows` training rows (packed ones where packing is on)."""
    training = spec.training
    if training.max_steps is not None:
        return training.max_steps
    if rows is None:
        return None
    return math.ceil(math.ceil(rows / training.effective_batch) * training.num_train_epochs)


def disk_bytes(spec: JobSpec, model: ModelInfo, steps: int | None) -> int | None:
    """Most that the job's files take at once, on one disk. None for a model of unknown size."""
    if model.parameters is None:
        return None
    shape = model.shape
    adapter = shape.adapter_parameters(spec.lora.r, spec.lora.target_modules) if shape else None
    return disk_need(spec, model.parameters, adapter, steps=steps).total


def _seconds(
    spec: JobSpec, tokens: int | None, rows: int | None, steps: int | None, plan: Plan | None
) -> float | None:
    if plan is None or plan.tokens_per_second is None or steps is None:
        return None
    # Unknown rows are taken to be full ones, which packed rows nearly are.
    row = spec.max_seq_length * FILL if tokens is None or not rows else tokens / rows
    return round(steps * spec.training.effective_batch * row / plan.tokens_per_second, 1)


def _tokens_and_rows(spec: JobSpec, report: dict[str, Any] | None) -> tuple[int | None, int | None]:
    if report is None:
        return None, None
    usable = int(report["rows_used"])
    used = math.ceil(min(usable, spec.max_samples or usable) * (1 - spec.validation_fraction))
    tokens = math.ceil(report["characters"] / CHARACTERS_PER_TOKEN * used / max(usable, 1))
    packed = math.ceil(tokens / spec.max_seq_length / (1 - PACKING_WASTE))
    return tokens, packed if spec.packing else used

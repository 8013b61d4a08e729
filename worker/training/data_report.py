"""The parts of a job's `data_report` that need tokens."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from shared.spec import JobSpec

PERCENTILES = (50, 90, 95, 99)


def token_report(lengths: npt.NDArray[np.int64], trained: int) -> dict[str, Any]:
    total = int(lengths.sum())
    # Equal steps from nothing to the longest row.
    counts, edges = np.histogram(lengths, bins=min(20, int(lengths.max())), range=(0, int(lengths.max())))
    return {
        "total": total,
        "trained": trained,
        "trained_share": round(trained / total, 4),
        "min": int(lengths.min()),
        "mean": round(float(lengths.mean()), 1),
        **{f"p{q}": int(np.percentile(lengths, q, method="inverted_cdf")) for q in PERCENTILES},
        "max": int(lengths.max()),
        "histogram": [
            {"from": int(low), "to": int(high), "rows": int(count)}
            for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True)
        ],
    }


def packing_report(spec: JobSpec, row_tokens: npt.NDArray[np.int64], limit: int) -> dict[str, Any]:
    """Slots are what the model computes on: full rows if packed, else batches padded to their longest row.

    Args:
        row_tokens: tokens of each row, in the order of training, int64 [rows].
    """
    if spec.packing:
        slots = len(row_tokens) * limit
    else:
        size = spec.training.per_device_train_batch_size
        batches = (row_tokens[at : at + size] for at in range(0, len(row_tokens), size))
        slots = sum(int(batch.max()) * len(batch) for batch in batches)
    return {
        "enabled": spec.packing,
        "rows": len(row_tokens),
        "row_length": limit,
        "efficiency": round(int(row_tokens.sum()) / slots, 4),
    }


def steps(spec: JobSpec, rows: int) -> dict[str, int]:
    """Optimizer steps, as the trainer counts them: an epoch's last step may be short."""
    training = spec.training
    an_epoch = math.ceil(rows / training.effective_batch)
    total = training.max_steps or math.ceil(training.num_train_epochs * an_epoch)
    return {"steps_per_epoch": an_epoch, "total_steps": total}

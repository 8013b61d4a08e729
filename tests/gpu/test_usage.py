"""What the driver's tool tells of a GPU that holds memory."""

from __future__ import annotations

import pytest
import torch

from worker.gpus import find_slots, measure_use

pytestmark = [
    pytest.mark.train,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


def test_memory_and_use_of_a_gpu_are_told() -> None:
    slots = find_slots(None, None)
    held = torch.zeros(1 << 30, dtype=torch.uint8, device="cuda")
    told = measure_use(slots)
    assert [gpu["index"] for gpu in told] == [slot.index for slot in slots]
    assert all(gpu["memory_bytes"] == slot.memory_bytes for gpu, slot in zip(told, slots, strict=True))
    assert max(gpu["used_bytes"] for gpu in told) >= held.nbytes
    assert all(0 <= gpu["utilization"] <= 1 for gpu in told)

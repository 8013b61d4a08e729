"""Graphs that the compiler makes after the first step are counted, and those of evaluations are not."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from worker.training.engines.graphs import Graphs, graphs

pytestmark = pytest.mark.train


def test_what_is_compiled_after_the_first_step_is_counted() -> None:
    doubled: Any = torch.compile(lambda x: x * 2, backend="eager", dynamic=False)
    seen, before = Graphs(), graphs()

    def step(*lengths: int) -> int:
        seen.on_step_begin(None, None, None)
        for length in lengths:
            doubled(torch.ones(length))
        seen.on_step_end(None, None, None)
        return seen.recompiled

    assert step(2, 3) == 0
    assert step(2, 3) == 0
    # An evaluation, between two steps.
    doubled(torch.ones(4))
    assert step(3, 4) == 0
    assert step(5) == 1
    assert graphs() - before == 4

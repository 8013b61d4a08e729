"""What torch's compiler makes while a job trains."""

# ruff: noqa: ARG002 - transformers calls every hook with all of its arguments

from __future__ import annotations

from typing import Any

from torch._dynamo.utils import counters
from transformers import TrainerCallback


class Graphs(TrainerCallback):  # type: ignore[misc]
    """Counts graphs; evaluations, which have graphs of their own, lie between the steps.

    Attributes:
        recompiled: graphs made in any step after the first, for which a shape or a constant had changed.
    """

    def __init__(self) -> None:
        self.recompiled = 0
        self._warm = False
        self._before = 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._before = graphs()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._warm:
            self.recompiled += graphs() - self._before
        self._warm = True


def graphs() -> int:
    """Made in this process so far."""
    return int(counters["stats"]["unique_graphs"])


def graph_breaks() -> int:
    """Places at which a graph had to end, in this process so far."""
    return int(sum(counters["graph_break"].values()))

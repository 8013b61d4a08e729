"""TRL's SFTTrainer with the order of rows that Tuneyard wants, and no model card at each checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import trl
from torch.utils.data import Sampler


class RowOrder(Sampler[int]):
    """The data's own order in the first epoch, another shuffle of the same seed in each later one.

    The data comes shuffled, with its longest rows first: a job that will run out of memory does so in its
    first step rather than after an hour.
    """

    def __init__(self, rows: int, seed: int) -> None:
        self._rows = rows
        self._seed = seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the trainer before each epoch, also after it resumed in the middle of one."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        if self._epoch == 0:
            return iter(range(self._rows))
        generator = torch.Generator().manual_seed(self._seed + self._epoch)
        return iter(torch.randperm(self._rows, generator=generator).tolist())

    def __len__(self) -> int:
        return self._rows


class JobTrainer(trl.SFTTrainer):  # type: ignore[misc]
    """The trainer of every engine."""

    def _get_train_sampler(self, train_dataset: Any = None) -> RowOrder:
        rows = train_dataset if train_dataset is not None else self.train_dataset
        return RowOrder(len(rows), self.args.data_seed)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the exports have Tuneyard's card."""

"""Batches of prepared rows: flat ones of packed documents, and padded ones of single documents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

IGNORED = -100


@dataclass(frozen=True)
class FlatCollator:
    """Joins the documents of a micro-batch's rows into one sequence, as variable-length attention reads it.

    Position ids start again with each document, whose first token is never predicted, and are 0 in what is
    filled in. `num_tokens` counts real tokens.

    Args:
        pad_to: fill the sequence to this many tokens, with documents that nothing is learnt from.
        longest: of so many tokens at most.
        documents: fill `cu_seqlens` to this many documents, with empty ones. It and `pad_to` keep the shapes
            of all batches alike for compiled code.
        boundaries: also give `cu_seqlens` (int32, where each document begins, and the end), `kept` (int64,
            the positions whose next token is learnt) and `targets` (int64, those tokens).
    """

    pad_token_id: int
    pad_to: int | None = None
    longest: int | None = None
    documents: int | None = None
    boundaries: bool = False

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        # In NumPy: torch starts threads for each of these small operations, and the GPU waits for a batch.
        lengths = np.concatenate([np.asarray(row["seq_lengths"], np.int64) for row in rows])
        ids = np.concatenate([np.asarray(row["input_ids"], np.int64) for row in rows])
        labels = np.concatenate([np.asarray(row["labels"], np.int64) for row in rows])
        real = len(ids)
        if self.pad_to is not None and real < self.pad_to:
            empty = self.pad_to - real
            piece = min(self.longest or empty, empty)
            filling = [piece] * (empty // piece) + [empty % piece] * (empty % piece > 0)
            lengths = np.concatenate([lengths, np.array(filling, np.int64)])
            ids = np.pad(ids, (0, empty), constant_values=self.pad_token_id)
            labels = np.pad(labels, (0, empty), constant_values=IGNORED)
        ends = lengths.cumsum()
        starts = ends - lengths
        labels[starts] = IGNORED
        positions = np.arange(len(ids)) - starts.repeat(lengths)
        # RoPE that is scaled by the longest document must see none that is not there.
        positions[real:] = 0
        batch = {"input_ids": ids[None], "labels": labels[None], "position_ids": positions[None]}
        if self.boundaries:
            batch |= self._boundaries(ends, labels)
        return {name: torch.from_numpy(values) for name, values in batch.items()} | {
            "num_tokens": torch.tensor(real)
        }

    def _boundaries(
        self, ends: npt.NDArray[np.int64], labels: npt.NDArray[np.int64]
    ) -> dict[str, npt.NDArray[Any]]:
        cu_seqlens = np.concatenate([[0], ends]).astype(np.int32)
        if self.documents is not None:
            cu_seqlens = np.pad(cu_seqlens, (0, self.documents + 1 - len(cu_seqlens)), mode="edge")
        kept = np.flatnonzero(labels[1:] != IGNORED)
        return {"cu_seqlens": cu_seqlens, "kept": kept, "targets": labels[kept + 1]}


@dataclass(frozen=True)
class PaddedCollator:
    """Pads single documents on the right to the longest of the micro-batch."""

    pad_token_id: int

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        ids = [torch.as_tensor(row["input_ids"]) for row in rows]
        labels = [torch.as_tensor(row["labels"]) for row in rows]
        lengths = torch.tensor([len(row) for row in ids])
        pad = torch.nn.utils.rnn.pad_sequence
        return {
            "input_ids": pad(ids, batch_first=True, padding_value=self.pad_token_id),
            "labels": pad(labels, batch_first=True, padding_value=IGNORED),
            "attention_mask": (torch.arange(int(lengths.max())) < lengths[:, None]).long(),
            "num_tokens": lengths.sum(),
        }

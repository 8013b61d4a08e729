"""Batches: where documents begin, what is learnt, and shapes that compiled code can count on."""

from __future__ import annotations

import pytest
import torch

from worker.training.collate import FlatCollator, PaddedCollator

pytestmark = pytest.mark.train

ROWS = [
    {"input_ids": [5, 6, 7, 8, 9], "labels": [-100, 6, -100, 8, 9], "seq_lengths": [3, 2]},
    {"input_ids": [1, 2, 3], "labels": [1, 2, 3], "seq_lengths": [3]},
]


def test_documents_follow_each_other_and_no_first_token_is_predicted() -> None:
    batch = FlatCollator(0)(ROWS)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 1, 2, 3]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1, 2]]
    assert batch["labels"].tolist() == [[-100, 6, -100, -100, 9, -100, 2, 3]]
    assert batch["num_tokens"].item() == 8
    assert set(batch) == {"input_ids", "position_ids", "labels", "num_tokens"}


def test_boundaries_name_the_documents_and_what_is_learnt() -> None:
    batch = FlatCollator(0, boundaries=True)(ROWS)
    assert batch["cu_seqlens"].tolist() == [0, 3, 5, 8]
    assert batch["cu_seqlens"].dtype == torch.int32
    assert batch["kept"].tolist() == [0, 3, 5, 6]
    assert batch["targets"].tolist() == [6, 9, 2, 3]


def test_filled_batches_have_one_shape_and_learn_nothing_more() -> None:
    collate = FlatCollator(0, pad_to=12, longest=4, documents=6, boundaries=True)
    full, short = collate(ROWS), collate(ROWS[:1])
    assert full["input_ids"].tolist() == [[5, 6, 7, 8, 9, 1, 2, 3, 0, 0, 0, 0]]
    assert full["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1, 2, 0, 0, 0, 0]]
    assert full["cu_seqlens"].tolist() == [0, 3, 5, 8, 12, 12, 12]
    assert full["num_tokens"].item() == 8
    assert full["kept"].tolist() == [0, 3, 5, 6]
    for name in ("input_ids", "position_ids", "labels", "cu_seqlens"):
        assert short[name].shape == full[name].shape
    assert short["targets"].tolist() == [6, 9]
    # What is filled in is no longer than the longest document, and its positions make none longer.
    assert short["position_ids"].max().item() == 2
    assert short["cu_seqlens"].tolist() == [0, 3, 5, 9, 12, 12, 12]


def test_padded_rows_mask_what_is_filled_in() -> None:
    batch = PaddedCollator(0)(ROWS)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9], [1, 2, 3, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 6, -100, 8, 9], [1, 2, 3, -100, -100]]
    assert batch["num_tokens"].item() == 8

"""Packing puts every document into exactly one row, and wastes little."""

from __future__ import annotations

from array import array

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from shared.spec import JobSpec
from worker.training.data_report import packing_report
from worker.training.job_trainer import RowOrder
from worker.training.packing import arranged, best_fit, in_batches


@given(st.lists(st.integers(1, 64), max_size=200))
def test_every_document_is_in_one_row_that_it_fits(lengths: list[int]) -> None:
    rows = best_fit(lengths, 64)
    assert sorted(document for row in rows for document in row) == list(range(len(lengths)))
    assert all(0 < sum(lengths[document] for document in row) <= 64 for row in rows)
    # Best fit decreasing never needs more than 11/9 of the fewest rows, plus one.
    assert len(rows) <= -(-sum(lengths) // 64) * 11 / 9 + 1 + sum(length > 32 for length in lengths)


def test_the_fullest_row_with_room_is_taken() -> None:
    assert [row.tolist() for row in best_fit([6, 5, 4, 4, 1], 10)] == [[0, 2], [1, 3, 4]]
    assert best_fit([], 10) == []


def test_real_lengths_fill_the_rows() -> None:
    chance = np.random.default_rng(0)
    lengths = chance.lognormal(6, 0.6, 20_000).astype(int).clip(1, 4096)
    rows = best_fit(lengths, 4096)
    assert lengths.sum() / (len(rows) * 4096) > 0.995


def test_the_longest_rows_lead_and_the_rest_is_shuffled_by_seed() -> None:
    lengths = list(range(1, 101))
    rows = [array("I", [number]) for number in range(100)]
    found = arranged(rows, lengths, 3, seed=1)
    assert [row[0] for row in found[:3]] == [99, 98, 97]
    assert sorted(found) == rows
    assert found == arranged(rows, lengths, 3, seed=1) != arranged(rows, lengths, 3, seed=2)


def test_padded_batches_hold_rows_of_like_lengths() -> None:
    lengths = np.random.default_rng(0).permutation(np.arange(1, 103))
    order = in_batches(lengths, 4, seed=1)
    assert sorted(order) == list(range(102))
    tokens = lengths[order].tolist()
    assert tokens[:4] == [102, 101, 100, 99]
    assert tokens[-2:] == [2, 1]
    assert all(max(tokens[at : at + 4]) - min(tokens[at : at + 4]) < 4 for at in range(0, 102, 4))
    assert tokens != sorted(tokens, reverse=True)
    assert order.tolist() == in_batches(lengths, 4, seed=1).tolist() != in_batches(lengths, 4, 2).tolist()
    assert in_batches([1, 3], 4, seed=1).tolist() == [1, 0]


def test_efficiency_is_that_of_the_order_of_the_rows() -> None:
    spec = JobSpec.model_validate({"packing": False, "training": {"per_device_train_batch_size": 2}})
    assert packing_report(spec, np.array([10, 10, 2, 2]), 128)["efficiency"] == 1
    assert packing_report(spec, np.array([10, 2, 10, 2]), 128)["efficiency"] == 0.6


def test_later_epochs_shuffle_whole_batches() -> None:
    order = RowOrder(42, seed=3, batch=4)
    assert list(order) == list(range(42))
    order.set_epoch(1)
    found = list(order)
    assert sorted(found) == list(range(42)) != found
    assert found[-2:] == [40, 41]
    assert all(found[at : at + 4] == list(range(found[at], found[at] + 4)) for at in range(0, 40, 4))

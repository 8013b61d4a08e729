"""The compact set of hashes is a set."""

from __future__ import annotations

import random
import tracemalloc

from hypothesis import given
from hypothesis import strategies as st

from shared.data.keys import Keys


@given(st.lists(st.integers(1, 2**64 - 1) | st.integers(1, 40)))
def test_it_is_a_set(numbers: list[int]) -> None:
    keys, known = Keys(), set[int]()
    for number in numbers:
        assert (number in keys) == (number in known)
        assert keys.add(number) == (number not in known)
        known.add(number)
        assert number in keys
        assert len(keys) == len(known)


def test_zero_is_a_key_too() -> None:
    keys = Keys()
    assert 0 not in keys
    assert keys.add(0)
    assert 0 in keys
    assert not keys.add(0)


def test_it_is_small() -> None:
    chance = random.Random(0)
    tracemalloc.start()
    keys = Keys()
    for _ in range(50_000):
        keys.add(chance.getrandbits(64))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50_000 * 40

from __future__ import annotations

import threading

import pytest

from shared.errors import JobFailure, JobStopped
from shared.lifecycle import FailureCode
from tests.conftest import wait_for
from worker.training.overlap import Loading


class Switch:
    """A control that stops once it is told to."""

    def __init__(self) -> None:
        self.stopped = False

    def check(self) -> None:
        if self.stopped:
            raise JobStopped


def test_what_was_loaded_meanwhile_is_given_once() -> None:
    go_on = threading.Event()
    loading = Loading(lambda: go_on.wait(10) and ["model"], Switch())
    loading.check()
    go_on.set()
    assert loading.result() == ["model"]
    # Nothing keeps the model once the exports want its memory.
    assert loading.result() is None


def test_a_model_that_cannot_be_loaded_ends_the_preparation() -> None:
    def fail() -> None:
        raise JobFailure(FailureCode.MODEL_UNAVAILABLE, "no weights", "")

    loading = Loading(fail, Switch())

    def has_failed() -> bool:
        try:
            loading.check()
        except JobFailure:
            return True
        return False

    assert wait_for(has_failed)
    with pytest.raises(JobFailure, match="no weights"):
        loading.result()


def test_a_stop_is_heeded_while_it_loads() -> None:
    control, go_on = Switch(), threading.Event()
    loading = Loading(lambda: go_on.wait(10), control)
    control.stopped = True
    with pytest.raises(JobStopped):
        loading.result()
    go_on.set()

"""The thread of a supervisor that listens to the doorbell."""

from __future__ import annotations

import time

import pytest

from shared.queue import Doorbell
from tests.conftest import wait_for
from worker.doorbell import Listener


def test_a_listener_that_is_stopped_does_not_sit_out_its_wait(
    doorbell: Doorbell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.doorbell.WAIT_SECONDS", 5)
    listener = Listener(doorbell, lambda: None)
    began = time.monotonic()
    listener.start()
    wait_for(lambda: doorbell.redis.info("clients")["blocked_clients"])
    listener.stop()
    assert time.monotonic() - began < 4

"""The inference process: how it ends."""

from __future__ import annotations

import asyncio
import threading

import pytest

from shared.settings import Settings
from tests.conftest import wait_for
from worker.inference.service import Service


@pytest.mark.parametrize("early", [True, False])
def test_it_stops_when_asked_to_even_before_it_began(settings: Settings, early: bool) -> None:
    settings.root.mkdir(parents=True)
    service = Service(settings)
    if early:
        service.stop()
    thread = threading.Thread(target=lambda: asyncio.run(service.run()))
    thread.start()
    if not early:
        wait_for(settings.inference_socket().exists)
        service.stop()
    thread.join(10)
    assert not thread.is_alive()
    assert not settings.inference_socket().exists()

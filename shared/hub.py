"""Configs of hub models, read without their weights, for those who only want to know a model's shape."""

from __future__ import annotations

import json
import os
import threading
import time
from collections import OrderedDict
from typing import Any
from urllib.parse import quote

import httpx

from shared.shape import ModelShape

DEFAULT_ENDPOINT = "https://huggingface.co"
# How long a request for a job may wait for the hub, in seconds, and how much a config may be, in bytes.
PATIENCE = 3.0
MAX_CONFIG = 1 << 20
MAX_HOPS = 3
# Seconds for which an answer, and the lack of one, is remembered, and of how many models.
REMEMBERED, FORGOTTEN, MOST_REMEMBERED = 3600.0, 60.0, 512
MOST_AT_ONCE = 8


class HubConfigs:
    """Shapes of hub models, remembered. Safe for many threads at once.

    Looks at `HF_ENDPOINT`, `HF_TOKEN` and `HF_HUB_OFFLINE`, as the worker's downloads do.
    """

    def __init__(self) -> None:
        self._endpoint = os.environ.get("HF_ENDPOINT", DEFAULT_ENDPOINT).rstrip("/")
        self._token = os.environ.get("HF_TOKEN")
        self._offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
        self._found: OrderedDict[tuple[str, str], tuple[float, ModelShape | None]] = OrderedDict()
        self._lock = threading.Lock()
        self._free = threading.BoundedSemaphore(MOST_AT_ONCE)

    def shape(self, model_id: str, revision: str | None) -> ModelShape | None:
        """The model's shape; None if the hub can't be asked, doesn't say, or is too slow.

        Never in a database session: it may take `PATIENCE` seconds.

        Args:
            model_id, revision: as the spec has checked them.
        """
        key = (model_id, revision or "main")
        with self._lock:
            until, shape = self._found.get(key, (0.0, None))
        if time.monotonic() < until:
            return shape
        if self._offline or not self._free.acquire(blocking=False):
            return None
        answer: list[ModelShape | None] = []

        def look() -> None:
            try:
                answer.append(self._read(*key))
            finally:
                self._free.release()

        # A thread, for looking up the hub's address knows no time limit of its own.
        thread = threading.Thread(target=look, name="hub-config", daemon=True)
        thread.start()
        thread.join(PATIENCE)
        shape = answer[0] if answer else None
        self._remember(key, shape)
        return shape

    def _remember(self, key: tuple[str, str], shape: ModelShape | None) -> None:
        with self._lock:
            self._found[key] = (time.monotonic() + (REMEMBERED if shape else FORGOTTEN), shape)
            self._found.move_to_end(key)
            while len(self._found) > MOST_REMEMBERED:
                self._found.popitem(last=False)

    def _read(self, model_id: str, revision: str) -> ModelShape | None:
        url = f"{self._endpoint}/{model_id}/resolve/{quote(revision, safe='')}/config.json"
        try:
            config = self._fetch(httpx.URL(url))
        except (httpx.HTTPError, httpx.InvalidURL, ValueError, RecursionError):
            return None
        return ModelShape.from_config(config) if isinstance(config, dict) else None

    def _fetch(self, url: httpx.URL) -> Any:
        """The JSON at this address, over redirects within its host: they are how the hub tells new names."""
        headers = {"authorization": f"Bearer {self._token}"} if self._token else {}
        deadline = time.monotonic() + PATIENCE
        with httpx.Client(timeout=PATIENCE, headers=headers) as client:
            for _ in range(MAX_HOPS):
                with client.stream("GET", url) as response:
                    following = response.next_request
                    if following is not None and _origin(following.url) == _origin(url):
                        url = following.url
                        continue
                    if response.status_code != httpx.codes.OK:
                        return None
                    body = b""
                    for part in response.iter_bytes():
                        body += part
                        if len(body) > MAX_CONFIG or time.monotonic() > deadline:
                            return None
                    return json.loads(body)
        return None


def _origin(url: httpx.URL) -> tuple[str, str, int | None]:
    return url.scheme, url.host, url.port

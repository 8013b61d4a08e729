"""Configs of hub models, from a hub on the loopback."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from shared import hub
from shared.hub import HubConfigs
from shared.shape import NEMOTRON_NANO_4B

CONFIG = {
    "model_type": "llama", "hidden_size": 3072, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 9216, "vocab_size": 128256,
    "max_position_embeddings": 131072, "tie_word_embeddings": False,
}  # fmt: skip


class LocalHub:
    """Answers by path; records paths and keys; `hold` keeps every answer back until it is set."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str | None]] = []
        self.hold = threading.Event()
        self.hold.set()
        answers = {
            "/a/model/resolve/main/config.json": (200, {}, json.dumps(CONFIG).encode()),
            "/a/model/resolve/refs%2Fpr%2F1/config.json": (200, {}, json.dumps(CONFIG).encode()),
            "/a/renamed/resolve/main/config.json": (
                307,
                {"location": "/a/model/resolve/main/config.json"},
                b"",
            ),
            "/a/elsewhere/resolve/main/config.json": (
                302,
                {"location": "http://127.0.0.1:9/config.json"},
                b"",
            ),
            "/a/circle/resolve/main/config.json": (
                302,
                {"location": "/a/circle/resolve/main/config.json"},
                b"",
            ),
            "/a/large/resolve/main/config.json": (200, {}, b" " * ((1 << 20) + 1)),
            "/a/list/resolve/main/config.json": (200, {}, b"[]"),
            "/a/broken/resolve/main/config.json": (200, {}, b"{"),
        }
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.asked.append((self.path, self.headers.get("authorization")))
                outer.hold.wait(10)
                status, headers, body = answers.get(self.path, (401, {}, b""))
                self.send_response(status)
                for name, value in (headers | {"content-length": str(len(body))}).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                return

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"


@pytest.fixture
def local(monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    running = LocalHub()
    monkeypatch.setenv("HF_ENDPOINT", running.url + "/")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    yield running
    running.hold.set()
    running.server.shutdown()
    running.server.server_close()


def test_a_config_is_read_once_and_remembered(local: LocalHub) -> None:
    configs = HubConfigs()
    for _ in range(3):
        assert configs.shape("a/model", None) == NEMOTRON_NANO_4B
        assert configs.shape("a/absent", None) is None
    paths = ["/a/model/resolve/main/config.json", "/a/absent/resolve/main/config.json"]
    assert local.asked == [(path, "Bearer hf_secret") for path in paths]
    assert configs.shape("a/model", "refs/pr/1") == NEMOTRON_NANO_4B
    assert len(local.asked) == 3


def test_a_renamed_model_is_found_and_other_hosts_are_not_asked(local: LocalHub) -> None:
    configs = HubConfigs()
    assert configs.shape("a/renamed", None) == NEMOTRON_NANO_4B
    assert configs.shape("a/elsewhere", None) is None
    assert configs.shape("a/circle", None) is None
    assert len(local.asked) == 2 + 1 + 3


@pytest.mark.parametrize("name", ["large", "list", "broken"])
def test_what_is_no_config_gives_no_shape(local: LocalHub, name: str) -> None:
    assert HubConfigs().shape(f"a/{name}", None) is None


def test_a_slow_hub_holds_nobody_up(local: LocalHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "PATIENCE", 0.05)
    local.hold.clear()
    configs = HubConfigs()
    began = time.monotonic()
    # More than may wait at once: the rest are told at once that nothing is known.
    assert [configs.shape(f"a/model{n}", None) for n in range(hub.MOST_AT_ONCE + 5)] == [None] * 13
    assert time.monotonic() - began < 5


def test_offline_means_that_the_hub_is_not_asked(local: LocalHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert HubConfigs().shape("a/model", None) is None
    assert local.asked == []


def test_a_hub_that_is_away_gives_no_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    for endpoint in ("http://127.0.0.1:9", "no address"):
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        assert HubConfigs().shape("a/model", None) is None

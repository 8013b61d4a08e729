"""Which addresses the server may call for its users, and that it calls none but those it has judged."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import pytest

from api import outbound
from api.outbound import Unreachable, address_allowed, check_url
from shared.errors import InvalidRequest
from shared.settings import Settings
from tests.clients.receiver import receiver

pytestmark = pytest.mark.anyio

PUBLIC = Settings()
PRIVATE = Settings(webhook_private=True)


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "127.9.9.9", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1",
        "0.0.0.0", "224.0.0.1", "255.255.255.255", "192.0.2.1", "::1", "::", "fe80::1", "fe80::1%eth0",
        "fc00::1", "fec0::1", "ff02::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::127.0.0.1",
        "2002:7f00:1::", "64:ff9b::7f00:1", "2001:db8::1",
    ],
)  # fmt: skip
def test_addresses_that_are_not_public(address: str) -> None:
    assert not address_allowed(address, PUBLIC)


def test_addresses_that_are() -> None:
    for address in ("93.184.216.34", "2606:2800:220:1::1", "::ffff:8.8.8.8"):
        assert address_allowed(address, PUBLIC)
    assert address_allowed("10.0.0.1", PRIVATE)
    assert address_allowed("::1", PRIVATE)
    for nobody in ("0.0.0.0", "::", "224.0.0.1", "ff02::1"):
        assert not address_allowed(nobody, PRIVATE)


@pytest.mark.parametrize(
    "url",
    [
        "http://example.org/", "ftp://example.org/", "file:///etc/passwd", "//example.org", "example.org", "",
        "https://", "https:///path", "https://user:pw@example.org/", "https://example.org/#part",
        "https://example.org:99999/", "https://exa mple.org/", "https://example.org/\r\nX: y",
        "https://example.org\\@10.0.0.1/", "https://[::1]/", "https://[::1", "https://127.0.0.1/",
        "https://169.254.169.254/latest", "https://ex\u00e4mple.org/", "https://-x.org/",
        "https://example.org/" + "x" * 2000,
    ],
)  # fmt: skip
def test_urls_that_are_refused(url: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check_url(url, PUBLIC)
    assert caught.value.param == "url"


def test_urls_that_are_taken() -> None:
    assert check_url("https://Example.org/hook?token=x", PUBLIC).port == 443
    assert check_url("https://93.184.216.34:8443/", PUBLIC).host == "93.184.216.34"
    assert check_url("http://10.0.0.1/", PRIVATE).port == 80


def test_the_operators_list_of_hosts() -> None:
    settings = Settings(webhook_allow="*.Example.org, hooks.test")
    assert check_url("https://ci.example.org/", settings)
    assert check_url("https://hooks.test./", settings)
    for url in ("https://example.org/", "https://example.org.evil.test/", "https://93.184.216.34/"):
        with pytest.raises(InvalidRequest) as caught:
            check_url(url, settings)
        assert caught.value.error_code == "webhook_not_allowed"


@pytest.mark.parametrize("addresses", [("10.0.0.1",), ("93.184.216.34", "127.0.0.1"), ()])
async def test_a_name_with_an_address_that_is_not_public_is_not_called(
    monkeypatch: pytest.MonkeyPatch, addresses: tuple[str, ...]
) -> None:
    monkeypatch.setattr(outbound, "asyncio", Loop(addresses))
    with pytest.raises(Unreachable, match="not public"):
        await outbound.post("https://hooks.example.org/", "{}", {}, PUBLIC)


class Loop:
    """asyncio with a resolver of the test's own, which counts."""

    def __init__(self, addresses: tuple[str, ...]) -> None:
        self.addresses = addresses
        self.asked: list[str] = []
        self.timeout = asyncio.timeout

    def get_running_loop(self) -> Loop:
        return self

    async def getaddrinfo(self, host: str, port: int, **_: Any) -> list[Any]:
        self.asked.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in self.addresses]


async def test_the_connection_goes_to_the_address_that_was_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = Loop(("127.0.0.1",))
    monkeypatch.setattr(outbound, "asyncio", loop)
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    with receiver() as hook:
        hook.statuses = [302]
        url = f"http://no-such-name.invalid:{hook.port}/hook?token=x"
        assert await outbound.post(url, "{}", {"x-mine": "1"}, PRIVATE) == 302
        # Once looked up, once called: the redirect led nowhere.
        assert loop.asked == ["no-such-name.invalid"]
        ((headers, body),) = hook.taken
    assert (headers["host"], headers["x-mine"], body) == (f"no-such-name.invalid:{hook.port}", "1", b"{}")


async def test_a_host_that_never_answers_takes_no_longer_than_its_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(outbound, "SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(Unreachable, match="No answer"):
        await outbound.post(f"http://127.0.0.1:{silent.getsockname()[1]}/", "{}", {}, PRIVATE)


async def test_a_rule_that_has_changed_counts() -> None:
    with pytest.raises(Unreachable, match="https"):
        await outbound.post("http://127.0.0.1:9/", "{}", {}, PUBLIC)

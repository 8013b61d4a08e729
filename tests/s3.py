"""An S3-compatible store of the suite's own (moto), on a free port of the loopback."""

from __future__ import annotations

import re
import subprocess
import sys
from itertools import count
from pathlib import Path

import httpx

RUNNING = re.compile(r"Running on (http://127\.0\.0\.1:\d+)")
ACCOUNT = {"AWS_ACCESS_KEY_ID": "tests-key-id", "AWS_SECRET_ACCESS_KEY": "tests-secret"}


class S3Server:
    """A moto server in a process of its own; what is in it goes with it."""

    def __init__(self, folder: Path) -> None:
        self._log = folder / "moto.log"
        with self._log.open("wb") as log:
            command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"]
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        self._numbers = count(1)
        self.endpoint = ""

    def is_ready(self) -> bool:
        """From then on `endpoint` is its URL."""
        assert self._process.poll() is None, self._log.read_text()
        found = RUNNING.search(self._log.read_text())
        self.endpoint = found[1] if found else ""
        return found is not None

    def bucket(self) -> str:
        """The URL of a new, empty bucket."""
        name = f"bucket-{next(self._numbers)}"
        assert httpx.put(f"{self.endpoint}/{name}").is_success
        return f"s3://{name}"

    def environment(self, endpoint: str | None = None) -> dict[str, str]:
        """What a process finds the store by, directly or at another endpoint."""
        return {**ACCOUNT, "AWS_ENDPOINT_URL": endpoint or self.endpoint, "AWS_DEFAULT_REGION": "us-east-1"}

    def close(self) -> None:
        self._process.kill()
        self._process.wait()

"""Starting, asking and ending the child process of one attempt."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

from shared.planner import Device
from worker.order import Order

# What a child may see of the worker's environment. Never the API's keys, the database's or Redis' address.
ENVIRONMENT = frozenset(
    {
        "PATH", "HOME", "USER", "LANG", "TZ", "VIRTUAL_ENV", "PYTHONPATH", "LD_LIBRARY_PATH",
        "XDG_CACHE_HOME",
        "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy",
        "SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "OMP_NUM_THREADS", "MKL_NUM_THREADS",
    }
)  # fmt: skip
# AWS_ is for an artifact store on S3.
ENVIRONMENT_PREFIXES = ("LC_", "HF_", "AWS_", "CUDA_", "NVIDIA_", "NCCL_", "TORCH_", "TRITON_")
OUTPUT_FILE = "output.log"

logger = logging.getLogger(__name__)


class Child:
    """A running attempt: one process group in one slot."""

    def __init__(self, module: str, order: Order, device: Device, on_exit: Callable[[], None]) -> None:
        self.job_id = order.job_id
        self.token = order.token
        self.workdir = Path(order.workdir)
        self.device = device
        self.started_at = time.monotonic()
        self.stop_asked_at: float | None = None
        self.deadline: datetime | None = None
        with (self.workdir / OUTPUT_FILE).open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                env=_environment(self.workdir, device),
                # A group of its own: the converter and quantiser that it starts end with it.
                start_new_session=True,
                text=True,
            )
        self._say(order.to_line())
        threading.Thread(target=self._await_exit, args=(on_exit,), daemon=True).start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def exit_code(self) -> int | None:
        """None while it runs; negative for the signal that ended it."""
        return self._process.poll()

    def ask_to_stop(self) -> None:
        """Ask it to end at its next step; asking again changes nothing."""
        if self.stop_asked_at is None:
            self.stop_asked_at = time.monotonic()
            self._say("stop\n")

    def kill(self) -> None:
        """End the whole group at once; `exit_code` tells when it is gone."""
        self._kill_group()

    def await_exit(self, seconds: float) -> None:
        """Wait for its end, though not for one that hangs in a driver."""
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            logger.error("Process %d of job %s does not end", self.pid, self.job_id)

    def close(self) -> None:
        """Release what is left of an ended child, and end what it left running."""
        self._kill_group()
        if self._process.stdin is not None:
            try:
                self._process.stdin.close()
            except BrokenPipeError:
                return

    def last_words(self) -> str:
        """The last line that it printed, for a death that nothing else explains."""
        try:
            lines = (self.workdir / OUTPUT_FILE).read_text(errors="replace").splitlines()
        except OSError:
            return ""
        return next((line.strip()[:500] for line in reversed(lines) if line.strip()), "")

    def _say(self, line: str) -> None:
        stdin = self._process.stdin
        if stdin is None or stdin.closed:
            return
        try:
            stdin.write(line)
            stdin.flush()
        except BrokenPipeError:
            return  # It has just ended: its exit is noticed by itself.

    def _kill_group(self) -> None:
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            return  # Gone; its number may be somebody else's by now.

    def _await_exit(self, on_exit: Callable[[], None]) -> None:
        self._process.wait()
        on_exit()


def _environment(workdir: Path, device: Device) -> dict[str, str]:
    kept = {
        name: value
        for name, value in os.environ.items()
        if name in ENVIRONMENT or name.startswith(ENVIRONMENT_PREFIXES)
    }
    temporary = workdir / "tmp"
    temporary.mkdir(mode=0o700, exist_ok=True)
    return kept | {
        "CUDA_VISIBLE_DEVICES": str(device.index) if device.kind == "cuda" else "",
        # As nvidia-smi counts them, which the slots come from.
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "TMPDIR": str(temporary),
        # Threads that spin while they wait slow each other down when the cores are shared: on a loaded
        # 2-core machine a training step took 4.1 s so and 0.9 s with this.
        "OMP_WAIT_POLICY": "PASSIVE",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "true",
        "PYTHONUNBUFFERED": "1",
        "PYTHONUTF8": "1",
    }

"""One process of the worker's own code, in a process group and a folder of its own, told what to do by lines
on its standard input."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from shared.device import Device
from shared.storage import ACCOUNT

# What a child may see of the worker's environment. Never the API's keys, the database's or Redis' address.
ENVIRONMENT = frozenset(
    {
        "PATH", "HOME", "USER", "LANG", "TZ", "VIRTUAL_ENV", "PYTHONPATH", "LD_LIBRARY_PATH",
        "XDG_CACHE_HOME",
        "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy",
        "SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "OMP_NUM_THREADS", "MKL_NUM_THREADS",
    }
)  # fmt: skip
# AWS_ is for an artifact store on S3: where it is, and in which files its account. The account itself goes
# with the order, to that process alone.
ENVIRONMENT_PREFIXES = ("LC_", "HF_", "AWS_", "CUDA_", "NVIDIA_", "NCCL_", "TORCH_", "TRITON_")
# The worker's own account on the hub, and the caches that all owners share.
SHARED_HUB = frozenset(
    {
        "HF_TOKEN", "HF_TOKEN_PATH", "HF_HUB_CACHE", "HF_DATASETS_CACHE", "HF_ASSETS_CACHE", "HF_XET_CACHE",
        "HF_MODULES_CACHE",
    }
)  # fmt: skip
OUTPUT_FILE = "output.log"
# What reporters write: beside the attempts of a job, and in the data folder what all jobs share.
REPORTS = "reports"

logger = logging.getLogger(__name__)


class Process:
    """`python -m MODULE ARGUMENTS`, pinned to one device; its output goes to a file in its folder.

    With a `hub_cache` it has that for what it gets from the hub, and no account of the worker's there.

    Raises:
        OSError: the disk is full or the machine is out of processes.
    """

    def __init__(
        self,
        module: str,
        arguments: list[str],
        folder: Path,
        device: Device,
        compile_cache: Path,
        on_exit: Callable[[], None],
        hub_cache: Path | None = None,
    ) -> None:
        self.folder = folder
        folder.mkdir(parents=True, mode=0o700)
        (folder / "tmp").mkdir(mode=0o700)
        with (folder / OUTPUT_FILE).open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                env=_environment(folder, device, compile_cache, hub_cache),
                # A group of its own: the converter and quantiser that it starts end with it.
                start_new_session=True,
                text=True,
            )
        threading.Thread(target=self._await_exit, args=(on_exit,), daemon=True).start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def exit_code(self) -> int | None:
        """None while it runs; negative for the signal that ended it."""
        return self._process.poll()

    def move_to(self, folder: Path) -> None:
        """Make its folder another one; what it has open there stays open."""
        folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.folder = self.folder.rename(folder)

    def say(self, line: str) -> None:
        stdin = self._process.stdin
        if stdin is None or stdin.closed:
            return
        try:
            stdin.write(line)
            stdin.flush()
        except BrokenPipeError:
            return  # It has just ended: its exit is noticed by itself.

    def kill(self) -> None:
        """End the whole group at once; `exit_code` tells when it is gone."""
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            return  # Gone; its number may be somebody else's by now.

    def await_exit(self, seconds: float) -> None:
        """Wait for its end, though not for one that hangs in a driver."""
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            logger.error("Process %d does not end", self.pid)

    def close(self) -> None:
        """Release what is left of an ended process, and end what it left running."""
        self.kill()
        if self._process.stdin is not None:
            try:
                self._process.stdin.close()
            except BrokenPipeError:
                return

    def last_words(self) -> str:
        """The last line that it printed, for a death that nothing else explains."""
        try:
            lines = (self.folder / OUTPUT_FILE).read_text(errors="replace").splitlines()
        except OSError:
            return ""
        return next((line.strip()[:500] for line in reversed(lines) if line.strip()), "")

    def _await_exit(self, on_exit: Callable[[], None]) -> None:
        self._process.wait()
        on_exit()


def _environment(folder: Path, device: Device, compile_cache: Path, hub_cache: Path | None) -> dict[str, str]:
    kept = {
        name: value
        for name, value in os.environ.items()
        if (name in ENVIRONMENT or name.startswith(ENVIRONMENT_PREFIXES)) and name not in ACCOUNT
    }
    if hub_cache is not None:
        # What one owner's token opened, no other owner may find in a cache; nor is it the worker's account.
        kept = {name: value for name, value in kept.items() if name not in SHARED_HUB}
        kept["HF_HOME"] = str(hub_cache)
    return kept | {
        # From the start, before there is a job: importing bitsandbytes or Unsloth asks CUDA what the GPU can
        # do, and from then on the process sees the GPUs that it saw at that moment.
        "CUDA_VISIBLE_DEVICES": str(device.index) if device.kind == "cuda" else "",
        # As nvidia-smi counts them, which the slots come from.
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        # Whether there is a GPU is asked of the driver's library: no import needs CUDA itself for that.
        "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
        "TMPDIR": str(folder / "tmp"),
        # What a job compiled, the next one of the same shape loads.
        "TORCHINDUCTOR_CACHE_DIR": str(compile_cache / "inductor"),
        "TRITON_CACHE_DIR": str(compile_cache / "triton"),
        "UNSLOTH_COMPILE_LOCATION": str(compile_cache / "unsloth"),
        # Threads that spin while they wait slow each other down when the cores are shared: on a loaded
        # 2-core machine a training step took 4.1 s so and 0.9 s with this.
        "OMP_WAIT_POLICY": "PASSIVE",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "true",
        "PYTHONUNBUFFERED": "1",
        "PYTHONUTF8": "1",
    }

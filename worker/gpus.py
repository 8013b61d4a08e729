"""The slots of this box: one per GPU, or one for the CPU. Asks the driver's own tool, never torch."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Sequence

from shared.errors import InvalidRequest
from shared.planner import Device

QUERY_SECONDS = 10


def find_slots(gpus: Sequence[int] | None, workers: int | None) -> list[Device]:
    """One slot per GPU, those named by `gpus` or all; without any GPU `workers` slots on the CPU (default 1).

    Raises:
        InvalidRequest: a GPU was named that is not there.
    """
    found = probe_gpus()
    if gpus is not None:
        by_index = {device.index: device for device in found}
        absent = [index for index in gpus if index not in by_index]
        if absent:
            raise InvalidRequest(
                f"There is no GPU {absent[0]} on this machine. It has: {sorted(by_index) or 'none'}."
            )
        found = [by_index[index] for index in gpus]
    if found:
        return found[:workers]
    return [_cpu(index) for index in range(workers or 1)]


def probe_gpus() -> list[Device]:
    """The NVIDIA GPUs that the driver shows; none without a driver."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    query = "--query-gpu=index,name,memory.total"
    answer = subprocess.run(
        [tool, query, "--format=csv,noheader,nounits"],
        capture_output=True,
        text=True,
        timeout=QUERY_SECONDS,
        check=False,
    )
    return parse_gpus(answer.stdout) if answer.returncode == 0 else []


def parse_gpus(text: str) -> list[Device]:
    """Devices from `nvidia-smi --query-gpu=index,name,memory.total --format=csv,noheader,nounits` (MiB)."""
    devices = []
    for line in text.splitlines():
        parts = [part.strip() for part in line.split(",")]
        if len(parts) == 3 and parts[0].isdigit() and parts[2].isdigit():
            devices.append(Device("cuda", int(parts[0]), parts[1], int(parts[2]) << 20))
    return devices


def _cpu(index: int) -> Device:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Device("cpu", index, f"CPU ({platform.machine()}, {os.cpu_count()} cores)", memory)

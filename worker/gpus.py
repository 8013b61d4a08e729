"""The slots of this box: one per GPU, or one for the CPU. Asks the driver's own tool, never torch."""

from __future__ import annotations

import importlib.util
import logging
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import Any

from shared.device import Device
from shared.errors import InvalidRequest, Unavailable
from shared.plan import EngineName

QUERY = (
    "--query-gpu=index,uuid,name,memory.total,mig.mode.current,compute_cap",
    "--format=csv,noheader,nounits",
)
# Drivers before 2022 refuse a query that has compute_cap in it.
OLD_QUERY = (
    "--query-gpu=index,uuid,name,memory.total,mig.mode.current",
    "--format=csv,noheader,nounits",
)
FREE_QUERY = ("--query-gpu=index,memory.free", "--format=csv,noheader,nounits")
USE_QUERY = (
    "--query-gpu=index,name,memory.total,memory.used,utilization.gpu",
    "--format=csv,noheader,nounits",
)
# What is told of the memory of a GPU that has none of its own.
NO_MEMORY = ("[N/A]", "[Not Supported]")
QUERY_SECONDS = 30
CAPABILITY = re.compile(r"\d{1,2}\.\d")

logger = logging.getLogger(__name__)


def find_slots(gpus: Sequence[int] | None, workers: int | None) -> list[Device]:
    """One slot per GPU, those named by `gpus` or all; without any GPU `workers` slots on the CPU (default 1).

    Raises:
        InvalidRequest: a GPU was named that is not there.
        Unavailable: the driver is installed and does not answer, or no GPU that it shows can be used.
    """
    found = probe_gpus()
    if gpus is not None:
        by_index = {device.index: device for device in found}
        absent = [index for index in gpus if index not in by_index]
        if absent:
            raise InvalidRequest(
                f"There is no GPU {absent[0]} on this machine. It has: {sorted(by_index) or 'none'}."
            )
        found = [by_index[index] for index in dict.fromkeys(gpus)]
    if found:
        return found[:workers]
    return [_cpu(index) for index in range(workers or 1)]


def probe_gpus() -> list[Device]:
    """The NVIDIA GPUs that the driver shows and CUDA_VISIBLE_DEVICES, where it is set, leaves.

    Raises:
        Unavailable: the driver's tool is there and fails, or there are GPUs and none that can be used: jobs
            must not end up on the CPU unnoticed.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    tool = shutil.which("nvidia-smi")
    if tool is None or visible == "":
        return []
    try:
        told = _ask(tool, QUERY)
    except Unavailable:
        told = _ask(tool, OLD_QUERY)
    return parse_gpus(told, visible)


def measure_free(devices: Sequence[Device]) -> list[Device]:
    """The devices with the memory that is free on them now; one whose driver fails to tell stays as it is.

    Raises:
        Unavailable: the driver does not answer.
    """
    if all(device.kind == "cpu" for device in devices):
        return list(devices)
    free = {}
    for line in _ask("nvidia-smi", FREE_QUERY).splitlines():
        index, _, memory = (part.strip() for part in line.partition(","))
        told = _memory(memory, available_bytes())
        if index.isdigit() and told is not None:
            # 0 would say that it is not known.
            free[int(index)] = max(told, 1)
    # What a device of a worker has may be a share of the GPU.
    return [
        replace(d, memory_bytes=min(free[d.index], d.memory_bytes or free[d.index])) if d.index in free else d
        for d in devices
    ]


def measure_use(devices: Sequence[Device]) -> list[dict[str, Any]]:
    """What these GPUs do now: `{"index", "name", "memory_bytes", "used_bytes", "utilization"}` each, the last
    from 0 to 1; None for what the driver does not tell.

    Raises:
        Unavailable: the driver does not answer.
    """
    wanted = {device.index for device in devices}
    found = []
    for line in _ask("nvidia-smi", USE_QUERY).splitlines():
        parts = [part.strip() for part in line.split(",")]
        if len(parts) != 5 or not parts[0].isdigit() or int(parts[0]) not in wanted:
            continue
        total, used, percent = (int(part) if part.isdigit() else None for part in parts[2:])
        found.append(
            {
                "index": int(parts[0]),
                "name": parts[1],
                "memory_bytes": None if total is None else total << 20,
                "used_bytes": None if used is None else used << 20,
                "utilization": None if percent is None else percent / 100,
            }
        )
    return found


def with_share(devices: Sequence[Device], fraction: float) -> list[Device]:
    """The devices, GPUs with this share of their memory."""
    return [
        replace(d, memory_bytes=int(d.memory_bytes * fraction)) if d.kind == "cuda" else d for d in devices
    ]


def _ask(tool: str, query: Sequence[str]) -> str:
    try:
        answer = subprocess.run(
            [tool, *query], capture_output=True, text=True, timeout=QUERY_SECONDS, check=True
        )
    except (subprocess.SubprocessError, OSError) as error:
        said = getattr(error, "stdout", None) or error
        raise Unavailable(
            f"nvidia-smi is installed and fails: {str(said).strip()} Mend the driver, or set "
            "CUDA_VISIBLE_DEVICES to nothing to run jobs on the CPU."
        ) from error
    return answer.stdout


def parse_gpus(text: str, visible: str | None = None) -> list[Device]:
    """Devices from nvidia-smi's answer to QUERY or OLD_QUERY (memory in MiB, 0 if the driver fails to tell).

    One for which that does not apply (GB10) computes in the machine's memory. One that is split with MIG is
    left out: its memory is not one job's to have.

    Args:
        visible: a comma-separated list of numbers or UUIDs, as CUDA_VISIBLE_DEVICES has it; None for all.

    Raises:
        Unavailable: `visible` names what is not there, or all GPUs are split.
    """
    rows = [[part.strip() for part in line.split(",")] for line in text.splitlines()]
    rows = [row for row in rows if len(row) in (5, 6) and row[0].isdigit()]
    if visible is not None:
        rows = _visible(rows, visible)
    split = ", ".join(row[0] for row in rows if row[4] == "Enabled")
    rows = [row for row in rows if row[4] != "Enabled"]
    if split:
        why = f"Split with MIG, while jobs run on whole GPUs: {split}."
        if not rows:
            raise Unavailable(
                f"{why} Switch MIG off (nvidia-smi -mig 0), or set CUDA_VISIBLE_DEVICES to nothing to run "
                "jobs on the CPU."
            )
        logger.warning("%s These are left alone.", why)
    engines = installed_engines()
    return [
        Device(
            "cuda",
            int(index),
            name,
            _memory(memory, _machine_bytes()) or 0,
            engines,
            float(told[0]) if told and CAPABILITY.fullmatch(told[0]) else None,
        )
        for index, _, name, memory, _, *told in rows
    ]


def _visible(rows: list[list[str]], visible: str) -> list[list[str]]:
    """The rows that the list names. CUDA reads it up to the first -1."""
    named = takewhile("-1".__ne__, [part.strip() for part in visible.split(",") if part.strip()])
    found = set()
    for part in named:
        there = [number for number, row in enumerate(rows) if part == row[0] or row[1].startswith(part)]
        if not there:
            raise Unavailable(
                f"CUDA_VISIBLE_DEVICES names {part}, which is no GPU that nvidia-smi shows: "
                f"{', '.join(row[0] for row in rows)}. Name whole GPUs by their numbers or UUIDs, or nothing "
                "to run jobs on the CPU."
            )
        found.update(there)
    return [rows[number] for number in sorted(found)]


def installed_engines() -> tuple[EngineName, ...]:
    """The engines that a GPU of this box can run: the reference, and those whose packages are installed.

    Triton comes with the builds of torch that know CUDA, and compiles with the box's C compiler.
    """
    found: list[EngineName] = ["reference"]
    if importlib.util.find_spec("triton") and any(map(shutil.which, ("cc", "gcc", "clang"))):
        found.append("compiled")
        if importlib.util.find_spec("unsloth"):
            found.append("unsloth")
    return tuple(found)


def _memory(told: str, machine: int) -> int | None:
    """Bytes of what the driver tells in MiB: the machine's for a GPU without its own, None if it fails."""
    if told in NO_MEMORY:
        return machine
    return int(told) << 20 if told.isdigit() else None


def available_bytes() -> int:
    """Of the machine's memory, what a process can have without others losing theirs."""
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    told = next(line for line in lines if line.startswith("MemAvailable:"))
    return int(told.split()[1]) << 10


def _machine_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _cpu(index: int) -> Device:
    return Device("cpu", index, f"CPU ({platform.machine()}, {os.cpu_count()} cores)", _machine_bytes())

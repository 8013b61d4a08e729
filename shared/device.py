"""What a job can run on, and what a GPU can do."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Self

from shared.plan import EngineName

if TYPE_CHECKING:
    # The tables take half a second to import, and what trains has no database.
    from shared.tables import WorkerRow

DeviceKind = Literal["cpu", "cuda"]

# Dense 16-bit matrix products in TFLOP/s from the makers' data sheets, by whole words of the name that
# nvidia-smi gives. The first that is found counts.
PEAK_TFLOPS = (
    ("B200", 2250), ("GB200", 2250), ("H200 NVL", 835), ("H200", 989), ("GH200", 989), ("H100 PCIe", 756),
    ("H100 NVL", 835), ("H100", 989), ("H800", 989), ("H20", 148), ("A100", 312), ("A800", 312),
    ("A40", 150), ("A30", 165), ("A10G", 70), ("A10", 125), ("A16", 18), ("A2", 18), ("L40S", 362),
    ("L40", 181), ("L4", 121), ("RTX PRO 6000", 500), ("RTX 6000 Ada", 364), ("RTX 5000 Ada", 261),
    ("RTX 4500 Ada", 159), ("RTX 4000 Ada", 107), ("A6000", 155), ("A5500", 136), ("A5000", 111),
    ("A4500", 95), ("A4000", 77), ("A2000", 32), ("5090", 210), ("5080", 113), ("5070 Ti", 88), ("5070", 62),
    ("5060", 48), ("4090", 165), ("4080", 98), ("4070 Ti", 80), ("4070", 58), ("4060 Ti", 44), ("4060", 30),
    ("3090 Ti", 80), ("3090", 71), ("3080 Ti", 68), ("3080", 60), ("3070", 41), ("3060", 26), ("V100", 112),
    ("T4", 65), ("P100", 19), ("2080 Ti", 54), ("2080", 40), ("2070", 30), ("2060", 26),
)  # fmt: skip
# A GPU that is not in the table is taken for a plain one with so much memory, in GB.
PEAK_BY_MEMORY = ((70, 312), (40, 150), (20, 70), (0, 40))
# Compute capabilities from which on a GPU multiplies in bfloat16 (Ampere) and in float8 (Ada, Hopper).
BF16_CAPABILITY, FP8_CAPABILITY = 8.0, 8.9
# Drivers that don't tell the compute capability are older than Ada: there are GPUs with bfloat16 and without,
# and none with float8. These have none.
NO_BF16 = re.compile(
    r"Tesla|Quadro|TITAN|GTX|\bGT\b|GeForce MX|RTX 20[678]0|V100|\bT4\b|\b[KMP]\d{1,3}\b|\bT\d{3,4}\b"
)


@dataclass(frozen=True)
class Device:
    """One slot of a worker: a GPU (`index` as CUDA counts it) or the CPU. Memory in bytes, 0: not known.

    `engines` are those that the worker has installed and this device can run; `capability` is a GPU's compute
    capability as the driver tells it (8.9, …), None where it doesn't.
    """

    kind: DeviceKind
    index: int
    name: str
    memory_bytes: int
    engines: tuple[EngineName, ...] = ("reference",)
    capability: float | None = None

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> Self:
        return cls(**stored | {"engines": tuple(stored["engines"])})

    def to_json(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "index": self.index,
            "name": self.name,
            "memory_bytes": self.memory_bytes,
            "engines": list(self.engines),
            "capability": self.capability,
        }

    @property
    def known_capability(self) -> float:
        """The compute capability, or the least that the name stands for; 0 for a CPU."""
        if self.capability is not None:
            return self.capability
        return BF16_CAPABILITY if self.kind == "cuda" and NO_BF16.search(self.name) is None else 0.0

    @property
    def bf16(self) -> bool:
        """Whether it computes in bfloat16 at speed."""
        return self.known_capability >= BF16_CAPABILITY

    @property
    def fp8(self) -> bool:
        """Whether it multiplies in float8."""
        return self.known_capability >= FP8_CAPABILITY

    @property
    def peak_flops(self) -> float:
        """Dense 16-bit operations a second that a GPU does at best."""
        for part, tflops in PEAK_TFLOPS:
            if re.search(rf"\b{part}\b", self.name):
                return tflops * 1e12
        gigabytes = self.memory_bytes / 1e9
        return next(tflops for least, tflops in PEAK_BY_MEMORY if gigabytes >= least) * 1e12

    @property
    def cores(self) -> int:
        """Cores of a CPU, which its name tells; 1 if it doesn't."""
        told = re.search(r"(\d+) cores", self.name)
        return int(told.group(1)) if told else 1


def boxes_of(workers: Iterable[WorkerRow]) -> list[list[Device]]:
    """The slots of each worker on line."""
    return [[Device.from_json(slot) for slot in worker.slots] for worker in workers]

"""What a GPU can do: by what its driver tells, and by its name where that tells nothing."""

from __future__ import annotations

import pytest

from shared.device import Device
from tests.shared.test_planner import gpu


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A10G", 70),
        ("NVIDIA RTX A4000", 77),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 4080 SUPER", 98),
        ("Tesla T4", 65),
        ("NVIDIA RTX 2000 Ada Generation", 70),
        ("A card of next year", 70),
    ],
)
def test_the_speed_of_gpus_is_known_by_name_and_of_others_by_their_memory(name: str, tflops: float) -> None:
    assert gpu(24, name).peak_flops / 1e12 == tflops


@pytest.mark.parametrize(
    ("name", "capability", "bf16", "fp8"),
    [
        ("NVIDIA H100 80GB HBM3", 9.0, True, True),
        ("NVIDIA A100-SXM4-80GB", 8.0, True, False),
        ("NVIDIA GeForce RTX 3090", 8.6, True, False),
        ("NVIDIA L2", 8.9, True, True),
        ("NVIDIA GB10", 12.1, True, True),
        ("NVIDIA GeForce RTX 2080 Ti", 7.5, False, False),
        ("Quadro RTX 4000", 7.5, False, False),
        ("Tesla of next year", 13.0, True, True),
        # What old drivers don't tell: then the name has to do.
        ("A100-SXM4-40GB", None, True, False),
        ("GeForce RTX 2050", None, True, False),
        ("Tesla T10", None, False, False),
        ("GeForce MX450", None, False, False),
        ("GeForce GT 1030", None, False, False),
        ("GeForce GTX 1660", None, False, False),
        ("Quadro RTX 4000", None, False, False),
        ("TITAN RTX", None, False, False),
        ("T1000", None, False, False),
        ("GRID M60", None, False, False),
    ],
)
def test_what_a_gpu_multiplies_in_is_known_by_its_compute_capability(
    name: str, capability: float | None, bf16: bool, fp8: bool
) -> None:
    device = gpu(24, name, capability=capability)
    assert (device.bf16, device.fp8) == (bf16, fp8)
    assert Device.from_json(device.to_json()) == device

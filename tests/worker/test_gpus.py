from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest

from shared.device import Device
from shared.errors import InvalidRequest, Unavailable
from shared.planner import make_plan
from shared.shape import NEMOTRON_NANO_4B
from shared.spec import JobSpec
from tests.conftest import wait_for
from worker import gpus
from worker.gpus import find_slots, parse_gpus, probe_gpus
from worker.usage import Usage

TWO = (
    "0, GPU-aa11, NVIDIA H100 80GB HBM3, 81559, Disabled, 9.0\n"
    "1, GPU-bb22, NVIDIA RTX 4090, 24564, [N/A], 8.9\n"
)


@pytest.fixture
def two_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver's tool that shows two GPUs."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\ncat <<'END'\n{TWO}END\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}/usr/bin:/bin")


def test_the_drivers_table_is_read() -> None:
    first, second = parse_gpus(TWO)
    assert (first.index, first.name, first.memory_bytes) == (0, "NVIDIA H100 80GB HBM3", 81559 << 20)
    assert (second.kind, second.index) == ("cuda", 1)
    assert parse_gpus("No devices were found\n") == []
    assert (first.capability, second.capability) == (9.0, 8.9)
    (silent,) = parse_gpus("0, GPU-aa11, GRID T4-8Q, 8192, [N/A], [N/A]\n")
    assert (silent.memory_bytes >> 30, silent.capability) == (8, None)


def test_a_gpu_without_memory_of_its_own_has_the_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    (unified,) = parse_gpus("0, GPU-aa11, NVIDIA GB10, [N/A], [N/A], 12.1\n")
    (cpu,) = find_slots(None, None)
    assert (unified.memory_bytes, unified.capability) == (cpu.memory_bytes, 12.1)
    monkeypatch.setattr(gpus, "_ask", lambda *_: "0, [N/A]\n")
    (measured,) = gpus.measure_free([unified])
    assert 0 < measured.memory_bytes < cpu.memory_bytes
    huge = JobSpec.from_json({"quantization": "none"})
    shape = dataclasses.replace(NEMOTRON_NANO_4B, layers=100_000)
    assert make_plan(huge, shape, [unified]) is None


def test_a_driver_that_does_not_know_compute_capabilities_is_asked_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "nvidia-smi"
    refused = 'Field "compute_cap" is not a valid field to query.'
    tool.write_text(
        f"#!/bin/sh\ncase $1 in *compute_cap*) echo '{refused}'; exit 2;; esac\n"
        "echo 0, GPU-aa11, Tesla T4, 15109, [N/A]\n"
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}/usr/bin:/bin")
    (old,) = probe_gpus()
    assert (old.name, old.capability, old.bf16) == ("Tesla T4", None, False)


@pytest.mark.parametrize(
    ("visible", "indices"),
    [
        ("1", [1]),
        ("1, 0", [0, 1]),
        ("GPU-bb22", [1]),
        ("GPU-aa,0", [0]),
        ("-1", []),
        ("1,-1,0", [1]),
    ],
)
def test_cuda_visible_devices_is_heeded(visible: str, indices: list[int]) -> None:
    assert [d.index for d in parse_gpus(TWO, visible)] == indices


@pytest.mark.parametrize("visible", ["7", "0,7", "MIG-aa11", "all"])
def test_a_gpu_that_is_not_there_is_no_reason_to_train_on_the_cpu(visible: str) -> None:
    with pytest.raises(Unavailable, match=f"names {visible.split(',')[-1]}, which is no GPU.*: 0, 1"):
        parse_gpus(TWO, visible)


def test_a_gpu_that_is_split_is_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    split = TWO.replace("Disabled", "Enabled")
    assert [d.index for d in parse_gpus(split)] == [1]
    assert "whole GPUs: 0." in caplog.text
    with pytest.raises(Unavailable, match="MIG"):
        parse_gpus(split, "0")


def test_a_driver_that_fails_is_no_reason_to_train_on_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'Driver/library version mismatch'\nexit 18\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}/usr/bin:/bin")
    with pytest.raises(Unavailable, match="version mismatch"):
        find_slots(None, None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert [s.kind for s in find_slots(None, None)] == ["cpu"]


@pytest.mark.usefixtures("two_gpus")
def test_every_gpu_is_a_slot_unless_some_are_named() -> None:
    assert [s.index for s in find_slots(None, None)] == [0, 1]
    assert [s.index for s in find_slots([1, 1], None)] == [1]
    assert [s.index for s in find_slots(None, 1)] == [0]
    with pytest.raises(InvalidRequest, match=r"no GPU 7.*\[0, 1\]"):
        find_slots([7], None)


def test_without_a_driver_there_are_cpu_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert probe_gpus() == []
    (slot,) = find_slots(None, None)
    assert slot.kind == "cpu"
    assert slot.memory_bytes > 0
    assert [s.index for s in find_slots(None, 3)] == [0, 1, 2]
    with pytest.raises(InvalidRequest, match="none"):
        find_slots([0], None)


@pytest.mark.parametrize(
    ("packages", "compilers", "engines"),
    [
        ((), ("gcc",), ("reference",)),
        (("triton",), ("gcc",), ("reference", "compiled")),
        (("triton", "unsloth"), ("cc",), ("reference", "compiled", "unsloth")),
        # Triton can't compile its launchers.
        (("triton", "unsloth"), (), ("reference",)),
    ],
)
def test_a_box_offers_the_engines_that_it_can_run(
    monkeypatch: pytest.MonkeyPatch,
    packages: tuple[str, ...],
    compilers: tuple[str, ...],
    engines: tuple[str, ...],
) -> None:
    monkeypatch.setattr(gpus.importlib.util, "find_spec", lambda name: name in packages or None)
    monkeypatch.setattr(gpus.shutil, "which", lambda name: name if name in compilers else None)
    assert gpus.installed_engines() == engines


@pytest.mark.usefixtures("two_gpus")
def test_what_the_gpus_do_is_told(tmp_path: Path) -> None:
    told = "0, NVIDIA L4, 23034, 512, 97\n1, NVIDIA GB10, [N/A], [N/A], [N/A]\n2, NVIDIA L4, 23034, 1, 0\n"
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\ncat <<'END'\n{told}END\n")
    usage = Usage([Device("cuda", 0, "NVIDIA L4", 1), Device("cuda", 1, "NVIDIA GB10", 0)])
    usage.start()
    first, second = wait_for(lambda: usage.gpus)
    usage.stop()
    assert first == {
        "index": 0,
        "name": "NVIDIA L4",
        "memory_bytes": 23034 << 20,
        "used_bytes": 512 << 20,
        "utilization": 0.97,
    }
    assert (second["index"], second["used_bytes"], second["utilization"]) == (1, None, None)

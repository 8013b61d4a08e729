"""When a model may have a GPU."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from shared.database import Database
from shared.lifecycle import JobStatus
from shared.settings import Settings
from tests.api.conftest import finish
from tests.samples import make_job
from worker.inference.placement import CUDA_BYTES, Placement

GIB = 1 << 30


@pytest.fixture
def _two_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver's tool that shows two GPUs, with 4 and 20 GiB free."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text(
        "#!/bin/sh\ncase $1 in *memory.free*) printf '0, 4096\\n1, 20480\\n';;\n"
        "*) printf '0, GPU-aa11, NVIDIA H100, 81559, Disabled\\n'\n"
        "printf '1, GPU-bb22, NVIDIA RTX 4090, 24564, [N/A]\\n';; esac\n"
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}/usr/bin:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def placement(settings: Settings, database: Database, gpu: str) -> Placement:
    return Placement(settings.model_copy(update={"inference_gpu": gpu}), database)


@pytest.mark.usefixtures("_two_gpus")
def test_a_gpu_is_taken_only_if_asked_for_and_large_enough(settings: Settings, database: Database) -> None:
    assert placement(settings, database, "off").find_gpu(GIB) is None
    idle = placement(settings, database, "idle")
    assert idle.find_gpu(20 * GIB - CUDA_BYTES) == 1
    assert idle.find_gpu(20 * GIB - CUDA_BYTES + 1) is None


@pytest.mark.usefixtures("_two_gpus")
def test_no_gpu_is_taken_while_a_job_waits_or_runs(settings: Settings, database: Database) -> None:
    idle = placement(settings, database, "idle")
    job_id = make_job(database)
    assert idle.is_wanted()
    assert idle.find_gpu(GIB) is None
    finish(database, job_id, JobStatus.CANCELLING)
    assert idle.find_gpu(GIB) is None
    finish(database, job_id, JobStatus.CANCELLED)
    assert not idle.is_wanted()
    assert idle.find_gpu(GIB) == 1


def test_a_driver_that_fails_leaves_the_cpu(
    settings: Settings, database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nexit 18\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}/usr/bin:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert placement(settings, database, "idle").find_gpu(1) is None

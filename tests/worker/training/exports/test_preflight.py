"""What would fail after training fails before it: too little room, and models that llama.cpp doesn't know."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from shared.disk import disk_need
from shared.errors import JobFailure
from shared.events import MemorySink
from shared.lifecycle import FailureCode, Phase
from tests.worker.training.samples import make_spec, new_workdir, run_job

Usage = namedtuple("Usage", ["total", "used", "free"])
FOUR_B = 4_513_000_000


def room(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: Usage(free, 0, free))


def test_what_a_job_needs_is_counted_at_its_peak() -> None:
    adapter_only = disk_need(make_spec(), FOUR_B, 33_000_000)
    assert (adapter_only.merged, adapter_only.conversion) == (0, 0)
    # Two checkpoints of 132 MB and two bytes an 8-bit moment pair, the adapter's folder and its tar.
    assert 0.6e9 < adapter_only.total < 0.9e9
    ggufs = disk_need(make_spec(exports=["gguf:f16", "gguf:q8_0", "gguf:q4_k_m"]), FOUR_B, 33_000_000)
    # The merged folder and the 16-bit GGUF at 9 GB each; gguf:f16 is a second name of the latter.
    assert 26e9 < ggufs.total < 28e9
    assert ggufs.store > 16e9
    assert disk_need(make_spec({"max_steps": None, "save_total_limit": 9}), FOUR_B).checkpoints > 2.5e9
    assert disk_need(make_spec(), FOUR_B, trained=True).checkpoints == 0


@pytest.mark.train
@pytest.mark.usefixtures("warm")
def test_a_job_without_room_fails_before_it_trains(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sink = MemorySink()
    workdir = new_workdir(tmp_path, tiny_model)
    room(monkeypatch, 10_000_000)
    with pytest.raises(JobFailure, match="needs about") as caught:
        run_job(make_spec(exports=["adapter", "gguf:q8_0"]), workdir, sink)
    assert caught.value.code == FailureCode.OUT_OF_DISK
    assert Phase.TRAINING not in sink.phases


@pytest.mark.train
def test_the_need_covers_what_a_job_really_leaves(tmp_path: Path, tiny_model: Path) -> None:
    spec = make_spec({"max_steps": 2}, exports=["adapter", "merged_16bit"])
    outcome = run_job(spec, new_workdir(tmp_path, tiny_model))
    left = sum(f.stat().st_size for f in outcome.workdir.root.rglob("*") if f.is_file())
    weights = (tiny_model / "model.safetensors").stat().st_size
    need = disk_need(spec, weights // 2)
    assert left < need.total


@pytest.mark.train
@pytest.mark.usefixtures("warm")
def test_a_model_that_llama_cpp_does_not_know_fails_before_training(tmp_path: Path, tiny_model: Path) -> None:
    folder = tmp_path / "unknown"
    shutil.copytree(tiny_model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["NeverHeardOfForCausalLM"]}))
    sink = MemorySink()
    workdir = new_workdir(tmp_path, folder)
    with pytest.raises(JobFailure, match="NeverHeardOfForCausalLM is not supported") as caught:
        run_job(make_spec(exports=["adapter", "gguf:q8_0"]), workdir, sink)
    assert caught.value.code == FailureCode.EXPORT_FAILED
    assert Phase.TRAINING not in sink.phases
    assert not (workdir.root / "preflight").exists()

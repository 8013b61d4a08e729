"""Exports after the job: from its last adapter and from a checkpoint, with nothing but what was kept."""

from __future__ import annotations

import json
import tarfile
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
import transformers

from shared.errors import JobFailure
from shared.events import MemorySink
from shared.lifecycle import FailureCode
from tests.worker.training.samples import Outcome, Running, make_spec, new_workdir, run_job
from worker.export_order import ADAPTER_FILE, LaterExport
from worker.training.later import export_later
from worker.training.workdir import Workdir

pytestmark = pytest.mark.train


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Outcome:
    """A job that asked for a merged model alone."""
    workdir = new_workdir(tmp_path_factory.mktemp("job"), tiny_model)
    return run_job(make_spec(exports=["merged_16bit"], name="Tides"), workdir)


def later(job: Outcome, fmt: str, checkpoint: int | None = None) -> LaterExport:
    weights = job.workdir.root / "checkpoints" / f"checkpoint-{checkpoint}" / ADAPTER_FILE
    return LaterExport(
        spec=job.spec,
        format=fmt,
        checkpoint=checkpoint,
        adapter=job.path("adapter.tar"),
        manifest=job.path("manifest.json"),
        weights=weights if checkpoint else None,
        smallest_gguf=None,
    )


def export(job: Outcome, folder: Path, wanted: LaterExport) -> tuple[Workdir, MemorySink]:
    root = folder / "export"
    root.mkdir()
    workdir = replace(job.workdir, root=root, dataset_file=None)
    sink = MemorySink()
    assert export_later(wanted, workdir, sink, Running()) == sink.artifacts
    return workdir, sink


def test_the_adapter_is_kept_though_nobody_asked_for_it(job: Outcome) -> None:
    kept = {a.name: a.listed for a in job.sink.artifacts}
    assert kept == {
        "manifest.json": True, "metrics.csv": True, "adapter.tar": False, "merged_16bit.tar": True,
    }  # fmt: skip


def test_the_last_adapter_gives_the_same_file_as_during_the_job(job: Outcome, tmp_path: Path) -> None:
    workdir, sink = export(job, tmp_path, later(job, "merged_16bit"))
    assert [a.name for a in sink.artifacts] == ["merged_16bit.tar"]
    assert sink.artifacts[0].sha256 == next(
        a.sha256 for a in job.sink.artifacts if a.name == "merged_16bit.tar"
    )
    assert not (workdir.root / "merged").exists()


def test_a_checkpoint_gives_the_model_of_its_step(job: Outcome, tmp_path: Path, tiny_model: Path) -> None:
    workdir, sink = export(job, tmp_path, later(job, "merged_16bit", checkpoint=2))
    (artifact,) = sink.artifacts
    assert artifact.name == "merged_16bit.step-2.tar"
    with tarfile.open(workdir.root / "exports" / artifact.name) as tar:
        tar.extractall(tmp_path, filter="data")
    folder = tmp_path / "merged_16bit.step-2"
    assert json.loads((folder / "manifest.json").read_text())["exported_step"] == 2
    assert 'from_pretrained("merged_16bit.step-2")' in (folder / "README.md").read_text()
    ids = torch.arange(10, 40)[None]
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    step_two = job.workdir.root / "checkpoints" / "checkpoint-2"
    with torch.no_grad():
        before = base(ids).logits
        adapted = peft.PeftModel.from_pretrained(base, step_two)(ids).logits
        found = transformers.AutoModelForCausalLM.from_pretrained(folder).to(torch.float32)(ids).logits
    assert (adapted - found).abs().max() < 0.15 * (adapted - before).abs().max()


@pytest.mark.usefixtures("warm")
def test_a_gguf_comes_with_a_modelfile_unless_a_smaller_one_has_it(job: Outcome, tmp_path: Path) -> None:
    workdir, sink = export(job, tmp_path, later(job, "gguf:q8_0", checkpoint=2))
    assert [a.name for a in sink.artifacts] == ["model-q8_0.step-2.gguf", "Modelfile.step-2"]
    assert "FROM ./model-q8_0.step-2.gguf" in (workdir.root / "exports" / "Modelfile.step-2").read_text()
    assert {p.name for p in (workdir.root / "exports").iterdir()} == {a.name for a in sink.artifacts}
    (tmp_path / "again").mkdir()
    _, sink = export(job, tmp_path / "again", replace(later(job, "gguf:q8_0"), smallest_gguf=1))
    assert [a.name for a in sink.artifacts] == ["model-q8_0.gguf"]


def test_an_adapter_of_a_checkpoint_needs_no_base_model(job: Outcome, tmp_path: Path) -> None:
    wanted = later(job, "adapter", checkpoint=2)
    root = tmp_path / "export"
    root.mkdir()
    sink = MemorySink()
    export_later(wanted, Workdir(root=root, cache=tmp_path / "cache"), sink, Running())
    assert [a.name for a in sink.artifacts] == ["adapter.step-2.tar"]
    with tarfile.open(root / "exports" / "adapter.step-2.tar") as tar:
        tar.extractall(tmp_path, filter="data")
    assert wanted.weights is not None
    assert (tmp_path / "adapter.step-2" / ADAPTER_FILE).read_bytes() == wanted.weights.read_bytes()


def test_a_base_that_is_gone_fails_the_export(job: Outcome, tmp_path: Path) -> None:
    with pytest.raises(JobFailure) as caught:
        export_later(
            later(job, "merged_16bit"), Workdir(root=tmp_path, cache=tmp_path), MemorySink(), Running()
        )
    assert caught.value.code == FailureCode.MODEL_UNAVAILABLE

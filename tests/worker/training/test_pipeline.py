"""The pipeline on a tiny model: one run with every export, seen from all sides, and runs that end early."""

from __future__ import annotations

import csv
import hashlib
import json
import tarfile
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from gguf import GGUFReader

from shared.errors import JobFailure, JobStopped
from shared.events import Artifact, MemorySink, Progress
from shared.lifecycle import FailureCode, Phase
from tests.worker.training.conftest import fork_tools
from tests.worker.training.samples import Outcome, Running, make_spec, new_workdir, run_job
from worker.training.exports import gguf

pytestmark = pytest.mark.train

EXPORTS = ["adapter", "merged_16bit", "gguf:f16", "gguf:q8_0", "gguf:q5_k_m", "gguf:q4_k_m"]


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Outcome:
    """One job with all exports."""
    folder = tmp_path_factory.mktemp("full")
    spec = make_spec({"max_steps": 6}, exports=EXPORTS, name="Tides")
    with pytest.MonkeyPatch.context() as patch:
        fork_tools(patch)
        return run_job(spec, new_workdir(folder, tiny_model))


@pytest.fixture(scope="module")
def unpacked(full: Outcome, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both tars of the full run, unpacked."""
    folder = tmp_path_factory.mktemp("unpacked")
    for name in ("adapter.tar", "merged_16bit.tar"):
        with tarfile.open(full.path(name)) as tar:
            tar.extractall(folder, filter="data")
    return folder


def test_every_export_is_reported_as_soon_as_it_is_complete(full: Outcome) -> None:
    told = [(a.name, a.kind) for a in full.sink.artifacts]
    assert told == [
        ("manifest.json", "manifest"),
        ("metrics.csv", "metrics"),
        ("adapter.tar", "adapter"),
        ("merged_16bit.tar", "merged_16bit"),
        ("model-f16.gguf", "gguf:f16"),
        ("model-q8_0.gguf", "gguf:q8_0"),
        ("model-q5_k_m.gguf", "gguf:q5_k_m"),
        ("model-q4_k_m.gguf", "gguf:q4_k_m"),
        ("Modelfile", "modelfile"),
    ]
    assert full.artifacts == full.sink.artifacts
    for artifact in full.artifacts:
        content = artifact.path.read_bytes()
        assert artifact.bytes == len(content)
        assert artifact.sha256 == hashlib.sha256(content).hexdigest()


def test_phases_and_steps_are_told(full: Outcome) -> None:
    sink = full.sink
    assert sink.phases == [Phase.PREPARING_DATA, Phase.LOADING_MODEL, Phase.TRAINING, Phase.EXPORTING]
    assert [row["step"] for row in sink.rows] == [1, 2, 3, 4, 5, 6]
    assert all(
        set(row) >= {"epoch", "loss", "learning_rate", "grad_norm", "tokens_per_second"} for row in sink.rows
    )
    assert [p.step for p in sink.progresses] == [1, 2, 3, 4, 5, 6]
    assert sink.progresses[-1].eta_seconds == 0
    entries = [e.data for e in sink.entries if e.type == "metrics"]
    assert [e["step"] for e in entries if e] == [2, 4, 6]
    for entry in entries:
        assert entry is not None
        assert set(entry) >= {
            "loss",
            "learning_rate",
            "epoch",
            "step",
            "total_steps",
            "grad_norm",
            "tokens_per_second",
            "eta_seconds",
        }


def test_the_loss_falls(full: Outcome) -> None:
    losses = [float(row["loss"] or 0) for row in full.sink.rows]
    assert losses[-1] < losses[0] - 0.05


def test_checkpoints_are_told_with_their_size(full: Outcome) -> None:
    assert [c.step for c in full.sink.checkpoints] == [2, 4, 6]
    for checkpoint in full.sink.checkpoints:
        assert checkpoint.bytes > 100_000
        assert checkpoint.metrics["train_loss"] > 0
        assert (checkpoint.path / "adapter_model.safetensors").is_file()


def test_nothing_is_left_over(full: Outcome) -> None:
    names = {p.name for p in (full.workdir.root / "exports").iterdir()}
    assert names == {a.name for a in full.artifacts}
    assert not (full.workdir.root / "merged").exists()


@pytest.mark.parametrize("name", ["adapter.tar", "merged_16bit.tar"])
def test_tars_hold_plain_files_only(full: Outcome, name: str) -> None:
    with tarfile.open(full.path(name)) as tar:
        members = tar.getmembers()
    top = name.removesuffix(".tar")
    assert [m.name for m in members] == sorted(m.name for m in members)
    assert all(m.isfile() and m.mtime == 0 and m.uid == m.gid == 0 for m in members)
    assert {f"{top}/README.md", f"{top}/manifest.json", f"{top}/tokenizer.json"} <= {m.name for m in members}


def test_the_manifest_says_what_was_done_and_used(full: Outcome) -> None:
    manifest = json.loads(full.path("manifest.json").read_text(encoding="utf-8"))
    assert manifest["spec"] == full.spec.to_json()
    assert manifest["seed"] == 42
    assert manifest["packages"]["torch"]
    assert manifest["steps"] == 6
    assert [row["step"] for row in manifest["history"]] == [2, 4, 6]
    assert manifest["dataset"]["sha256"]
    assert manifest["dataset"]["report"] == full.sink.reports[-1]
    used = manifest["used"]
    assert used["attention"] == "sdpa"
    assert used["dtype"] == "float32"
    assert used["packing"] is True
    assert used["peak_memory_bytes"] > 100e6
    assert used["tokens_per_second"] > 0


def test_metrics_csv_has_a_line_a_step(full: Outcome) -> None:
    with full.path("metrics.csv").open(newline="") as stream:
        lines = list(csv.DictReader(stream))
    assert [float(line["loss"]) for line in lines] == [row["loss"] for row in full.sink.rows]


def test_cards_name_base_data_and_how_to_load(unpacked: Path) -> None:
    for folder in ("adapter", "merged_16bit"):
        card = (unpacked / folder / "README.md").read_text(encoding="utf-8")
        assert card.startswith("---\nlibrary_name: ")
        for part in ("# Tides", "local/tiny", "file-aaaa", "from_pretrained", "## Licence"):
            assert part in card


def test_the_adapter_names_its_base_not_a_path(unpacked: Path) -> None:
    config = json.loads((unpacked / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "local/tiny"
    assert config["r"] == 16


def test_merged_weights_give_the_adapters_logits(unpacked: Path, tiny_model: Path) -> None:
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(unpacked / "merged_16bit")
    ids = tokenizer("How high is the tide in Oslo?", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        before = base(ids).logits
        adapted = peft.PeftModel.from_pretrained(base, unpacked / "adapter")(ids).logits
        merged = transformers.AutoModelForCausalLM.from_pretrained(unpacked / "merged_16bit")
        assert merged.dtype == torch.bfloat16
        after = merged.to(torch.float32)(ids).logits
    moved = (adapted - before).abs().max()
    # What is left is the rounding of the merged weights to bfloat16.
    assert (adapted - after).abs().max() < 0.1 * moved
    assert moved > 0.05


def test_ggufs_carry_the_trained_template_and_its_end_of_turn(full: Outcome, unpacked: Path) -> None:
    template = (unpacked / "merged_16bit" / "chat_template.jinja").read_text(encoding="utf-8")
    assert "<functioncall>" in template
    sizes = []
    for kind in EXPORTS[2:]:
        path = full.path(f"model-{kind.removeprefix('gguf:')}.gguf")
        reader = GGUFReader(path)
        assert reader.get_field("tokenizer.chat_template").contents() == template
        tokens = reader.get_field("tokenizer.ggml.tokens").contents()
        assert tokens[reader.get_field("tokenizer.ggml.eos_token_id").contents()] == "<|im_end|>"
        sizes.append(path.stat().st_size)
    assert sizes == sorted(sizes, reverse=True)


def test_quantised_ggufs_hold_the_types_they_are_named_for(full: Outcome) -> None:
    def types(name: str) -> set[str]:
        return {t.tensor_type.name for t in GGUFReader(full.path(name)).tensors} - {"F32"}

    assert types("model-f16.gguf") == {"F16"}
    assert types("model-q8_0.gguf") == {"Q8_0"}
    assert types("model-q5_k_m.gguf") == {"Q5_K", "Q6_K"}
    assert types("model-q4_k_m.gguf") == {"Q4_K", "Q6_K"}


def test_the_modelfile_points_at_the_smallest_gguf(full: Outcome) -> None:
    text = full.path("Modelfile").read_text()
    assert "FROM ./model-q4_k_m.gguf\n" in text
    assert 'PARAMETER stop "<|im_end|>"' in text


def test_two_runs_give_the_same_losses_and_weights(tmp_path: Path, tiny_model: Path) -> None:
    weights, losses = [], []
    for name in ("one", "two"):
        outcome = run_job(make_spec(), new_workdir(tmp_path / name, tiny_model))
        losses.append([row["loss"] for row in outcome.sink.rows])
        adapter = outcome.workdir.root / "adapter" / "adapter_model.safetensors"
        weights.append(adapter.read_bytes())
    assert losses[0] == losses[1]
    assert weights[0] == weights[1]


def test_another_seed_gives_another_run(tmp_path: Path, tiny_model: Path, full: Outcome) -> None:
    outcome = run_job(make_spec({"seed": 7}), new_workdir(tmp_path, tiny_model))
    # The first step says nothing: a fresh adapter does nothing, and the longest rows come first.
    assert outcome.sink.rows[3]["loss"] != full.sink.rows[3]["loss"]


def test_recomputing_activations_changes_nothing_but_memory(tmp_path: Path, tiny_model: Path) -> None:
    def losses(name: str, checkpointing: str) -> list[Any]:
        spec = make_spec(lora={"dropout": 0.0})
        workdir = new_workdir(tmp_path / name, tiny_model)
        outcome = run_job(spec, workdir, gradient_checkpointing=checkpointing)
        manifest = json.loads(outcome.path("manifest.json").read_text())
        assert manifest["used"]["gradient_checkpointing"] == checkpointing
        return [row["loss"] for row in outcome.sink.rows]

    assert losses("kept", "none") == pytest.approx(losses("recomputed", "all"), rel=1e-5)


def test_without_packing_a_row_is_a_document(tmp_path: Path, tiny_model: Path) -> None:
    spec = make_spec({"max_steps": None, "num_train_epochs": 1}, packing=False)
    outcome = run_job(spec, new_workdir(tmp_path, tiny_model, rows=7))
    # 7 documents, 2 at a time.
    assert len(outcome.sink.rows) == 4
    assert json.loads(outcome.path("manifest.json").read_text())["used"]["packing"] is False


def test_bf16_on_a_cpu_trains_too(tmp_path: Path, tiny_model: Path, full: Outcome) -> None:
    outcome = run_job(make_spec({"max_steps": 6}), new_workdir(tmp_path, tiny_model), precision="bf16")
    assert json.loads(outcome.path("manifest.json").read_text())["used"]["dtype"] == "bfloat16"
    losses = [float(row["loss"] or 0) for row in outcome.sink.rows]
    assert losses == pytest.approx([row["loss"] for row in full.sink.rows], rel=2e-2)


class _StopAt(MemorySink):
    """Stops the job at a step, as a cancel that arrives in the middle would."""

    def __init__(self, control: Running, step: int) -> None:
        super().__init__()
        self._control = control
        self._step = step

    def progress(self, progress: Progress) -> None:
        super().progress(progress)
        self._control.stop = progress.step >= self._step


def test_a_stop_in_mid_training_leaves_no_artifact(tmp_path: Path, tiny_model: Path) -> None:
    control = Running()
    sink = _StopAt(control, step=2)
    workdir = new_workdir(tmp_path, tiny_model)
    with pytest.raises(JobStopped):
        run_job(make_spec({"max_steps": 50}), workdir, sink, control)
    assert sink.progresses[-1].step == 2
    assert sink.artifacts == []
    assert not (workdir.root / "exports").exists()


class _StopAfter(MemorySink):
    """Stops the job after it told of an artifact."""

    def __init__(self, control: Running, name: str) -> None:
        super().__init__()
        self._control = control
        self._name = name

    def artifact(self, artifact: Artifact) -> None:
        super().artifact(artifact)
        self._control.stop = artifact.name == self._name


def test_a_stop_among_the_exports_keeps_those_that_are_complete(tmp_path: Path, tiny_model: Path) -> None:
    control = Running()
    sink = _StopAfter(control, "adapter.tar")
    workdir = new_workdir(tmp_path, tiny_model)
    with pytest.raises(JobStopped):
        run_job(make_spec({"max_steps": 1}, exports=["adapter", "merged_16bit"]), workdir, sink, control)
    assert [p.name for p in sorted((workdir.root / "exports").iterdir())] == [
        "adapter.tar",
        "manifest.json",
        "metrics.csv",
    ]
    assert not (workdir.root / "merged").exists()


def test_a_loss_that_is_no_number_ends_the_job_as_diverged(tmp_path: Path, broken_model: Path) -> None:
    sink = MemorySink()
    with pytest.raises(JobFailure) as caught:
        run_job(make_spec(), new_workdir(tmp_path, broken_model), sink)
    assert caught.value.code == FailureCode.DIVERGED
    assert "step 1" in caught.value.message
    assert "learning_rate" in caught.value.advice
    assert sink.artifacts == []


@pytest.mark.usefixtures("warm")
def test_a_failing_gguf_keeps_the_adapter(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(gguf.FTYPES, "gguf:q4_k_m", 9999)
    sink = MemorySink()
    spec = make_spec({"max_steps": 1}, exports=["adapter", "gguf:q4_k_m"])
    workdir = new_workdir(tmp_path, tiny_model)
    with pytest.raises(JobFailure) as caught:
        run_job(spec, workdir, sink)
    assert caught.value.code == FailureCode.EXPORT_FAILED
    assert "model-q4_k_m.gguf" in caught.value.message
    assert [a.name for a in sink.artifacts] == ["manifest.json", "metrics.csv", "adapter.tar"]
    assert not list((workdir.root / "exports").glob("*.gguf"))

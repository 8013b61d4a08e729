"""Held-out rows: what is evaluated, when, what it leaves alone, and which step is exported."""

from __future__ import annotations

import csv
import dataclasses
import itertools
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from shared.errors import JobFailure, JobStopped
from shared.events import MemorySink
from shared.lifecycle import FailureCode, Phase
from tests.worker.training.samples import (
    Outcome,
    Running,
    conversations,
    make_spec,
    new_workdir,
    plan_for,
    run_job,
    write_rows,
)
from worker.training.data import prepare_data
from worker.training.engines.reference import load_model
from worker.training.models import ResolvedModel, load_tokenizer, settle_tokenizer
from worker.training.trainer import make_trainer

pytestmark = pytest.mark.train

NAMES = ("eval_loss", "eval_mean_token_accuracy")


def evaluated_job(folder: Path, model: Path, sink: MemorySink | None = None, **training: Any) -> Outcome:
    spec = make_spec({"max_steps": 5, **training}, validation_fraction=0.3)
    return run_job(spec, new_workdir(folder, model), sink)


@pytest.fixture(scope="module")
def twice(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Outcome:
    """Evaluated at step 2, 4 and, as the last one, 5."""
    return evaluated_job(tmp_path_factory.mktemp("twice"), tiny_model, eval_steps=2)


def adapter(path: Path) -> dict[str, torch.Tensor]:
    return dict(load_file(path / "adapter_model.safetensors"))


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_an_evaluation_is_the_mean_over_all_tokens_of_documents_alone(
    tiny_model: Path, tmp_path: Path
) -> None:
    spec = make_spec(validation_fraction=0.5, lora={"dropout": 0.5})
    workdir = new_workdir(tmp_path, tiny_model, rows=40)
    model = ResolvedModel("local/tiny", tiny_model, config={"max_position_embeddings": 2048})
    tokenizer = load_tokenizer(model)
    data = prepare_data(spec, workdir.dataset_file, tokenizer, MemorySink(), Running(), 2048)
    assert data.validation is not None
    settle_tokenizer(tokenizer, data.chat_template, data.stop_token)
    plan = plan_for(spec)
    trainer = make_trainer(spec, plan, load_model(spec, plan, model), tokenizer, data, 4, tmp_path, [])
    with torch.no_grad():
        # A fresh adapter does nothing, and nor would dropout in front of it.
        for name, weight in trainer.model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.02)
    before = torch.get_rng_state()
    trainer.check = Running().check
    found = trainer.evaluate()
    assert torch.equal(torch.get_rng_state(), before)
    assert trainer.model.training
    network = trainer.model.eval()
    losses: list[torch.Tensor] = []
    right: list[torch.Tensor] = []
    for row in data.validation:
        ends = list(itertools.accumulate(row["seq_lengths"]))
        for start, end in zip([0, *ends], ends, strict=False):
            ids = torch.tensor([row["input_ids"][start:end]])
            labels = torch.tensor(row["labels"][start + 1 : end])
            with torch.no_grad():
                logits = network(input_ids=ids, use_cache=False).logits[0, :-1]
            kept = labels != -100
            losses.append(torch.nn.functional.cross_entropy(logits[kept], labels[kept], reduction="none"))
            right.append(logits[kept].argmax(-1) == labels[kept])
    assert len(losses) == data.report["validation"]["rows_used"] > 10
    assert found["eval_loss"] == pytest.approx(torch.cat(losses).mean().item(), rel=1e-5)
    assert found["eval_mean_token_accuracy"] == pytest.approx(torch.cat(right).float().mean().item())


def test_evaluations_are_in_log_metrics_manifest_csv_and_card(twice: Outcome) -> None:
    rows = {row["step"]: row for row in twice.sink.rows}
    assert [step for step, row in rows.items() if "eval_loss" in row] == [2, 4, 5]
    # The row that stands for a step in the end has both halves.
    assert all({"loss", "learning_rate", *NAMES} <= rows[step].keys() for step in (2, 4, 5))
    entries = [e for e in twice.sink.entries if e.type == "metrics" and e.data and "eval_loss" in e.data]
    told = [e for e in entries if "eval loss" in e.message]
    assert [e.data["step"] for e in told if e.data] == [2, 4, 5]
    manifest = json.loads(twice.path("manifest.json").read_text(encoding="utf-8"))
    assert [e["step"] for e in manifest["evaluations"]] == [2, 4, 5]
    assert all(rows[e["step"]][name] == e[name] for e in manifest["evaluations"] for name in NAMES)
    assert [row.get("eval_loss") for row in manifest["history"]] == [rows[n]["eval_loss"] for n in (2, 4, 5)]
    best = min(manifest["evaluations"], key=lambda e: e["eval_loss"])
    assert (manifest["best_step"], manifest["exported_step"]) == (best["step"], 5)
    with twice.path("metrics.csv").open(newline="") as stream:
        lines = list(csv.DictReader(stream))
    assert [line["eval_loss"] != "" for line in lines] == [False, True, False, True, True]
    with tarfile.open(twice.path("adapter.tar")) as tar:
        member = tar.extractfile("adapter/README.md")
        assert member is not None
        card = member.read().decode()
    assert f"held-out rows, step 5 | {rows[5]['eval_loss']:.4f}, " in card


def test_phases_tell_when_it_evaluates(twice: Outcome) -> None:
    evaluating, training = Phase.EVALUATING, Phase.TRAINING
    assert twice.sink.phases[2:] == [
        training, evaluating, training, evaluating, training, evaluating, Phase.EXPORTING,
    ]  # fmt: skip


def test_a_checkpoint_of_an_evaluated_step_has_its_loss(twice: Outcome) -> None:
    found = {c.step: set(c.metrics) for c in twice.sink.checkpoints}
    assert found == {step: {"train_loss", "eval_loss"} for step in (2, 4, 5)}


def test_evaluating_changes_nothing_in_training(twice: Outcome, tmp_path: Path, tiny_model: Path) -> None:
    once = evaluated_job(tmp_path, tiny_model)
    assert [row["step"] for row in once.sink.rows if "eval_loss" in row] == [5]
    assert once.sink.phases[-2:] == [Phase.EVALUATING, Phase.EXPORTING]
    losses = [{row["step"]: row["loss"] for row in run.sink.rows} for run in (once, twice)]
    assert losses[0] == losses[1]
    assert same(adapter(once.workdir.root / "adapter"), adapter(twice.workdir.root / "adapter"))


def test_no_held_out_row_is_trained_on(twice: Outcome, tiny_model: Path) -> None:
    assert twice.workdir.dataset_file is not None
    model = ResolvedModel("local/tiny", tiny_model, config={})
    data = prepare_data(
        twice.spec, twice.workdir.dataset_file, load_tokenizer(model), MemorySink(), Running(), 2048
    )

    def documents(rows: Any) -> set[tuple[int, ...]]:
        found = set()
        for row in rows:
            ends = list(itertools.accumulate(row["seq_lengths"]))
            found |= {tuple(row["input_ids"][a:b]) for a, b in zip([0, *ends], ends, strict=False)}
        return found

    trained, held_out = documents(data.train), documents(data.validation)
    assert len(held_out) > 2
    assert not trained & held_out
    assert len(trained) + len(held_out) == 24


def test_validation_data_of_its_own_is_evaluated(tmp_path: Path, tiny_model: Path) -> None:
    workdir = new_workdir(tmp_path, tiny_model)
    # Half of them are rows to train on as well.
    other = write_rows(tmp_path / "validation.jsonl", conversations(28)[20:])
    spec = make_spec({"eval_steps": 2}, validation_dataset={"source": "file", "file_id": "file-" + "b" * 24})
    outcome = run_job(spec, dataclasses.replace(workdir, validation_file=other))
    (report,) = outcome.sink.reports
    assert (report["rows_used"], report["validation"]["rows_used"]) == (20, 8)
    assert report["dropped"]["in_validation"]["count"] == 4
    assert [row["step"] for row in outcome.sink.rows if "eval_loss" in row] == [2, 4]
    manifest = json.loads(outcome.path("manifest.json").read_text(encoding="utf-8"))
    assert manifest["dataset"]["report"]["validation"]["file_sha256"]


# So high a rate makes it worse at first.
TOO_FAST = {"max_steps": 40, "learning_rate": 1.0, "lr_scheduler_type": "constant", "eval_steps": 1}


@pytest.mark.parametrize("kept", [1, 2])
def test_early_stopping_exports_the_best_checkpoint(tmp_path: Path, tiny_model: Path, kept: int) -> None:
    outcome = evaluated_job(
        tmp_path, tiny_model, **TOO_FAST, early_stopping_patience=2, save_steps=1, save_total_limit=kept
    )
    manifest = json.loads(outcome.path("manifest.json").read_text(encoding="utf-8"))
    losses = {e["step"]: e["eval_loss"] for e in manifest["evaluations"]}
    best = min(losses, key=lambda step: losses[step])
    last = max(losses)
    assert last == best + 2 < 40
    assert (manifest["steps"], manifest["best_step"], manifest["exported_step"]) == (last, best, best)
    checkpoints = outcome.workdir.root / "checkpoints"
    assert same(adapter(outcome.workdir.root / "adapter"), adapter(checkpoints / f"checkpoint-{best}"))
    assert not same(adapter(outcome.workdir.root / "adapter"), adapter(checkpoints / f"checkpoint-{last}"))
    messages = [entry.message for entry in outcome.sink.entries]
    assert any(m.startswith(f"Stopping early at step {last} of 40: 2 evaluations") for m in messages)
    assert f"Exporting the adapter of step {best}: the lowest eval loss." in messages
    assert outcome.sink.phases[-2:] == [Phase.EVALUATING, Phase.EXPORTING]


def test_the_best_of_a_job_that_runs_to_its_end_is_exported_too(tmp_path: Path, tiny_model: Path) -> None:
    outcome = evaluated_job(
        tmp_path, tiny_model, **{**TOO_FAST, "max_steps": 2}, early_stopping_patience=50, save_steps=100
    )
    manifest = json.loads(outcome.path("manifest.json").read_text(encoding="utf-8"))
    assert manifest["steps"] == 2
    assert manifest["exported_step"] == manifest["best_step"] == 1


def test_without_patience_the_last_step_is_exported(tmp_path: Path, tiny_model: Path) -> None:
    outcome = evaluated_job(tmp_path, tiny_model, **{**TOO_FAST, "max_steps": 2})
    manifest = json.loads(outcome.path("manifest.json").read_text(encoding="utf-8"))
    best = manifest["best_step"]
    assert (manifest["steps"], manifest["exported_step"], best) == (2, 2, 1)
    assert any(
        entry.message == f"Exporting the adapter of step 2: the last; step {best} had the lowest eval loss."
        for entry in outcome.sink.entries
    )


class _StopInEvaluation(MemorySink):
    def __init__(self, control: Running) -> None:
        super().__init__()
        self._control = control

    def phase(self, phase: Phase) -> None:
        super().phase(phase)
        self._control.stop = phase is Phase.EVALUATING


def test_a_stop_is_heard_in_the_middle_of_an_evaluation(tmp_path: Path, tiny_model: Path) -> None:
    control = Running()
    sink = _StopInEvaluation(control)
    spec = make_spec({"eval_steps": 1}, validation_fraction=0.3)
    with pytest.raises(JobStopped):
        run_job(spec, new_workdir(tmp_path, tiny_model), sink, control)
    assert [row["step"] for row in sink.rows] == [1]
    assert all("eval_loss" not in row for row in sink.rows)


def test_a_fraction_that_holds_out_nothing_fails_before_the_model_is_loaded(
    tmp_path: Path, tiny_model: Path
) -> None:
    sink = MemorySink()
    spec = make_spec(validation_fraction=0.001)
    with pytest.raises(JobFailure) as caught:
        run_job(spec, new_workdir(tmp_path, tiny_model, rows=4), sink)
    assert caught.value.code == FailureCode.INVALID_DATASET
    assert sink.phases == [Phase.PREPARING_DATA]

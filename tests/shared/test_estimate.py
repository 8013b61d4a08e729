"""Tokens, steps, time and disk of a job."""

from __future__ import annotations

from typing import Any

import pytest

from shared.device import Device
from shared.disk import SMALL_FILES_BYTES
from shared.estimate import count_steps, disk_bytes, estimate
from shared.models import ModelInfo
from shared.planner import make_plan
from shared.shape import NEMOTRON_NANO_4B
from shared.spec import JobSpec

H100 = Device("cuda", 0, "NVIDIA H100 80GB HBM3", 80 << 30, ("reference", "compiled", "unsloth"))
REPORT = {"rows_used": 100, "characters": 360_000}


@pytest.mark.parametrize(
    ("training", "rows", "steps"),
    [
        ({"max_steps": 7}, None, 7),
        ({}, None, None),
        ({"num_train_epochs": 3}, 16, 6),
        ({"num_train_epochs": 3}, 17, 9),
        ({"num_train_epochs": 0.5}, 16, 1),
    ],
)
def test_steps_follow_from_rows_and_batch(
    training: dict[str, Any], rows: int | None, steps: int | None
) -> None:
    assert count_steps(JobSpec.from_json({"training": training}), rows) == steps


def test_an_estimate_says_what_is_known_and_null_for_the_rest() -> None:
    spec = JobSpec.from_json({"max_seq_length": 1000})
    unknown = estimate(spec, ModelInfo("a/b", "hub"), None, None, [])
    assert {k for k, v in unknown.items() if v is None} == {
        "plan", "tokens", "steps", "seconds", "peak_memory_bytes", "disk_bytes",
    }  # fmt: skip
    model = ModelInfo("a/b", "hub").shaped(NEMOTRON_NANO_4B)
    plan = make_plan(spec, NEMOTRON_NANO_4B, [H100])
    assert plan is not None
    assert plan.tokens_per_second is not None
    known = estimate(spec, model, REPORT, plan, [])
    assert known["tokens"] == 100_000
    assert known["steps"] == 39
    assert known["peak_memory_bytes"] == plan.peak_memory_bytes
    # Three epochs of the tokens, as far as whole batches have them.
    assert known["seconds"] == pytest.approx(300_000 / plan.tokens_per_second, rel=0.02)
    for field, value in (("max_samples", 50), ("validation_fraction", 0.5)):
        half = JobSpec.from_json({field: value})
        assert estimate(half, model, REPORT, None, [])["tokens"] == 50_000


def test_time_without_data_is_that_of_full_rows() -> None:
    spec = JobSpec.from_json({"training": {"max_steps": 10}})
    model = ModelInfo("a/b", "hub").shaped(NEMOTRON_NANO_4B)
    plan = make_plan(spec, NEMOTRON_NANO_4B, [H100])
    assert plan is not None
    assert plan.tokens_per_second is not None
    known = estimate(spec, model, None, plan, [])
    assert known["seconds"] == pytest.approx(10 * 8 * 4096 * 0.98 / plan.tokens_per_second, abs=0.1)


@pytest.mark.parametrize(
    ("exports", "per_weight", "files"),
    [
        (["adapter"], 0.0, 2),
        # The merged folder is there while the archive is made.
        (["merged_16bit"], 2.0 + 2.0, 4),
        # The f16 GGUF is what others are made from, once.
        (["gguf:f16"], 2.0 + 2.0, 4),
        (["merged_16bit", "gguf:q8_0"], 2.0 + 2.0 + 1.0625 + 2.0, 6),
    ],
)
def test_disk_holds_exports_and_what_they_are_made_from(
    exports: list[str], per_weight: float, files: int
) -> None:
    """`files`: folders and files beside the checkpoints that each come with a tokenizer."""
    spec = JobSpec.from_json({"exports": exports, "training": {"save_steps": 10, "optim": "adamw_torch"}})
    shaped = ModelInfo("a/b", "hub", parameters=1_000_000).shaped(NEMOTRON_NANO_4B)
    weights, adapter = shaped.parameters or 0, 30_408_704
    small = SMALL_FILES_BYTES
    # One more than are kept: the oldest goes when the newest is there.
    for steps, checkpoints in ((None, 4), (100, 4), (15, 2), (10, 1)):
        told = disk_bytes(spec, shaped, steps)
        exact = per_weight * weights + 2 * adapter * 4 + checkpoints * (adapter * 12 + small) + files * small
        assert told == pytest.approx(exact, rel=1e-6)


def test_without_a_shape_the_adapters_size_is_guessed() -> None:
    spec = JobSpec.from_json({})
    bare = disk_bytes(spec, ModelInfo("a/b", "hub", parameters=4_510_000_000), 10)
    known = disk_bytes(spec, ModelInfo("a/b", "hub").shaped(NEMOTRON_NANO_4B), 10)
    assert bare is not None
    assert known is not None
    assert 0.7 < bare / known < 2
    assert disk_bytes(spec, ModelInfo("a/b", "hub"), 10) is None

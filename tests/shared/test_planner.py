"""The planner: predictions against measurements, what it promises of every plan, and what it refuses."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from bench import planner
from bench.planner import MEMORY_BOUND, SPEED_BOUND, read_lines
from bench.standins import CONFIGS
from shared.cost import GIB, Way, fits, peak_bytes, tokens_per_second
from shared.device import Device
from shared.feasible import check_runnable
from shared.models import ModelInfo
from shared.plan import EngineName, Plan
from shared.planner import (
    TIE,
    alternatives,
    candidates,
    cheaper_plan,
    groups,
    least_memory,
    make_plan,
    way_of,
)
from shared.shape import NEMOTRON_NANO_4B, SMOLLM2_135M, ModelShape
from shared.spec import JobSpec

ALL_ENGINES: tuple[EngineName, ...] = get_args(EngineName)
CPU = Device("cpu", 0, "CPU (x86_64, 2 cores)", 16 << 30)
H100 = Device("cuda", 0, "NVIDIA H100 80GB HBM3", 80 << 30, ALL_ENGINES, 9.0)
SHAPES = (NEMOTRON_NANO_4B, SMOLLM2_135M)
NANO = ModelInfo("a/nano", "hub").shaped(NEMOTRON_NANO_4B)


def gpu(
    gib: float,
    name: str = "NVIDIA GeForce RTX 4090",
    engines: tuple[EngineName, ...] = ALL_ENGINES,
    capability: float | None = 8.9,
) -> Device:
    return Device("cuda", 0, name, int(gib * GIB), engines, capability)


def spec_of(**fields: Any) -> JobSpec:
    return JobSpec.model_validate_json(json.dumps(fields))


def planned(spec: JobSpec, device: Device, shape: ModelShape | None = NEMOTRON_NANO_4B) -> Plan:
    plan = make_plan(spec, shape, [device])
    assert plan is not None
    return plan


# By `bench.train` on an H100 80 GB, 2 x 4 rows of 4,096 tokens: way, dropout, tokens a second, GiB.
MEASURED_ON_H100 = [
    (("reference", "none", "bf16", "all"), 0.05, 4_708, 13.2),
    (("unsloth", "4bit", "bf16", "all"), 0.05, 14_783, 5.5),
    (("unsloth", "none", "bf16", "all"), 0.05, 15_413, 10.4),
    (("unsloth", "none", "bf16", "all"), 0.0, 17_172, 9.9),
    (("compiled", "none", "bf16", "none"), 0.05, 25_525, 28.4),
    (("compiled", "none", "fp8", "none"), 0.05, 31_139, 28.1),
]


@pytest.mark.parametrize(("way", "dropout", "speed", "gib"), MEASURED_ON_H100)
def test_predictions_are_near_what_was_measured(way: Any, dropout: float, speed: float, gib: float) -> None:
    engine, quantization, precision, checkpointing = way
    tried = Way(engine, "cuda", quantization, precision, 2, 4, checkpointing)
    spec = spec_of(lora={"dropout": dropout}, max_seq_length=4096)
    shape = ModelShape.from_config(CONFIGS["4b"])
    assert shape is not None
    assert peak_bytes(tried, shape, spec) / GIB == pytest.approx(gib, rel=MEMORY_BOUND)
    assert tokens_per_second(tried, shape, spec, H100) == pytest.approx(speed, rel=SPEED_BOUND)


def test_predictions_are_near_the_points_of_the_bench() -> None:
    lines = read_lines(Path(planner.__file__).with_name("planner-h200.jsonl"))
    assert {json.dumps(line["point"]) for line in lines} == {json.dumps(asdict(p)) for p in planner.POINTS}
    for point, line, peak, speed in planner.compared(lines):
        assert peak == pytest.approx(line["peak_memory_bytes"], rel=MEMORY_BOUND), point
        assert speed == pytest.approx(line["tokens_per_second"], rel=SPEED_BOUND), point


def test_a_cpu_is_predicted_for_the_bundled_model() -> None:
    plan = planned(spec_of(max_seq_length=512), CPU, SMOLLM2_135M)
    assert (plan.engine, plan.device, plan.precision) == ("reference", "cpu", "fp32")
    assert (plan.micro_batch, plan.accumulation, plan.gradient_checkpointing) == (2, 4, "none")
    assert plan.peak_memory_bytes == pytest.approx(4.7e9, rel=0.10)
    # The demo's job: 12 steps over 33 rows with 14,771 tokens, about 5 s a step on two cores.
    way = Way("reference", "cpu", "none", "fp32", 1, 2, "none")
    speed = tokens_per_second(way, SMOLLM2_135M, spec_of(max_seq_length=512), CPU)
    assert speed == pytest.approx(14_771 / 33 * 2 / 5, rel=0.10)


def test_without_devices_there_is_no_plan() -> None:
    assert make_plan(spec_of(), NEMOTRON_NANO_4B, []) is None
    assert alternatives(spec_of(), NEMOTRON_NANO_4B, []) == []


def test_a_gpu_goes_before_the_cpu_and_the_cpu_keeps_the_batch_that_was_stated() -> None:
    devices = [CPU, H100]
    plan = make_plan(spec_of(), SMOLLM2_135M, devices)
    assert plan is not None
    assert plan.device == "cuda"
    stated = spec_of(training={"per_device_train_batch_size": 1, "gradient_accumulation_steps": 6})
    on_cpu = planned(stated, CPU, SMOLLM2_135M)
    assert (on_cpu.micro_batch, on_cpu.accumulation, on_cpu.gradient_checkpointing) == (1, 6, "all")


def test_a_cpu_with_little_memory_takes_what_fits() -> None:
    spec = spec_of(max_seq_length=512)
    roomy = planned(spec, CPU, SMOLLM2_135M)
    tight = planned(spec, Device("cpu", 0, "CPU", 3 << 30), SMOLLM2_135M)
    assert (roomy.gradient_checkpointing, tight.gradient_checkpointing) == ("none", "all")
    assert make_plan(spec, SMOLLM2_135M, [Device("cpu", 0, "CPU", 1 << 30)]) is None


@pytest.mark.parametrize("gib", [12, 16, 24])
@pytest.mark.parametrize("engines", [ALL_ENGINES, ("reference", "unsloth"), ("reference",)])
def test_the_default_job_runs_on_cards_of_12_16_and_24_gb(gib: int, engines: tuple[EngineName, ...]) -> None:
    plan = planned(spec_of(), gpu(gib, engines=engines))
    assert plan.micro_batch * plan.accumulation == 8
    assert (plan.peak_memory_bytes or 0) < gib * GIB


def test_auto_takes_the_fastest_and_tells_why_the_others_lost() -> None:
    plan = planned(spec_of(), H100)
    assert (plan.engine, plan.precision, plan.quantization) == ("compiled", "bf16", "none")
    others = alternatives(spec_of(), NEMOTRON_NANO_4B, [H100])
    assert {other.engine for other in others} == set(ALL_ENGINES)
    assert {other.quantization for other in others} == {"none", "4bit"}
    assert all("%" in other.reason or "no faster" in other.reason for other in others)
    small = alternatives(spec_of(), NEMOTRON_NANO_4B, [gpu(12)])
    assert any("needs 3" in other.reason and "12.0 GiB" in other.reason for other in small)


def test_float8_is_never_chosen_unasked() -> None:
    assert all(c.way.precision != "fp8" for c in candidates(spec_of(), NEMOTRON_NANO_4B, [H100]))
    assert planned(spec_of(precision="fp8"), H100).precision == "fp8"


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"engine": "unsloth"}, {"engine": "unsloth"}),
        ({"engine": "reference", "quantization": "4bit"}, {"engine": "reference", "quantization": "4bit"}),
        ({"quantization": "4bit"}, {"engine": "unsloth", "quantization": "4bit"}),
        ({"precision": "fp32"}, {"engine": "reference", "precision": "fp32"}),
    ],
)
def test_what_the_spec_names_binds(fields: dict[str, Any], expected: dict[str, Any]) -> None:
    plan = planned(spec_of(**fields), H100)
    assert {name: getattr(plan, name) for name in expected} == expected


def test_a_gpu_without_bfloat16_gets_the_reference_in_fp32() -> None:
    old = gpu(32, "Tesla V100-SXM2-32GB", capability=7.0)
    assert {(c.way.engine, c.way.precision) for c in candidates(spec_of(), SMOLLM2_135M, [old])} == {
        ("reference", "fp32")
    }


def test_a_model_of_unknown_shape_gets_a_careful_plan_without_predictions() -> None:
    plan = planned(spec_of(), H100, None)
    # Its type may be one in which only plain transformers keep documents apart.
    assert (plan.engine, plan.quantization, plan.gradient_checkpointing) == ("reference", "none", "all")
    assert (plan.micro_batch, plan.accumulation) == (2, 4)
    assert plan.peak_memory_bytes is None
    named = planned(spec_of(engine="unsloth"), H100, None)
    assert (named.engine, named.quantization, named.gradient_checkpointing) == ("unsloth", "4bit", "all")
    plain = planned(spec_of(), gpu(24, engines=("reference",)), None)
    assert (plain.quantization, plain.gradient_checkpointing) == ("none", "all")
    smaller = cheaper_plan(spec_of(), None, [gpu(24, engines=("reference",))], [plain])
    assert smaller is not None
    assert smaller.quantization == "4bit"
    assert smaller.peak_memory_bytes is None


def test_what_has_to_be_free_is_what_the_smallest_plan_fits_into() -> None:
    least = least_memory(spec_of(), NEMOTRON_NANO_4B, [gpu(24)])
    assert least is not None
    for memory, fit in ((least, True), (least - 1, False)):
        card = Device("cuda", 0, "NVIDIA GeForce RTX 4090", memory, ALL_ENGINES, 8.9)
        assert (make_plan(spec_of(), NEMOTRON_NANO_4B, [card]) is not None) == fit
    tried = [planned(spec_of(), gpu(24))]
    assert (least_memory(spec_of(), NEMOTRON_NANO_4B, [gpu(24)], tried) or 0) >= least
    assert least_memory(spec_of(), None, [gpu(24)]) is None


def test_a_model_of_unknown_size_is_planned_for_the_largest_gpu() -> None:
    for box in ([gpu(24), H100], [H100, gpu(24)]):
        plan = make_plan(spec_of(), None, box)
        assert plan is not None
        assert H100.name in plan.reason
        following = cheaper_plan(spec_of(), None, box, [plan])
        assert following is None or H100.name in following.reason


@pytest.mark.parametrize(
    ("fields", "engine"),
    [
        ({"engine": "compiled"}, "compiled"),
        ({"precision": "fp8"}, "compiled"),
        ({"engine": "unsloth"}, "unsloth"),
    ],
)
def test_what_only_some_models_can_have_is_tried_where_the_hub_does_not_say(
    fields: dict[str, Any], engine: str
) -> None:
    check_runnable(spec_of(**fields), ModelInfo("a/b", "hub"), [[H100]])
    plan = planned(spec_of(**fields), H100, None)
    assert plan.engine == engine
    assert plan.precision == fields.get("precision", "bf16")
    following = cheaper_plan(spec_of(**fields), None, [H100], [plan])
    assert following is None or following.engine == engine
    # Who doesn't name it doesn't get it, neither at first nor after running out of memory.
    careful = planned(spec_of(), gpu(24), None)
    after = cheaper_plan(spec_of(), None, [gpu(24)], [careful])
    assert {careful.engine, after and after.engine} == {"reference"}


def test_fp8_is_planned_for_rows_that_are_not_packed_and_the_plan_says_what_that_costs() -> None:
    check_runnable(spec_of(precision="fp8", packing=False), NANO, [[H100]])
    plan = planned(spec_of(precision="fp8", packing=False), H100)
    assert (plan.engine, plan.precision) == ("compiled", "fp8")
    assert "aren't packed are filled up" in plan.reason
    assert "filled up" not in planned(spec_of(precision="fp8"), H100).reason
    # Without a name for it the planner takes an engine that doesn't fill them up.
    assert planned(spec_of(packing=False), H100).engine != "compiled"


def test_several_gpus_share_the_effective_batch() -> None:
    spec = spec_of().model_copy(update={"gpus": 2})
    box = [H100, gpu(80, H100.name)]
    plan = make_plan(spec, NEMOTRON_NANO_4B, box)
    assert plan is not None
    assert plan.gpus == 2
    assert plan.micro_batch * plan.accumulation * plan.gpus == 8
    alone = planned(spec_of(), H100)
    assert (plan.tokens_per_second or 0) > 1.5 * (alone.tokens_per_second or 0)
    assert make_plan(spec, NEMOTRON_NANO_4B, [H100]) is None


def test_of_mixed_gpus_those_are_taken_that_are_fastest_together() -> None:
    old = Device("cuda", 0, "Tesla V100-SXM2-32GB", 32 << 30, ALL_ENGINES, 7.0)
    one, two = (Device("cuda", n, "NVIDIA GeForce RTX 3090", 24 << 30, ALL_ENGINES, 8.6) for n in (1, 2))
    spec = spec_of(gpus=2)
    # The largest two have no number format in common that is fast: they would train in fp32.
    mixed = make_plan(spec, SMOLLM2_135M, [old, one])
    alike = make_plan(spec, SMOLLM2_135M, [old, one, two])
    assert mixed is not None
    assert alike is not None
    assert (mixed.precision, alike.precision) == ("fp32", "bf16")
    assert groups(2, [old, one, two]) == [(old, one), (one, two)]
    assert groups(3, [one, two]) == []


def test_after_running_out_of_memory_plans_get_cheaper_until_there_is_none() -> None:
    tried = [planned(spec_of(), H100)]
    while (following := cheaper_plan(spec_of(), NEMOTRON_NANO_4B, [H100], tried)) is not None:
        assert (following.peak_memory_bytes or 0) < 0.95 * (tried[-1].peak_memory_bytes or 0)
        assert following.micro_batch * following.accumulation == 8
        tried.append(following)
    assert 3 <= len(tried) <= 8
    assert tried[-1].micro_batch == 1
    # Where nothing that is cheaper fits, there is nothing to try now.
    assert cheaper_plan(spec_of(), NEMOTRON_NANO_4B, [gpu(3, H100.name)], tried[:1]) is None
    # With the memory that there really is, the next one fits it at once.
    second = cheaper_plan(spec_of(), NEMOTRON_NANO_4B, [gpu(12, H100.name)], tried[:1])
    assert second is not None
    assert fits(second.peak_memory_bytes or 0, gpu(12))


def test_on_a_cpu_the_next_plan_recomputes_or_splits() -> None:
    spec = spec_of(max_seq_length=64)
    first = planned(spec, CPU, SMOLLM2_135M)
    second = cheaper_plan(spec, SMOLLM2_135M, [CPU], [first])
    assert second is not None
    assert second.micro_batch * second.accumulation == 8
    assert (second.micro_batch, second.gradient_checkpointing) != (2, "none")


specs = st.builds(
    lambda batch, accumulation, length, packing, r, dropout, fields: spec_of(
        max_seq_length=length,
        packing=packing,
        lora={"r": r, "dropout": dropout},
        training={"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation},
        **fields,
    ),
    st.integers(1, 16),
    st.integers(1, 16),
    st.sampled_from([128, 1000, 2048, 4096, 8192, 32768]),
    st.booleans(),
    st.sampled_from([1, 16, 64]),
    st.sampled_from([0.0, 0.05]),
    st.sampled_from(
        [{}, {"engine": "unsloth"}, {"quantization": "4bit"}, {"precision": "fp8"}, {"quantization": "none"}]
    ),
)


BY_TWELVE = spec_of(
    engine="unsloth",
    max_seq_length=1000,
    lora={"r": 1},
    training={"per_device_train_batch_size": 3, "gradient_accumulation_steps": 4},
)


@given(spec=specs, shape=st.sampled_from(SHAPES), gib=st.integers(4, 80), more=st.integers(1, 100))
@example(spec=BY_TWELVE, shape=NEMOTRON_NANO_4B, gib=10, more=1)
def test_more_memory_never_makes_a_slower_plan_but_for_whole_weights(
    spec: JobSpec, shape: ModelShape, gib: int, more: int
) -> None:
    name = "NVIDIA L40S"
    less, roomy = (make_plan(spec, shape, [gpu(size, name)]) for size in (gib, gib + more))
    if less is not None:
        assert roomy is not None
        whole = less.quantization == "4bit" != roomy.quantization
        least = (less.tokens_per_second or 0) * (1 - TIE if whole else 1)
        assert (roomy.tokens_per_second or 0) >= least


def test_why_a_plan_lost_is_true_where_it_is_nearly_as_fast() -> None:
    # As fast as makes no difference, and faster all the same.
    (four_bit,) = (
        other
        for other in alternatives(BY_TWELVE, NEMOTRON_NANO_4B, [gpu(11, "NVIDIA L40S")])
        if (other.quantization, other.gradient_checkpointing) == ("4bit", "all")
    )
    taken = planned(BY_TWELVE, gpu(11, "NVIDIA L40S"))
    assert taken.quantization == "none"
    gain = (four_bit.tokens_per_second or 0) / (taken.tokens_per_second or 1) - 1
    assert 0 < gain < 2 * TIE
    assert four_bit.reason == f"{gain:.1%} faster, and rounds the weights to 4 bits"
    # Too far from the fastest of all to be taken, near the one that was, and smaller than that.
    spec = spec_of(
        lora={"r": 1, "dropout": 0.0},
        training={"per_device_train_batch_size": 7, "gradient_accumulation_steps": 10},
    )
    reasons = [other.reason for other in alternatives(spec, SMOLLM2_135M, [gpu(12)])]
    assert "1.6% slower" in reasons
    assert not any("takes -" in reason for reason in reasons)


@given(
    spec=specs, shape=st.sampled_from([*SHAPES, None]), gib=st.integers(4, 141), gpus=st.sampled_from([1, 2])
)
def test_every_plan_keeps_the_effective_batch_and_fits(
    spec: JobSpec, shape: ModelShape | None, gib: int, gpus: int
) -> None:
    spec = spec.model_copy(update={"gpus": gpus})
    box = [gpu(gib, "NVIDIA L40S")] * gpus
    plan = make_plan(spec, shape, box)
    tried = [] if plan is None else [plan]
    while tried and (following := cheaper_plan(spec, shape, box, tried)):
        tried.append(following)
    for made in [*tried, *alternatives(spec, shape, box)]:
        assert made.micro_batch * made.accumulation * made.gpus == spec.training.effective_batch
        # What a plan costs is told by what it says and the spec alone: the sequence length is the spec's.
        if shape is not None:
            assert made.peak_memory_bytes == peak_bytes(way_of(made), shape, spec)
    if plan is not None and plan.peak_memory_bytes is not None:
        assert fits(plan.peak_memory_bytes, box[0])

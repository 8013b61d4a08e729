"""What is refused when it is posted, and what the refusal says."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from shared.cost import fits
from shared.device import Device
from shared.errors import InvalidRequest
from shared.feasible import check_runnable
from shared.models import ModelInfo
from shared.planner import make_plan
from shared.shape import NEMOTRON_NANO_4B, ModelShape
from tests.shared.test_planner import CPU, H100, NANO, gpu, planned, spec_of

A100 = gpu(80, "NVIDIA A100-SXM4-80GB", capability=8.0)
V100 = gpu(32, "Tesla V100-SXM2-32GB", capability=7.0)
PLAIN = gpu(80, engines=("reference",))


def refusal(fields: dict[str, Any], model: ModelInfo, *boxes: list[Device]) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        check_runnable(spec_of(**fields), model, boxes)
    return caught.value


@pytest.mark.parametrize(
    ("fields", "device", "code", "param", "said"),
    [
        ({"engine": "compiled"}, CPU, "needs_gpu", "engine", "reference engine"),
        ({"engine": "unsloth"}, CPU, "needs_gpu", "engine", "needs a GPU"),
        ({"quantization": "4bit"}, CPU, "needs_gpu", "quantization", "needs a GPU"),
        ({"precision": "fp8"}, CPU, "needs_gpu", "precision", "needs a GPU"),
        ({"precision": "bf16"}, CPU, "needs_gpu", "precision", "needs a GPU"),
        ({"engine": "unsloth"}, gpu(80, engines=("reference",)), "not_available_here", "engine", "reference"),
        ({"precision": "fp8"}, A100, "not_available_here", "precision", "capability 8.9 or more"),
        ({"precision": "fp8"}, A100, "not_available_here", "precision", "NVIDIA A100-SXM4-80GB (8.0)"),
        ({"precision": "fp8", "packing": False}, A100, "not_available_here", "precision", "float8"),
        ({"precision": "fp8"}, PLAIN, "not_available_here", "precision", "Triton, and a C compiler"),
        ({"engine": "compiled"}, PLAIN, "not_available_here", "engine", "not installed on any worker"),
        ({"engine": "unsloth"}, PLAIN, "not_available_here", "engine", "the extra gpu"),
        ({"engine": "unsloth"}, V100, "not_available_here", "engine", "bfloat16"),
        ({"engine": "compiled"}, V100, "not_available_here", "engine", "Tesla V100-SXM2-32GB (7.0)"),
        ({"quantization": "4bit"}, V100, "not_available_here", "quantization", "Ampere"),
        ({"precision": "bf16"}, V100, "not_available_here", "precision", "bf16 computes in bfloat16"),
        ({"quantization": "none"}, gpu(8), "does_not_fit", "quantization", "(a margin of 8% stays free"),
        ({"quantization": "none"}, gpu(8), "does_not_fit", "quantization", "4bit"),
        ({"max_seq_length": 131072}, gpu(16), "does_not_fit", "max_seq_length", "max_seq_length 65536"),
        ({"precision": "fp32"}, gpu(16), "does_not_fit", "precision", "precision auto"),
        ({}, gpu(4), "does_not_fit", "model", "smaller model"),
        ({}, Device("cpu", 0, "CPU", 8 << 30), "does_not_fit", "model", "8.0 GiB"),
    ],
)
def test_what_no_device_can_run_is_refused_with_what_would_do(
    fields: dict[str, Any], device: Device, code: str, param: str, said: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check_runnable(spec_of(**fields), NANO, [[device]])
    assert (caught.value.error_code, caught.value.param) == (code, param)
    assert said in caught.value.message
    check_runnable(spec_of(**fields), NANO, [])
    check_runnable(spec_of(**fields), NANO, [[device], [H100]])


def test_unsloth_is_for_one_gpu() -> None:
    refused = refusal({"engine": "unsloth", "gpus": 2}, NANO, [H100, H100])
    assert refused.param == "engine"
    assert "unsloth trains on one GPU alone, and the job asks for 2. Leave it on auto." in refused.message
    assert refused.message.endswith("The job would run with gpus 1.")
    four_bit = make_plan(spec_of(quantization="4bit", gpus=2), NEMOTRON_NANO_4B, [H100, H100])
    assert four_bit is not None
    assert four_bit.engine == "reference"


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({"engine": "compiled"}, "engine", "compiled does not know models of the type gemma2"),
        ({"precision": "fp8"}, "precision", "fp8 is the compiled engine's, which does not know"),
        (
            {"engine": "unsloth"},
            "engine",
            "unsloth is not known to keep packed documents apart in models of the type gemma2. It takes: "
            "gemma, llama, mistral, qwen2, qwen3. Leave it on auto.",
        ),
        ({"engine": "unsloth", "packing": False}, "engine", "models of the type gemma2"),
    ],
)
def test_an_engine_refuses_types_of_models_that_it_does_not_take(
    fields: dict[str, Any], param: str, said: str
) -> None:
    odd = ModelShape.from_json(NEMOTRON_NANO_4B.to_json() | {"model_type": "gemma2"})
    refused = refusal(fields, ModelInfo("a/b", "hub", shape=odd), [H100])
    assert (refused.error_code, refused.param) == ("not_available_here", param)
    assert said in refused.message


@pytest.mark.parametrize("fields", [{"engine": "compiled"}, {"precision": "fp8"}])
@pytest.mark.parametrize(
    ("changes", "said"),
    [({"attention_dropout": True}, "(attention_dropout)"), ({"quantized": True}, "are stored quantised")],
)
def test_the_compiled_engine_refuses_what_its_layers_do_not_do(
    fields: dict[str, Any], changes: dict[str, Any], said: str
) -> None:
    odd = ModelShape.from_json(NEMOTRON_NANO_4B.to_json() | changes)
    refused = refusal(fields, ModelInfo("a/b", "hub", shape=odd), [H100])
    assert (refused.error_code, refused.param) == ("not_available_here", next(iter(fields)))
    assert said in refused.message
    assert planned(spec_of(), H100).engine == "compiled"
    assert planned(spec_of(), H100, odd).engine == "unsloth"


def test_a_refusal_tells_what_plans_fill_and_what_would_be_enough() -> None:
    said = refusal({"quantization": "none"}, NANO, [gpu(8)]).message
    assert "NVIDIA GeForce RTX 4090, has 8.0 GiB, of which plans fill at most 6.8 GiB" in said
    # It is enough, and a GiB less is not.
    needed = int(said.split("else it needs one with ")[1].split(" GiB")[0])
    check_runnable(spec_of(quantization="none"), NANO, [[gpu(needed)]])
    assert (
        f"needs one with {needed} GiB" in refusal({"quantization": "none"}, NANO, [gpu(needed - 1)]).message
    )


def test_a_job_for_several_gpus_is_offered_as_many_as_it_fits() -> None:
    several = {"gpus": 4, "quantization": "none"}
    pair = refusal(several, NANO, [H100, gpu(8), gpu(8), gpu(8)])
    assert (pair.error_code, pair.param) == ("does_not_fit", "gpus")
    assert "It would fit with gpus 1, or quantization 4bit" in pair.message
    assert "on each of its 4 GPUs" in pair.message
    assert "gpus 2" in refusal(several, NANO, [H100, replace(H100, index=1), gpu(8), gpu(8)]).message
    too_many = refusal({"gpus": 2}, NANO, [H100])
    assert (too_many.error_code, too_many.param) == ("not_available_here", "gpus")
    assert "The job would run with gpus 1." in too_many.message
    assert "would run" not in refusal(several, NANO, [gpu(8)]).message


def test_cards_of_different_kinds_train_together_in_what_each_can_do() -> None:
    box = [gpu(24, "NVIDIA GeForce RTX 3090", capability=8.6), gpu(15, "Tesla T4", capability=7.5)]
    for fields, word in (({"quantization": "4bit"}, "4bit"), ({"precision": "bf16"}, "bf16")):
        refused = refusal(fields | {"gpus": 2}, NANO, box)
        assert (refused.error_code, refused.param) == ("not_available_here", next(iter(fields)))
        assert f"{word} computes in bfloat16, which takes 2 GPUs of one worker" in refused.message
        assert "The job would run with gpus 1." in refused.message


def local_model(parameters: int, stored_bytes: int) -> ModelInfo:
    """A local model of a kind whose cost nobody knows here."""
    return ModelInfo("local/moe", "local", parameters=parameters, weight_bytes=stored_bytes)


def test_a_model_of_unknown_kind_is_refused_if_its_weights_alone_fit_nowhere() -> None:
    huge = local_model(47 * 10**9, 94 * 10**9)
    refused = refusal({}, huge, [gpu(24)])
    assert (refused.error_code, refused.param) == ("does_not_fit", "model")
    assert "its weights alone take 22." in refused.message
    assert "max_seq_length" not in refused.message
    check_runnable(spec_of(), huge, [[gpu(24)], [H100]])
    in_16_bit = refusal({"quantization": "none"}, huge, [H100])
    assert in_16_bit.param == "quantization"
    assert "weights alone take 87.5 GiB" in in_16_bit.message
    # What is packed several to an element takes no more than the files.
    check_runnable(spec_of(quantization="none"), local_model(47 * 10**9, 30 * 10**9), [[H100]])
    # Nothing is known of the hub's.
    check_runnable(spec_of(quantization="none"), ModelInfo("a/b", "hub"), [[gpu(8)]])


def test_a_device_whose_memory_is_not_known_fits_anything() -> None:
    assert fits(1 << 50, Device("cuda", 0, "NVIDIA GH200", 0))
    check_runnable(spec_of(), NANO, [[gpu(0)]])

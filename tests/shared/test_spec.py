from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from shared.spec import SPEC_EXAMPLE, JobSpec

# The seed script's settings, which are the defaults of a job that names nothing else.
DEFAULTS: dict[str, Any] = {
    "name": None,
    "model": "nvidia/Llama-3.1-Nemotron-Nano-4B-v1.1",
    "model_revision": None,
    "max_samples": None,
    "validation_dataset": None,
    "validation_fraction": 0,
    "chat_template": "chatml",
    "tool_call_style": "functioncall",
    "max_seq_length": 4096,
    "overlong_rows": "drop",
    "unparsable_calls": "keep",
    "packing": True,
    "train_on": "assistant",
    "quantization": "auto",
    "precision": "auto",
    "engine": "auto",
    "gpus": 1,
    "exports": ["adapter"],
    "report_to": [],
    "priority": "normal",
}
TRAINING_DEFAULTS = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 4,
    "num_train_epochs": 3,
    "max_steps": None,
    "learning_rate": 2e-4,
    "lr_scheduler_type": "linear",
    "warmup_ratio": 0.03,
    "weight_decay": 0,
    "optim": "adamw_8bit",
    "logging_steps": 10,
    "save_steps": 500,
    "save_total_limit": 3,
    "eval_steps": None,
    "seed": 42,
}


def errors(spec: Any) -> list[str]:
    with pytest.raises(ValidationError) as caught:
        JobSpec.model_validate_json(spec if isinstance(spec, str) else json.dumps(spec))
    return [".".join(str(part) for part in error["loc"]) for error in caught.value.errors()]


def test_an_empty_spec_is_the_seeds_job_with_every_default_visible() -> None:
    spec = JobSpec.model_validate_json("{}").to_json()
    assert {name: spec[name] for name in DEFAULTS} == DEFAULTS
    assert {name: spec["training"][name] for name in TRAINING_DEFAULTS} == TRAINING_DEFAULTS
    assert spec["lora"] == {
        "r": 16,
        "alpha": 32,
        "dropout": 0.05,
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        "use_rslora": False,
    }
    assert spec["dataset"] == {
        "source": "hub",
        "id": "glaiveai/glaive-function-calling-v2",
        "revision": None,
        "split": "train",
        "config": None,
        "format": "auto",
    }


@pytest.mark.parametrize("spec", [{}, SPEC_EXAMPLE, {"metadata": {"k": "v"}, "lora": {"r": 512}}])
def test_a_spec_survives_its_own_json(spec: dict[str, Any]) -> None:
    parsed = JobSpec.from_json(spec)
    assert JobSpec.from_json(parsed.to_json()) == parsed


@pytest.mark.parametrize(
    ("spec", "where"),
    [
        ({"modle": "x"}, "modle"),
        ({"training": {"lr": 1}}, "training.lr"),
        ({"lora": {"r": 0}}, "lora.r"),
        ({"lora": {"r": 513}}, "lora.r"),
        ({"lora": {"r": "16"}}, "lora.r"),
        ({"lora": {"r": 16.5}}, "lora.r"),
        ({"lora": {"r": True}}, "lora.r"),
        ({"lora": {"alpha": 0}}, "lora.alpha"),
        ({"lora": {"dropout": 1.0}}, "lora.dropout"),
        ({"lora": {"dropout": -0.1}}, "lora.dropout"),
        ({"lora": {"target_modules": []}}, "lora.target_modules"),
        ({"lora": {"target_modules": ["q_proj", "q_proj"]}}, "lora.target_modules"),
        ({"lora": {"target_modules": ["../x"]}}, "lora.target_modules.0"),
        ({"training": {"learning_rate": 0}}, "training.learning_rate"),
        ({"training": {"learning_rate": 2}}, "training.learning_rate"),
        ({"training": {"max_steps": 0}}, "training.max_steps"),
        ({"training": {"max_steps": 10**30}}, "training.max_steps"),
        ({"training": {"num_train_epochs": 0}}, "training.num_train_epochs"),
        ({"training": {"eval_steps": 10}}, "training.eval_steps"),
        ({"training": {"eval_steps": 0}, "validation_fraction": 0.1}, "training.eval_steps"),
        (
            {"training": {"early_stopping_patience": 2}, "validation_fraction": 0.1},
            "training.early_stopping_patience",
        ),
        (
            {"training": {"eval_steps": 5, "early_stopping_patience": 0}, "validation_fraction": 0.1},
            "training.early_stopping_patience",
        ),
        ({"training": {"eval_steps": 5, "early_stopping_patience": 2}}, "training.eval_steps"),
        ({"max_seq_length": 8}, "max_seq_length"),
        ({"max_samples": 0}, "max_samples"),
        ({"max_samples": "10"}, "max_samples"),
        ({"packing": "yes"}, "packing"),
        ({"exports": []}, "exports"),
        ({"exports": ["gguf:q2_k"]}, "exports.0"),
        ({"exports": ["adapter", "adapter"]}, "exports"),
        ({"report_to": ["pigeon"]}, "report_to.0"),
        ({"engine": "vllm"}, "engine"),
        ({"engine": "compiled", "quantization": "4bit"}, "engine"),
        ({"engine": "compiled", "precision": "fp32"}, "engine"),
        ({"engine": "unsloth", "precision": "fp32"}, "engine"),
        ({"engine": "unsloth", "precision": "fp8"}, "engine"),
        ({"engine": "reference", "precision": "fp8"}, "engine"),
        ({"quantization": "8bit"}, "quantization"),
        ({"quantization": "4bit", "precision": "fp8"}, "precision"),
        ({"quantization": "4bit", "precision": "fp32"}, "precision"),
        ({"gpus": 9}, "gpus"),
        ({"gpus": 3}, "gpus"),
        ({"chat_template": "jinja"}, "chat_template"),
        ({"tool_call_style": "template"}, "tool_call_style"),
        ({"validation_fraction": 0.6}, "validation_fraction"),
        (
            {"validation_fraction": 0.1, "validation_dataset": {"source": "hub", "id": "x/y"}},
            "validation_fraction",
        ),
        ({"validation_dataset": {"source": "hub"}}, "validation_dataset"),
        ({"validation_dataset": {"source": "hub", "format": "glaive"}}, "validation_dataset"),
        ({"validation_dataset": {"source": "file", "file_id": "x"}}, "validation_dataset.file.file_id"),
        ({"validation_fraction": -0.1}, "validation_fraction"),
        ({"name": ""}, "name"),
        ({"name": "x" * 201}, "name"),
        ({"name": "a\u0000b"}, "name"),
        ({"metadata": {"k": 1}}, "metadata.k"),
        ({"metadata": {'a"b': "v"}}, 'metadata.a"b.[key]'),
        ({"metadata": {"k" * 65: "v"}}, f"metadata.{'k' * 65}.[key]"),
        ({"metadata": {str(n): "v" for n in range(17)}}, "metadata"),
        ({"priority": "urgent"}, "priority"),
        ({"dataset": {"source": "file"}}, "dataset.file.file_id"),
        ({"dataset": {"source": "file", "file_id": "file-../../etc/passwd"}}, "dataset.file.file_id"),
        ({"dataset": {"source": "web", "url": "http://x"}}, "dataset"),
        ({"dataset": {"source": "hub", "id": "x/y", "split": "train[:10]"}}, "dataset.hub.split"),
    ],
)
def test_a_bad_value_is_refused_at_its_field(spec: dict[str, Any], where: str) -> None:
    assert errors(spec)[0] == where


@pytest.mark.parametrize(
    "model",
    [
        "../../etc",
        "/etc/passwd",
        "a/b/c",
        "a/../b",
        "local/..",
        "local/.hidden",
        "a\x00b",
        "a b",
        "https://x/y",
        "a\\b",
        "",
        "owner/--name",
    ],
)
def test_a_model_id_is_never_a_path(model: str) -> None:
    assert errors({"model": model}) == ["model"]


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_what_is_no_number_is_refused(number: str) -> None:
    assert errors(f'{{"training": {{"learning_rate": {number}}}}}') == ["training.learning_rate"]


def test_a_revision_goes_with_a_hub_model_alone() -> None:
    assert errors({"model": "local/x", "model_revision": "main"}) == ["model_revision"]
    assert JobSpec.from_json({"model": "a/b", "model_revision": "refs/pr/1"}).model_revision == "refs/pr/1"


def test_a_models_own_way_to_write_calls_goes_with_its_own_template() -> None:
    spec = JobSpec.from_json({"chat_template": "model", "tool_call_style": "template"})
    assert JobSpec.from_json(spec.to_json()) == spec
    assert JobSpec.from_json({"chat_template": "model"}).tool_call_style == "functioncall"


def test_evaluations_and_early_stopping_go_with_held_out_rows() -> None:
    training = {"eval_steps": 5, "early_stopping_patience": 2}
    spec = JobSpec.from_json({"validation_fraction": 0.1, "training": training})
    assert (spec.training.eval_steps, spec.training.early_stopping_patience) == (5, 2)
    assert JobSpec.from_json(spec.to_json()) == spec
    other = {"source": "hub", "split": "test"}
    spec = JobSpec.from_json({"validation_dataset": other, "training": {"eval_steps": 5}})
    assert spec.to_json()["validation_dataset"]["split"] == "test"
    assert JobSpec.from_json(spec.to_json()) == spec


def test_a_spec_cannot_be_changed() -> None:
    spec = JobSpec.from_json({})
    with pytest.raises(ValidationError, match="frozen"):
        spec.model = "x"  # type: ignore[misc]

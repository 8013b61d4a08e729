"""Models, the server's limits on a spec, plans and estimates."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from shared.errors import InvalidRequest
from shared.models import ModelInfo, find_model, list_models
from shared.planner import Device, count_steps, estimate, make_plan
from shared.policy import check_spec
from shared.settings import Settings
from shared.spec import BUNDLED_MODEL, JobSpec

CPU = Device("cpu", 0, "CPU", 8 << 30)
GPU = Device("cuda", 1, "NVIDIA H100", 80 << 30)


def make_model(folder: Path, weights: str = "model.safetensors") -> Path:
    """A folder that looks like a model: config and a safetensors header without any data."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"max_position_embeddings": 2048}))
    header = {
        "__metadata__": {"format": "pt"},
        "model.embed_tokens.weight": {"dtype": "BF16", "shape": [100, 8], "data_offsets": [0, 1600]},
        "model.layers.0.self_attn.q_proj.weight": {
            "dtype": "BF16",
            "shape": [8, 8],
            "data_offsets": [0, 128],
        },
        "model.layers.0.mlp.up_proj.weight": {"dtype": "BF16", "shape": [16, 8], "data_offsets": [0, 256]},
        "model.layers.0.norm.weight": {"dtype": "BF16", "shape": [8], "data_offsets": [0, 16]},
    }
    raw = json.dumps(header).encode()
    (folder / weights).write_bytes(struct.pack("<Q", len(raw)) + raw)
    return folder


def test_a_local_model_is_known_from_its_files(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "tiny")
    info = find_model(Settings(models_root=tmp_path), "local/tiny")
    assert info.modules == {"q_proj", "up_proj"}
    assert (info.context_length, info.parameters, info.path) == (2048, 800 + 64 + 128 + 8, folder)


def test_the_models_of_this_box_are_listed(tmp_path: Path) -> None:
    make_model(tmp_path / "tiny")
    make_model(tmp_path / "pickled", "pytorch_model.bin")
    (tmp_path / "not a model").mkdir()
    (tmp_path / "file").write_text("")
    found = [m.id for m in list_models(Settings(models_root=tmp_path))]
    assert [i for i in found if i.startswith("local/")] == ["local/tiny"]
    assert list_models(Settings(models_root=tmp_path, model_allow="other/*")) == []


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("local/pickled", "pickle"),
        ("local/absent", "no local model"),
        ("local/empty", r"holds no \*.safetensors"),
        ("local/broken", "can't be read"),
        ("bundled/other", f"bundled one is {BUNDLED_MODEL}"),
        ("evil/model", "not allowed"),
    ],
)
def test_a_model_that_cannot_be_used_is_refused_with_the_reason(
    tmp_path: Path, model: str, message: str
) -> None:
    make_model(tmp_path / "pickled", "pytorch_model.bin")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text("{}")
    make_model(tmp_path / "broken")
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"\xff" * 16)
    settings = Settings(models_root=tmp_path, model_allow="local/*,bundled/*")
    with pytest.raises(InvalidRequest, match=message) as caught:
        find_model(settings, model)
    assert caught.value.param == "model"


def test_without_a_models_root_there_are_no_local_models() -> None:
    with pytest.raises(InvalidRequest, match="TUNEYARD_MODELS_ROOT"):
        find_model(Settings(), "local/x")


@pytest.mark.parametrize(
    ("spec", "param"),
    [
        ({"max_samples": 1001}, "max_samples"),
        ({"max_seq_length": 5000}, "max_seq_length"),
        ({"max_seq_length": 2049}, "max_seq_length"),
        (
            {"training": {"per_device_train_batch_size": 64, "gradient_accumulation_steps": 3}},
            "training.gradient_accumulation_steps",
        ),
        ({"lora": {"target_modules": ["q_proj", "z_proj"]}}, "lora.target_modules"),
        ({"dataset": {"source": "hub", "id": "other/data"}}, "dataset.id"),
        ({"validation_dataset": {"source": "hub", "id": "other/data"}}, "validation_dataset.id"),
        ({"priority": "high"}, "priority"),
    ],
)
def test_the_servers_limits_name_the_field(spec: dict[str, Any], param: str) -> None:
    settings = Settings(
        max_samples=1000, max_seq_length=4096, max_effective_batch=128, dataset_allow="glaiveai/*"
    )
    model = ModelInfo("local/x", "local", context_length=2048, modules=frozenset({"q_proj", "v_proj"}))
    base = {"max_seq_length": 2048, "lora": {"target_modules": ["q_proj"]}}
    check_spec(JobSpec.from_json(base), settings, model, admin=False)
    with pytest.raises(InvalidRequest) as caught:
        check_spec(JobSpec.from_json(base | spec), settings, model, admin=False)
    assert caught.value.param == param


def test_an_admin_may_post_high_priority_and_unknown_models_are_not_judged() -> None:
    spec = JobSpec.from_json({"priority": "high", "lora": {"target_modules": ["anything"]}})
    check_spec(spec, Settings(), ModelInfo("a/b", "hub"), admin=True)


def test_a_plan_takes_the_gpu_and_keeps_the_effective_batch() -> None:
    spec = JobSpec.from_json({})
    assert make_plan(spec, []) is None
    on_cpu, on_gpu = make_plan(spec, [CPU]), make_plan(spec, [CPU, GPU])
    assert on_cpu is not None
    assert on_gpu is not None
    assert (on_cpu.device, on_cpu.precision) == ("cpu", "fp32")
    assert (on_gpu.device, on_gpu.precision) == ("cuda", "bf16")
    assert on_gpu.micro_batch * on_gpu.accumulation == 8


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
    spec = JobSpec.from_json({"max_seq_length": 1000, "exports": ["merged_16bit", "gguf:q8_0"]})
    model = ModelInfo("local/x", "local", parameters=1_000_000)
    unknown = estimate(spec, ModelInfo("a/b", "hub"), None, None)
    assert {k for k, v in unknown.items() if v is None} == {
        "plan", "tokens", "steps", "seconds", "peak_memory_bytes", "disk_bytes",
    }  # fmt: skip
    known = estimate(spec, model, {"rows_used": 100, "characters": 360_000}, make_plan(spec, [CPU]))
    assert known["tokens"] == 100_000
    assert known["steps"] == 39
    assert known["disk_bytes"] == 3_062_500
    for field, value in (("max_samples", 50), ("validation_fraction", 0.5)):
        half = JobSpec.from_json({field: value})
        assert estimate(half, model, {"rows_used": 100, "characters": 360_000}, None)["tokens"] == 50_000

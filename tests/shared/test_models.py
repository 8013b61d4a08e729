"""What is known of models without loading them, and the server's limits on a spec."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from shared.errors import InvalidRequest
from shared.models import ModelInfo, find_model, list_models
from shared.policy import check_spec
from shared.settings import Settings
from shared.shape import NEMOTRON_NANO_4B, SMOLLM2_135M, ModelShape
from shared.spec import BUNDLED_MODEL, DEFAULT_MODEL, JobSpec


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
        ("local/list", "config.json holds no JSON object"),
        ("local/number", "config.json holds no JSON object"),
        ("local/deep", "can't be read"),
        ("local/headless", "describes no tensors"),
        ("local/shapeless", "describes no tensors"),
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
    for name, config in (("list", "[]"), ("number", "7"), ("deep", "[" * 100_000)):
        (make_model(tmp_path / name) / "config.json").write_text(config)
    for name, header in (
        ("headless", b"[]"),
        ("shapeless", b'{"model.layers.0.q_proj.weight": {"shape": 7}}'),
    ):
        file = make_model(tmp_path / name) / "model.safetensors"
        file.write_bytes(struct.pack("<Q", len(header)) + header)
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
    check_spec(JobSpec.from_json(base), settings, model, high=False)
    with pytest.raises(InvalidRequest) as caught:
        check_spec(JobSpec.from_json(base | spec), settings, model, high=False)
    assert caught.value.param == param


def test_an_admin_may_post_high_priority_and_unknown_models_are_not_judged() -> None:
    spec = JobSpec.from_json({"priority": "high", "lora": {"target_modules": ["anything"]}})
    check_spec(spec, Settings(), ModelInfo("a/b", "hub"), high=True)


QWEN = {
    "model_type": "qwen2", "hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14,
    "num_key_value_heads": 2, "intermediate_size": 4864, "vocab_size": 151936, "tie_word_embeddings": True,
    "max_position_embeddings": 32768,
}  # fmt: skip


def test_a_config_tells_a_models_size() -> None:
    shape = ModelShape.from_config(QWEN)
    assert shape is not None
    # The published model counts 494,032,768 with the biases of its queries, keys and values.
    assert shape.parameters == pytest.approx(494_032_768, rel=1e-3)
    assert (shape.head_dim, shape.keys, shape.context_length) == (64, 128, 32768)
    assert not shape.attention_dropout
    assert not shape.quantized
    odd = ModelShape.from_config(
        QWEN | {"attention_dropout": 0.1, "quantization_config": {"quant_method": "fp8"}}
    )
    assert odd == replace(shape, attention_dropout=True, quantized=True)
    assert ModelShape.from_json(shape.to_json()) == shape
    assert NEMOTRON_NANO_4B.parameters == 4_512_746_496
    assert NEMOTRON_NANO_4B.adapter_parameters(16, NEMOTRON_NANO_4B.linears) == 30_408_704


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": None},
        {"num_hidden_layers": None},
        {"hidden_size": "896"},
        {"hidden_size": True},
        {"vocab_size": 10**12},
        {"intermediate_size": -1},
        {"num_local_experts": 8},
        {"text_config": {"hidden_size": 896}},
    ],
)
def test_a_config_that_tells_no_cost_gives_no_shape(changes: dict[str, Any]) -> None:
    assert ModelShape.from_config(QWEN | changes) is None


def test_the_bundled_and_the_default_model_are_known_without_network(tmp_path: Path) -> None:
    for model_id, shape in ((BUNDLED_MODEL, SMOLLM2_135M), (DEFAULT_MODEL, NEMOTRON_NANO_4B)):
        info = find_model(Settings(), model_id)
        assert (info.shape, info.parameters) == (shape, shape.parameters)
        assert info.context_length == shape.context_length
    assert find_model(Settings(), "somebody/else").shape is None
    folder = make_model(tmp_path / "tiny")
    (folder / "config.json").write_text(json.dumps(QWEN))
    local = find_model(Settings(models_root=tmp_path), "local/tiny")
    assert local.shape == ModelShape.from_config(QWEN)
    # The files were counted.
    assert local.parameters == 800 + 64 + 128 + 8


def test_a_hub_models_context_limits_the_sequence() -> None:
    shape = ModelShape.from_config(QWEN)
    assert shape is not None
    model = ModelInfo("a/b", "hub").shaped(shape)
    check_spec(JobSpec.from_json({"max_seq_length": 32768}), Settings(), model, high=False)
    with pytest.raises(InvalidRequest, match="the context of a/b") as caught:
        check_spec(JobSpec.from_json({"max_seq_length": 32769}), Settings(), model, high=False)
    assert caught.value.param == "max_seq_length"

"""The Unsloth engine without Unsloth: what it is asked for, and what is read back of it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import peft
import pytest
import torch
import transformers

from shared.errors import JobFailure
from shared.spec import LoraSpec
from tests.worker.training.samples import make_spec, plan_for
from worker.training.collate import FlatCollator, PaddedCollator
from worker.training.engines import unsloth
from worker.training.models import ResolvedModel

pytestmark = pytest.mark.train

LORA = {"r": 5, "alpha": 7, "dropout": 0.25, "target_modules": ["q_proj", "up_proj"], "use_rslora": True}


class FastLanguageModel:
    """Notes what it is given; its models are transformers' own."""

    loaded: dict[str, Any]
    adapted: dict[str, Any]
    error: Exception | None = None

    @classmethod
    def from_pretrained(cls, **given: Any) -> tuple[Any, None]:
        cls.loaded = given
        if cls.error is not None:
            raise cls.error
        return transformers.AutoModelForCausalLM.from_pretrained(given["model_name"]), None

    @classmethod
    def get_peft_model(cls, base: Any, **given: Any) -> Any:
        cls.adapted = given
        names = ("r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "bias")
        return peft.get_peft_model(base, peft.LoraConfig(**{name: given[name] for name in names}))


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> type[FastLanguageModel]:
    class Fast(FastLanguageModel):
        pass

    monkeypatch.setitem(sys.modules, "unsloth", package("unsloth", FastLanguageModel=Fast))
    return Fast


def package(name: str, **content: Any) -> ModuleType:
    made = ModuleType(name)
    vars(made).update(content)
    return made


def model_of(folder: Path) -> ResolvedModel:
    return ResolvedModel(id="local/tiny", path=folder, config={"model_type": "llama"})


def test_as_it_is_imported_the_gpu_stays_unopened_and_its_streams_are_true_afterwards(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def true(index: int) -> int:
        return 7 + index

    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", true, raising=False)
    for name in ("UNSLOTH_DISABLE_STATISTICS", "UNSLOTH_MOE_BACKEND"):
        monkeypatch.setenv(name, "")
    # As Unsloth's kernels do: ask once, and keep the function.
    (tmp_path / "unsloth.py").write_text(
        "import os, torch\n"
        "stream = torch._C._cuda_getCurrentRawStream\n"
        "noted = stream(1)\n"
        "told = {name: value for name, value in os.environ.items() if name.startswith('UNSLOTH_')}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "unsloth", package("unsloth"))
    del sys.modules["unsloth"]
    unsloth.import_stack()
    found: Any = sys.modules["unsloth"]
    assert found.noted == 0
    assert torch._C._cuda_getCurrentRawStream is true
    assert found.stream(1) == 8
    # The backend that needs no trying out on the GPU.
    assert found.told["UNSLOTH_MOE_BACKEND"] == "native_torch"
    assert found.told["UNSLOTH_DISABLE_STATISTICS"] == "1"


@pytest.mark.parametrize(
    ("quantization", "checkpointing", "four_bit", "asked"),
    [("4bit", "all", True, "unsloth"), ("none", "none", False, False)],
)
def test_every_field_of_lora_and_of_the_plan_reaches_unsloth(
    fast: type[FastLanguageModel],
    tiny_model: Path,
    quantization: str,
    checkpointing: str,
    four_bit: bool,
    asked: Any,
) -> None:
    assert set(LORA) == set(LoraSpec.model_fields)
    spec = make_spec({"seed": 11}, lora=LORA)
    plan = plan_for(spec, engine="unsloth", quantization=quantization, gradient_checkpointing=checkpointing)
    model = unsloth.load_model(spec, plan, model_of(tiny_model))
    assert fast.loaded["load_in_4bit"] is four_bit
    assert fast.loaded["use_gradient_checkpointing"] == fast.adapted["use_gradient_checkpointing"] == asked
    # Nothing is downloaded, and no model's own code is run.
    assert (fast.loaded["local_files_only"], fast.loaded["trust_remote_code"]) == (True, False)
    assert fast.loaded["max_seq_length"] == fast.adapted["max_seq_length"] == spec.max_seq_length
    names = ("r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora")
    assert {name: fast.adapted[name] for name in names} == dict(zip(names, LORA.values(), strict=True))
    assert (fast.adapted["bias"], fast.adapted["random_state"]) == ("none", 11)
    config = model.peft_config["default"]
    assert (config.r, config.target_modules) == (5, {"q_proj", "up_proj"})


def test_a_model_that_unsloth_does_not_take_is_said_to_be_one(
    fast: type[FastLanguageModel], tiny_model: Path
) -> None:
    fast.error = NotImplementedError("Unsloth: no such architecture")
    spec = make_spec()
    with pytest.raises(JobFailure, match="no such architecture") as failed:
        unsloth.load_model(spec, plan_for(spec, engine="unsloth"), model_of(tiny_model))
    assert failed.value.code == "model_unavailable"
    assert "reference" in failed.value.advice


def backends(varlen: Callable[..., Any] | None, packed: str, padded: str) -> ModuleType:
    def select_attention_backend(*, use_varlen: bool) -> str:
        return packed if use_varlen else padded

    return package(
        "attention_dispatch",
        _TORCH_VARLEN_ATTN=varlen,
        select_attention_backend=select_attention_backend,
    )


@pytest.mark.parametrize(
    ("own", "varlen", "packing", "attention", "variable_length"),
    [
        (True, print, True, "sdpa", True),
        (True, None, True, "xformers", True),
        (True, None, True, "sdpa", False),
        (True, print, False, "flash_dense", True),
        # Whatever kernels Unsloth has, transformers' attention ran.
        (False, print, True, "flash_varlen", False),
        (False, print, False, "flash_dense", False),
    ],
)
def test_what_ran_is_read_back(
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    own: bool,
    varlen: Callable[..., Any] | None,
    packing: bool,
    attention: str,
    variable_length: bool,
) -> None:
    used = backends(varlen, attention if packing else "none", "none" if packing else attention)
    for name, module in (
        ("unsloth", package("unsloth")),
        ("unsloth.utils", package("unsloth.utils", attention_dispatch=used)),
    ):
        monkeypatch.setitem(sys.modules, name, module)
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny_model)

    def fast_forward() -> None:
        """Known by its module."""

    def apply_lora_qkv() -> None:
        """By its name."""

    if own:
        fast_forward.__module__ = "unsloth.models.llama"
        monkeypatch.setattr(type(base.model.layers[0].self_attn), "forward", fast_forward)

    # The second layer is as transformers has it.
    base.model.layers[0].self_attn.apply_qkv = apply_lora_qkv
    trainer = SimpleNamespace(
        model=SimpleNamespace(get_base_model=lambda: base),
        data_collator=(FlatCollator if packing else PaddedCollator)(0),
        layer_calls={"layer": 4, "model": 2},
    )
    found = unsloth.read_back(trainer)
    assert found == {
        "attention": attention if own else "sdpa",
        "own_attention": own,
        "variable_length": variable_length,
        "gradient_checkpointing": "all",
        "layers": 2,
        "fused_layers": 1,
    }
    said = unsloth.shortfalls(found | {"packing": packing})
    assert "1 of 2 layers" in said[-1]
    assert (len(said) == 2) is (not own or (packing and not variable_length))
    assert ("left attention to transformers (sdpa)" in said[0]) is not own

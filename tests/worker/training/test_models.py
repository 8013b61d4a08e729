"""Finding and loading models: what is refused, and how it is said."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import httpx
import huggingface_hub
import pytest
import torch
import transformers
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from safetensors.torch import load_file, save_file

from shared.errors import JobFailure
from shared.lifecycle import FailureCode
from tests.worker.training.samples import Running, make_spec, plan_for
from worker.training.engines.reference import load_base, load_model
from worker.training.models import ResolvedModel, load_tokenizer, resolve_model
from worker.training.pipeline import check_length
from worker.training.workdir import Workdir

pytestmark = pytest.mark.train


def resolve(tmp_path: Path, model: str, folder: Path | None = None) -> ResolvedModel:
    spec = make_spec(model=model)
    return resolve_model(spec, Workdir(tmp_path, tmp_path / "cache", model_dir=folder), Running())


def refusal(tmp_path: Path, model: str, folder: Path | None = None) -> JobFailure:
    with pytest.raises(JobFailure) as caught:
        resolve(tmp_path, model, folder)
    assert caught.value.code == FailureCode.MODEL_UNAVAILABLE
    assert caught.value.advice
    return caught.value


def test_a_local_model_is_found_with_its_licence(tmp_path: Path, tiny_model: Path) -> None:
    folder = tmp_path / "licensed"
    shutil.copytree(tiny_model, folder)
    (folder / "README.md").write_text("---\nlanguage: en\nlicense: 'apache-2.0'\n---\n# Tiny\n")
    model = resolve(tmp_path, "local/licensed", folder)
    assert model.license == "apache-2.0"
    assert model.context_length == 2048
    assert model.revision is None


def test_pickle_weights_are_refused(tmp_path: Path, tiny_model: Path) -> None:
    folder = tmp_path / "pickled"
    shutil.copytree(tiny_model, folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "pickle" in refusal(tmp_path, "local/pickled", folder).message


def test_a_folder_without_weights_is_refused(tmp_path: Path, tiny_model: Path) -> None:
    folder = tmp_path / "bare"
    shutil.copytree(tiny_model, folder)
    (folder / "model.safetensors").unlink()
    assert "safetensors" in refusal(tmp_path, "local/bare", folder).message


@pytest.mark.parametrize("model_type", ["llama", "homegrown"])
def test_code_that_a_model_brings_is_never_run(tmp_path: Path, tiny_model: Path, model_type: str) -> None:
    folder = tmp_path / "coded"
    shutil.copytree(tiny_model, folder)
    trace = tmp_path / "it-ran"
    (folder / "modeling.py").write_text(f"open({str(trace)!r}, 'w').close()\nclass Own: pass\n")
    config = json.loads((folder / "config.json").read_text())
    config["model_type"] = model_type
    config["auto_map"] = {"AutoConfig": "modeling.Own", "AutoModelForCausalLM": "modeling.Own"}
    (folder / "config.json").write_text(json.dumps(config))
    model = resolve(tmp_path, "local/coded", folder)
    if model_type == "llama":
        assert type(load_base(model, torch.float32)) is transformers.LlamaForCausalLM
    else:
        with pytest.raises(JobFailure) as caught:
            load_base(model, torch.float32)
        assert caught.value.code == FailureCode.MODEL_UNAVAILABLE
    assert not trace.exists()


def test_a_model_that_lacks_some_weights_is_refused(tmp_path: Path, tiny_model: Path) -> None:
    folder = tmp_path / "gappy"
    shutil.copytree(tiny_model, folder)
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        JobFailure, match=r"lacks 1 of its weights, among them model\.layers\.1\.mlp\.up_proj"
    ):
        load_base(resolve(tmp_path, "local/gappy", folder), torch.float32)


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_config_that_can_not_be_read_is_refused(tmp_path: Path, tiny_model: Path, text: str) -> None:
    folder = tmp_path / "odd"
    shutil.copytree(tiny_model, folder)
    (folder / "config.json").write_text(text)
    assert "config.json" in refusal(tmp_path, "local/odd", folder).message


def test_weights_that_are_cut_off_are_refused(tmp_path: Path, tiny_model: Path) -> None:
    folder = tmp_path / "cut"
    shutil.copytree(tiny_model, folder)
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    spec = make_spec()
    with pytest.raises(JobFailure) as caught:
        load_model(spec, plan_for(spec), resolve(tmp_path, "local/cut", folder))
    assert caught.value.code == FailureCode.MODEL_UNAVAILABLE


def test_a_folder_without_tokenizer_is_refused(tmp_path: Path, tiny_model: Path) -> None:
    folder = tmp_path / "mute"
    shutil.copytree(tiny_model, folder)
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(JobFailure) as caught:
        load_tokenizer(resolve(tmp_path, "local/mute", folder))
    assert caught.value.code == FailureCode.MODEL_UNAVAILABLE


def test_target_modules_that_the_model_lacks_are_named(tmp_path: Path, tiny_model: Path) -> None:
    spec = make_spec(lora={"target_modules": ["q_proj", "qkv_proj", "proj", "lm_head"]})
    with pytest.raises(JobFailure) as caught:
        load_model(spec, plan_for(spec), resolve(tmp_path, "local/tiny", tiny_model))
    assert "no module called qkv_proj, proj, lm_head." in caught.value.message
    assert caught.value.advice.endswith(
        "those it has: down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj."
    )


def test_a_lora_is_put_where_and_as_the_spec_says(tmp_path: Path, tiny_model: Path) -> None:
    spec = make_spec(
        lora={
            "r": 4,
            "alpha": 12,
            "dropout": 0.1,
            "target_modules": ["q_proj", "down_proj"],
            "use_rslora": True,
        }
    )
    model = load_model(spec, plan_for(spec), resolve(tmp_path, "local/tiny", tiny_model))
    config = model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout, config.use_rslora) == (4, 12, 0.1, True)
    adapted = {
        name.split(".lora_")[0].rsplit(".", 1)[-1] for name, _ in model.named_parameters() if "lora_" in name
    }
    assert adapted == {"q_proj", "down_proj"}
    assert all(p.requires_grad == ("lora_" in name) for name, p in model.named_parameters())


def test_rows_longer_than_the_context_are_refused(tmp_path: Path, tiny_model: Path) -> None:
    model = resolve(tmp_path, "local/tiny", tiny_model)
    check_length(make_spec(max_seq_length=2048), model)
    with pytest.raises(JobFailure) as caught:
        check_length(make_spec(max_seq_length=2049), model)
    assert "2048" in caught.value.message


def _answers(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def raise_it(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", raise_it)


def _hub_error(kind: type[Exception], status: int) -> Exception:
    request = httpx.Request("GET", "https://huggingface.co/api/models/acme/model")
    return kind("refused", response=httpx.Response(status, request=request))


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (httpx.ConnectError("no route"), "could not be reached"),
        (httpx.ReadTimeout("slow"), "could not be reached"),
        (_hub_error(GatedRepoError, 403), "gated"),
        (_hub_error(RepositoryNotFoundError, 404), "no model acme/model"),
    ],
)
def test_what_the_hub_refuses_is_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, said: str
) -> None:
    _answers(monkeypatch, error)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    assert said in refusal(tmp_path, "acme/model").message


def test_a_model_without_safetensors_on_the_hub_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = huggingface_hub.ModelInfo(
        id="acme/model",
        sha="0" * 40,
        siblings=[{"rfilename": "pytorch_model.bin"}, {"rfilename": "config.json"}],
    )
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: info)
    assert "safetensors" in refusal(tmp_path, "acme/model").message


def test_a_model_downloaded_before_needs_no_network(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "a" * 40
    repository = tmp_path / "hub" / "models--acme--model"
    shutil.copytree(tiny_model, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    _answers(monkeypatch, httpx.ConnectError("no route"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    model = resolve(tmp_path, "acme/model")
    assert model.revision == commit
    assert model.complete

"""Models of types that the reference engine has not been tried with: what it tries out before it trains."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from shared.errors import JobFailure
from tests.worker.training.samples import make_spec, new_workdir, run_job
from worker.training import collate
from worker.training.collate import FlatCollator
from worker.training.engines import reference

pytestmark = pytest.mark.train

SMALL = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 1024,
}  # fmt: skip
# Type: what its config has beside, and modules to adapt. Masks without position ids, a convolution along the
# row, a state along the row, experts, a window, two factors on the logits.
LEAKING: dict[str, tuple[dict[str, Any], list[str]]] = {
    "opt": ({"ffn_dim": 128, "word_embed_proj_dim": 64}, ["q_proj", "v_proj"]),
    "lfm2": ({"full_attn_idxs": [1]}, ["q_proj", "v_proj"]),
    "mamba2": ({"num_heads": 8, "head_dim": 16, "n_groups": 1, "state_size": 8}, ["in_proj"]),
}
RIGHT: dict[str, tuple[dict[str, Any], list[str]]] = {
    "mixtral": ({"num_local_experts": 4}, ["q_proj", "v_proj"]),
    "gemma2": ({"sliding_window": 8, "head_dim": 16, "query_pre_attn_scalar": 16}, ["q_proj"]),
    "granite": ({"logits_scaling": 8.0}, ["q_proj", "down_proj"]),
    "cohere": ({"logit_scale": 0.25}, ["q_proj", "down_proj"]),
}


def make_model(folder: Path, source: Path, kind: str, more: dict[str, Any]) -> Path:
    """A random model of this type, with the tokenizer of another."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    config = transformers.CONFIG_MAPPING[kind](
        **SMALL, **more, vocab_size=len(tokenizer), pad_token_id=0, bos_token_id=1, eos_token_id=2
    )
    transformers.set_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def train(folder: Path, model: Path, modules: list[str], *, packing: bool = True) -> float:
    """The loss of the first step."""
    spec = make_spec({"max_steps": 1}, lora={"target_modules": modules}, packing=packing, max_seq_length=256)
    shutil.rmtree(folder / "attempt", ignore_errors=True)
    return float(run_job(spec, new_workdir(folder, model)).sink.rows[0]["loss"] or 0)


@pytest.mark.parametrize("kind", LEAKING)
def test_a_model_in_which_packed_documents_see_each_other_is_refused(
    tmp_path: Path, tiny_model: Path, kind: str
) -> None:
    more, modules = LEAKING[kind]
    model = make_model(tmp_path / "model", tiny_model, kind, more)
    with pytest.raises(JobFailure, match=rf"see each other in local/tiny \(type {kind}\)") as caught:
        train(tmp_path, model, modules)
    assert caught.value.code == "model_unavailable"
    assert "packing to false" in caught.value.advice
    assert train(tmp_path, model, modules, packing=False) > 0


@pytest.mark.parametrize("kind", RIGHT)
def test_other_types_are_trained_with_the_loss_of_their_own_logits(
    tmp_path: Path, tiny_model: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    more, modules = RIGHT[kind]
    model = make_model(tmp_path / "model", tiny_model, kind, more)
    told: list[dict[str, torch.Tensor]] = []

    class Collator(FlatCollator):
        def __call__(self, rows: Any) -> dict[str, torch.Tensor]:
            told.append(super().__call__(rows))
            return dict(told[-1])

    monkeypatch.setattr(collate, "FlatCollator", Collator)
    loss = train(tmp_path, model, modules)
    batch = {name: told[-1][name] for name in ("input_ids", "position_ids", "labels")}
    plain = transformers.AutoModelForCausalLM.from_pretrained(model).train()
    # TRL adds a little for the balance of experts.
    rel = 1e-2 if kind == "mixtral" else 1e-3
    assert loss == pytest.approx(plain(**batch, use_cache=False).loss.item(), rel=rel)


def test_a_loss_that_is_not_that_of_the_logits_is_refused(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = reference.load_model

    def load_model(*arguments: Any) -> Any:
        loaded = load(*arguments)
        # As a model that scales its logits by a name that nobody knows.
        loaded.get_base_model().config.logit_scale = 3.0
        return loaded

    monkeypatch.setattr(reference, "load_model", load_model)
    with pytest.raises(JobFailure, match="would be computed wrongly"):
        train(tmp_path, tiny_model, ["q_proj"])

"""The merge from file to file: PEFT's own result, for every kind of base, in bounded memory."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from shared.errors import JobFailure, JobStopped
from shared.lifecycle import FailureCode
from shared.spec import TARGET_MODULES
from tests.worker.training.samples import Running
from tests.worker.training.warm import Popen
from worker.training.exports import merged
from worker.training.exports.merged import check_mergeable, merge_adapter, open_base
from worker.training.models import ResolvedModel

pytestmark = pytest.mark.train

SIZES = {
    "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 96, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 300, "max_position_embeddings": 128, "pad_token_id": 0,
}  # fmt: skip


def resolved(folder: Path) -> ResolvedModel:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return ResolvedModel("local/base", folder, config=config)


def adapt(base: Any, folder: Path, targets: tuple[str, ...], **lora: Any) -> None:
    """A LoRA that moves the model, saved."""
    model = peft.get_peft_model(
        base, peft.LoraConfig(r=4, lora_alpha=12, target_modules=list(targets), **lora)
    )
    for name, weight in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.2)
    model.save_pretrained(folder, save_embedding_layers=False)


FUSED = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")


@pytest.mark.parametrize(
    ("config", "dtype", "targets", "lora"),
    [
        (transformers.LlamaConfig(**SIZES, tie_word_embeddings=True), torch.bfloat16, TARGET_MODULES, {}),
        (transformers.LlamaConfig(**SIZES), torch.float32, ("q_proj", "down_proj"), {"use_rslora": True}),
        (
            transformers.LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
            torch.float16,
            TARGET_MODULES,
            {},
        ),
        (transformers.Qwen2Config(**SIZES), torch.bfloat16, TARGET_MODULES, {}),
        (transformers.Phi3Config(**SIZES), torch.bfloat16, FUSED, {"use_rslora": True}),
    ],
    ids=["tied", "float32", "biases", "qwen2", "fused"],
)
def test_the_merge_is_pefts_own(
    tmp_path: Path,
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    config: Any,
    dtype: torch.dtype,
    targets: tuple[str, ...],
    lora: dict[str, Any],
) -> None:
    monkeypatch.setattr(merged, "SHARD_BYTES", 60_000)
    transformers.set_seed(1)
    base = transformers.AutoModelForCausalLM.from_config(config).to(dtype)
    base.save_pretrained(tmp_path / "base", max_shard_size="100KB")
    adapt(base, tmp_path / "adapter", targets, **lora)
    model = resolved(tmp_path / "base")
    check_mergeable(model, open_base(model), targets)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model)
    merge_adapter(model, tmp_path / "adapter", tokenizer, tmp_path / "merged", Running())

    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        before = plain(ids).logits
    wanted = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter").merge_and_unload()
    half = torch.float16 if dtype == torch.float16 else torch.bfloat16
    found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    assert found.dtype == half
    assert len(list((tmp_path / "merged").glob("*.safetensors"))) > 1
    found_state = found.state_dict()
    for name, weight in wanted.state_dict().items():
        torch.testing.assert_close(found_state[name], weight.to(half), rtol=2**-7, atol=1e-6)
    with torch.no_grad():
        after, exact = found.to(torch.float32)(ids).logits, wanted(ids).logits
    # What is left is the rounding to 16 bits.
    assert (after - exact).abs().max() < 0.05 * (exact - before).abs().max()


def test_a_stop_ends_the_merge(tmp_path: Path, tiny_model: Path) -> None:
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny_model)
    adapt(base, tmp_path / "adapter", ("q_proj",))
    control = Running()
    control.stop = True
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model)
    with pytest.raises(JobStopped):
        merge_adapter(resolved(tiny_model), tmp_path / "adapter", tokenizer, tmp_path / "out", control)


def test_quantised_files_are_refused_before_training(tmp_path: Path, tiny_model: Path) -> None:
    folder = tmp_path / "quantised"
    shutil.copytree(tiny_model, folder)
    config = json.loads((folder / "config.json").read_text())
    model = ResolvedModel("local/base", folder, config=config | {"quantization_config": {"bits": 4}})
    with pytest.raises(JobFailure, match="quantised already") as caught:
        check_mergeable(model, open_base(model), TARGET_MODULES)
    assert caught.value.code == FailureCode.EXPORT_FAILED
    weights = load_file(folder / "model.safetensors")
    odd = {n: w.to(torch.float8_e4m3fn) if "q_proj" in n else w for n, w in weights.items()}
    save_file(odd, folder / "model.safetensors")
    with pytest.raises(JobFailure, match="F8_E4M3"):
        check_mergeable(resolved(folder), open_base(resolved(folder)), TARGET_MODULES)


def test_a_weight_that_the_files_hold_with_others_is_refused(tmp_path: Path, tiny_model: Path) -> None:
    folder = tmp_path / "odd"
    shutil.copytree(tiny_model, folder)
    weights = load_file(folder / "model.safetensors")
    layer = "model.layers.1.self_attn"
    parts = [weights.pop(f"{layer}.{part}_proj.weight") for part in "qkv"]
    save_file(weights | {f"{layer}.qkv.weight": torch.cat(parts)}, folder / "model.safetensors")
    model = resolved(folder)
    with pytest.raises(JobFailure, match=r"layers\.1\.self_attn\.[kqv]_proj together with others"):
        check_mergeable(model, open_base(model), TARGET_MODULES)
    check_mergeable(model, open_base(model), ("down_proj",))


def test_damaged_files_are_the_models_fault(tmp_path: Path, tiny_model: Path) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(tiny_model, folder)
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(JobFailure, match="no such size") as caught:
        open_base(resolved(folder))
    assert caught.value.code == FailureCode.MODEL_UNAVAILABLE
    index = {"weight_map": {"model.norm.weight": "../tiny/model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(JobFailure, match="outside its folder"):
        open_base(resolved(folder))


MERGE = """
import gc, sys
from pathlib import Path
import transformers
from safetensors.torch import load_file
from tests.worker.training.exports.test_merged import resolved
from tests.worker.training.samples import Running
from worker.training.exports.merged import merge_adapter
base, adapter, tiny, tiny_adapter, out = map(Path, sys.argv[1:])
tokenizer = transformers.AutoTokenizer.from_pretrained(tiny)
# What is imported and set up once is no part of the question.
merge_adapter(resolved(tiny), tiny_adapter, tokenizer, out / "tiny", Running())
gc.collect()
def kilobytes(name):
    return int(Path("/proc/self/status").read_text().split(name + ":")[1].split()[0])
before = kilobytes("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
merge_adapter(resolved(base), adapter, tokenizer, out / "merged", Running())
print((kilobytes("VmHWM") - before) * 1024)
"""


def test_memory_stays_bounded_whatever_the_models_size(tmp_path: Path, tiny_model: Path) -> None:
    sizes = SIZES | {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 16}
    sizes["num_hidden_layers"] = 4
    config = transformers.LlamaConfig(**sizes, tie_word_embeddings=True)
    with torch.device("meta"):
        empty = transformers.LlamaForCausalLM(config)
    weights = {n: torch.full(p.shape, 0.01, dtype=torch.bfloat16) for n, p in empty.named_parameters()}
    (tmp_path / "base").mkdir()
    save_file(weights, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(tmp_path / "base")
    transformers_model = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path / "base", dtype=torch.bfloat16
    )
    adapt(transformers_model, tmp_path / "adapter", TARGET_MODULES)
    del transformers_model, weights
    size = (tmp_path / "base" / "model.safetensors").stat().st_size
    adapt(transformers.LlamaForCausalLM.from_pretrained(tiny_model), tmp_path / "small", TARGET_MODULES)
    folders = [tmp_path / "base", tmp_path / "adapter", tiny_model, tmp_path / "small", tmp_path]
    script, said = tmp_path / "merge.py", tmp_path / "said"
    script.write_text(MERGE)
    with said.open("wb") as out:
        assert Popen([sys.executable, "-P", str(script), *map(str, folders)], stdout=out).wait(300) == 0
    more = int(said.read_text().splitlines()[-1])
    # A matrix of this model in float32 is 64 MiB, the whole model in float32 twice its file.
    assert size > 470e6
    assert more < 200e6, f"{more / 1e6:.0f} MB for a model of {size / 1e6:.0f} MB"

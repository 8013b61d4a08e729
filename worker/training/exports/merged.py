"""The adapter merged into its base model, in 16 bits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from shared.events import Artifact, Control
from worker.training.engines.reference import load_base
from worker.training.exports.card import merged_card
from worker.training.exports.files import tar_artifact
from worker.training.exports.manifest import Manifest
from worker.training.models import ResolvedModel

SHARD_SIZE = "5GB"


def merge_adapter(
    model: ResolvedModel, adapter: Path, tokenizer: Any, folder: Path, control: Control
) -> None:
    """Write a folder of safetensors weights, config and tokenizer.

    The base weights are loaded anew as they are stored, on the CPU; each adapted matrix is merged in float32
    and only then rounded to 16 bits (float16 where the base is stored so, bfloat16 otherwise).
    """
    import peft
    import torch

    base = load_base(model, "auto")
    dtype = torch.float16 if base.dtype == torch.float16 else torch.bfloat16
    adapted = peft.PeftModel.from_pretrained(base, adapter)
    with torch.no_grad():
        for module in adapted.modules():
            if not isinstance(module, peft.tuners.lora.LoraLayer):
                continue
            control.check()
            weight = module.get_base_layer().weight
            delta = module.get_delta_weight("default").to(torch.float32)
            weight.data = (weight.data.to(torch.float32) + delta).to(dtype)
    merged = adapted.unload().to(dtype)
    _settle_generation(merged, tokenizer)
    control.check()
    merged.save_pretrained(folder, safe_serialization=True, max_shard_size=SHARD_SIZE)
    tokenizer.save_pretrained(folder)
    _say_whether_bos(tokenizer, folder)


def _settle_generation(merged: Any, tokenizer: Any) -> None:
    """End generation where the trained template ends a turn, and let saving accept the settings."""
    known = merged.generation_config.eos_token_id
    ends = [] if known is None else [known] if isinstance(known, int) else list(known)
    if tokenizer.eos_token_id not in ends:
        merged.config.eos_token_id = tokenizer.eos_token_id
        merged.generation_config.eos_token_id = [tokenizer.eos_token_id, *ends]
    try:
        merged.generation_config.validate(strict=True)
    except ValueError:
        # Temperatures beside `do_sample: false`, as some models ship them: saving refuses such a pair.
        merged.generation_config.do_sample = True


def _say_whether_bos(tokenizer: Any, folder: Path) -> None:
    """Write down that a tokenizer adds no BOS: llama.cpp takes silence for a yes with some vocabularies."""
    if tokenizer.bos_token_id is not None and tokenizer("a").input_ids[0] == tokenizer.bos_token_id:
        return
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config["add_bos_token"] = False
    file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def export_merged(folder: Path, manifest: Manifest, target: Path, control: Control) -> Artifact:
    """`merged_16bit.tar`: the merged model with tokenizer, model card and manifest."""
    card, record = folder / "README.md", folder / "manifest.json"
    card.write_text(merged_card(manifest), encoding="utf-8")
    record.write_text(manifest.to_text(), encoding="utf-8")
    artifact = tar_artifact("merged_16bit.tar", "merged_16bit", folder, target, control)
    # The GGUF converter takes what it finds in the card for the model's metadata.
    card.unlink()
    record.unlink()
    return artifact

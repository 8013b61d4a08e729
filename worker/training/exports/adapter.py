"""The adapter as a PEFT folder, and its tar."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from shared.events import Artifact, Control
from worker.training.exports.card import adapter_card
from worker.training.exports.files import tar_artifact
from worker.training.exports.manifest import Manifest


def save_adapter(model: Any, tokenizer: Any, base_id: str, folder: Path) -> None:
    """Write the PEFT folder that every other export starts from.

    Args:
        model: the trained `peft.PeftModel`.
        tokenizer: with the chat template that was trained.
        base_id: what the adapter's config names as its base, rather than this machine's path.
    """
    # Not "auto": that would ask the hub whether the base model's vocabulary was changed.
    model.save_pretrained(folder, safe_serialization=True, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)
    config_file = folder / "adapter_config.json"
    config = json.loads(config_file.read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = base_id
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    tokenizer.save_pretrained(folder)


def export_adapter(folder: Path, manifest: Manifest, name: str, target: Path, control: Control) -> Artifact:
    """`adapter.tar`: the PEFT folder with tokenizer, model card and manifest."""
    (folder / "README.md").write_text(adapter_card(manifest, name.removesuffix(".tar")), encoding="utf-8")
    (folder / "manifest.json").write_text(manifest.to_text(), encoding="utf-8")
    return tar_artifact(name, "adapter", folder, target, control)

"""The adapter merged into its base model, in 16 bits, straight from file to file.

The base weights are read as they are stored, whatever the model was trained in (4-bit, float8): each adapted
matrix is merged in float32, a few rows at a time, and only then rounded. No model is loaded, on no device.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from shared.errors import JobFailure
from shared.events import Artifact, Control
from shared.lifecycle import FailureCode
from worker.training.exports.card import merged_card
from worker.training.exports.files import tar_artifact
from worker.training.exports.manifest import Manifest
from worker.training.exports.weights import Stored, read_pieces, stored_tensors, torch_dtype, write_shards
from worker.training.models import ResolvedModel, unavailable

SHARD_BYTES = 5_000_000_000
FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
PREFIX = "base_model.model."
ADVICE = (
    "Ask for the adapter alone (exports: adapter) and load it with PEFT, or choose a base model with plain "
    "16-bit weights."
)


@dataclass(frozen=True)
class Base:
    """The base model's files: its tensors by name, and by a module's name which of them is its weight."""

    tensors: dict[str, Stored]
    modules: dict[str, str]

    @property
    def parameters(self) -> int:
        return sum(math.prod(t.shape) for t in self.tensors.values() if t.dtype in FLOATS)

    def adapter_parameters(self, target_modules: tuple[str, ...], r: int) -> int:
        """Weights of a LoRA of rank `r` on these modules."""
        shapes = (
            self.tensors[name].shape for m, name in self.modules.items() if _targeted(m, target_modules)
        )
        return sum(r * sum(shape) for shape in shapes if len(shape) == 2)


def open_base(model: ResolvedModel) -> Base:
    """Look at the base model's files, and at which tensor belongs to which linear module.

    Raises:
        JobFailure: `model_unavailable`: the files are damaged.
    """
    try:
        tensors = stored_tensors(model.path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        unavailable(f"The weights of {model.id} can't be read: {error}", "Choose a complete model.", error)
    return Base(tensors, _modules(model, list(tensors)))


def check_mergeable(model: ResolvedModel, base: Base, target_modules: tuple[str, ...]) -> None:
    """Refuse before training what could not be merged after it.

    Raises:
        JobFailure: `export_failed`: the base's own files are quantised, or hold a module's weight together
            with others.
    """
    if "quantization_config" in model.config:
        _refuse(f"The files of {model.id} are quantised already, and an adapter can't be merged into those.")
    odd = sorted({t.dtype for t in base.tensors.values() if t.dtype.startswith("F")} - FLOATS)
    if odd:
        _refuse(f"{model.id} has weights of type {odd[0]}, which an adapter can't be merged into.")
    wanted = [m for m in _linear_modules(model) if _targeted(m, target_modules)]
    for module in wanted:
        _weight_of(base, model.id, module)


def merge_adapter(
    model: ResolvedModel, adapter: Path, tokenizer: Any, folder: Path, control: Control
) -> None:
    """Write a folder of safetensors weights, config and tokenizer.

    The result has the base's own tensor names, all floats in 16 bits: float16 where most of the base is
    stored so, bfloat16 otherwise.

    Raises:
        JobFailure: `export_failed`: what `check_mergeable` refuses, or an adapter that is no plain LoRA.
    """
    base = open_base(model)
    deltas = _Deltas(adapter)
    changed = {_weight_of(base, model.id, module): module for module in deltas.modules}
    half = sixteen_bit(base)

    def pieces(name: str) -> Iterator[Any]:
        stored = base.tensors[name]
        module = changed.get(name)
        at = 0
        for piece in read_pieces(stored):
            control.check()
            if module is not None:
                piece = deltas.add(module, piece, at)
                at += len(piece)
            yield piece.to(torch_dtype(half)) if stored.dtype in FLOATS else piece

    folder.mkdir(parents=True)
    written = {name: (half if t.dtype in FLOATS else t.dtype, t.shape) for name, t in base.tensors.items()}
    write_shards(folder, written, pieces, SHARD_BYTES)
    write_settings(model, tokenizer, half, folder)


def export_merged(folder: Path, manifest: Manifest, name: str, target: Path, control: Control) -> Artifact:
    """`merged_16bit.tar`: the merged model with tokenizer, model card and manifest."""
    card, record = folder / "README.md", folder / "manifest.json"
    card.write_text(merged_card(manifest, name.removesuffix(".tar")), encoding="utf-8")
    record.write_text(manifest.to_text(), encoding="utf-8")
    artifact = tar_artifact(name, "merged_16bit", folder, target, control)
    # The GGUF converter takes what it finds in the card for the model's metadata.
    card.unlink()
    record.unlink()
    return artifact


def write_settings(model: ResolvedModel, tokenizer: Any, half: str, folder: Path) -> None:
    """All of a model folder but its weights; generation ends where the trained template ends a turn."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(model.path, trust_remote_code=False)
    try:
        generation = transformers.GenerationConfig.from_pretrained(model.path)
    except OSError:
        generation = transformers.GenerationConfig.from_model_config(config)
    known = generation.eos_token_id
    ends = [] if known is None else [known] if isinstance(known, int) else list(known)
    if tokenizer.eos_token_id not in ends:
        config.eos_token_id = tokenizer.eos_token_id
        generation.eos_token_id = [tokenizer.eos_token_id, *ends]
    try:
        generation.validate(strict=True)
    except ValueError:
        # Temperatures beside `do_sample: false`, as some models ship them: saving refuses such a pair.
        generation.do_sample = True
    config.dtype = torch_dtype(half)
    config.save_pretrained(folder)
    generation.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _say_whether_bos(tokenizer, folder)


class _Deltas:
    """What an adapter adds to each weight: scale x B x A, by the module's name in the base model."""

    def __init__(self, folder: Path) -> None:
        from safetensors.torch import load_file

        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        plain = config["peft_type"] == "LORA" and config["bias"] == "none"
        odd = ("use_dora", "fan_in_fan_out", "rank_pattern", "alpha_pattern", "modules_to_save")
        if not plain or any(config.get(name) for name in odd):
            _refuse("The adapter is no plain LoRA.")
        self._alpha = config["lora_alpha"]
        self._root = bool(config.get("use_rslora"))
        self._weights = load_file(folder / "adapter_model.safetensors")
        endings = (".lora_A.weight", ".lora_B.weight")
        unknown = [k for k in self._weights if not (k.startswith(PREFIX) and k.endswith(endings))]
        if unknown:
            _refuse(f"The adapter holds {unknown[0]}, which is no part of a plain LoRA.")
        self.modules = sorted({k.removeprefix(PREFIX).rsplit(".", 2)[0] for k in self._weights})

    def add(self, module: str, rows: Any, at: int) -> Any:
        """Rows `at` and on of the module's weight, adapted, in float32."""
        import torch

        a = self._weights[f"{PREFIX}{module}.lora_A.weight"].to(torch.float32)
        b = self._weights[f"{PREFIX}{module}.lora_B.weight"][at : at + len(rows)].to(torch.float32)
        scale = self._alpha / (math.sqrt(len(a)) if self._root else len(a))
        return rows.to(torch.float32, copy=True).addmm_(b, a, alpha=scale)


def _modules(model: ResolvedModel, stored: list[str]) -> dict[str, str]:
    """Module name -> the stored tensor that is its weight; modules made of several are left out.

    transformers knows under which names a model type's checkpoints have its weights, and which of them it
    takes apart or puts together.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    empty = _empty_model(model)
    transforms = get_model_conversion_mapping(empty)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    state = empty.state_dict()
    found: dict[str, str] = {}
    for name in stored:
        parameter, converted = rename_source_key(name, renamings, converters, empty.base_model_prefix, state)
        if converted is None and parameter in state and parameter.endswith(".weight"):
            found[parameter.removesuffix(".weight")] = name
    return found


def _linear_modules(model: ResolvedModel) -> list[str]:
    """Names of the linear modules inside the layers, as PEFT sees them."""
    import torch

    modules = _empty_model(model).named_modules()
    return [
        n for n, m in modules if isinstance(m, torch.nn.Linear) and any(p.isdigit() for p in n.split("."))
    ]


def _empty_model(model: ResolvedModel) -> Any:
    """The model's modules without any weights."""
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(model.path, trust_remote_code=False)
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def _targeted(module: str, target_modules: tuple[str, ...]) -> bool:
    """As PEFT matches names."""
    return any(module == target or module.endswith(f".{target}") for target in target_modules)


def _weight_of(base: Base, model_id: str, module: str) -> str:
    name = base.modules.get(module)
    if name is None or len(base.tensors[name].shape) != 2:
        _refuse(
            f"The files of {model_id} hold the weight of {module} together with others, where an adapter "
            "can't be merged into it."
        )
    return name


def sixteen_bit(base: Base) -> str:
    """The type that the merged weights will have, as safetensors calls it."""
    halves = sum(t.bytes for t in base.tensors.values() if t.dtype == "F16")
    return "F16" if 2 * halves > sum(t.bytes for t in base.tensors.values()) else "BF16"


def _say_whether_bos(tokenizer: Any, folder: Path) -> None:
    """Write down that a tokenizer adds no BOS: llama.cpp takes silence for a yes with some vocabularies."""
    if tokenizer.bos_token_id is not None and tokenizer("a").input_ids[0] == tokenizer.bos_token_id:
        return
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config["add_bos_token"] = False
    file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _refuse(message: str) -> NoReturn:
    raise JobFailure(FailureCode.EXPORT_FAILED, message, ADVICE)

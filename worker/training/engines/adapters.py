"""Fresh LoRA adapters on a base model: the same ones for every engine."""

from __future__ import annotations

import math
from typing import Any

from shared.errors import JobFailure
from shared.lifecycle import FailureCode
from shared.plan import EngineName, Plan
from shared.planner import not_taken
from shared.shape import ModelKind
from shared.spec import JobSpec
from worker.training.models import ResolvedModel, unavailable


def check_kind(engine: EngineName, model: ResolvedModel) -> None:
    """A model must be of a kind that the engine takes.

    Where the config could not be read when the job was posted nobody could say so.

    Raises:
        JobFailure: `model_unavailable`, with what it does not take.
    """
    if said := not_taken(engine, ModelKind.from_config(model.config)):
        unavailable(
            f"{model.id} can't be trained with the {engine} engine, which {said}",
            "Leave engine and precision on auto.",
        )


def add_adapter(spec: JobSpec, base: Any) -> Any:
    """A `peft.PeftModel` of this base, its adapters in float32 and started from the job's seed.

    Raises:
        JobFailure: `model_unavailable`: the model lacks a target module.
    """
    import peft

    check_target_modules(spec, base)
    lora = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=spec.lora.r,
        lora_alpha=spec.lora.alpha,
        lora_dropout=spec.lora.dropout,
        target_modules=list(spec.lora.target_modules),
        use_rslora=spec.lora.use_rslora,
        bias="none",
    )
    model = peft.get_peft_model(base, lora)
    start_adapter(model, spec.training.seed)
    return model


def start_adapter(model: Any, seed: int) -> None:
    """PEFT's own start (A Kaiming-uniform, B zero), drawn on the CPU so that no engine or device changes it.

    Also seeds what is drawn from here on, so that a run depends on the seed alone.
    """
    import torch
    import transformers

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            if ".lora_A." in name:
                start = torch.empty(weight.shape, dtype=torch.float32)
                torch.nn.init.kaiming_uniform_(start, a=math.sqrt(5), generator=generator)
                weight.copy_(start)
            elif ".lora_B." in name:
                weight.zero_()
    transformers.set_seed(seed)


def checkpoint_layers(base: Any, plan: Plan) -> None:
    """Let the layers that the plan names compute their activations again in the backward pass."""
    if plan.gradient_checkpointing == "none":
        return
    base.gradient_checkpointing_enable({"use_reentrant": False})
    if plan.gradient_checkpointing == "some":
        for number, layer in enumerate(decoder_layers(base)):
            layer.gradient_checkpointing = number % 2 == 0


def checkpointed(base: Any) -> str:
    """What `checkpoint_layers` did, read back from the layers."""
    layers = [getattr(layer, "gradient_checkpointing", False) for layer in decoder_layers(base)]
    return "all" if all(layers) else "some" if any(layers) else "none"


def decoder_layers(base: Any) -> list[Any]:
    """The repeated blocks of a causal language model, in order."""
    return [module for module in base.modules() if type(module).__name__.endswith("DecoderLayer")]


def check_target_modules(spec: JobSpec, base: Any) -> None:
    """Every named target module must match a linear module inside the model's layers.

    The output head is none of them: where it shares its weights with the embeddings, as in many models, a
    LoRA on it could not be merged.

    Raises:
        JobFailure: `model_unavailable`, naming those it lacks and those it has.
    """
    import torch

    linear = [
        name
        for name, module in base.named_modules()
        if isinstance(module, torch.nn.Linear) and any(part.isdigit() for part in name.split("."))
    ]
    missing = [t for t in spec.lora.target_modules if not any(n == t or n.endswith(f".{t}") for n in linear)]
    if missing:
        names = {name.rsplit(".", 1)[-1] for name in linear}
        raise JobFailure(
            FailureCode.MODEL_UNAVAILABLE,
            f"{spec.model} has no module called {', '.join(missing)}.",
            f"Set lora.target_modules to some of those it has: {', '.join(sorted(names))}.",
        )

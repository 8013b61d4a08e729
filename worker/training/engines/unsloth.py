"""The Unsloth engine: the least memory. The one file that imports Unsloth, which `stack` has loaded first."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from shared.plan import Plan
from shared.spec import JobSpec
from worker.training.collate import FlatCollator
from worker.training.engines.adapters import (
    check_kind,
    check_target_modules,
    decoder_layers,
    start_adapter,
)
from worker.training.models import ResolvedModel, unavailable


def import_stack() -> None:
    """Import Unsloth, which must come before transformers and TRL, with its statistics off.

    Left to itself it would open the GPU: to try out products that mixtures of experts alone need, and to note
    each GPU's current stream, which nothing reads. A process in waiting holds nothing of a GPU.
    """
    os.environ["UNSLOTH_DISABLE_STATISTICS"] = "1"
    os.environ["UNSLOTH_MOE_BACKEND"] = "native_torch"
    with _unopened():
        import unsloth  # noqa: F401


@contextmanager
def _unopened() -> Iterator[None]:
    """Within this, the GPU's current stream is the default one, without asking the GPU."""
    import torch

    current = getattr(torch._C, "_cuda_getCurrentRawStream", None)
    if current is None:
        yield
        return
    inside = True
    # Unsloth's kernels keep the function: from then on they are to have the true answer.
    torch._C._cuda_getCurrentRawStream = lambda device: 0 if inside else int(current(device))
    try:
        yield
    finally:
        inside = False
        torch._C._cuda_getCurrentRawStream = current


def load_model(spec: JobSpec, plan: Plan, model: ResolvedModel) -> Any:
    """Unsloth's version of the model, in 4 bits or bfloat16, with fresh adapters.

    Returns:
        a `peft.PeftModel`.

    Raises:
        JobFailure: `model_unavailable`: a type of model that Unsloth has no attention of its own for, weights
            that can't be read, or target modules that the model lacks.
    """
    check_kind("unsloth", model)
    import torch
    from unsloth import FastLanguageModel

    checkpointing: Any = False if plan.gradient_checkpointing == "none" else "unsloth"
    try:
        base, _ = FastLanguageModel.from_pretrained(
            model_name=str(model.path),
            max_seq_length=spec.max_seq_length,
            dtype=torch.bfloat16,
            load_in_4bit=plan.quantization == "4bit",
            local_files_only=True,
            trust_remote_code=False,
            use_gradient_checkpointing=checkpointing,
        )
    except (OSError, ValueError, KeyError, NotImplementedError) as error:
        unavailable(
            f"Unsloth can't load the weights of {model.id}: {error}",
            "Leave engine on auto, set it to reference, or choose another model.",
            error,
        )
    check_target_modules(spec, base)
    adapted = FastLanguageModel.get_peft_model(
        base,
        r=spec.lora.r,
        target_modules=list(spec.lora.target_modules),
        lora_alpha=spec.lora.alpha,
        lora_dropout=spec.lora.dropout,
        bias="none",
        use_rslora=spec.lora.use_rslora,
        use_gradient_checkpointing=checkpointing,
        random_state=spec.training.seed,
        max_seq_length=spec.max_seq_length,
    )
    start_adapter(adapted, spec.training.seed)
    return adapted


def wire(trainer: Any, spec: JobSpec, plan: Plan) -> None:  # noqa: ARG001 - every engine's signature
    """Give the trainer this engine's batches and loss; padded batches stay Unsloth's own."""
    from worker.training.head_loss import learn_through_head

    trainer.layer_calls = _count_calls(trainer.model.get_base_model())
    if not isinstance(trainer.data_collator, FlatCollator):
        return
    trainer.data_collator = FlatCollator(trainer.processing_class.pad_token_id, boundaries=True)

    def decoder_arguments(batch: dict[str, Any]) -> dict[str, Any]:
        return {"packed_seq_lengths": batch["cu_seqlens"].diff().int()}

    learn_through_head(trainer.model.get_base_model(), decoder_arguments)


def read_back(trainer: Any) -> dict[str, Any]:
    """What really ran, of this engine: `fused_layers` have Unsloth's own LoRA kernels.

    `own_attention` is whether it put its attention in, else transformers' ran, as the config names it. Its
    checkpointing Unsloth takes back when training ends: what it did shows in how often a layer ran.
    """
    from unsloth.utils import attention_dispatch

    base = trainer.model.get_base_model()
    layers = decoder_layers(base)
    own = all(map(_attends, layers))
    packed = isinstance(trainer.data_collator, FlatCollator)
    attention = base.config._attn_implementation
    varlen = False
    if own:
        attention = attention_dispatch.select_attention_backend(use_varlen=packed)
        # torch's own is behind "sdpa"; the others have kernels of variable length themselves.
        varlen = attention != "sdpa" or attention_dispatch._TORCH_VARLEN_ATTN is not None
    return {
        "attention": attention,
        "own_attention": own,
        "variable_length": varlen,
        "gradient_checkpointing": "all"
        if trainer.layer_calls["layer"] > trainer.layer_calls["model"]
        else "none",
        "layers": len(layers),
        "fused_layers": sum(map(_is_fused, layers)),
    }


def shortfalls(used: dict[str, Any]) -> list[str]:
    """What the job's log warns of, given what `read_back` found."""
    found = []
    if not used["own_attention"]:
        found.append(
            f"Unsloth left attention to transformers ({used['attention']}): nobody has shown that packed "
            "documents are kept apart then. Train with another engine."
            if used["packing"]
            else f"Unsloth left attention to transformers ({used['attention']}): it was no faster for it."
        )
    elif used["packing"] and not used["variable_length"]:
        found.append(
            "Unsloth found no attention of variable length in this torch: it attended document by document, "
            "at about half the speed."
        )
    if used["fused_layers"] < used["layers"]:
        found.append(
            f"Unsloth put its own LoRA kernels into {used['fused_layers']} of {used['layers']} layers: the "
            "others ran as PEFT has them."
        )
    return found


def _attends(layer: Any) -> bool:
    """Whether Unsloth put in its attention, which it does class by class."""
    forward = getattr(type(getattr(layer, "self_attn", None)), "forward", None)
    return str(getattr(forward, "__module__", "")).partition(".")[0] == "unsloth"


def _is_fused(layer: Any) -> bool:
    """Whether Unsloth put its own LoRA kernel in."""
    attention = getattr(layer, "self_attn", None)
    return "lora" in getattr(getattr(attention, "apply_qkv", None), "__name__", "")


def _count_calls(base: Any) -> dict[str, int]:
    """Counts, from here on, how often the decoder and its first layer run in training."""
    calls = {"model": 0, "layer": 0}

    def counting(name: str) -> Any:
        def count(module: Any, _inputs: Any) -> None:
            calls[name] += int(module.training)

        return count

    base.model.register_forward_pre_hook(counting("model"))
    decoder_layers(base)[0].register_forward_pre_hook(counting("layer"))
    return calls

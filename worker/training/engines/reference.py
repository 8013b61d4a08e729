"""The reference engine: plain transformers and PEFT, on the CPU or any GPU."""

from __future__ import annotations

from typing import Any

from shared.errors import JobFailure
from shared.lifecycle import FailureCode
from shared.plan import Plan
from shared.spec import JobSpec
from worker.training.models import ResolvedModel, unavailable


def load_model(spec: JobSpec, plan: Plan, model: ResolvedModel) -> Any:
    """The base model with fresh LoRA adapters on it, ready for the trainer.

    The base weights are in the plan's precision and frozen; the adapter's are float32.

    Returns:
        a `peft.PeftModel`.

    Raises:
        JobFailure: `model_unavailable`: weights that can't be read, or target modules that the model lacks.
    """
    import peft
    import torch
    import transformers

    base = load_base(model, torch.bfloat16 if plan.precision == "bf16" else torch.float32)
    check_target_modules(spec, base)
    # After loading, so that the adapter's start depends on the seed alone.
    transformers.set_seed(spec.training.seed)
    lora = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=spec.lora.r,
        lora_alpha=spec.lora.alpha,
        lora_dropout=spec.lora.dropout,
        target_modules=list(spec.lora.target_modules),
        use_rslora=spec.lora.use_rslora,
        bias="none",
    )
    if plan.gradient_checkpointing != "none":
        # The frozen embeddings' output needs a gradient, or nothing behind a checkpoint would get one.
        base.enable_input_require_grads()
    return peft.get_peft_model(base.to(plan.device), lora)


def load_base(model: ResolvedModel, dtype: Any) -> Any:
    """The bare model on the CPU.

    Args:
        dtype: a torch dtype, or "auto" for the one that the weights are stored in.

    Raises:
        JobFailure: `model_unavailable`.
    """
    import transformers
    from safetensors import SafetensorError

    advice = "Choose a complete text-generation model, with safetensors weights, that transformers knows."
    try:
        # A model that brings Python code of its own gets transformers' code for its type, or is refused.
        base, loading = transformers.AutoModelForCausalLM.from_pretrained(
            model.path,
            dtype=dtype,
            attn_implementation="sdpa",
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        unavailable(f"The weights of {model.id} can't be loaded: {error}", advice, error)
    if loading["missing_keys"]:
        # transformers would go on with random numbers in their place.
        missing = sorted(loading["missing_keys"])
        unavailable(f"{model.id} lacks {len(missing)} of its weights, among them {missing[0]}.", advice)
    return base


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

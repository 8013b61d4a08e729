"""The reference engine: plain transformers and PEFT, on the CPU or any GPU."""

from __future__ import annotations

from typing import Any

from shared.plan import Plan
from shared.spec import JobSpec
from worker.training.engines.adapters import add_adapter, checkpoint_layers, checkpointed
from worker.training.models import ResolvedModel, unavailable


def load_model(spec: JobSpec, plan: Plan, model: ResolvedModel) -> Any:
    """The base model with fresh LoRA adapters on it, ready for the trainer.

    The base weights are in the plan's precision, or 4-bit (nf4, quantised twice), and frozen; the adapter's
    are float32.

    Returns:
        a `peft.PeftModel`.

    Raises:
        JobFailure: `model_unavailable`: weights that can't be read, or target modules that the model lacks.
    """
    import torch

    dtype = torch.bfloat16 if plan.precision == "bf16" else torch.float32
    device = "cuda:0" if plan.device == "cuda" else "cpu"
    base = load_base(model, dtype, device=device, four_bit=plan.quantization == "4bit")
    if scaling := getattr(base.config, "logits_scaling", None):
        # Granite divides its logits. The loss over chunks knows that as a factor, by another name.
        base.config.logit_scale = 1 / scaling
    checkpoint_layers(base, plan)
    return add_adapter(spec, base)


def load_base(
    model: ResolvedModel,
    dtype: Any,
    *,
    device: str = "cpu",
    four_bit: bool = False,
    attention: str | None = None,
) -> Any:
    """The bare model, its safetensors read straight onto the device.

    Args:
        dtype: a torch dtype, or "auto" for the one that the weights are stored in.
        attention: the name of an implementation that transformers knows or was told of; None: sdpa, or
            eager for a type that has no sdpa.

    Raises:
        JobFailure: `model_unavailable`.
    """
    import transformers
    from safetensors import SafetensorError

    advice = "Choose a complete text-generation model, with safetensors weights, that transformers knows."
    quantization = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    try:
        # A model that brings Python code of its own gets transformers' code for its type, or is refused.
        base, loading = transformers.AutoModelForCausalLM.from_pretrained(
            model.path,
            dtype=dtype,
            device_map={"": device},
            quantization_config=quantization if four_bit else None,
            attn_implementation=attention,
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


def wire(trainer: Any, spec: JobSpec, plan: Plan) -> None:
    """TRL computes the loss of this engine; whether it is right for this model is tried out.

    Raises:
        JobFailure: `model_unavailable`: it isn't, or packed documents would see each other.
    """
    from worker.training.engines.checks import check_model

    check_model(trainer, spec, plan)


def read_back(trainer: Any) -> dict[str, Any]:
    """What really ran, of this engine."""
    base = trainer.model.get_base_model()
    return {"attention": base.config._attn_implementation, "gradient_checkpointing": checkpointed(base)}


def shortfalls(used: dict[str, Any]) -> list[str]:  # noqa: ARG001 - every engine's signature
    """Nothing: there is no faster way that it could miss."""
    return []

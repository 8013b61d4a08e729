"""What of a spec costs memory that it could do without: for refusals, and for who ran out of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from shared.device import DeviceKind
from shared.spec import JobSpec

# Shorter sequences than these, and adapters of a lower rank, save next to nothing.
SHORTEST, LOWEST_RANK = 256, 16
MACHINE_MEMORY_ADVICE = (
    "It was the memory of the worker's machine that ran short, not a GPU's: give the machine more of it, or "
    "run fewer jobs on it at once, then submit it again."
)
EXPORT_MEMORY_ADVICE = (
    "The model is trained and the exports finished before this one are kept. Give the worker's machine more "
    "memory, or submit the job without the merged and GGUF exports."
)


class Saving(NamedTuple):
    """A single change of a spec that takes less memory: its field, what to set it to, the spec with it."""

    field: str
    words: str
    spec: JobSpec


def savings(spec: JobSpec, kind: DeviceKind) -> Iterator[Saving]:
    """Every single change that may save memory on such a device, those that cost the result least first.

    Not a smaller batch: micro-batches are the planner's, at the same effective batch.
    """
    if kind == "cuda":
        yield from _held_otherwise(spec)
    length = spec.max_seq_length
    while (length := length // 2) >= SHORTEST:
        shorter = spec.model_copy(update={"max_seq_length": length})
        yield Saving("max_seq_length", f"max_seq_length {length}", shorter)
    if spec.lora.r > LOWEST_RANK:
        lora = spec.lora.model_copy(update={"r": LOWEST_RANK})
        yield Saving("lora.r", f"lora.r {LOWEST_RANK}", spec.model_copy(update={"lora": lora}))
    if spec.training.optim != "adamw_8bit":
        training = spec.training.model_copy(update={"optim": "adamw_8bit"})
        changed = spec.model_copy(update={"training": training})
        yield Saving("training.optim", "training.optim adamw_8bit", changed)


def memory_advice(spec: JobSpec, kind: DeviceKind) -> str:
    """What to change in a spec that ran out of memory under its smallest plan too."""
    ways: dict[str, str] = {}
    for saving in savings(spec, kind):
        ways.setdefault(saving.field, saving.words)
    larger = "a GPU" if kind == "cuda" else "a machine"
    return (
        "A smaller batch would not help: micro-batches and recomputed activations are chosen by themselves, "
        f"at the same effective batch. Try {', or '.join([*ways.values(), 'a smaller model'])}, or {larger} "
        "with more memory."
    )


def lost_advice(spec: JobSpec | None, kind: DeviceKind) -> str:
    """What to do about a job whose process died again and again; None for a spec of another version."""
    start = (
        "Look at the log's last entries. A job that needs more memory than the machine has ends like this: "
    )
    if spec is None or kind == "cuda":
        return f"{start}give the worker's machine more main memory, or try a smaller model."
    ways = [saving.words for saving in savings(spec, kind) if saving.field == "max_seq_length"][:1]
    training = spec.training
    if training.per_device_train_batch_size > 1:
        ways.insert(
            0,
            "training.per_device_train_batch_size 1 with training.gradient_accumulation_steps "
            f"{training.effective_batch} (the same effective batch)",
        )
    return f"{start}try {', or '.join([*ways, 'a smaller model'])}."


def _held_otherwise(spec: JobSpec) -> Iterator[Saving]:
    """Changes of how a GPU holds the base weights, and of what trains them."""
    if spec.quantization == "none":
        changes = {"quantization": "4bit", "engine": "auto", "precision": "auto"}
        words = "quantization 4bit"
        if spec.engine == "compiled" or spec.precision in ("fp32", "fp8"):
            words += " on auto engine and precision"
        yield Saving("quantization", words, spec.model_copy(update=changes))
    if spec.precision in ("fp32", "fp8"):
        yield Saving("precision", "precision auto", spec.model_copy(update={"precision": "auto"}))
    if spec.engine in ("compiled", "reference"):
        changes = {"engine": "auto"} | ({"precision": "auto"} if spec.precision == "fp8" else {})
        words = "engine auto" + (" and precision auto" if spec.precision == "fp8" else "")
        yield Saving("engine", words, spec.model_copy(update=changes))

"""Whether any device on line can run a spec; if none can, which field is in the way and what would fit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from shared.cost import GIB, memory_needed
from shared.device import Device
from shared.errors import InvalidRequest
from shared.planner import COMPILED_ARCHITECTURES, Candidate, candidates
from shared.shape import ModelShape
from shared.spec import JobSpec

SHORTEST = 256


def check_runnable(spec: JobSpec, shape: ModelShape | None, boxes: Sequence[Sequence[Device]]) -> None:
    """Refuse what no worker on line can run; with none on line nothing is known, and nothing refused.

    Args:
        boxes: the devices of each worker.

    Raises:
        InvalidRequest: `needs_gpu`, `not_available_here` or `does_not_fit`, with what would do.
    """
    devices = [device for box in boxes for device in box]
    if not devices:
        return
    found = _on_any(spec, shape, boxes)
    if not found:
        raise _unavailable(spec, shape, boxes)
    if not any(candidate.fits for candidate in found):
        raise _too_large(spec, shape, boxes, found)


def _on_any(spec: JobSpec, shape: ModelShape | None, boxes: Sequence[Sequence[Device]]) -> list[Candidate]:
    return [candidate for box in boxes for candidate in candidates(spec, shape, box)]


def _unavailable(
    spec: JobSpec, shape: ModelShape | None, boxes: Sequence[Sequence[Device]]
) -> InvalidRequest:
    gpus = [device for box in boxes for device in box if device.kind == "cuda"]
    most = max(sum(device.kind == "cuda" for device in box) for box in boxes)
    if spec.gpus > 1 and most < spec.gpus:
        return _refusal(
            "gpus",
            f"{spec.gpus}: no worker on line has so many GPUs; the most that one has is {most}.",
            code="not_available_here",
        )
    if not gpus:
        field, value = next(_named(spec))
        return _refusal(
            field,
            f"{value} needs a GPU, and the workers on line have none. Leave it on auto, which takes the "
            "reference engine in fp32 on a CPU.",
            code="needs_gpu",
        )
    installed = sorted({engine for device in gpus for engine in device.engines})
    if spec.engine != "auto" and spec.engine not in installed:
        return _refusal(
            "engine",
            f"{spec.engine} is not installed on any worker on line. They have: {', '.join(installed)}.",
            code="not_available_here",
        )
    if spec.engine == "compiled" and shape is not None and shape.model_type not in COMPILED_ARCHITECTURES:
        return _refusal(
            "engine",
            f"compiled does not know models of the type {shape.model_type}. It knows: "
            f"{', '.join(sorted(COMPILED_ARCHITECTURES))}. Leave it on auto.",
            code="not_available_here",
        )
    field, value = next(_named(spec))
    names = ", ".join(sorted({device.name for device in gpus}))
    return _refusal(
        field,
        f"{value} can't be had on the GPUs on line ({names}) with what the job names beside it. Leave it "
        "on auto.",
        code="not_available_here",
    )


def _named(spec: JobSpec) -> Iterator[tuple[str, str]]:
    """What the spec names that not every device has, the most particular first."""
    if spec.precision in ("fp8", "bf16"):
        yield "precision", spec.precision
    if spec.quantization == "4bit":
        yield "quantization", spec.quantization
    if spec.engine != "auto":
        yield "engine", spec.engine
    yield "precision", spec.precision


def _too_large(
    spec: JobSpec, shape: ModelShape | None, boxes: Sequence[Sequence[Device]], found: list[Candidate]
) -> InvalidRequest:
    least = min(candidate.peak or 0 for candidate in found)
    largest = max((c.device for c in found), key=lambda d: d.memory_bytes)
    would: dict[str, str] = {}
    for field, words, changed in _changes(spec):
        # The longest of the shorter sequences alone.
        if field not in would and _fits_any(changed, shape, boxes):
            would[field] = words
    ways = ", or ".join(would.values())
    with_less = f"It would fit with {ways}" if would else "No single change of the spec makes it fit"
    return _refusal(
        next(iter(would), "model"),
        f"No worker on line has the memory for this job: it takes {least / GIB:.1f} GiB at the least, and "
        f"the largest device, {largest.name}, has {largest.memory_bytes / GIB:.1f} GiB. {with_less}; else it "
        f"needs one with {memory_needed(least) / GIB:.0f} GiB, or a smaller model.",
        code="does_not_fit",
    )


def _fits_any(spec: JobSpec, shape: ModelShape | None, boxes: Sequence[Sequence[Device]]) -> bool:
    return any(candidate.fits for candidate in _on_any(spec, shape, boxes))


def _changes(spec: JobSpec) -> Iterator[tuple[str, str, JobSpec]]:
    """Single changes that save memory, as field, words and the spec with it."""
    if spec.quantization == "none":
        changes = {"quantization": "4bit", "engine": "auto", "precision": "auto"}
        yield (
            "quantization",
            "quantization 4bit on auto engine and precision",
            spec.model_copy(update=changes),
        )
    if spec.precision != "auto":
        yield "precision", "precision auto", spec.model_copy(update={"precision": "auto"})
    if spec.engine != "auto":
        yield "engine", "engine auto", spec.model_copy(update={"engine": "auto"})
    length = spec.max_seq_length
    while (length := length // 2) >= SHORTEST:
        shorter = spec.model_copy(update={"max_seq_length": length})
        yield "max_seq_length", f"max_seq_length {length}", shorter
    if spec.lora.r > 16:
        lora = spec.lora.model_copy(update={"r": 16})
        yield "lora.r", "lora.r 16", spec.model_copy(update={"lora": lora})
    if spec.training.optim != "adamw_8bit":
        training = spec.training.model_copy(update={"optim": "adamw_8bit"})
        yield "training.optim", "training.optim adamw_8bit", spec.model_copy(update={"training": training})


def _refusal(param: str, message: str, *, code: str) -> InvalidRequest:
    return InvalidRequest(
        f"{param}: {message}" if code != "does_not_fit" else message, param=param, code=code
    )

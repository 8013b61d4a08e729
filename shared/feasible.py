"""Whether any device on line can run a spec; if none can, which field is in the way and what would fit."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

from shared.cost import CONTEXT, GIB, MARGIN, least_weight_bytes, memory_needed, memory_usable
from shared.device import BF16_CAPABILITY, FP8_CAPABILITY, Device
from shared.errors import InvalidRequest
from shared.models import ModelInfo
from shared.planner import ONE_GPU_ENGINES, Candidate, candidates, not_taken
from shared.savings import Saving, savings
from shared.spec import JobSpec

Boxes = Sequence[Sequence[Device]]
# What a worker's engines need, for who has to install it.
INSTALLED_WITH = {
    "compiled": "a torch for CUDA, which brings Triton, and a C compiler (cc, gcc or clang)",
    "unsloth": "the extra gpu, which brings Unsloth, a torch for CUDA and a C compiler (cc, gcc or clang)",
}


def check_runnable(spec: JobSpec, model: ModelInfo, boxes: Boxes) -> None:
    """Refuse what no worker on line can run; with none on line nothing is known, and nothing refused.

    Args:
        boxes: the devices of each worker.

    Raises:
        InvalidRequest: `needs_gpu`, `not_available_here` or `does_not_fit`, with what would do.
    """
    if not any(boxes):
        return
    found = _on_any(spec, model, boxes)
    if not found:
        raise _unavailable(spec, model, boxes)
    if not any(candidate.fits for candidate in found):
        raise _too_large(spec, model, boxes, found)


def _on_any(spec: JobSpec, model: ModelInfo, boxes: Boxes) -> list[Candidate]:
    """Every way on every box; of a local model of unknown kind its weights alone count."""
    found = [candidate for box in boxes for candidate in candidates(spec, model.shape, box)]
    parameters, stored = model.parameters, model.weight_bytes
    if model.shape is not None or parameters is None or stored is None:
        return found
    return [replace(c, peak=least_weight_bytes(c.way, parameters, stored)) for c in found]


def _fits_any(spec: JobSpec, model: ModelInfo, boxes: Boxes) -> bool:
    return any(candidate.fits for candidate in _on_any(spec, model, boxes))


def _unavailable(spec: JobSpec, model: ModelInfo, boxes: Boxes) -> InvalidRequest:
    field, value = next(_named(spec))
    gpus = [device for box in boxes for device in box if device.kind == "cuda"]
    most = max(sum(device.kind == "cuda" for device in box) for box in boxes)
    code = "not_available_here"
    if most < spec.gpus > 1:
        field = "gpus"
        why = f"{spec.gpus}: no worker on line has so many GPUs; the most that one has is {most}."
    elif not gpus:
        code = "needs_gpu"
        why = (
            f"{value} needs a GPU, and the workers on line have none. Leave it on auto, which takes the "
            "reference engine in fp32 on a CPU."
        )
    elif told := (
        _why_not_installed(spec, gpus) or _why_not_taken(spec, model) or _why_not_able(spec, boxes)
    ):
        field, why = told
    else:
        why = (
            f"{value} can't be had on the GPUs on line ({', '.join(_names(gpus))}) with what the job names "
            "beside it. Leave it on auto."
        )
    fewer = next(_fewer_gpus(spec, model, boxes), None)
    return _refusal(field, f"{why} The job would run with {fewer.words}." if fewer else why, code=code)


def _named(spec: JobSpec) -> Iterator[tuple[str, str]]:
    """What the spec names that not every device has, the most particular first."""
    if spec.precision in ("fp8", "bf16"):
        yield "precision", spec.precision
    if spec.quantization == "4bit":
        yield "quantization", spec.quantization
    if spec.engine != "auto":
        yield "engine", spec.engine
    yield "precision", spec.precision


def _engine(spec: JobSpec) -> tuple[str, str, str]:
    """The engine that the spec asks for, or `auto`, and the field and words with which it does."""
    if spec.engine == "auto" and spec.precision == "fp8":
        return "compiled", "precision", "fp8 is the compiled engine's, which"
    return spec.engine, "engine", spec.engine


def _why_not_installed(spec: JobSpec, gpus: Sequence[Device]) -> tuple[str, str] | None:
    engine, field, words = _engine(spec)
    installed = sorted({name for device in gpus for name in device.engines})
    if engine == "auto" or engine in installed:
        return None
    return field, (
        f"{words} is not installed on any worker on line. They have: {', '.join(installed)}. Leave it on "
        f"auto, or have a worker's operator install {INSTALLED_WITH[engine]}."
    )


def _why_not_taken(spec: JobSpec, model: ModelInfo) -> tuple[str, str] | None:
    engine, field, words = _engine(spec)
    if spec.gpus > 1 and engine in ONE_GPU_ENGINES:
        return field, f"{words} trains on one GPU alone, and the job asks for {spec.gpus}. Leave it on auto."
    said = not_taken(engine, model.shape.kind) if model.shape else None
    return (field, f"{words} {said} Leave it on auto.") if said else None


def _why_not_able(spec: JobSpec, boxes: Boxes) -> tuple[str, str] | None:
    """What the cards lack that have the engine that is asked for."""
    engine = _engine(spec)[0]
    able = [[d for d in box if d.kind == "cuda" and engine in ("auto", *d.engines)] for box in boxes]
    having = f" that have the engine {engine}" if engine != "auto" else ""
    those = ", ".join(_names([device for box in able for device in box]))
    told = f"Those on line{having}: {those}. Leave it on auto."
    takes = "which takes a GPU" if spec.gpus == 1 else f"which takes {spec.gpus} GPUs of one worker"
    if spec.precision == "fp8" and not any(sum(d.fp8 for d in box) >= spec.gpus for box in able):
        return "precision", (
            f"fp8 multiplies in float8, {takes} of compute capability {FP8_CAPABILITY} or more "
            f"(Ada, Hopper or later). {told}"
        )
    if not any(sum(d.bf16 for d in box) >= spec.gpus for box in able):
        field, value = next(_named(spec))
        return field, (
            f"{value} computes in bfloat16, {takes} of compute capability {BF16_CAPABILITY} or "
            f"more (Ampere or later). {told}"
        )
    return None


def _names(gpus: Sequence[Device]) -> list[str]:
    return sorted({f"{d.name} ({d.capability})" if d.capability is not None else d.name for d in gpus})


def _too_large(spec: JobSpec, model: ModelInfo, boxes: Boxes, found: Sequence[Candidate]) -> InvalidRequest:
    largest = max((c.device for c in found), key=lambda d: d.memory_bytes)
    least = min(c.peak or 0 for c in found if c.device == largest)
    would: dict[str, str] = {}
    for saving in (*_fewer_gpus(spec, model, boxes), *savings(spec, largest.kind)):
        # The longest of the shorter sequences alone.
        if saving.field not in would and _fits_any(saving.spec, model, boxes):
            would[saving.field] = saving.words
    ways = ", or ".join(would.values())
    with_less = f"It would fit with {ways}" if would else "No single change of the spec makes it fit"
    takes = "it takes" if model.shape else "its weights alone take"
    each = f" on each of its {spec.gpus} GPUs" if spec.gpus > 1 else ""
    cuda = f", and CUDA itself takes {CONTEXT / GIB:.1f} GiB" if largest.kind == "cuda" else ""
    name, memory = largest.name, f"{largest.memory_bytes / GIB:.1f} GiB"
    which = f"the largest device, {name}, has {memory}"
    if spec.gpus > 1:
        which = f"{spec.gpus} GPUs of one worker (the slowest: {name}) have {memory} each"
    needed = math.ceil(memory_needed(least, largest.kind) / GIB)
    return _refusal(
        next(iter(would), "model"),
        f"No worker on line has the memory for this job: {takes} {least / GIB:.1f} GiB{each} at the least, "
        f"and {which}, of which plans fill at most "
        f"{max(memory_usable(largest), 0) / GIB:.1f} GiB (a margin of {MARGIN:.0%} stays free{cuda}). "
        f"{with_less}; else it needs one with {needed} GiB, or a smaller model.",
        code="does_not_fit",
    )


def _fewer_gpus(spec: JobSpec, model: ModelInfo, boxes: Boxes) -> Iterator[Saving]:
    """The most GPUs below what the spec asks for with which the job fits."""
    for gpus in range(spec.gpus - 1, 0, -1):
        fewer = spec.model_copy(update={"gpus": gpus})
        if spec.training.effective_batch % gpus == 0 and _fits_any(fewer, model, boxes):
            yield Saving("gpus", f"gpus {gpus}", fewer)
            return


def _refusal(param: str, message: str, *, code: str) -> InvalidRequest:
    return InvalidRequest(
        f"{param}: {message}" if code != "does_not_fit" else message, param=param, code=code
    )

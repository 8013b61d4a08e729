"""The planner: from a spec, a model's shape and the devices at hand to a plan.

Torch-free. Every plan keeps the spec's effective batch and sequence length; what the spec names it keeps too,
and what is `auto` there it chooses: the fastest way that fits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, product

from shared.cost import ENGINES, GIB, Way, fits, memory_needed, memory_usable, peak_bytes, tokens_per_second
from shared.device import Device
from shared.plan import EngineName, Plan, Precision, Quantization
from shared.shape import NEMOTRON_NANO_4B, ModelKind, ModelShape
from shared.spec import JobSpec

# What the compiled engine knows how to compile and to attend with.
COMPILED_ARCHITECTURES = frozenset({"llama", "mistral", "qwen2", "qwen3"})
# What Unsloth has attention of its own for that keeps packed documents apart by their lengths, under a head
# that is a plain product. All other types run as transformers has them, patched and compiled, where that
# depends on the type; for gemma2 its attention knows no documents, and the head isn't plain (decision 0018).
UNSLOTH_ARCHITECTURES = frozenset({"gemma", "llama", "mistral", "qwen2", "qwen3"})
# The engines that take some types of models alone.
ARCHITECTURES: dict[str, frozenset[str]] = {
    "compiled": COMPILED_ARCHITECTURES,
    "unsloth": UNSLOTH_ARCHITECTURES,
}
# Nobody has shown here that ranks of it train what one process does.
ONE_GPU_ENGINES: frozenset[str] = frozenset({"unsloth"})
# On a CPU: above so many tokens in one micro-batch, activations are recomputed rather than kept.
CPU_CHECKPOINTING_TOKENS = 2048
# Larger micro-batches help nobody, and kernels count in 32 bits.
MOST_TOKENS = 65_536
# Predictions no further apart than this count as equal: whole weights win, then the least memory.
TIE = 0.02
# After running out of memory: the next plan has at most this share of what could be saved of the last one's.
NEXT_SHARE = 0.5
CHECKPOINTING_WORDS = {
    "none": "all activations kept",
    "some": "every second layer's activations recomputed",
    "all": "activations recomputed",
}


@dataclass(frozen=True)
class Candidate:
    """A way to run the spec on a device, with what it is predicted to take; None where nothing is."""

    way: Way
    device: Device
    peak: int | None
    speed: float | None

    @property
    def fits(self) -> bool:
        return self.peak is None or fits(self.peak, self.device)

    def plan(self, reason: str) -> Plan:
        return Plan(
            engine=self.way.engine,
            device=self.way.device,
            gpus=self.way.gpus,
            quantization=self.way.quantization,
            precision=self.way.precision,
            micro_batch=self.way.micro_batch,
            accumulation=self.way.accumulation,
            gradient_checkpointing=self.way.checkpointing,
            peak_memory_bytes=self.peak,
            tokens_per_second=None if self.speed is None else round(self.speed, 1),
            reason=reason,
        )


def make_plan(spec: JobSpec, shape: ModelShape | None, devices: Sequence[Device]) -> Plan | None:
    """The fastest plan that fits one of these devices; None if there is none, or no device.

    Args:
        shape: None if the model's config can't be had: then nothing is predicted, and the plan is careful.
        devices: of one box, where the spec asks for several GPUs.
    """
    chosen = _choose(spec, candidates(spec, shape, devices))
    return chosen.plan(_reason(chosen, spec, "the fastest that fits")) if chosen else None


def alternatives(spec: JobSpec, shape: ModelShape | None, devices: Sequence[Device]) -> list[Plan]:
    """The plans that lost against `make_plan`'s, the nearest first; `reason` says why.

    One for each engine, quantisation, precision and checkpointing, with its best batch.
    """
    found = candidates(spec, shape, devices)
    chosen = _choose(spec, found)
    if chosen is None or chosen.speed is None:
        return []

    def kind(candidate: Candidate) -> tuple[str, ...]:
        way = candidate.way
        return way.device, way.engine, way.quantization, way.precision, way.checkpointing

    best = [_best(list(group)) for _, group in groupby(sorted(found, key=kind), kind)]
    lost = [c for c in best if kind(c) != kind(chosen)]
    lost.sort(key=lambda c: (not c.fits, -(c.speed or 0)))
    return [candidate.plan(_why_lost(candidate, chosen)) for candidate in lost]


def cheaper_plan(
    spec: JobSpec, shape: ModelShape | None, devices: Sequence[Device], tried: Sequence[Plan]
) -> Plan | None:
    """What to try after these plans ran out of memory: clearly less, with the same effective batch.

    The fastest of those that take at most half of what could still be saved and fit one of `devices`; None
    when the tried ones can't be undercut, or nothing that undercuts them fits.
    """
    cheaper = _cheaper(spec, shape, devices, tried)
    if shape is None and cheaper:
        # The largest device, and there the order alone: the sizes are another model's.
        largest = max(c.device.memory_bytes for c in cheaper)
        best = _best([c for c in cheaper if c.device.memory_bytes == largest])
        chosen = Candidate(best.way, best.device, None, None)
    elif fitting := [c for c in cheaper if c.fits]:
        chosen = _best(fitting)
    else:
        return None
    return chosen.plan(_reason(chosen, spec, "the next cheaper one after running out of memory"))


def least_memory(
    spec: JobSpec, shape: ModelShape | None, devices: Sequence[Device], tried: Sequence[Plan] = ()
) -> int | None:
    """Memory that has to be free for the smallest plan, the margin in it; None where nothing is predicted.

    Args:
        tried: plans that ran out of memory: what undercuts them counts.
    """
    found = _cheaper(spec, shape, devices, tried) if tried else candidates(spec, shape, devices)
    if shape is None or not found:
        return None
    return min(memory_needed(c.peak or 0, c.way.device) for c in found)


def _cheaper(
    spec: JobSpec, shape: ModelShape | None, devices: Sequence[Device], tried: Sequence[Plan]
) -> list[Candidate]:
    # Without the model's config the order of the ways is known, if not their sizes: any model's will do.
    sized = shape or NEMOTRON_NANO_4B
    found = [_predicted(c.way, sized, spec, c.device) for c in candidates(spec, shape, devices)]
    if not found or not tried:
        return []
    least = min(c.peak or 0 for c in found)
    lowest = min(peak_bytes(way_of(plan), sized, spec) for plan in tried)
    return [c for c in found if (c.peak or 0) <= least + (lowest - least) * NEXT_SHARE < lowest]


def candidates(spec: JobSpec, shape: ModelShape | None, devices: Sequence[Device]) -> list[Candidate]:
    """Every way that the spec admits on these devices, whether it fits or not."""
    return [
        _predicted(way, shape, spec, device)
        for device in _distinct(spec, devices)
        for way in _ways(spec, shape, device)
    ]


def not_taken(engine: str, model: ModelKind) -> str | None:
    """What to say after the name of an engine that doesn't take models of this kind; None where it does."""
    known = ARCHITECTURES.get(engine)
    if known is not None and model.model_type not in known:
        does_not = (
            "is not known to keep packed documents apart in" if engine == "unsloth" else "does not know"
        )
        return f"{does_not} models of the type {model.model_type}. It takes: {', '.join(sorted(known))}."
    if engine == "compiled" and model.attention_dropout:
        return "attends without dropout, and this model's config asks for it (attention_dropout)."
    if engine == "compiled" and model.quantized:
        return "takes plain weights, and this model's are stored quantised (quantization_config)."
    return None


def way_of(plan: Plan) -> Way:
    """The way that a plan describes."""
    return Way(
        plan.engine,
        plan.device,
        plan.quantization,
        plan.precision,
        plan.micro_batch,
        plan.accumulation,
        plan.gradient_checkpointing,
        plan.gpus,
    )


def _predicted(way: Way, shape: ModelShape | None, spec: JobSpec, device: Device) -> Candidate:
    if shape is None:
        return Candidate(way, device, None, None)
    return Candidate(way, device, peak_bytes(way, shape, spec), tokens_per_second(way, shape, spec, device))


def groups(gpus: int, devices: Sequence[Device]) -> list[tuple[Device, ...]]:
    """The sets of so many GPUs of one box that are worth a plan: of all, of those with bfloat16 and of those
    with float8, the ones with the most memory, largest first."""
    cuda = sorted((d for d in devices if d.kind == "cuda"), key=lambda d: -d.memory_bytes)
    able = (cuda, [d for d in cuda if d.bf16], [d for d in cuda if d.fp8])
    return list(dict.fromkeys(tuple(found[:gpus]) for found in able if len(found) >= gpus))


def _weakest(group: Sequence[Device]) -> Device:
    """One device that can do what each of a group can: ranks have the same plan, and wait for the slowest."""
    slowest = min(group, key=lambda d: d.peak_flops)
    return replace(
        slowest,
        memory_bytes=min(d.memory_bytes for d in group),
        engines=tuple(name for name in slowest.engines if all(name in d.engines for d in group)),
        capability=min(d.known_capability for d in group),
    )


def _distinct(spec: JobSpec, devices: Sequence[Device]) -> list[Device]:
    """One device of each kind that the plan may be for; for several GPUs, one that stands for a set."""
    if spec.gpus > 1:
        return [_weakest(group) for group in groups(spec.gpus, devices)]
    return list({(d.kind, d.name, d.memory_bytes, d.engines, d.capability): d for d in devices}.values())


def _ways(spec: JobSpec, shape: ModelShape | None, device: Device) -> Iterator[Way]:
    if spec.training.effective_batch % spec.gpus:
        return
    rows = spec.training.effective_batch // spec.gpus
    if device.kind == "cpu":
        yield from _cpu_ways(spec, device, rows)
        return
    for engine in device.engines:
        if spec.engine in ("auto", engine) and (spec.gpus == 1 or engine not in ONE_GPU_ENGINES):
            kinds = product(
                _weights(spec, engine, shape, device), _batches(spec, rows), ENGINES[engine].checkpointing
            )
            for (quantization, precision), batch, checkpointing in kinds:
                yield Way(
                    engine, "cuda", quantization, precision, batch, rows // batch, checkpointing, spec.gpus
                )


def _cpu_ways(spec: JobSpec, device: Device, rows: int) -> Iterator[Way]:
    """As the spec writes its batch, for a larger one is no faster here; smaller ones for want of memory."""
    named_otherwise = spec.engine not in ("auto", "reference") or spec.quantization == "4bit"
    if named_otherwise or spec.precision not in ("auto", "fp32") or spec.gpus > 1:
        return
    for batch in reversed(_batches(spec, rows)):
        if batch <= spec.training.per_device_train_batch_size:
            tokens = batch * spec.max_seq_length
            if tokens <= CPU_CHECKPOINTING_TOKENS:
                yield Way("reference", device.kind, "none", "fp32", batch, rows // batch, "none")
            yield Way("reference", device.kind, "none", "fp32", batch, rows // batch, "all")


def _weights(
    spec: JobSpec, engine: EngineName, shape: ModelShape | None, device: Device
) -> list[tuple[Quantization, Precision]]:
    """How this engine may hold the base weights on this GPU."""
    found: list[tuple[Quantization, Precision]] = []
    # Float8 is the compiled engine's alone.
    named = spec.engine == engine or (engine == "compiled" and spec.precision == "fp8")
    if engine in ARCHITECTURES:
        # A type that nobody knows here may be one that it takes: whoever names it finds out.
        known = named if shape is None else not_taken(engine, shape.kind) is None
        if not known:
            return []
    if engine == "reference":
        found.append(("none", "fp32" if spec.precision == "fp32" or not device.bf16 else "bf16"))
    elif engine == "compiled":
        # It pads each micro-batch to its full size, which costs most where rows aren't packed.
        wanted = spec.packing or named
        # Float8 rounds the weights, so it is for those who name it.
        if device.bf16 and wanted:
            found.append(("none", "fp8" if spec.precision == "fp8" and device.fp8 else "bf16"))
    elif device.bf16:
        found.append(("none", "bf16"))
    if engine != "compiled" and device.bf16:
        found.append(("4bit", "bf16"))
    return [
        (quantization, precision)
        for quantization, precision in found
        if spec.quantization in ("auto", quantization) and spec.precision in ("auto", precision)
    ]


def _batches(spec: JobSpec, rows: int) -> list[int]:
    """Micro-batches that divide the rows of a step, smallest first.

    Rows that aren't packed are padded to the longest of their micro-batch: more of them waste more.
    """
    stated = spec.training.per_device_train_batch_size
    most = max(1, MOST_TOKENS // spec.max_seq_length) if spec.packing else stated
    return [n for n in range(1, rows + 1) if rows % n == 0 and n <= max(most, stated)]


def _choose(spec: JobSpec, found: list[Candidate]) -> Candidate | None:
    fitting = [c for c in found if c.fits]
    on_gpu = [c for c in fitting if c.way.device == "cuda"]
    if not on_gpu:
        return next(iter(fitting), None)
    if on_gpu[0].peak is None:
        return min(on_gpu, key=lambda c: (-c.device.memory_bytes, _care(c.way, spec)))
    return _best(on_gpu)


def _care(way: Way, spec: JobSpec) -> tuple[bool, bool, int]:
    """For a model of unknown size: as the least memory is had, at the batch that the spec states.

    Not in 4 bits but where Unsloth is named: the reference is slower in them, and gets them when it ran out.
    """
    four_bit = way.engine == "unsloth"
    stated = abs(way.micro_batch - spec.training.per_device_train_batch_size)
    return (way.quantization == "4bit") != four_bit, way.checkpointing != "all", stated


def _best(found: list[Candidate]) -> Candidate:
    """The fastest that fits; of nearly equal ones one whose weights are whole, and of those the smallest.

    If none fits, the smallest of all.
    """
    fitting = [c for c in found if c.fits]
    if not fitting:
        return min(found, key=lambda c: c.peak or 0)
    fastest = max(c.speed or 0 for c in fitting)
    return min(
        (c for c in fitting if (c.speed or 0) >= fastest * (1 - TIE)),
        key=lambda c: (c.way.quantization == "4bit", c.peak or 0, -(c.speed or 0)),
    )


def _reason(chosen: Candidate, spec: JobSpec, why: str) -> str:
    way = chosen.way
    weights = "4-bit, computing in bf16" if way.quantization == "4bit" else way.precision
    gpus = f"{way.gpus} x " if way.gpus > 1 else ""
    rows = f"{way.micro_batch} x {way.accumulation} of {spec.max_seq_length} tokens"
    if way.engine == "compiled" and not spec.packing:
        rows += " (rows that aren't packed are filled up to that, which costs time)"
    said = (
        f"The {way.engine} engine in {weights} on {gpus}{chosen.device.name}: batch {rows}, "
        f"{CHECKPOINTING_WORDS[way.checkpointing]}."
    )
    if chosen.peak is None or chosen.speed is None:
        return f"{said} Nothing is predicted, because the model's config is not known here."
    predicted = f"{said} Predicted: {chosen.speed:,.0f} tokens/s and {chosen.peak / GIB:.1f} GiB at the peak"
    return f"{predicted}, {why}." if way.device == "cuda" else f"{predicted}."


def _why_lost(candidate: Candidate, chosen: Candidate) -> str:
    peak, speed, best = candidate.peak or 0, candidate.speed or 0, chosen.speed or 1
    if not candidate.fits:
        device = candidate.device
        return (
            f"needs {peak / GIB:.1f} GiB, and of the {device.memory_bytes / GIB:.1f} GiB of {device.name} "
            f"plans fill at most {max(memory_usable(device), 0) / GIB:.1f} GiB"
        )
    if speed < best * (1 - TIE):
        return f"{1 - speed / best:.0%} slower"
    more = (peak - (chosen.peak or 0)) / GIB
    if candidate.way.quantization == "4bit" != chosen.way.quantization:
        but = "rounds the weights to 4 bits"
    elif more > 0:
        but = f"takes {more:.1f} GiB more"
    else:
        # It is further from the fastest of all than the one that was taken.
        return f"{1 - speed / best:.1%} slower"
    return f"{'no' if speed <= best else f'{speed / best - 1:.1%}'} faster, and {but}"

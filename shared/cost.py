"""What a way to train costs: bytes at the peak and tokens a second, from the model's shape alone.

Physics with measured constants. To fit them anew, run `python -m bench.planner --measure FILE` on a GPU: its
table shows the prediction beside what was measured. All constants are here and in `shared/device.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from shared.device import Device, DeviceKind
from shared.plan import Checkpointing, EngineName, Precision, Quantization
from shared.shape import ModelShape
from shared.spec import JobSpec

GIB = 1 << 30


@dataclass(frozen=True)
class EngineCosts:
    """One engine's constants, for 16-bit activations; fp32 takes twice the bytes.

    Bytes that a layer keeps for the backward pass, for one token: `hidden`, `queries`, `keys` and
    `intermediate` times those widths, and `adapters` times the inputs of the layer's LoRA matrices, with
    dropout `dropout` times more. `boundary`: bytes x hidden left on the GPU of a layer that is recomputed.
    `buffers`: bytes x (hidden + queries + intermediate), a token, of one layer's gradients on their way.
    `mask`: bytes for each pair of tokens in a micro-batch, where attention takes a mask over all of it.
    `logits`: bytes x vocabulary of the loss: tokens of a chunk times bytes of a logit in all its copies.
    `efficiency`: share of the device's peak that the arithmetic reaches; with bf16 weights and no dropout,
    and what is left of that with 4-bit weights, with dropout, in fp8. `layer_seconds`: least time for a layer
    forward and backward, however few its tokens. `varlen`: attention computes within documents alone.
    """

    checkpointing: tuple[Checkpointing, ...]
    hidden: float
    queries: float
    keys: float
    intermediate: float
    adapters: float
    dropout: float
    boundary: float
    buffers: float
    mask: float
    logits: float
    efficiency: float
    with_4bit: float
    with_dropout: float
    with_fp8: float
    layer_seconds: float
    varlen: bool


# Fitted to the points of bench/planner-h200.jsonl, and to what bench.train measured on an H100 80 GB.
ENGINES: dict[EngineName, EngineCosts] = {
    # Eager operations, each of which keeps its inputs; norms in float32; one copy of its input per adapter.
    "reference": EngineCosts(
        checkpointing=("none", "some", "all"),
        hidden=8, queries=10, keys=0, intermediate=6, adapters=2, dropout=1,
        boundary=2, buffers=4, mask=1, logits=256 * 10,
        efficiency=0.27, with_4bit=1.0, with_dropout=1.0, with_fp8=1.0, layer_seconds=8.1e-3, varlen=False,
    ),
    # Fused layers, which keep what the compiler could not compute again. Dropout is drawn again, and with it
    # what it reads: with dropout a layer keeps less.
    "compiled": EngineCosts(
        checkpointing=("none", "some", "all"),
        hidden=5, queries=4, keys=4, intermediate=4, adapters=0.96, dropout=-0.96,
        boundary=2, buffers=4, mask=0, logits=1024 * 4,
        efficiency=0.565, with_4bit=1.0, with_dropout=0.97, with_fp8=1.26, layer_seconds=1.7e-3, varlen=True,
    ),
    # Layer inputs wait in the host's memory: one layer's activations are all that the GPU holds.
    "unsloth": EngineCosts(
        checkpointing=("none", "all"),
        hidden=5, queries=3, keys=3, intermediate=4, adapters=0, dropout=1.7,
        boundary=0, buffers=1, mask=0, logits=1024 * 4,
        efficiency=0.50, with_4bit=0.965, with_dropout=0.90, with_fp8=1.0, layer_seconds=4.8e-3, varlen=True,
    ),
}  # fmt: skip
# nf4 weights with doubly quantised scales: half a byte, 1/64 for the scales, 4/(64 x 256) for theirs.
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
# The two float8 copies of a matrix, one for the forward and one for the backward product.
FP8_BYTES = 2.0
# Adapters in float32, their gradients, and two moments of the optimiser, in 8 or 32 bits each.
ADAPTER_BYTES = {"adamw_8bit": 4 + 4 + 2, "adamw_torch": 4 + 4 + 8}
# The allocator's share of what it can't use, and libraries' workspaces.
SLACK, WORKSPACE = 0.04, 0.15 * GIB
# What the driver takes of the card for the process; measured peaks don't count it.
CONTEXT = 0.6e9
# The planner leaves this share of the memory free.
MARGIN = 0.08
# A micro-batch of so many tokens, at a hidden size of 3,072, reaches half of the efficiency.
HALF_TOKENS = 200
# Share of the slots of packed rows that hold tokens, and how long a document is where nobody knows.
FILL, DOCUMENT_TOKENS = 0.98, 512
STEP_SECONDS = 0.03
# Under a mask a GPU takes as long for a narrower head as for one of this width: the mask is the same.
MASKED_HEAD = 128
# float32 products run outside the tensor cores' 16-bit path.
FP32_SHARE = 0.07
# Of a second GPU, what gradients in flight leave.
PARALLEL_SHARE = 0.93

# A CPU: operations a second of one core, bytes of a process with the stack loaded, and what the allocator
# keeps of what it had.
CPU_FLOPS, CPU_PROCESS, CPU_SLACK = 65e9, 0.65e9, 0.45


@dataclass(frozen=True)
class Way:
    """One way to run a spec: what a plan says, before anything is predicted. On one of `gpus` devices."""

    engine: EngineName
    device: DeviceKind
    quantization: Quantization
    precision: Precision
    micro_batch: int
    accumulation: int
    checkpointing: Checkpointing
    gpus: int = 1


def peak_bytes(way: Way, shape: ModelShape, spec: JobSpec) -> int:
    """Most memory of one device: reserved by torch on a GPU, resident in the process on a CPU."""
    costs = ENGINES[way.engine]
    wide = 2 if way.precision == "fp32" else 1
    adapters = shape.adapter_parameters(spec.lora.r, spec.lora.target_modules)
    fixed = _weight_bytes(way, shape) + adapters * ADAPTER_BYTES[spec.training.optim]
    tokens = way.micro_batch * spec.max_seq_length
    recomputed = _recomputed_layers(way.checkpointing, shape.layers)
    layer = tokens * wide * _saved_per_token(costs, shape, spec)
    kept = layer * (shape.layers - recomputed + (1 if recomputed else 0))
    kept += tokens * wide * recomputed * costs.boundary * shape.hidden
    kept += tokens * wide * costs.buffers * (shape.hidden + shape.queries + shape.intermediate)
    kept += tokens * (tokens if spec.packing else spec.max_seq_length) * wide * costs.mask
    kept += costs.logits * shape.vocab
    if way.quantization == "4bit":
        # The widest matrix, in 16 bits, while it is multiplied.
        kept += 2 * 2 * shape.hidden * shape.intermediate
    if way.device == "cpu":
        return int(CPU_PROCESS + fixed + kept * (1 + CPU_SLACK))
    return int(fixed + kept * (1 + SLACK) + WORKSPACE)


def tokens_per_second(way: Way, shape: ModelShape, spec: JobSpec, device: Device) -> float:
    """Trained tokens a second of all the way's devices together, each like this one."""
    costs = ENGINES[way.engine]
    tokens = way.micro_batch * spec.max_seq_length
    operations = tokens * _operations_per_token(way, costs, shape, spec)
    if way.device == "cpu":
        micro = operations / (CPU_FLOPS * device.cores)
    else:
        reached = costs.efficiency * tokens / (tokens + HALF_TOKENS * 3072 / shape.hidden)
        reached *= costs.with_4bit if way.quantization == "4bit" else 1
        reached *= costs.with_dropout if spec.lora.dropout else 1
        reached *= {"fp8": costs.with_fp8, "fp32": FP32_SHARE, "bf16": 1.0}[way.precision]
        recomputed = _recomputed_layers(way.checkpointing, shape.layers)
        launches = costs.layer_seconds * (shape.layers + recomputed / 3)
        # Launching goes on while the device computes: the slower of the two decides, with a soft corner.
        micro = ((operations / (device.peak_flops * reached)) ** 4 + launches**4) ** 0.25
    step = way.accumulation * micro + STEP_SECONDS
    fill = FILL if spec.packing else 1.0
    parallel = way.gpus * (PARALLEL_SHARE if way.gpus > 1 else 1)
    return way.accumulation * tokens * fill / step * parallel


def fits(peak: int, device: Device) -> bool:
    """Whether this peak leaves the margin free; True where the device's memory is not known."""
    return not device.memory_bytes or memory_needed(peak, device.kind) <= device.memory_bytes


def memory_needed(peak: int, kind: DeviceKind) -> int:
    """Memory that a device must have free for this peak to fit: the margin and CUDA's own are in it."""
    context = CONTEXT if kind == "cuda" else 0
    return math.ceil((peak + context) / (1 - MARGIN))


def memory_usable(device: Device) -> int:
    """The highest peak that fits the device."""
    return int(device.memory_bytes * (1 - MARGIN) - (CONTEXT if device.kind == "cuda" else 0))


def least_weight_bytes(way: Way, parameters: int, stored_bytes: int) -> int:
    """What the weights of a model of unknown kind take at the least: files may hold several in one element.

    Args:
        parameters: elements of the files' tensors.
        stored_bytes: size of the files.
    """
    each = {"fp32": 4.0, "bf16": 2.0, "fp8": FP8_BYTES}[way.precision]
    return int(min(parameters * (NF4_BYTES if way.quantization == "4bit" else each), stored_bytes))


def _weight_bytes(way: Way, shape: ModelShape) -> float:
    if way.precision == "fp32":
        return 4 * shape.parameters
    linear = 2.0
    if way.quantization == "4bit":
        linear = NF4_BYTES
    elif way.precision == "fp8":
        linear = FP8_BYTES
    return linear * shape.linear_parameters + 2 * shape.other_parameters


def _saved_per_token(costs: EngineCosts, shape: ModelShape, spec: JobSpec) -> float:
    inputs = shape.adapter_inputs(spec.lora.target_modules)
    return (
        costs.hidden * shape.hidden
        + costs.queries * shape.queries
        + costs.keys * shape.keys
        + costs.intermediate * shape.intermediate
        + (costs.adapters + (costs.dropout if spec.lora.dropout else 0)) * inputs
    )


def _recomputed_layers(checkpointing: Checkpointing, layers: int) -> int:
    return {"none": 0, "some": layers // 2, "all": layers}[checkpointing]


def _operations_per_token(way: Way, costs: EngineCosts, shape: ModelShape, spec: JobSpec) -> float:
    """Forward 2 a weight, backward as many for the inputs' gradients (frozen weights have none), and once
    more the forward pass of the layers that are recomputed."""
    again = _recomputed_layers(way.checkpointing, shape.layers) / shape.layers
    adapters = shape.adapter_parameters(spec.lora.r, spec.lora.target_modules)
    products = 2 * shape.linear_parameters * (2 + again) + 4 * shape.head_parameters + 6 * adapters
    if costs.varlen:
        # Causal: half of the pairs.
        seen = min(spec.max_seq_length, DOCUMENT_TOKENS) / 2 if spec.packing else spec.max_seq_length / 2
        width = shape.queries
    else:
        seen = way.micro_batch * spec.max_seq_length if spec.packing else spec.max_seq_length
        width = shape.heads * max(shape.head_dim, MASKED_HEAD if way.device == "cuda" else 0)
    attention = 4 * width * seen * shape.layers * (3.5 + again)
    return products + attention

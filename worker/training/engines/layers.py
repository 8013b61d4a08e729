"""The parts of a compiled decoder layer: LoRA with its dropout, and float8 products."""

from __future__ import annotations

from typing import Any

import peft
import torch
from torch._inductor.ir import ConcatKernel, TensorBox
from torch._inductor.lowering import register_lowering
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

FLOAT8 = torch.float8_e4m3fn
FLOAT8_MAX = torch.finfo(FLOAT8).max
# Multipliers of the 32-bit finaliser of MurmurHash3 and the golden ratio, as signed numbers.
GOLDEN, MIX_1, MIX_2 = -1640531535, -2048144789, -1028477387
MIN_INT32, MAX_INT32 = -(2**31), 2**31 - 1
# Columns of bfloat16 in 16 bytes.
ALIGNED = 8
# In the models that this engine takes.
SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class InputGroup:
    """The adapted modules of a layer that read one input, in the order in which they are called.

    Their frozen matrices lie in one, for one product is faster than three and its gradient is written once.
    So do the LoRA's second matrices, scaled, each in rows and columns of its own. In bfloat16 they are the
    last columns of the frozen matrix: the product of [input, LoRA's first product] with all of it is the
    whole result, and its gradient the whole of both.

    Attributes:
        matrix: (all outputs, inputs + ranks) bfloat16, or (all outputs, inputs) float8.
        ups: (all outputs, ranks) bfloat16, the second matrices.
        places: for every module, where in `ups` its own belongs.
        outputs: what the first module has computed for the others, within a forward pass.
    """

    def __init__(self, modules: list[Any], seed: torch.Tensor) -> None:
        first = modules[0]
        dropout = first.lora_dropout["default"]
        self.modules = modules
        self.seed = seed
        self.dropout_share = float(dropout.p) if isinstance(dropout, torch.nn.Dropout) else 0.0
        self.rank = first.r["default"]
        self.scaling = first.scaling["default"]
        self.sizes = [module.base_layer.out_features for module in modules]
        # Rows of whole 16 bytes, or the product is a slow one.
        padding = -self.rank * len(modules) % ALIGNED
        self.float8: tuple[torch.Tensor, ...] | None = None
        self.outputs: tuple[torch.Tensor, ...] = ()
        frozen = torch.cat([module.base_layer.weight.data for module in modules])
        ranks = frozen.new_zeros(frozen.shape[0], self.rank * len(modules) + padding)
        self.matrix = torch.cat([frozen, ranks], dim=1)
        self._put_ups(self.matrix[:, frozen.shape[1] :])
        self._show_matrices()

    def quantize(self) -> None:
        """Keep the frozen matrices in float8, once by rows and once by columns.

        A product with float8 operands needs the summed dimension contiguous: forwards that is the input's, on
        the way back the output's. The two copies together are as large as the bfloat16 matrix.
        """
        frozen = self.matrix[:, : self.modules[0].base_layer.in_features]
        backward, backward_scale = _rows_to_float8(frozen.t())
        self.matrix, scale = _rows_to_float8(frozen)
        self.float8 = (scale.t(), backward, backward_scale.t())
        self._put_ups(self.ups.clone())
        self._show_matrices()

    def _put_ups(self, ups: torch.Tensor) -> None:
        self.ups = ups
        rows = torch.split(ups, self.sizes)
        self.places = [own[:, place * self.rank :][:, : self.rank] for place, own in enumerate(rows)]

    def _show_matrices(self) -> None:
        """Let the modules' own weights be views of the one matrix, or memory would hold both."""
        for module, rows in zip(self.modules, torch.split(self.matrix, self.sizes), strict=True):
            weight = rows[:, : module.base_layer.in_features]
            module.base_layer.weight = torch.nn.Parameter(weight, requires_grad=False)


class FusedLora(peft.tuners.lora.Linear):  # type: ignore[misc]
    """A LoRA linear in the base's dtype. The first module of a group computes the results of all.

    Dropout is computed from a seed, forwards and backwards. The mask is arithmetic on the positions: the
    compiler folds it into its neighbours and the backward pass computes it again. Nothing of it is stored,
    and a recomputed layer sees the same one.
    """

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:  # noqa: ARG002
        group = self.group
        if self.place == 0:
            group.outputs = _group_outputs(group, x, self.training)
        result: torch.Tensor = group.outputs[self.place]
        if self.place == len(group.sizes) - 1:
            group.outputs = ()
        bias = self.base_layer.bias
        return result if bias is None else result + bias


def fuse_adapters(model: Any) -> None:
    """Turn the PEFT model's LoRA linears into fused ones, in place; their parameters stay what they are."""
    together: dict[str, list[Any]] = {}
    for name, module in model.named_modules():
        if isinstance(module, peft.tuners.lora.Linear):
            together.setdefault(_input_of(name), []).append(module)
    device = next(model.parameters()).device
    # One tensor for all, so that drawing new seeds is one kernel; in steps of 16 bytes, as compiled code
    # wants its inputs aligned.
    seeds = torch.zeros(len(together), 4, dtype=torch.int32, device=device)
    model.register_buffer("lora_seeds", seeds, persistent=False)
    model.input_groups = []
    for number, modules in enumerate(together.values()):
        group = InputGroup(modules, seeds[number, 0])
        model.input_groups.append(group)
        for place, module in enumerate(modules):
            module.__class__ = FusedLora
            module.group, module.place = group, place


def quantize_rows(model: Any) -> None:
    """Keep every adapted frozen matrix in float8."""
    for group in model.input_groups:
        group.quantize()


@torch.no_grad()
def ready_adapters(model: Any) -> None:
    """What has to be done before each forward pass: LoRA's second matrices put where the product reads them.

    In training also new dropout masks, from torch's random numbers on the device.
    """
    if model.training:
        model.lora_seeds.random_(0, MAX_INT32)
    places, ups, scalings = [], [], []
    for group in model.input_groups:
        places += group.places
        ups += [module.lora_B["default"].weight for module in group.modules]
        scalings += [group.scaling] * len(group.modules)
    # A few kernels for all of them rather than one each.
    torch._foreach_copy_(places, torch._foreach_mul(ups, scalings))


def _group_outputs(group: InputGroup, x: torch.Tensor, training: bool) -> tuple[torch.Tensor, ...]:
    """The results of all modules of a group without their biases.

    Sums are taken of (1, tokens, ...), not of matrices: of a matrix and a product the compiler makes a
    product that adds, and copies the matrix for it (fp8: 16 of 255 ms of a micro-batch on an H100).

    Args:
        x: (1, tokens, inputs).
    """
    first = torch.cat([module.lora_A["default"].weight for module in group.modules])
    first = torch.nn.functional.pad(first, (0, 0, 0, -len(first) % ALIGNED)).to(x.dtype)
    if training and group.dropout_share:
        # Marked for the compiler as to be computed again, or it would store what is left of x.
        down = checkpoint(
            _dropped_product,
            x,
            group.seed,
            group.dropout_share,
            first,
            use_reentrant=False,
            preserve_rng_state=False,
            context_fn=_keep_products,
        )
    else:
        down = linear(x, first)
    ups = torch.cat([module.lora_B["default"].weight for module in group.modules])
    settled = (ups, group.scaling, group.sizes)
    flat, flat_down = x.flatten(0, -2), down.flatten(0, -2)
    if group.float8 is None:
        whole = _Joined.apply(flat, flat_down, group.matrix, *settled)  # type: ignore[no-untyped-call]
        whole = whole.unflatten(0, x.shape[:-1])
    else:
        whole = _Float8Linear.apply(flat, group.matrix, *group.float8)  # type: ignore[no-untyped-call]
        more = _Ups.apply(flat_down, group.ups, *settled)  # type: ignore[no-untyped-call]
        whole = whole.unflatten(0, x.shape[:-1]) + more.unflatten(0, x.shape[:-1])
    if len(group.sizes) == 1:
        return (whole,)
    outputs: tuple[torch.Tensor, ...] = _Split.apply(whole, group.sizes)  # type: ignore[no-untyped-call]
    return outputs


@torch.library.custom_op("tuneyard::side_by_side", mutates_args=())
def side_by_side(pieces: list[torch.Tensor]) -> torch.Tensor:
    """(..., sum of columns), each of the pieces computed and written on its own.

    Of `torch.cat` the compiler makes one loop over all columns, which computes every piece for each of them,
    throws away all but one and can be joined with no other. The gradients of a layer's gate and up, with what
    they come from, were three kernels of 593 us and are one of 271 (H200, 8,192 tokens of the 4B).
    """
    return torch.cat(pieces, dim=-1)


@side_by_side.register_fake
def _(pieces: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat(pieces, dim=-1)


@register_lowering(torch.ops.tuneyard.side_by_side.default, type_promotion_kind=None)
def _(pieces: list[Any]) -> Any:
    return TensorBox(ConcatKernel.create(pieces, len(pieces[0].get_size()) - 1))


class _Split(torch.autograd.Function):
    """`torch.split` of the last dimension, whose gradient is put together by `side_by_side`."""

    @staticmethod
    def forward(ctx: Any, whole: torch.Tensor, sizes: list[int]) -> tuple[torch.Tensor, ...]:  # noqa: ARG004
        return torch.split(whole, sizes, dim=-1)

    @staticmethod
    def backward(ctx: Any, *outputs: torch.Tensor) -> tuple[torch.Tensor, None]:  # noqa: ARG004
        return side_by_side(list(outputs)), None


class _Joined(torch.autograd.Function):
    """[x, down] times the group's matrix.

    Args:
        ups: (all outputs, rank), what the matrix has in its last columns; here for its gradient alone.
        sizes: outputs of each module.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        down: torch.Tensor,
        matrix: torch.Tensor,
        ups: torch.Tensor,
        scaling: float,
        sizes: list[int],
    ) -> torch.Tensor:
        ctx.save_for_backward(down, matrix)
        ctx.inputs, ctx.rank, ctx.scaling, ctx.sizes = x.shape[1], ups.shape[1], scaling, sizes
        joined: torch.Tensor = side_by_side([x, down])
        return joined @ matrix.t()

    @staticmethod
    def backward(ctx: Any, *outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        down, matrix = ctx.saved_tensors
        slopes = outputs[0] @ matrix
        ups = _slopes_of_ups(outputs[0], down, ctx.rank, ctx.scaling, ctx.sizes)
        return slopes[:, : ctx.inputs], slopes[:, ctx.inputs :], None, ups, None, None


class _Ups(torch.autograd.Function):
    """down times the group's ups: what `_Joined` does, where the frozen matrix has no columns for them."""

    @staticmethod
    def forward(
        ctx: Any,
        down: torch.Tensor,
        matrix: torch.Tensor,
        ups: torch.Tensor,
        scaling: float,
        sizes: list[int],
    ) -> torch.Tensor:
        ctx.save_for_backward(down, matrix)
        ctx.rank, ctx.scaling, ctx.sizes = ups.shape[1], scaling, sizes
        return down @ matrix.t()

    @staticmethod
    def backward(ctx: Any, *outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        down, matrix = ctx.saved_tensors
        ups = _slopes_of_ups(outputs[0], down, ctx.rank, ctx.scaling, ctx.sizes)
        return outputs[0] @ matrix, None, ups, None, None


def _slopes_of_ups(
    outputs: torch.Tensor, down: torch.Tensor, rank: int, scaling: float, sizes: list[int]
) -> torch.Tensor:
    """(all outputs, rank) float32: in the product of all outputs by all ranks each module has a block."""
    rows = torch.split(outputs.t() @ down, sizes)
    return torch.cat([own[:, place * rank :][:, :rank] for place, own in enumerate(rows)]).float() * scaling


def _dropped_product(x: torch.Tensor, seed: torch.Tensor, share: float, weight: torch.Tensor) -> torch.Tensor:
    return linear(seeded_dropout(x, seed, share), weight)


def _keep_products() -> Any:
    """The product has a few columns: it is cheaper to keep than to compute again."""
    return create_selective_checkpoint_contexts([torch.ops.aten.mm.default])  # type: ignore[no-untyped-call]


def seeded_dropout(x: torch.Tensor, seed: torch.Tensor, share: float) -> torch.Tensor:
    """Zero a share of the elements, chosen by a hash of position and seed, and scale up the others.

    Args:
        seed: an int32 scalar tensor.
    """
    bits = torch.arange(x.numel(), dtype=torch.int32, device=x.device).view(x.shape)
    # The seed comes in twice, or the mask of one seed would be that of another in another order. It comes in
    # first of all, or the compiler would fold the product into an index of more than 32 bits.
    bits = (bits ^ seed) * GOLDEN + seed
    # Shifts keep the sign: what they bring in from it is masked away.
    bits = (bits ^ ((bits >> 15) & 0x1FFFF)) * MIX_1
    bits = (bits ^ ((bits >> 13) & 0x7FFFF)) * MIX_2
    # A product's highest bits depend on all of its factor's: they decide, and need no more mixing.
    kept = bits >= MIN_INT32 + int(share * 2**32)
    return torch.where(kept, x * (1 / (1 - share)), 0)


def frozen_dtype(model: Any) -> str:
    """The dtype in which the adapted matrices are multiplied."""
    return str(model.input_groups[0].matrix.dtype).removeprefix("torch.")


class _Float8Linear(torch.autograd.Function):
    """x @ weight.T with both rounded to float8, a scale for each row of either, summed in float32.

    Args:
        x: (tokens, inputs).
        weight, scale: (outputs, inputs) float8 and (1, outputs) float32.
        backward, backward_scale: (inputs, outputs) float8 and (1, inputs) float32, for the gradient of x.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        scale: torch.Tensor,
        backward: torch.Tensor,
        backward_scale: torch.Tensor,
    ) -> torch.Tensor:
        ctx.save_for_backward(backward, backward_scale)
        return _product(x, weight, scale)

    @staticmethod
    def backward(ctx: Any, *outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        weight, scale = ctx.saved_tensors
        return _product(outputs[0], weight, scale), None, None, None, None


def _product(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    rounded, row_scale = _rows_to_float8(x)
    return torch._scaled_mm(
        rounded, weight.t(), scale_a=row_scale, scale_b=scale, out_dtype=x.dtype, use_fast_accum=True
    )


def _rows_to_float8(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The matrix in float8, contiguous, and the scale of each row (rows, 1): matrix = float8 * scale."""
    scale = matrix.abs().amax(dim=1, keepdim=True).float().clamp(min=1e-12) / FLOAT8_MAX
    rounded = (matrix.float() / scale).clamp(-FLOAT8_MAX, FLOAT8_MAX).to(FLOAT8)
    return rounded.contiguous(), scale


def _input_of(name: str) -> str:
    """What names the input of an adapted module: its parent, and which of the parent's inputs it reads."""
    parent, _, last = name.rpartition(".")
    shared = next((group[0] for group in SAME_INPUT if last in group), last)
    return f"{parent}.{shared}"

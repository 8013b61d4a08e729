"""The parts of a compiled decoder layer: attention over packed documents, LoRA, and float8 products."""

from __future__ import annotations

from typing import Any

import peft
import torch
from torch.nn.attention import varlen
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

FLOAT8 = torch.float8_e4m3fn
FLOAT8_MAX = torch.finfo(FLOAT8).max
# Multipliers of the 32-bit finaliser of MurmurHash3 and the golden ratio, as signed numbers.
GOLDEN, MIX_1, MIX_2 = -1640531535, -2048144789, -1028477387
MAX_INT32 = 2**31 - 1
# In the models that this engine takes.
SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def register_attention(name: str) -> None:
    """Tell transformers of attention over a flat row of documents, and that it needs no mask."""
    AttentionInterface.register(name, packed_attention)
    AttentionMaskInterface.register(name, lambda *_args, **_kwargs: None)


def packed_attention(
    module: torch.nn.Module,  # noqa: ARG001 - transformers' signature
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,  # noqa: ARG001 - transformers' signature
    scaling: float | None = None,
    dropout: float = 0.0,  # noqa: ARG001 - transformers' signature
    *,
    cu_seq_lens_q: torch.Tensor,
    max_length_q: int,
    sliding_window: int | None = None,
    **kwargs: Any,  # noqa: ARG001 - transformers' signature
) -> tuple[torch.Tensor, None]:
    """Causal attention of each document to itself.

    Args:
        query, key, value: (1, heads, tokens, width); key and value may have fewer heads.
        cu_seq_lens_q: (documents + 1,) int32, where each document begins, and the end.
        max_length_q: the most tokens that a document may have.

    Returns:
        (1, tokens, heads, width), and no weights.
    """
    q, k, v = (states.squeeze(0).transpose(0, 1) for states in (query, key, value))
    window = (-1, 0) if sliding_window is None else (sliding_window - 1, 0)
    out: Any = varlen.varlen_attn(
        q,
        k,
        v,
        cu_seq_lens_q,
        cu_seq_lens_q,
        max_length_q,
        max_length_q,
        scale=scaling,
        window_size=window,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out.unsqueeze(0), None


class FusedLora(peft.tuners.lora.Linear):  # type: ignore[misc]
    """A LoRA linear in the base's dtype whose dropout is computed from a seed, forwards and backwards.

    The mask is arithmetic on the positions: the compiler folds it into its neighbours and the backward pass
    computes it again. Nothing of it is stored, and a recomputed layer sees the same one.
    """

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:  # noqa: ARG002
        base = self.base_layer
        if self.float8 is not None:
            result = float8_linear(x, base.weight, *self.float8)
            result = result if base.bias is None else result + base.bias
        else:
            result = linear(x, base.weight, base.bias)
        first = self.lora_A["default"].weight.to(x.dtype)
        if self.training and self.dropout_share:
            # Marked for the compiler as to be computed again, or it would store what is left of x.
            down = checkpoint(
                _dropped_product,
                x,
                self.seed,
                self.dropout_share,
                first,
                use_reentrant=False,
                preserve_rng_state=False,
                context_fn=_keep_products,
            )
        else:
            down = linear(x, first)
        up = (self.lora_B["default"].weight * self.scaling["default"]).to(x.dtype)
        return result + linear(down, up)


def fuse_adapters(model: Any) -> None:
    """Turn the PEFT model's LoRA linears into fused ones, in place; their parameters stay what they are."""
    modules = [(name, module) for name, module in model.named_modules() if _is_adapted(module)]
    # Those that read one input share its mask: the compiler computes what they drop once.
    inputs = list(dict.fromkeys(_input_of(name) for name, _ in modules))
    device = next(model.parameters()).device
    # One tensor for all, so that drawing new seeds is one kernel; in steps of 16 bytes, as compiled code
    # wants its inputs aligned.
    seeds = torch.zeros(len(inputs), 4, dtype=torch.int32, device=device)
    model.register_buffer("lora_seeds", seeds, persistent=False)
    for name, module in modules:
        module.__class__ = FusedLora
        module.seed = seeds[inputs.index(_input_of(name)), 0]
        dropout = module.lora_dropout["default"]
        module.dropout_share = float(dropout.p) if isinstance(dropout, torch.nn.Dropout) else 0.0
        module.float8 = None


def draw_seeds(model: Any) -> None:
    """New dropout masks for the coming micro-batch, from torch's random numbers on the device."""
    if model.training:
        model.lora_seeds.random_(0, MAX_INT32)


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
    bits = (bits ^ ((bits >> 16) & 0xFFFF)) * MIX_1
    bits = (bits ^ ((bits >> 13) & 0x7FFFF)) * MIX_2
    bits = bits ^ ((bits >> 16) & 0xFFFF)
    kept = (bits & MAX_INT32) >= int(share * 2**31)
    return torch.where(kept, x * (1 / (1 - share)), 0)


def quantize_rows(model: Any) -> None:
    """Quantise the frozen matrix of every adapted linear to float8, once by rows and once by columns.

    A product with float8 operands needs the summed dimension contiguous: forwards that is the input's, on the
    way back the output's. The two copies together are as large as the bfloat16 matrix that they replace.
    """
    for module in _adapted(model):
        base = module.base_layer
        weight, scale = _rows_to_float8(base.weight.data)
        backward, backward_scale = _rows_to_float8(base.weight.data.t())
        base.weight = torch.nn.Parameter(weight, requires_grad=False)
        module.float8 = (scale.t(), backward, backward_scale.t())


def float8_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    backward: torch.Tensor,
    backward_scale: torch.Tensor,
) -> torch.Tensor:
    """x @ weight.T with both rounded to float8, a scale for each row of either, summed in float32.

    Args:
        x: (..., inputs).
        weight, scale: (outputs, inputs) float8 and (1, outputs) float32.
        backward, backward_scale: (inputs, outputs) float8 and (1, inputs) float32, for the gradient of x.
    """
    flat = x.flatten(0, -2)
    out: torch.Tensor = _Float8Linear.apply(flat, weight, scale, backward, backward_scale)  # type: ignore[no-untyped-call]
    return out.view(*x.shape[:-1], -1)


def frozen_dtype(model: Any) -> str:
    """The dtype in which the adapted matrices are multiplied."""
    return str(_adapted(model)[0].base_layer.weight.dtype).removeprefix("torch.")


class _Float8Linear(torch.autograd.Function):
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


def _adapted(model: Any) -> list[Any]:
    return [module for module in model.modules() if _is_adapted(module)]


def _is_adapted(module: Any) -> bool:
    return isinstance(module, peft.tuners.lora.Linear)


def _input_of(name: str) -> str:
    """What names the input of an adapted module: its parent, and which of the parent's inputs it reads."""
    parent, _, last = name.rpartition(".")
    shared = next((group[0] for group in SAME_INPUT if last in group), last)
    return f"{parent}.{shared}"

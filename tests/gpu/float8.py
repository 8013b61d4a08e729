"""float8 by the book: what a product with rounded operands is, in float32 and without the compiled engine."""

from __future__ import annotations

from typing import Any

import peft
import torch

FLOAT8 = torch.float8_e4m3fn


def round_products(model: Any) -> None:
    """Let a float32 PEFT model multiply every adapted matrix rounded to float8, forwards and backwards."""
    for module in model.modules():
        if isinstance(module, peft.tuners.lora.Linear):
            module.base_layer.forward = _rounded_product(module.base_layer.weight)


def rounded(matrix: torch.Tensor) -> torch.Tensor:
    """(rows, columns): each row as float8 has it when its largest element is the largest that float8 has."""
    scale = matrix.abs().amax(dim=-1, keepdim=True).clamp(min=1e-12) / torch.finfo(FLOAT8).max
    return (matrix / scale).to(FLOAT8).to(matrix.dtype) * scale


def _rounded_product(weight: torch.Tensor) -> Any:
    return lambda x: _RoundedLinear.apply(x, weight)  # type: ignore[no-untyped-call]


class _RoundedLinear(torch.autograd.Function):
    """x times weight.T; on the way back the slopes are rounded, and the weight by its columns."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(weight)
        return rounded(x) @ rounded(weight).t()

    @staticmethod
    def backward(ctx: Any, *slopes: torch.Tensor) -> tuple[torch.Tensor, None]:
        (weight,) = ctx.saved_tensors
        return rounded(slopes[0]) @ rounded(weight.t()).t(), None

"""Attention over a flat row of packed documents, by torch's kernel of variable length."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.attention import varlen
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

# A head's width is filled up to a multiple of this.
WIDTHS = 8


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
    # A view of the group's product would keep all of that in memory for the backward pass.
    v = v.contiguous()
    width = q.shape[-1]
    if width % WIDTHS:
        # The kernel takes no other widths; zeros add nothing to a product.
        q, k, v = (torch.nn.functional.pad(states, (0, -width % WIDTHS)) for states in (q, k, v))
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
    return out[..., :width].unsqueeze(0), None

"""Cross-entropy of the output head, for the tokens that are learnt alone, a chunk of them at a time.

The gradient of the hidden states is computed in the forward pass, while a chunk's logits are there: they are
never stored and never computed twice. The head itself is frozen.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from transformers.utils import ModelOutput

# Logits of so many tokens at a time: 0.26 GB a copy at a vocabulary of 128k in bfloat16.
CHUNK = 1024


@dataclass
class Loss(ModelOutput):  # type: ignore[misc]
    """What the trainer reads of a forward pass, as TRL's own loss over chunks names it."""

    loss: torch.Tensor | None = None
    num_correct_tokens: torch.Tensor | None = None
    num_valid_tokens: torch.Tensor | None = None


def head_loss(
    hidden: torch.Tensor, weight: torch.Tensor, kept: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed cross-entropy and the count of right predictions.

    Args:
        hidden: (tokens, width) states in front of the head.
        weight: (vocabulary, width) of the head, frozen.
        kept: (learnt,) int64, distinct positions that predict a token.
        targets: (learnt,) int64, the tokens to predict.

    Returns:
        two float32 scalars; the first carries the gradient to `hidden`.
    """
    loss, correct = _HeadLoss.apply(hidden, weight, kept, targets)  # type: ignore[no-untyped-call]
    return loss, correct


def learn_through_head(base: Any, decoder_arguments: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Let a causal language model's forward give `Loss` for batches that say what is kept.

    Args:
        base: the causal language model under its adapters.
        decoder_arguments: from a batch's tensors beside `input_ids` and `position_ids` to what the decoder
            takes for them; what it takes it out of the batch.
    """

    def forward(
        self: Any,
        input_ids: torch.Tensor,
        *,
        position_ids: torch.Tensor,
        kept: torch.Tensor,
        targets: torch.Tensor,
        num_items_in_batch: torch.Tensor | int | None = None,
        **batch: Any,
    ) -> Loss:
        states = self.model(
            input_ids=input_ids, position_ids=position_ids, use_cache=False, **decoder_arguments(batch)
        ).last_hidden_state
        loss, correct = head_loss(states.flatten(0, 1), self.lm_head.weight, kept, targets)
        # Filled on the device: a copy from the host would wait for all that the device still has to do.
        valid = torch.full_like(loss, len(targets), requires_grad=False)
        # An evaluation gives no count: the mean is then of this batch.
        return Loss(loss / (valid if num_items_in_batch is None else num_items_in_batch), correct, valid)

    base.forward = types.MethodType(forward, base)


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, kept: torch.Tensor, targets: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        learning = hidden.requires_grad
        states = hidden.detach().index_select(0, kept)
        gradients = torch.empty_like(states) if learning else None
        totals = torch.zeros(2, dtype=torch.float32, device=hidden.device)
        step = _compiled_step() if hidden.is_cuda else _step
        for start in range(0, len(kept), CHUNK):
            end = min(start + CHUNK, len(kept))
            short = CHUNK - (end - start) if hidden.is_cuda else 0
            # One shape for all chunks, so that the compiled step is compiled once.
            part = torch.nn.functional.pad(states[start:end], (0, 0, 0, short))
            wanted = torch.nn.functional.pad(targets[start:end], (0, short), value=-100)
            summed, gradient = step(part, weight, wanted, learning)
            totals += summed
            if gradients is not None and gradient is not None:
                gradients[start:end] = gradient[: end - start]
        ctx.save_for_backward(gradients, kept)
        ctx.shape = hidden.shape
        loss, correct = totals.clone().unbind()
        ctx.mark_non_differentiable(correct)
        return loss, correct

    @staticmethod
    def backward(ctx: Any, *outputs: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        gradients, kept = ctx.saved_tensors
        scattered = gradients.new_zeros(ctx.shape)
        # The factor in float32: rounded to bfloat16 it would move every gradient by up to 0.4%, all one way.
        scattered[kept] = (gradients.float() * outputs[0]).to(gradients.dtype)
        return scattered, None, None, None


@cache
def _compiled_step() -> Callable[..., tuple[torch.Tensor, torch.Tensor | None]]:
    return torch.compile(_step, dynamic=False, fullgraph=True)


def _step(
    states: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, learning: bool
) -> tuple[torch.Tensor, Any]:
    """Sums of loss and right predictions of one chunk, and the gradient of its states."""
    logits = (states @ weight.t()).float()
    valid = targets >= 0
    safe = targets.clamp(min=0)[:, None]
    peak, best = logits.max(dim=-1, keepdim=True)
    exponents = (logits - peak).exp()
    total = exponents.sum(dim=-1, keepdim=True)
    picked = logits.gather(1, safe)
    loss = ((total.log() + peak - picked)[:, 0] * valid).sum()
    # The first of the largest: in bfloat16 several often are, and not all of them would be said.
    correct = ((best == safe)[:, 0] & valid).sum()
    summed = torch.stack([loss, correct.to(torch.float32)])
    if not learning:
        return summed, None
    columns = torch.arange(logits.shape[1], device=logits.device)
    slopes = exponents / total - (columns == safe).to(torch.float32)
    slopes = (slopes * valid[:, None]).to(states.dtype)
    return summed, slopes @ weight

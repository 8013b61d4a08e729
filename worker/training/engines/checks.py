"""What the reference engine tries out before it trains: it takes models of any type, most of them untried.

A packed row is right only where a model keeps apart documents whose position ids start again. Attention with
a mask that transformers makes from those does; masks of a model's own making may not, and layers that carry
a state along the row do not. Nor is each model's head a plain product, as the loss over chunks takes it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from shared.plan import Plan
from shared.spec import JobSpec
from worker.training.collate import IGNORED
from worker.training.models import unavailable

# Of the first row of the data, which is one of the longest.
TOKENS = 64
# By so much a token's states may move, relative to their length. They don't move at all, but where experts
# multiply another number of tokens, which rounds otherwise.
MOVED = {"fp32": 1e-4, "bf16": 0.03}
# By so much of the loss, or of 1 where it is less: logits in bfloat16 are rounded by some hundredths.
LOSS_OFF = 0.02


def check_model(trainer: Any, spec: JobSpec, plan: Plan) -> None:
    """Try out whether a row's second half changes with its first, and whether the loss is that of the logits.

    Three passes over 64 tokens, without gradients; nothing random is drawn.

    Raises:
        JobFailure: `model_unavailable`: packed documents would see each other, or the loss would be wrong.
    """
    ids = [int(token) for token in trainer.train_dataset[0]["input_ids"][:TOKENS]]
    with _tried(trainer):
        moved = _moved(trainer, ids) if spec.packing else 0.0
        told, own = _losses(trainer, ids)
    if moved > MOVED["fp32" if plan.precision == "fp32" else "bf16"]:
        unavailable(
            f"Documents of one packed row would see each other in {spec.model} (type {_type(trainer)}): "
            f"other words in front of a document move its states by {moved:.1%}.",
            "Set packing to false: each document then has a row of its own.",
        )
    if abs(told - own) > LOSS_OFF * max(own, 1.0):
        unavailable(
            f"The loss of {spec.model} (type {_type(trainer)}) would be computed wrongly: as {told:.3f}, "
            f"where the model's own logits give {own:.3f}.",
            "Choose a model of another type.",
        )


@contextmanager
def _tried(trainer: Any) -> Iterator[None]:
    trainer.model.eval()
    try:
        with torch.no_grad(), trainer.accelerator.autocast():
            yield
    finally:
        trainer.model.train()


def _moved(trainer: Any, ids: list[int]) -> float:
    """How far the states of the second document's tokens move at most when the first one's words change."""
    half = len(ids) // 2

    def states(first: list[int]) -> torch.Tensor:
        row = {"input_ids": first + ids[half:], "labels": ids, "seq_lengths": [half, len(ids) - half]}
        batch = _inputs(trainer, row)
        backbone = trainer.model.get_base_model().base_model
        found = backbone(
            input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
        ).last_hidden_state
        second: torch.Tensor = found[0, half:].float()
        return second

    before, after = states(ids[:half]), states([ids[-1]] * half)
    return float(((after - before).norm(dim=-1) / before.norm(dim=-1).clamp(min=1e-12)).max())


def _losses(trainer: Any, ids: list[int]) -> tuple[float, float]:
    """The mean loss of one document as training computes it, and from the model's own logits."""
    batch = _inputs(trainer, {"input_ids": ids, "labels": ids, "seq_lengths": [len(ids)]})
    # Without what TRL adds for the balance of experts.
    told = trainer.model(**batch, output_router_logits=False).loss
    labels = batch.pop("labels")[0, 1:]
    logits = trainer.model(**batch, use_cache=False).logits[0, :-1].float()
    own = torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORED)
    return float(told), float(own)


def _inputs(trainer: Any, row: dict[str, Any]) -> dict[str, torch.Tensor]:
    batch = trainer.data_collator([row])
    return {n: tensor.to(trainer.args.device) for n, tensor in batch.items() if n != "num_tokens"}


def _type(trainer: Any) -> str:
    return str(trainer.model.get_base_model().config.model_type)

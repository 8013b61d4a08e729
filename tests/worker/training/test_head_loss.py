"""The head's loss against torch's own cross-entropy, with its gradient and its counts."""

from __future__ import annotations

import pytest
import torch

from worker.training import head_loss as module
from worker.training.head_loss import head_loss

pytestmark = pytest.mark.train


@pytest.mark.parametrize("learnt", [1, 7, 30])
@pytest.mark.parametrize("chunk", [8, 1024])
def test_loss_gradient_and_hits_are_those_of_cross_entropy(
    learnt: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK", chunk)
    torch.manual_seed(learnt)
    weight = torch.randn(50, 16)
    kept = torch.randperm(30)[:learnt].sort().values
    targets = torch.randint(0, 50, (learnt,))
    hidden = torch.randn(30, 16, requires_grad=True)
    # Some right answers, or there would be nothing to count.
    with torch.no_grad():
        hidden[kept[::2]] += 5 * weight[targets[::2]]
    loss, correct = head_loss(hidden, weight, kept, targets)
    (loss / 3).backward()
    again = hidden.detach().clone().requires_grad_()
    logits = again[kept] @ weight.t()
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    (expected / 3).backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert correct.item() == (logits.argmax(-1) == targets).sum().item() > 0
    torch.testing.assert_close(hidden.grad, again.grad, rtol=1e-4, atol=1e-5)


def test_without_gradients_none_is_computed() -> None:
    weight, hidden = torch.randn(9, 4), torch.randn(5, 4)
    loss, _ = head_loss(hidden, weight, torch.tensor([0, 3]), torch.tensor([1, 8]))
    assert not loss.requires_grad


def test_of_equal_logits_the_first_is_the_answer() -> None:
    weight, hidden = torch.eye(4).repeat_interleave(2, dim=0), torch.eye(4)
    kept = torch.arange(4)
    for first, hits in ((0, 4), (1, 0)):
        _, correct = head_loss(hidden, weight, kept, 2 * kept + first)
        assert correct.item() == hits


def test_a_mean_moves_no_gradient_by_the_rounding_of_its_count() -> None:
    """1/871 in bfloat16 is 0.3% off, which every gradient would be."""
    torch.manual_seed(0)
    weight, kept = torch.randn(50, 64, dtype=torch.bfloat16), torch.arange(600)
    targets = torch.randint(0, 50, (600,))
    hidden = torch.randn(600, 64, dtype=torch.bfloat16, requires_grad=True)
    summed = torch.autograd.grad(head_loss(hidden, weight, kept, targets)[0], hidden)[0].double() / 871
    mean = torch.autograd.grad(head_loss(hidden, weight, kept, targets)[0] / 871, hidden)[0].double()
    assert ((mean * summed).sum() / (summed * summed).sum()).item() == pytest.approx(1, abs=1e-3)

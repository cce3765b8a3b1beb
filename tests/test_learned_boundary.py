"""Learned boundaries: probabilities, losses and training."""

from __future__ import annotations

import re

import pytest
import torch

import fastcompress as fc
from fastcompress.nn import LearnedBoundary, ratio_loss, straight_through


def test_straight_through_is_one_with_a_gradient():
    p = torch.tensor([0.3, 0.9], requires_grad=True)
    out = straight_through(p)
    assert out.tolist() == [1.0, 1.0]
    (grad,) = torch.autograd.grad((out * torch.tensor([2.0, 5.0])).sum(), p)
    assert grad.tolist() == [2.0, 5.0]


def test_ratio_loss():
    """The loss is 1 at the target ratio and larger on both sides of it."""
    for ratio in (2.0, 3.0, 8.0):

        def at(share: float, ratio: float = ratio) -> float:
            boundary = torch.arange(800) < share * 800
            return float(ratio_loss(boundary.float(), boundary, ratio))

        assert at(1 / ratio) == pytest.approx(1.0, abs=1e-2)
        assert at(0.0) > 1.05 and at(1.0) > 1.05
        p = torch.full((100,), 0.3, requires_grad=True)
        few, many = torch.zeros(100, dtype=torch.bool), torch.ones(100, dtype=torch.bool)
        assert torch.autograd.grad(ratio_loss(p, few, ratio), p)[0].sum() < 0  # too few: increase p
        assert torch.autograd.grad(ratio_loss(p, many, ratio), p)[0].sum() > 0
    with pytest.raises(ValueError, match="ratio must be more than 1 and finite, got 1"):
        ratio_loss(p, few, 1)
    assert ratio_loss(torch.zeros(0), few[:0], 2.0) == 0


@pytest.mark.parametrize("reduce", ("mean", "first"))
def test_definition(reduce: str):
    torch.manual_seed(0)
    module = LearnedBoundary(6, 3.0, reduce)
    x = torch.randn(40, 6)
    cu = torch.tensor([0, 17, 17, 18, 40])
    for trained in (False, True):
        if trained:
            torch.nn.init.normal_(module.query.weight)
        pooled = module(x, cu_seqlens=cu)
        starts, probabilities = [], []
        for a, b in zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True):
            for t in range(a, b):
                q, k = module.query(x[t - 1]), module.key(x[t])
                p = 1.0 if t == a else float((1 - torch.cosine_similarity(q, k, dim=0)) / 2)
                starts += [t] if p > 0.5 else []
                probabilities.append(p)
        assert pooled.segments.starts.tolist() == starts and 4 < len(starts) < 40
        p = torch.tensor(probabilities)
        torch.testing.assert_close(module.loss, ratio_loss(p, p > 0.5, 3.0))
        torch.testing.assert_close(pooled.values, fc.segment_reduce(x, pooled.segments, reduce))
        padded = torch.nn.utils.rnn.pad_sequence(x.split([17, 0, 1, 22]), True)
        again = module(padded, lengths=torch.tensor([17, 0, 1, 22]))
        torch.testing.assert_close(again.values, pooled.values)
        torch.testing.assert_close(again.cu_seqlens, pooled.cu_seqlens)
    if not trained:  # H-Net's untrained router is a threshold of 1
        assert starts == fc.segment_pool(x, cu_seqlens=cu, rule="threshold:1.0").segments.starts.tolist()
    assert module(torch.zeros(0, 6)).values.shape == (0, 6)


def test_training_recovers_from_a_state_without_boundaries():
    """All frames are similar, so there are no boundaries at first. The ratio loss adds boundaries, the loss of the task
    decreases, and every parameter changes."""
    torch.manual_seed(0)
    sounds = torch.randn(4, 12) + 3 * torch.randn(12)
    module = LearnedBoundary(12, 5.0)
    head = torch.nn.Linear(12, 4)
    optimizer = torch.optim.Adam([*module.parameters(), *head.parameters()], 5e-3)
    shares, losses = [], []
    for _ in range(200):
        labels = torch.randint(0, 4, (16, 8)).repeat_interleave(4, 1)
        x = (sounds[labels] + 0.3 * torch.randn(16, 32, 12)).flatten(0, 1)
        pooled = module(x, cu_seqlens=torch.arange(0, 513, 32))
        expected = labels.flatten()[pooled.segments.starts]
        task = torch.nn.functional.cross_entropy(head(pooled.values), expected)
        optimizer.zero_grad()
        (task + 0.3 * module.loss).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in module.parameters())
        optimizer.step()
        shares.append(len(pooled.values) / 512)
        losses.append(float(task.detach()))
    assert shares[0] == 16 / 512 and 0.12 < sum(shares[-20:]) / 20 < 0.33
    assert sum(losses[-20:]) / 20 < 0.3 * losses[0]


def test_the_task_alone_moves_boundaries():
    """With the straight-through factor, the boundary of a token that lowers the loss becomes more likely."""
    module = LearnedBoundary(4, 2.0)
    x = torch.tensor([[1.0, 0, 0, 0], [-1, 0.2, 0, 0], [1, 0, 0.3, 0]])
    pooled = module(x)
    assert pooled.segments.starts.tolist() == [0, 1, 2]
    pooled.values[1].sum().backward()
    before = module.probability(x)[1].detach()
    with torch.no_grad():
        for p in module.parameters():
            p -= 0.01 * p.grad
    # The sum is -0.8, so a larger factor lowers it.
    assert module.probability(x)[1] > before


def test_refused():
    for call, message in (
        (lambda: LearnedBoundary(4, 1.0), "ratio must be more than 1 and finite, got 1.0"),
        (lambda: LearnedBoundary(4, 2.0, "median"), "reduce must be one of mean, sum"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            call()
    assert "ratio=2.0, reduce=mean" in repr(LearnedBoundary(4, 2.0))


def test_integrate_and_fire_begins_as_a_mean():
    for ratio in (2.0, 3.0, 4.5):
        module = fc.nn.IntegrateAndFire(4, ratio).eval()
        fired = module(torch.randn(90, 4))
        torch.testing.assert_close(fired.total, torch.tensor([90 / ratio], dtype=torch.float64), rtol=1e-6, atol=0)
        assert module.loss < 1e-4


def test_integrate_and_fire_on_odd_batches():
    module = fc.nn.IntegrateAndFire(4, 3.0).train()
    x = torch.randn(20, 4)
    x[7] = torch.nan  # affects its own token and no other
    fired = module(x, cu_seqlens=torch.tensor([0, 12, 20]))
    assert fired.values.isnan().any(1).sum() == 1 and module.loss.isfinite()
    for empty, layout in ((torch.zeros(0, 4), {}), (torch.zeros(0, 5, 4), {"lengths": torch.zeros(0).long()})):
        assert module(empty, **layout).values.shape == (0, 4)
        assert module.loss == 0

"""Batches of training: each example is used once per epoch, and examples of similar length are together."""

from __future__ import annotations

import pytest

from fastcompress.training.batches import BatchPlan


def test_every_example_once_per_epoch():
    plan = BatchPlan([float(i % 7) for i in range(101)], 4, num_processes=3, seed=5)
    assert plan.steps_per_epoch == 8
    for epoch in range(3):
        seen = [i for s in range(8) for p in range(3) for i in plan.batch(8 * epoch + s, p)]
        assert len(seen) == len(set(seen)) == 96
    again = BatchPlan(plan.lengths, 4, 3, 5)
    assert [again.batch(s, 1) for s in (17, 3, 9)] == [plan.batch(s, 1) for s in (17, 3, 9)]
    assert plan.batch(0, 0) != plan.batch(8, 0)
    # A batch contains examples of similar length.
    spread = [max(x) - min(x) for x in ([plan.lengths[i] for i in plan.batch(s, 0)] for s in range(8))]
    assert sum(spread) / 8 < 1.5
    few = BatchPlan([1.0, 2.0], 8)
    assert sorted(set(few.batch(0))) == [0, 1] and len(few.batch(0)) == 8
    for wrong in ({"batch_size": 0}, {"num_processes": 0}):
        with pytest.raises(ValueError, match="must be at least 1, got 0"):
            BatchPlan([1.0], **({"batch_size": 1} | wrong))
    with pytest.raises(ValueError, match="at least one example"):
        BatchPlan([], 1)

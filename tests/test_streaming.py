"""Streaming returns the tokens of the whole sequence, bit for bit, and as soon as they are final."""

from __future__ import annotations

import random
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastcompress as fc
from tests.support.sample_inputs import DTYPES, features

RULES = (
    fc.Uniform(1),
    fc.Uniform(3),
    fc.Uniform(3, tail="drop"),
    fc.Uniform(150),
    fc.Threshold(0.15),
    fc.Threshold(0.9, min_len=3, max_len=7),
    fc.Threshold(2.5, max_len=200),
    fc.Threshold(float("inf")),
    fc.LocalMax(),
    fc.LocalMax(order=2, min_len=2, max_len=5),
    fc.LocalMax(order=9, threshold=0.3),
    fc.LocalMax(threshold=2.5),
    fc.LocalMax(max_len=2),
    fc.Lookback(1, 0.3),
    fc.Lookback(3, 0.8, min_len=2, max_len=90),
    fc.MinVariance(2.5, max_len=4),
)
CHUNKS = ("one by one", "whole", "random", "70")


def chunks(x: Tensor, kind: str, seed: int = 0) -> list[Tensor]:
    g, found, t = random.Random(seed), [], 0
    while t < len(x):
        size = {"one by one": 1, "whole": len(x), "70": 70}.get(kind) or g.choice([0, 1, 2, 3, 5, 17, 64, 65])
        found.append(x[t : t + size])
        t += size
    return found or [x]


def stream(rule: fc.Rule, x: Tensor, kind: str) -> tuple[Tensor, list[int], list[int]]:
    pool = fc.StreamingSegmentPool(rule)
    parts = [pool(chunk) for chunk in chunks(x, kind)]
    parts.append(pool.flush())
    values = torch.cat([part.values for part in parts])
    return values, *(torch.cat([getattr(p, name) for p in parts]).tolist() for name in ("starts", "lengths"))


def assert_same(found: Tensor, wanted: Tensor) -> None:
    assert found.dtype == wanted.dtype and found.shape == wanted.shape
    assert torch.equal(found.isnan(), wanted.isnan()) and torch.equal(found.nan_to_num(), wanted.nan_to_num())


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("kind", CHUNKS)
def test_the_same_tokens(kind: str, rule: fc.Rule):
    for dtype in DTYPES if kind == "random" else (torch.float32,):
        for what in ("iid", "smooth", "repeated", "zeros", "nonfinite"):
            for rows in (0, 1, 2, 3, 64, 65, 330) if what == "smooth" else (200,):
                x = features(what, rows, 5, dtype)
                whole = fc.segment_pool(x, rule=rule)
                values, starts, lengths = stream(rule, x, kind)
                assert starts == whole.segments.starts.tolist() and lengths == whole.segments.lengths.tolist()
                assert_same(values, whole.values)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 90), st.integers(0, 10_000), st.integers(1, 6), st.integers(1, 3), st.integers(0, 3))
def test_any_chunks_and_rules(rows: int, seed: int, order: int, shortest: int, more: int):
    g = torch.Generator().manual_seed(seed)
    x = torch.randint(-1, 2, (rows, 3), generator=g).float()  # includes ties, zero rows and equal rows
    longest = None if more == 0 else shortest + more
    for rule in (
        fc.LocalMax(order=order, min_len=shortest, max_len=longest),
        fc.Lookback(order, 0.5, min_len=shortest, max_len=longest),
        fc.Threshold(0.5, min_len=shortest, max_len=longest),
    ):
        whole = fc.segment_pool(x, rule=rule)
        pool, parts = fc.StreamingSegmentPool(rule), []
        for chunk in chunks(x, "random", seed):
            parts.append(pool(chunk))
        parts.append(pool.flush())
        assert torch.cat([p.starts for p in parts]).tolist() == whole.segments.starts.tolist()
        assert torch.equal(torch.cat([p.values for p in parts]), whole.values)


@pytest.mark.parametrize(
    ("rule", "latency"),
    [
        ("uniform:3", 0),
        ("threshold:0.5", 1),
        ("local-max", 2),
        ("local-max:order=3", 4),
        ("lookback:2,threshold=0.5", 1),
    ],
)
def test_tokens_are_returned_as_soon_as_they_are_final(rule: str, latency: int):
    """A token is returned ``latency`` frames after the last frame of its segment, and not later."""
    x = features("iid", 120, 6, torch.float32)
    pool, seen = fc.StreamingSegmentPool(rule), 0
    delays = []
    for frame in x.split(1):
        seen += 1
        found = pool(frame)
        delays += [
            seen - (start + length) for start, length in zip(found.starts.tolist(), found.lengths.tolist(), strict=True)
        ]
    assert set(delays) == {latency} and len(delays) > 15


def test_state_stays_small():
    for rule in (fc.Threshold(float("inf")), fc.Uniform(10**6), fc.LocalMax(threshold=3.0), fc.Lookback(4, 3.0)):
        pool = fc.StreamingSegmentPool(rule)
        x = features("smooth", 5000, 4, torch.float32)
        for chunk in x.split(25):
            pool(chunk)
        held = [v for v in vars(pool).values() if isinstance(v, Tensor)]
        assert sum(v.untyped_storage().nbytes() for v in held) < 4 * 4 * (64 + 25 + 60) + 64
        assert len(pool._distances) < 5 and pool.pending == 5000
        assert torch.equal(pool.flush().values, fc.segment_pool(x, rule=rule).values)


def test_min_variance_returns_whole_blocks():
    x = features("smooth", 3700, 4, torch.float32)
    pool, parts = fc.StreamingSegmentPool("min-variance:rate=3"), []
    for chunk in x.split(700):
        parts.append(pool(chunk))
        assert pool.pending == pool._seen % 1500
    parts.append(pool.flush())
    whole = fc.segment_pool(x, rule="min-variance:rate=3")
    assert torch.equal(torch.cat([part.values for part in parts]), whole.values)
    assert torch.equal(torch.cat([part.starts for part in parts]), whole.segments.starts)


def test_undecided_frames_are_not_summed():
    """A block of the sum ends among frames that belong to the next segment after a later peak."""
    for seed in range(40):
        x = torch.randn(200, 3, generator=torch.Generator().manual_seed(seed))
        rule = fc.LocalMax(order=30)
        values, starts, _ = stream(rule, x, "one by one")
        whole = fc.segment_pool(x, rule=rule)
        assert starts == whole.segments.starts.tolist() and torch.equal(values, whole.values)


def test_one_stream_after_another():
    pool = fc.StreamingSegmentPool("local-max")
    for seed in range(3):
        x = features("iid", 50, 3 + seed, torch.float32, seed)
        values = torch.cat([pool(x[:20]).values, pool(x[20:]).values, pool.flush().values])
        assert torch.equal(values, fc.segment_pool(x).values)
    with pytest.raises(ValueError, match="flush needs at least one frame"):
        pool.flush()


def test_rules_that_need_the_whole_sequence_are_refused():
    for rule in ("top-k:3", "peak-height", "label-change", "local-max:prominence=0.1", "local-max:normalize=True"):
        with pytest.raises(NotImplementedError, match="needs the whole sequence and cannot be streamed"):
            fc.StreamingSegmentPool(rule)


def test_bad_chunks():
    pool = fc.StreamingSegmentPool()
    pool(torch.zeros(3, 4))
    for x, error, message in (
        (torch.zeros(3, 5), ValueError, "x must be [N, 4], torch.float32, on cpu like the earlier frames, got [3, 5]"),
        (torch.zeros(3, 4).half(), ValueError, "got [3, 4], torch.float16"),
        (torch.zeros(4), ValueError, "x must have shape [N, D], got [4]"),
        (torch.zeros(3, 4).long(), TypeError, "x must be"),
    ):
        with pytest.raises(error, match=re.escape(message)):
            pool(x)


# Integrate and fire


@pytest.mark.parametrize("tail", (None, 0.0, 0.5))
@pytest.mark.parametrize("kind", CHUNKS)
def test_integrate_and_fire(kind: str, tail: float | None):
    g = torch.Generator().manual_seed(1)
    for dtype in DTYPES:
        for rows, scale in ((0, 1.0), (1, 1.0), (1, 0.3), (90, 0.5), (200, 0.004), (90, 4.0)):
            x = torch.randn(rows, 3, generator=g).to(dtype)
            alpha = torch.rand(rows, generator=g) * scale
            whole = fc.integrate_and_fire(x, alpha, tail=tail)
            fire, parts = fc.StreamingIntegrateAndFire(tail=tail), []
            for a, b in zip(chunks(x, kind, 2), chunks(alpha[:, None], kind, 2), strict=True):
                parts.append(fire(a, b[:, 0]))
            parts.append(fire.flush())
            assert_same(torch.cat([values for values, _ in parts]), whole.values)
            assert torch.cat([ends for _, ends in parts]).tolist() == whole.ends.tolist()


@pytest.mark.parametrize("beta", (1.0, 0.9, 0.3, 0.1))
def test_integrate_and_fire_with_any_beta(beta: float):
    """Weights are tenths, whose sums miss the threshold by rounding."""
    g = torch.Generator().manual_seed(4)
    for trial in range(60):
        tail = (None, 0.0, 0.5, 1.0)[trial % 4]
        alpha = torch.randint(0, 11, (1 + trial,), generator=g).double() / 10
        x = torch.randn(1 + trial, 2, generator=g)
        whole = fc.integrate_and_fire(x, alpha, beta=beta, tail=tail)
        fire = fc.StreamingIntegrateAndFire(beta, tail)
        parts = [fire(x[i : i + 3], alpha[i : i + 3]) for i in range(0, len(x), 3)] + [fire.flush()]
        assert_same(torch.cat([values for values, _ in parts]), whole.values)
        assert torch.cat([ends for _, ends in parts]).tolist() == whole.ends.tolist()


def test_the_state_keeps_no_chunk_alive():
    chunk = torch.randn(20_000, 16)
    rules = ("local-max", "uniform:3", "threshold:9", "lookback:2,threshold=0")
    pools = [fc.StreamingSegmentPool(rule) for rule in rules]
    fire = fc.StreamingIntegrateAndFire()
    for pool in pools:
        pool(chunk)
    fire(chunk, torch.full((len(chunk),), 0.3))
    for state in (*pools, fire):
        held = [t.untyped_storage().nbytes() for t in vars(state).values() if isinstance(t, torch.Tensor)]
        assert held and max(held) < 100_000, (state, held)


def test_the_graph_does_not_grow_with_the_stream():
    encoder = torch.nn.Linear(4, 4)
    for rule in ("local-max", "uniform:3", "threshold:9", "lookback:2,threshold=0.5"):
        pool = fc.StreamingSegmentPool(rule)
        tokens = [pool(encoder(chunk)) for chunk in torch.randn(200, 4).split(20)]
        assert not any(found.values.requires_grad for found in tokens)
        assert not any(t.requires_grad for t in vars(pool).values() if isinstance(t, Tensor))
        assert not pool.flush().values.requires_grad


def test_integrate_and_fire_fires_at_once():
    fire = fc.StreamingIntegrateAndFire()
    counts = [len(fire(torch.ones(1, 2), torch.tensor([w]))[0]) for w in (0.5, 0.5, 0.25, 2.0, 0.0, 0.75)]
    assert counts == [0, 1, 0, 2, 0, 1]
    for x, alpha, message in (
        (torch.ones(1, 2), torch.tensor([-1.0]), "alpha must be finite and not negative"),
        (torch.ones(1, 2), torch.ones(2), "x must have shape [N, D] and alpha [N]"),
        (torch.ones(1, 3), torch.ones(1), "x must be [N, 2]"),
        (torch.ones(1, 2), torch.tensor([1e12]), "alpha must add up to fewer than 2**31 tokens of beta 1, got 1e+12"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            fire(x, alpha)
    with pytest.raises(ValueError, match="beta must be positive"):
        fc.StreamingIntegrateAndFire(beta=-1.0)
    with pytest.raises(ValueError, match="flush needs at least one frame"):
        fc.StreamingIntegrateAndFire().flush()

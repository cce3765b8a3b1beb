"""Numbers of NumPy and other numeric types are taken wherever a number is."""

from __future__ import annotations

import json
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch

import fastcompress as fc
from tests.support.sample_inputs import assert_same_bits

np = pytest.importorskip("numpy")
X = torch.randn(40, 16, generator=torch.Generator().manual_seed(1))
ALPHA = torch.rand(40, generator=torch.Generator().manual_seed(2))
IDS = torch.tensor([3, 9, 9, 4])

#: Each makes a result from a constructor of integers and one of floats.
CALLS: dict[str, Callable[[Any, Any], Any]] = {
    "window": lambda i, f: fc.banded_distance(X, i(2)).nan_to_num(),
    "lag": lambda i, f: fc.adjacent_distance(X, lag=i(2)).nan_to_num(),
    "seconds": lambda i, f: fc.segment_pool(X).segments.seconds(f(25)),
    "greedy": lambda i, f: fc.greedy_segments(X, f(0.25), max_len=i(5)).starts,
    "beta, tail": lambda i, f: fc.integrate_and_fire(X, ALPHA, beta=f(2), tail=f(0.25)).values,
    "rate, window": lambda i, f: fc.bipartite_merge(X, f(1.5), window=i(3)).values,
    "count": lambda i, f: fc.iterative_fusion(X, i(3)).values,
    "min_len, max_len": lambda i, f: fc.segments_from_mask(X[:, 0] > 0, min_len=i(2), max_len=i(4)).starts,
    "num_rows": lambda i, f: fc.segments_from_starts(torch.tensor([3]), i(40)).lengths,
    "Segments": lambda i, f: fc.segment_expand(
        X[:1], fc.Segments(IDS[:1], IDS[:1], IDS[:2].int(), IDS[:2].int(), i(7))
    ),
    "placeholder": lambda i, f: fc.row_groups(IDS, i(9), placeholder_counts=i(1)),
    "pack": lambda i, f: fc.pack(IDS, X, X[:5], placeholder=i(9)).inputs_embeds,
    "num_segments": lambda i, f: torch.tensor([fc.Uniform(3).num_segments(i(7)), fc.TopK(f(2)).num_segments(i(7))]),
    "streaming": lambda i, f: fc.StreamingSegmentPool(fc.Threshold(f(0.5), i(2)))(X).values,
    "streaming CIF": lambda i, f: fc.StreamingIntegrateAndFire(f(2), f(0.25))(X, ALPHA)[0],
    "BipartiteMerge": lambda i, f: fc.nn.BipartiteMerge(f(3), i(2))(X).values,
    "IterativeFusion": lambda i, f: fc.nn.IterativeFusion(i(3))(X).values,
    "GreedySegments": lambda i, f: fc.nn.GreedySegments(f(0.25), i(3))(X).values,
    "IntegrateAndFire": lambda i, f: fc.nn.IntegrateAndFire(16, f(4), f(0.5), f(0.25)).eval()(X).values,
    "LearnedBoundary": lambda i, f: fc.nn.LearnedBoundary(16, f(4))(X).values,
    "ratio_loss": lambda i, f: fc.nn.ratio_loss(ALPHA, ALPHA > 0.5, f(4)),
}
RULES: dict[str, Callable[[Any, Any], fc.Rule]] = {
    "uniform": lambda i, f: fc.Uniform(i(3)),
    "local-max": lambda i, f: fc.LocalMax(i(2), f(0.5), f(0.25), i(2), i(8)),
    "threshold": lambda i, f: fc.Threshold(f(0.5), i(2), i(8)),
    "top-k": lambda i, f: fc.TopK(rate=f(2.5)),
    "top-k, count": lambda i, f: fc.TopK(count=i(3)),
    "min-variance": lambda i, f: fc.MinVariance(f(2.5), i(6)),
    "label-change": lambda i, f: fc.LabelChange(i(0), i(1), i(8)),
    "lookback": lambda i, f: fc.Lookback(i(3), f(0.5), i(1), i(8)),
    "peak-height": lambda i, f: fc.PeakHeight(f(0.5), i(1), i(8)),
}
TYPES = [
    (np.int64, np.float32), (np.uint8, np.float64), (np.int16, np.float16), (int, Fraction),
]  # fmt: skip


def ids(kind: Any) -> str:
    return getattr(kind, "__name__", None) or str(kind)


@pytest.mark.parametrize(("integer", "real"), TYPES, ids=ids)
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_numbers_of_other_types(call: Callable[[Any, Any], Any], integer: Any, real: Any):
    assert_same_bits(call(integer, real).detach(), call(int, float).detach())


@pytest.mark.parametrize(("integer", "real"), TYPES, ids=ids)
@pytest.mark.parametrize("make", RULES.values(), ids=RULES)
def test_rules_hold_plain_numbers(make: Callable[[Any, Any], fc.Rule], integer: Any, real: Any):
    rule, plain = make(integer, real), make(int, float)
    assert rule == plain and hash(rule) == hash(plain)
    assert (repr(rule), str(rule)) == (repr(plain), str(plain))
    assert json.dumps(rule.to_dict()) == json.dumps(plain.to_dict())
    assert {type(value) for value in rule.to_dict().values()} <= {str, int, float, bool, type(None)}


@pytest.mark.parametrize("bad", [np.float32(3), np.bool_(True), np.array([3]), "3", 3.0, torch.tensor(3)], ids=repr)
def test_what_is_no_integer_is_refused(bad: Any):
    for call in (
        lambda: fc.Uniform(bad),
        lambda: fc.adjacent_distance(X, lag=bad),
        lambda: fc.row_groups(IDS, bad),
        lambda: fc.iterative_fusion(X, bad),
    ):
        with pytest.raises((TypeError, ValueError), match="must be an integer, got"):
            call()


@pytest.mark.parametrize(
    "bad", [np.float64("nan"), np.float32("nan"), np.bool_(True), "3", 1j, torch.tensor(3.0)], ids=repr
)
def test_what_is_no_number_is_refused(bad: Any):
    for call in (lambda: fc.Threshold(bad), lambda: fc.greedy_segments(X, bad), lambda: fc.nn.BipartiteMerge(bad)):
        with pytest.raises((TypeError, ValueError), match="must be a number, got"):
            call()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64], ids=str)
def test_counts_of_narrow_dtypes_do_not_overflow(dtype: torch.dtype):
    most = min(torch.iinfo(dtype).max, 2**62)
    lengths = [0, 1, 5, 100, most - 1, most]
    tensor = torch.tensor(lengths, dtype=dtype)
    rules = [
        fc.Uniform(1), fc.Uniform(9), fc.Uniform(9, "drop"), fc.Uniform(2**40), fc.Uniform(2**62, "drop"),
        fc.TopK(count=3), fc.TopK(count=300), fc.TopK(count=2**40), fc.TopK(rate=1.0),
        fc.MinVariance(1.0), fc.MinVariance(4.0),
    ]  # fmt: skip
    for rule in rules:
        got = rule.num_segments(tensor)
        assert got.dtype == dtype
        kept = slice(None, 4) if rule == fc.TopK(rate=1.0) else slice(None)  # fp64 is exact up to 2**53
        assert got.tolist()[kept] == [rule.num_segments(length) for length in lengths][kept], rule
    labels = torch.tensor([0, 0, 1, 1, 1], dtype=dtype)
    assert fc.segments_from_ids(labels).starts.tolist() == [0, 2]
    pooled = fc.segment_pool(X[:5], fc.LabelChange(blank=0), labels=labels)
    assert pooled.segments.starts.tolist() == [2]

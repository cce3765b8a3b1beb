"""``MinVariance`` against brute force, dynamic programs that others wrote, and its definition."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

import fastcompress as fc
from fastcompress.reference import OPS as DEFINITION
from fastcompress.rules import MIN_VARIANCE_BLOCK as BLOCK
from tests.support.sample_inputs import DTYPES, RAGGED, batches, features, offsets, row_groups

op = torch.ops.fastcompress.min_variance_boundaries


def variance(x: Tensor, start: int, end: int) -> float:
    """Return the sum of squared distances of the normalized frames to their mean."""
    unit = torch.nn.functional.normalize(x[start:end].double(), dim=1)
    return float(((unit - unit.mean(0)) ** 2).sum())


def brute_force(x: Tensor, count: int, max_len: int) -> tuple[list[int], float, float]:
    """Return the best starts, their cost, and the cost of the second best of all segmentations."""
    n, found = len(x), []
    for cuts in itertools.combinations(range(1, n), count - 1):
        ends = (*cuts, n)
        if all(end - start <= max_len for start, end in zip((0, *cuts), ends, strict=True)):
            cost = sum(variance(x, start, end) for start, end in zip((0, *cuts), ends, strict=True))
            found.append((cost, [0, *cuts]))
    found.sort()
    return found[0][1], found[0][0], found[1][0] if len(found) > 1 else math.inf


# Few frames per segment and many, counts that leave one or no segmentation, and segments of one frame.
@pytest.mark.parametrize(
    ("rows", "rate", "max_len"),
    [(1, 4, 8), (7, 2, 4), (9, 2.5, 4), (10, 3, 5), (8, 1, 3), (11, 4, 8), (5, 5, 5), (12, 4, 4), (13, 3.3, 12)],
)
def test_brute_force(rows: int, rate: float, max_len: int):
    for seed in range(4):
        x = torch.randn(rows, 5, generator=torch.Generator().manual_seed(seed))
        rule = fc.MinVariance(rate, max_len)
        starts, cost, second = brute_force(x, math.ceil(rows / rate), max_len)
        assert second - cost > 1e-6, "the input has two optima"
        assert fc.segment_pool(x, rule=rule).segments.starts.tolist() == starts


def test_ruptures():
    """``ruptures.Dynp`` finds the same segments with a cost that is infinite above ``max_len``."""
    ruptures = pytest.importorskip("ruptures")

    class Cost(ruptures.base.BaseCost):
        model, min_size = "limited", 1

        def __init__(self, max_len: int) -> None:
            self.max_len = max_len

        def fit(self, signal):
            self.signal = signal
            return self

        def error(self, start: int, end: int) -> float:
            part = self.signal[start:end]
            return math.inf if end - start > self.max_len else float(((part - part.mean(0)) ** 2).sum())

    for seed, (rows, rate, max_len) in enumerate([(40, 4.0, 8), (60, 2.5, 6), (33, 3.0, 4)]):
        x = features("smooth", rows, 6, torch.float64, seed)
        unit = torch.nn.functional.normalize(x, dim=1).numpy()
        count = math.ceil(rows / rate)
        search = ruptures.Dynp(custom_cost=Cost(max_len), min_size=1, jump=1).fit(unit)
        wanted = [0, *search.predict(n_bkps=count - 1)[:-1]]
        assert fc.segment_pool(x, rule=fc.MinVariance(rate, max_len)).segments.starts.tolist() == wanted


@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels_equal_the_definition(dtype: torch.dtype):
    """In every layout, with NaN, zero frames, equal frames, dropped rows and rows of their own."""
    for kind in ("smooth", "repeated", "zeros", "nonfinite"):
        rules = [fc.MinVariance(2.5, 4)]
        if kind == "smooth":
            rules += [fc.MinVariance(), fc.MinVariance(1, 1), fc.MinVariance(6, 12)]
        for rule in rules:
            for batch in batches(9, dtype, kind):
                found = fc.segment_pool(batch.x, rule=rule, **batch.layout)
                with fc.backend("reference"):
                    wanted = fc.segment_pool(batch.x, rule=rule, **batch.layout)
                assert torch.equal(found.segments.starts, wanted.segments.starts), f"{batch} {rule}"
                assert torch.equal(found.segments.lengths, wanted.segments.lengths), f"{batch} {rule}"
                assert torch.equal(found.cu_seqlens, wanted.cu_seqlens), f"{batch} {rule}"


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
@pytest.mark.parametrize(("rate", "max_len"), [(4.0, 8), (2.0, 8), (7.7, 8), (1.5, 3)])
def test_blocks(rate: float, max_len: int, dtype: torch.dtype):
    """A block of 1,500 rows does not depend on what follows, and has an exact count."""
    g, window = torch.Generator().manual_seed(0), max_len - 1
    d = torch.rand(2 * BLOCK + 100, window, generator=g, dtype=dtype)
    rule = fc.MinVariance(rate, max_len)
    for rows in (BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 100):
        mask = op(d[:rows], None, None, None, rate, max_len)
        parts = [
            op(d[begin : min(begin + BLOCK, rows)], None, None, None, rate, max_len) for begin in range(0, rows, BLOCK)
        ]
        assert torch.equal(mask, torch.cat(parts))
        assert [int(part.sum()) for part in parts] == [math.ceil(len(part) / rate) for part in parts]
        assert int(mask.sum()) == rule.num_segments(rows)
        lengths = mask.nonzero()[:, 0].tolist()
        assert max(b - a for a, b in zip(lengths, [*lengths[1:], rows], strict=True)) <= max_len
    assert torch.equal(mask, DEFINITION["min_variance_boundaries"](d, None, None, None, rate, max_len))


def test_equal_optima_take_the_smallest_starts():
    assert fc.segment_pool(torch.ones(10, 3), rule=fc.MinVariance(2, 8)).segments.lengths.tolist() == [1, 1, 1, 1, 6]
    # Frames at right angles: every segmentation into three segments costs the same.
    assert fc.segment_pool(torch.eye(6), rule=fc.MinVariance(2, 3)).segments.lengths.tolist() == [1, 2, 3]


def test_frames_that_are_not_finite_or_zero():
    """Such a frame is as far from every other as a zero frame, which is at distance 1; two zero frames are equal."""
    x = features("smooth", 30, 4, torch.float32)
    x[11] = 0
    wanted = fc.segment_pool(x, rule=fc.MinVariance(3)).segments
    for value in (torch.nan, torch.inf, -torch.inf):
        spoilt = x.clone()
        spoilt[11, 0] = value
        found = fc.segment_pool(spoilt, rule=fc.MinVariance(3))
        assert torch.equal(found.segments.starts, wanted.starts)
        spoilt_tokens = ~found.values.isfinite().all(1)
        inside = (wanted.starts <= 11) & (11 < wanted.starts + wanted.lengths)
        assert torch.equal(spoilt_tokens, inside)
    x[10:20] = 0
    lengths = fc.segment_pool(x[8:22], rule=fc.MinVariance(2.8, 10)).segments.lengths.tolist()
    assert lengths == [1, 1, 10, 1, 1]


def test_huge_distances_and_limits():
    """Sums of given distances do not overflow, and lags beyond a block or the rows are not computed."""
    d = torch.zeros(12, 3, dtype=torch.float64)
    d[:6], d[6:] = 1e308, -1e308
    wanted = DEFINITION["min_variance_boundaries"](d, None, None, None, 3.0, 4)
    assert torch.equal(op(d, None, None, None, 3.0, 4), wanted) and int(wanted.sum()) == 4
    x = features("smooth", 30, 4, torch.float32)
    starts = fc.segment_pool(x, rule=fc.MinVariance(3, 30)).segments.starts
    for max_len in (2000, 2**40):
        assert torch.equal(fc.segment_pool(x, rule=fc.MinVariance(3, max_len)).segments.starts, starts)
    assert fc.segment_pool(x, rule=fc.MinVariance(2000, 3000)).segments.lengths.tolist() == [30]
    assert fc.banded_distance(x[:2], 2**16).shape == (2, 2**16)


def test_a_clip_does_not_depend_on_its_batch():
    x = features("smooth", sum(RAGGED), 7, torch.float32)
    cu = offsets(RAGGED)
    rule = fc.MinVariance(2.5, 6)
    batch = fc.segment_pool(x, rule=rule, cu_seqlens=cu)
    for b, (begin, end) in enumerate(itertools.pairwise(cu.tolist())):
        alone = fc.segment_pool(x[begin:end], rule=rule)
        first, last = batch.cu_seqlens[b : b + 2].tolist()
        assert torch.equal(batch.values[first:last], alone.values)
        assert last - first == rule.num_segments(end - begin)
    sizes = torch.tensor(RAGGED)
    assert torch.equal(rule.num_segments(sizes), batch.segments.counts.long())


def test_row_groups_and_keys():
    """Each run of rows of one group is segmented like a sequence; distances are those of ``keys``."""
    x, keys = features("smooth", 120, 5, torch.float32), features("iid", 120, 3, torch.float32, 1)
    groups, rule = row_groups(120), fc.MinVariance(2, 4)
    found = fc.segment_pool(x, rule=rule, row_group=groups, keys=keys)
    wanted, t = [], 0
    for group, rows in itertools.groupby(groups.tolist()):
        size = len(list(rows))
        if group > 0:
            part = fc.segment_pool(keys[t : t + size], rule=rule).segments
            wanted += (part.starts + t).tolist()
        elif group == 0:
            wanted += range(t, t + size)
        t += size
    assert found.segments.starts.tolist() == wanted
    assert torch.equal(found.values, fc.segment_reduce(x, found.segments))


def test_gradient_compile_and_export():
    x = features("smooth", 50, 6, torch.float64).requires_grad_()
    pooled = fc.segment_pool(x, rule="min-variance:rate=3")
    grad = torch.randn(pooled.values.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    pooled.values.backward(grad)
    lengths = pooled.segments.lengths
    assert torch.allclose(x.grad, (grad / lengths[:, None]).repeat_interleave(lengths, 0))

    class Pool(torch.nn.Module):
        def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
            pooled = fc.segment_pool(x, rule="min-variance:rate=3", lengths=lengths)
            return pooled.values, pooled.cu_seqlens

    batch, sizes = torch.randn(2, 20, 4), torch.tensor([20, 11])
    dynamic = ({0: torch.export.Dim("batch"), 1: torch.export.Dim("frames")}, {0: torch.export.Dim("batch")})
    program = torch.export.export(Pool(), (batch, sizes), dynamic_shapes=dynamic).module()
    other = torch.randn(3, 33, 4), torch.tensor([33, 0, 7])
    for found, wanted in zip(program(*other), Pool()(*other), strict=True):
        assert torch.equal(found, wanted)
    compiled = torch.compile(Pool(), backend="eager", fullgraph=True)
    assert torch.equal(compiled(*other)[0], Pool()(*other)[0])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fc.MinVariance(9), "MinVariance: rate must be between 1 and max_len, 8, got 9"),
        (lambda: fc.MinVariance(0.5), "rate must be between 1 and max_len, 8, got 0.5"),
        (lambda: fc.MinVariance(math.nan), "rate must be a number, got nan"),
        (lambda: fc.MinVariance(1, 0), "max_len must be at least 1, got 0"),
        (lambda: fc.select_boundaries(torch.zeros(5, 3), "min-variance"), r"d must have shape \[..., 7\]"),
        (
            lambda: op(torch.zeros(5, 3), None, None, None, 4.0, 8),
            "d must have max_len - 1 = 7 distances per row, got 3",
        ),
        (lambda: op(torch.zeros(5, 7), None, None, None, 9.0, 8), "rate must be between 1 and max_len, 8, got 9"),
    ],
)
def test_errors(make, message: str):
    with pytest.raises((ValueError, RuntimeError), match=message):
        make()

"""Properties of the ops for every batch, tested on ragged shapes that hypothesis draws."""

from __future__ import annotations

import torch
from hypothesis import example, given
from hypothesis import strategies as st

import fastcompress as fc
from fastcompress.reference import OPS
from fastcompress.rules import max_segments
from tests.support.sample_inputs import assert_same_bits, offsets
from tests.support.strategies import Case, batch, check


def pool(case: Case, compact: bool = True) -> fc.Pooled:
    return fc.segment_pool(case.x, rule=case.rule, compact=compact, **case.layout)


@check(150)
@given(batch(), st.booleans())
@example(Case(torch.zeros(0, 3), {"cu_seqlens": offsets(())}, fc.LocalMax(), torch.ones(0), torch.ones(0)), True)
@example(Case(torch.zeros(0, 0, 3), {}, fc.LocalMax(), torch.ones(0), torch.ones(0)), False)
@example(Case(torch.zeros(2, 0, 3), {}, fc.Uniform(2), torch.ones(0), torch.ones(0)), True)
def test_fused_is_composed_is_reference(case: Case, compact: bool):
    pooled = pool(case, compact)
    s = pooled.segments
    sequences = {name: value for name, value in case.layout.items() if name in ("cu_seqlens", "lengths")}
    d = fc.adjacent_distance(case.x, **sequences)
    segments = fc.select_boundaries(d, case.rule, compact=compact, **case.layout)
    group = case.layout.get("row_group")
    if "attention_mask" in case.layout:
        group = case.layout["attention_mask"].int() * 2 - 1
    layout = case.layout.get("cu_seqlens"), case.layout.get("lengths"), group
    expected = OPS["segment_pool"](case.x, None, *layout, *case.rule.op_args(), compact)
    composed = fc.segment_reduce(case.x, segments), segments.starts, segments.lengths, segments.cu_segments
    for name, a, b, c in zip(
        ("cu_segments", "lengths", "starts", "values"),
        (s.cu_segments, s.lengths, s.starts, pooled.values),
        reversed(composed),
        reversed(expected),
        strict=True,
    ):
        assert_same_bits(a, b, f"{name}: fused, composed")
        assert_same_bits(a, c, f"{name}: fused, reference")


@check(200)
@given(batch(), st.booleans())
def test_segments_partition_the_rows(case: Case, compact: bool):
    pooled = pool(case, compact)
    s = pooled.segments
    starts, lengths = s.starts.tolist(), s.lengths.tolist()
    count = int(s.cu_segments[-1])
    assert lengths[count:] == [0] * (len(lengths) - count) and starts[count:] == [s.num_rows] * (len(starts) - count)
    if compact:
        assert count == len(starts)
    ids = [-1] * s.num_rows
    for m in range(count):
        assert lengths[m] >= 1
        for row in range(starts[m], starts[m] + lengths[m]):
            assert ids[row] == -1  # in one segment at most
            ids[row] = m
    assert s.ids().tolist() == ids
    assert starts[:count] == sorted(starts[:count])
    covered = torch.tensor(ids, dtype=torch.int64) >= 0
    if isinstance(case.rule, fc.Uniform) and case.rule.tail == "drop":
        assert not (covered & ~case.inside).any()
    else:
        assert torch.equal(covered, case.inside)
    # Each segment is inside one sequence, and cu_segments counts the segments of each sequence.
    owner = [
        set(case.sequence[begin : begin + size].tolist()) for begin, size in zip(starts[:count], lengths, strict=False)
    ]
    assert all(len(one) == 1 for one in owner)
    assert s.counts.tolist() == [owner.count({b}) for b in range(len(s.cu_segments) - 1)]


@check(150)
@given(batch())
def test_segment_lengths_obey_the_rule(case: Case):
    s, rule = pool(case).segments, case.rule
    grouped = "row_group" in case.layout or "attention_mask" in case.layout
    name, size, _, _, min_len, max_len, _ = rule.op_args()
    if name == "uniform":
        assert (s.lengths <= size).all()
        if rule.tail == "drop" and not grouped:
            assert (s.lengths == size).all()
    elif max_len:
        assert (s.lengths <= max_len).all()
    if name != "uniform" and not grouped:
        for part in s.lengths.split(s.counts.tolist()):
            assert (part[:-1] >= min_len).all()  # the last one may be short
    if not grouped:
        assert len(s.starts) <= max_segments(name, size, min_len, max_len, s.num_rows, len(s.counts))


@check(150)
@given(batch())
def test_sums_are_kept(case: Case):
    pooled = pool(case)
    x = case.x.reshape(-1, case.x.shape[-1]).double()[pooled.segments.ids() >= 0]
    if not x.isfinite().all() or (x.abs() > 1e4).any():
        return  # test_segment_reduce.py has the large ones
    total = (pooled.values.double() * pooled.segments.lengths[:, None]).sum(0)
    # The bound is the error of the fp32 sum plus one rounding to the dtype, which is absolute for subnormal numbers.
    info = torch.finfo(case.x.dtype)
    rounding = info.eps + 64 * (2.0**-52 if case.x.dtype == torch.float64 else 2.0**-23)
    bound = rounding * x.abs().sum(0) + len(x) * info.tiny
    assert ((total - x.sum(0)).abs() <= bound).all()


@check(100)
@given(batch())
def test_gradient_of_the_sum_counts_frames(case: Case):
    x = case.x.detach().requires_grad_()
    pooled = fc.segment_pool(x, rule=case.rule, **case.layout)
    values = pooled.values.double() * pooled.segments.lengths[:, None]
    (grad,) = torch.autograd.grad(values.sum(), x)
    expected = (pooled.segments.ids() >= 0).to(x.dtype).view(*x.shape[:-1], 1).expand_as(x)
    # length / length, the division rounded: exact.
    assert_same_bits(grad, expected.contiguous())


@check(8)
@given(batch(widths=st.integers(1024, 4096)))
def test_wide_rows(case: Case):
    test_fused_is_composed_is_reference.hypothesis.inner_test(case, True)

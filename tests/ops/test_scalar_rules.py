"""Scalar rules, such as top-k, against their definitions and the methods of the papers."""

from __future__ import annotations

import dataclasses
import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastcompress as fc
from fastcompress.reference.scalar_rules import run_starts
from tests.support.sample_inputs import RAGGED

RULES = (
    fc.TopK(rate=3),
    fc.TopK(rate=1.7),
    fc.TopK(count=1),
    fc.TopK(count=5),
    fc.LabelChange(),
    fc.LabelChange(blank=0),
    fc.LabelChange(blank=1, min_len=2, max_len=4),
    fc.Lookback(1, 0.5),
    fc.Lookback(3, 0.25),
    fc.Lookback(2, 0.5, min_len=3),
    fc.Lookback(4, 0.5, max_len=3),
    fc.Lookback(2, 0.25, min_len=2, max_len=6),
    fc.PeakHeight(0.0),
    fc.PeakHeight(0.25),
    fc.PeakHeight(0.125, min_len=2, max_len=5),
)
KINDS = ("iid", "ties", "nan", "constant", "nothing")


def distances(kind: str, rows: int, window: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Return distances ``[rows, window]``."""
    g = torch.Generator().manual_seed(seed)
    d = torch.rand(rows, window, generator=g, dtype=dtype)
    if kind == "ties":
        return torch.randint(0, 4, (rows, window), generator=g).to(dtype) / 4
    if kind == "nan":
        return torch.where(torch.rand(rows, window, generator=g) < 0.2, torch.nan, d)
    if kind == "constant":
        return torch.full_like(d, 0.25)
    return torch.full_like(d, torch.nan) if kind == "nothing" else d


def expected(rule: fc.Rule, d: Tensor, labels: Tensor, runs: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return starts and lengths of the segments by the definition, for rows in runs ``(begin, end)``."""
    if hasattr(rule, "threshold"):  # rounded as in torch's comparison
        rule = dataclasses.replace(rule, threshold=float(torch.tensor(rule.threshold, dtype=d.dtype)))
    found = []
    for begin, end in runs:
        parts = [(begin, end)]
        if isinstance(rule, fc.LabelChange) and rule.blank is not None:
            kept = [t for t in range(begin, end) if labels[t] != rule.blank]
            parts = []
            for t in kept:
                if parts and parts[-1][1] == t:
                    parts[-1] = (parts[-1][0], t + 1)
                else:
                    parts.append((t, t + 1))
        for a, b in parts:
            if a == b:
                continue
            lags = [d[a:b, lag].tolist() for lag in range(d.shape[1])]
            starts = run_starts(rule, b - a, lags, labels[a:b].tolist())
            found += [(a + s, e - s) for s, e in zip(starts, [*starts[1:], b - a], strict=True)]
    return found


def select(rule: fc.Rule, d: Tensor, labels: Tensor, **layout) -> fc.Segments:
    if isinstance(rule, fc.LabelChange):
        return fc.select_boundaries(None, rule, labels=labels, **layout)
    return fc.select_boundaries(d if isinstance(rule, fc.Lookback) else d[..., 0], rule, **layout)


def parts(segments: fc.Segments) -> list[tuple[int, int]]:
    return list(zip(segments.starts.tolist(), segments.lengths.tolist(), strict=True))


def window(rule: fc.Rule) -> int:
    return getattr(rule, "window", 1)


# Kinds: any values, many equal ones, some NaN, all equal, all NaN. Thresholds are rounded to fp32.
@pytest.mark.parametrize(
    ("dtype", "kind"), [*((torch.float64, kind) for kind in KINDS), (torch.float32, "ties")], ids=str
)
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_definition(dtype: torch.dtype, kind: str, rule: fc.Rule):
    rows = sum(RAGGED)
    d = distances(kind, rows, window(rule), dtype)
    labels = torch.randint(0, 3, (rows,), generator=torch.Generator().manual_seed(1))
    cu = torch.tensor([0, *np.cumsum(RAGGED)], dtype=torch.int32)
    spans = list(zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True))
    segments = select(rule, d, labels, cu_seqlens=cu)
    assert parts(segments) == expected(rule, d, labels, spans)
    counts = [sum(a <= s < b for s in segments.starts.tolist()) for a, b in spans]
    assert segments.cu_segments.tolist() == [0, *np.cumsum(counts)]
    one = select(rule, d, labels)
    assert parts(one) == expected(rule, d, labels, [(0, rows)])
    # Row groups: dropped rows, rows that are segments of their own, and two adjacent runs of different groups.
    g = torch.Generator().manual_seed(2)
    groups = torch.randint(-1, 3, (rows // 4 + 1,), generator=g).repeat_interleave(4)[:rows].int()
    runs, alone = [], []
    for a, b in spans:
        t = a
        while t < b:
            end = t + 1
            while groups[t] > 0 and end < b and groups[end] == groups[t]:
                end += 1
            (runs if groups[t] > 0 else alone if groups[t] == 0 else []).append((t, end))
            t = end
    wanted = expected(rule, d, labels, runs)
    if isinstance(rule, fc.LabelChange) and rule.blank is not None:  # drops kept rows with a blank
        alone = [(t, e) for t, e in alone if labels[t] != rule.blank]
    wanted = sorted(wanted + [(t, 1) for t, _ in alone])
    assert parts(select(rule, d, labels, cu_seqlens=cu, row_group=groups)) == wanted


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_padded(rule: fc.Rule):
    lengths = torch.tensor([7, 0, 20, 1, 13])
    d = distances("ties", 100, window(rule), torch.float64).view(5, 20, -1)
    labels = torch.randint(0, 3, (5, 20), generator=torch.Generator().manual_seed(1))
    spans = [(20 * i, 20 * i + n) for i, n in enumerate(lengths.tolist())]
    wanted = expected(rule, d.flatten(0, 1), labels.flatten(), spans)
    assert parts(select(rule, d, labels, lengths=lengths)) == wanted
    mask = torch.arange(20) < lengths[:, None]
    assert parts(select(rule, d, labels, attention_mask=mask)) == wanted
    left = mask.flip(1)
    spans = [(20 * i + 20 - n, 20 * i + 20) for i, n in enumerate(lengths.tolist())]
    wanted = expected(rule, d.flatten(0, 1), labels.flatten(), spans)
    found = select(rule, d, labels, attention_mask=left)
    assert parts(found) == wanted
    loose = select(rule, d, labels, attention_mask=left, compact=False)
    assert len(loose.starts) == 100 and parts(loose)[: len(wanted)] == wanted and not loose.lengths[len(wanted) :].any()


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 40),
    st.integers(1, 5),
    st.integers(1, 4),
    st.integers(0, 4),
    st.integers(0, 1000),
    st.sampled_from(["iid", "ties", "nan"]),
)
def test_lookback_over_everything(rows: int, width: int, shortest: int, more: int, seed: int, kind: str):
    rule = fc.Lookback(width, 0.5, min_len=shortest, max_len=None if more == 0 else shortest + more)
    d = distances(kind, rows, width, torch.float64, seed)
    wanted = expected(rule, d, torch.zeros(rows).long(), [(0, rows)])
    assert parts(fc.select_boundaries(d, rule)) == wanted


@pytest.mark.parametrize("lengths", [(2**63 - 1, None), (1, 2**63 - 1), (2**40, 2**41)], ids=str)
def test_lookback_with_lengths_that_no_segment_has(lengths: tuple[int, int | None]):
    """Allocated memory depends on the maximum number of segments, not on ``min_len`` and ``max_len``."""
    d = distances("iid", 40, 3, torch.float64)
    rule = fc.Lookback(3, 0.5, *lengths)
    assert parts(fc.select_boundaries(d, rule)) == expected(rule, d, torch.zeros(40).long(), [(0, 40)])


def test_lookback_with_lengths_of_many_short_sequences():
    """Regression: the rule kept a state for each length up to the number of rows, and used 3.2 GB."""
    d = distances("iid", 20_000, 2, torch.float32)
    cu = torch.arange(0, 20_001, 40)
    rule = fc.Lookback(2, 0.5, 30, 10_000)
    with torch.profiler.profile(profile_memory=True) as profile:
        found = fc.select_boundaries(d, rule, cu_seqlens=cu)
    assert max(event.self_cpu_memory_usage for event in profile.key_averages()) < 128 << 20
    spans = [(t, t + 40) for t in range(0, 20_000, 40)]
    assert parts(found) == expected(rule, d, torch.zeros(20_000).long(), spans)


def test_lookback_further_than_there_are_frames():
    """Regression: the rule computed a distance for each lag up to the window of 2**62."""
    x = torch.randn(2, 12, 6, generator=torch.Generator().manual_seed(0))
    far, all_of_them = (fc.segment_pool(x, rule=fc.Lookback(window, 0.8)) for window in (2**62, 12))
    assert far.segments.starts.tolist() == all_of_them.segments.starts.tolist()
    assert len(far.segments.starts) > 2


# The methods of the papers


def test_top_k_is_the_merging_of_the_most_similar():
    """FastAdaSP merges the r most similar neighbours, in chains."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(50, 8, generator=g, dtype=torch.float64)
    for r in (1, 10, 30, 48):
        similarity = torch.nn.functional.cosine_similarity(x[:-1], x[1:], dim=-1)
        merged = set(similarity.topk(r).indices.tolist())
        groups, wanted = [[0]], []
        for t in range(1, 50):
            if t - 1 in merged:
                groups[-1].append(t)
            else:
                groups.append([t])
        wanted = torch.stack([x[group].mean(0) for group in groups])
        found = fc.segment_pool(x, rule=fc.TopK(count=50 - r))
        assert torch.allclose(found.values, wanted, atol=1e-12) and len(wanted) == 50 - r


def test_top_k_takes_nan_last():
    d = torch.tensor([torch.nan, -torch.inf, 0.5, torch.nan, -torch.inf, 0.5, 9.0])
    for count, starts in (
        (2, [0, 3]),
        (3, [0, 3, 6]),
        (4, [0, 2, 3, 6]),
        (5, [0, 2, 3, 5, 6]),
        (6, [0, 1, 2, 3, 5, 6]),
    ):
        assert fc.select_boundaries(d, fc.TopK(count=count)).starts.tolist() == starts


def test_top_k_keeps_its_rate():
    for rate in (1.0, 2.0, 2.5, 3.0, 7.3, 1000.0):
        rule = fc.TopK(rate=rate)
        lengths = torch.arange(1, 60)
        x = torch.randn(59, 59, 4)
        pooled = fc.segment_pool(x, lengths=lengths, rule=rule)
        wanted = [math.ceil(n / rate) for n in range(1, 60)]
        assert pooled.cu_seqlens.diff().tolist() == wanted == rule.num_segments(lengths).tolist()
        assert [rule.num_segments(n) for n in range(1, 60)] == wanted
    assert fc.Uniform(3).num_segments(lengths).tolist() == fc.TopK(rate=3).num_segments(lengths).tolist()


def test_affinity_pooling():
    """A frame joins if its cosine to one of the group's last frames is high enough."""
    g = torch.Generator().manual_seed(3)
    x = torch.randn(80, 6, generator=g, dtype=torch.float64).cumsum(0)
    unit = x / x.norm(dim=-1, keepdim=True)
    for width, cosine in ((1, 0.95), (3, 0.9), (8, 0.97)):
        groups = [[0]]
        for t in range(1, 80):
            near = max(float(unit[t] @ unit[m]) for m in groups[-1][-width:])
            if near >= cosine:
                groups[-1].append(t)
            else:
                groups.append([t])
        found = fc.segment_pool(x, rule=fc.Lookback(width, 1 - cosine))
        assert found.segments.starts.tolist() == [group[0] for group in groups] and 3 < len(groups) < 70
        wanted = torch.stack([x[group].mean(0) for group in groups])
        assert torch.allclose(found.values, wanted, atol=1e-12)


def test_ctc_compression():
    """Runs of one label become their mean. With a blank, its runs are dropped and posteriors are weights."""
    g = torch.Generator().manual_seed(4)
    posterior = torch.randn(2, 30, 5, generator=g).mul(3).softmax(-1)
    x = torch.randn(2, 30, 7, generator=g)
    labels = posterior.argmax(-1)
    lengths = torch.tensor([30, 21])
    pooled = fc.segment_pool(x, lengths=lengths, rule=fc.LabelChange(), labels=labels)
    weighted = fc.segment_pool(
        x, lengths=lengths, rule=fc.LabelChange(blank=0), labels=labels, weights=posterior.max(-1).values
    )
    values, means = [], []
    for i, n in enumerate(lengths.tolist()):
        for label, (a, b) in _stretches(labels[i, :n].tolist()):
            values.append(x[i, a:b].mean(0))
            if label != 0:
                w = posterior[i, a:b].max(-1).values
                means.append((w[:, None] * x[i, a:b]).sum(0) / w.sum())
    assert torch.allclose(pooled.values, torch.stack(values), atol=1e-6)
    assert torch.allclose(weighted.values, torch.stack(means), atol=1e-6)


@pytest.mark.parametrize(
    ("dtype", "blank"), [(torch.uint8, -1), (torch.int8, 300), (torch.int32, 2**40), (torch.int64, -(2**63))]
)
def test_a_blank_outside_of_the_dtype_of_the_labels_matches_none(dtype: torch.dtype, blank: int):
    labels = torch.tensor([255 - 256, 255 - 256, 44, 0, 0]).to(dtype)
    found = fc.select_boundaries(None, fc.LabelChange(blank=blank), labels=labels)
    assert found.starts.tolist() == [0, 2, 3] and found.lengths.tolist() == [2, 1, 2]


def _stretches(labels: list[int]) -> list[tuple[int, tuple[int, int]]]:
    found, begin = [], 0
    for t in range(1, len(labels) + 1):
        if t == len(labels) or labels[t] != labels[t - 1]:
            found.append((labels[begin], (begin, t)))
            begin = t
    return found


def test_unsupervised_segmentation_is_find_peaks():
    """UnsupSeg: prominent peaks of 1 - minmax(cosine)."""
    signal = pytest.importorskip("scipy.signal")
    g = torch.Generator().manual_seed(5)
    x = torch.randn(3, 60, 8, generator=g, dtype=torch.float64)
    lengths = torch.tensor([60, 41, 5])
    rule = fc.LocalMax(prominence=0.1, normalize=True)
    found = fc.segment_pool(x, lengths=lengths, rule=rule).segments
    wanted = []
    for i, n in enumerate(lengths.tolist()):
        cosine = torch.nn.functional.cosine_similarity(x[i, : n - 1], x[i, 1:n], dim=-1).numpy()
        z = 1 - (cosine - cosine.min()) / (cosine.max() - cosine.min())
        wanted += [60 * i, *(60 * i + 1 + signal.find_peaks(z, prominence=0.1)[0])]
    assert found.starts.tolist() == wanted and len(wanted) > 10
    text = "local-max:prominence=0.1,normalize=True"
    assert str(rule) == text and fc.Rule.from_string(text) == rule and not rule.fused


def test_normalized_distances():
    # The last distance of each sequence has no pair.
    d = torch.tensor([0.25, 0.75, torch.nan, 0.5, 9.0, 0.5, 0.5, 7.0, 3.0])
    cu = torch.tensor([0, 5, 8, 9])
    z = fc.normalize_distance(d, cu_seqlens=cu)
    assert z[:4].nan_to_num(-1).tolist() == [0.0, 1.0, -1.0, 0.5] and z[5:7].tolist() == [0.0, 0.0]
    assert fc.normalize_distance(torch.zeros(0)).shape == (0,)
    padded = fc.normalize_distance(d[:8].view(2, 4), lengths=torch.tensor([4, 3]))
    assert padded[0, :2].tolist() == [0.0, 1.0]


def test_segmental_cpc():
    """The result is that of the peak test in the paper's published code."""
    g = torch.Generator().manual_seed(6)
    d = torch.rand(70, generator=g, dtype=torch.float64)
    z = (d[:-1] - d[:-1].min()) / (d[:-1].max() - d[:-1].min())
    relu = torch.relu
    wide = torch.cat([z[:1], z[:1], z, z[-1:], z[-1:]])
    left, right = (
        (relu(z - wide[2 - k : 2 - k + 69]) for k in (1, 2)),
        (relu(z - wide[2 + k : 2 + k + 69]) for k in (1, 2)),
    )
    p1, p2 = (torch.minimum(a, b) for a, b in zip(left, right, strict=True))
    for threshold in (0.0, 0.04, 0.2):
        p = torch.minimum(relu(torch.maximum(p1, p2) - threshold), p1)
        wanted = [0, *((p > 0).nonzero()[:, 0] + 1).tolist()]
        assert fc.select_boundaries(d, fc.PeakHeight(threshold)).starts.tolist() == wanted


# Composition, compilation, text forms and errors


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_pooling_is_the_composition(rule: fc.Rule):
    g = torch.Generator().manual_seed(7)
    x = torch.randn(90, 16, generator=g).cumsum(0).requires_grad_()
    labels = torch.randint(0, 3, (90,), generator=g)
    cu = torch.tensor([0, 40, 40, 41, 90])
    more = {"labels": labels} if isinstance(rule, fc.LabelChange) else {}
    pooled = fc.segment_pool(x, cu_seqlens=cu, rule=rule, **more)
    lags = [fc.adjacent_distance(x.detach(), cu_seqlens=cu, lag=lag) for lag in range(1, window(rule) + 1)]
    segments = select(rule, torch.stack(lags, -1), labels, cu_seqlens=cu)
    assert parts(segments) == parts(pooled.segments)
    assert torch.equal(pooled.values, fc.segment_reduce(x, segments))
    (grad,) = torch.autograd.grad(pooled.values.square().sum(), x)
    (wanted,) = torch.autograd.grad(fc.segment_reduce(x, segments).square().sum(), x)
    assert torch.equal(grad, wanted)
    keyed = fc.segment_pool(torch.ones(90, 3), keys=x.detach(), cu_seqlens=cu, rule=rule, **more)
    assert parts(keyed.segments) == parts(segments)
    groups = torch.ones(90, dtype=torch.int32)
    groups[5:9], groups[50] = -1, 0
    assert fc.segment_pool(x, cu_seqlens=cu, rule=rule, row_group=groups, **more).segments.starts.tolist()[0] == 0


@pytest.mark.parametrize("rule", [RULES[0], RULES[5], RULES[8], RULES[13]], ids=str)
def test_compiled(rule: fc.Rule):
    g = torch.Generator().manual_seed(8)
    x = torch.randn(64, 8, generator=g)
    labels = torch.randint(0, 3, (64,), generator=g)
    more = {"labels": labels} if isinstance(rule, fc.LabelChange) else {}

    def pool(x: Tensor) -> Tensor:
        return fc.segment_pool(x, rule=rule, compact=False, **more).values

    compiled = torch.compile(pool, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), pool(x))


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_text_and_dict_forms(rule: fc.Rule):
    assert fc.Rule.from_string(str(rule)) == rule and fc.Rule.from_dict(rule.to_dict()) == rule
    assert not rule.fused and hash(rule) == hash(fc.Rule.from_string(str(rule)))


def test_text_forms():
    assert str(fc.Lookback(3, 0.2)) == "lookback:3,threshold=0.2"
    assert fc.Rule.from_string("top-k:2.5") == fc.TopK(rate=2.5)
    assert fc.Rule.from_string("top-k:count=7") == fc.TopK(count=7)
    assert fc.Rule.from_string("label-change") == fc.LabelChange()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fc.TopK(), "TopK: one of rate and count must be given, got rate=None, count=None"),
        (lambda: fc.TopK(2, 3), "TopK: one of rate and count must be given, got rate=2, count=3"),
        (lambda: fc.TopK(0.5), "TopK: rate must be at least 1 and finite, got 0.5"),
        (lambda: fc.TopK(math.inf), "TopK: rate must be at least 1 and finite, got inf"),
        (lambda: fc.TopK(count=0), "TopK: count must be at least 1, got 0"),
        (lambda: fc.Lookback(0, 0.5), "Lookback: window must be at least 1, got 0"),
        (lambda: fc.Lookback(2, "a"), "Lookback: threshold must be a number, got 'a'"),
        (lambda: fc.LabelChange(blank=0.5), "LabelChange: blank must be an integer, got 0.5"),
        (lambda: fc.PeakHeight(0.1, 3, 2), "PeakHeight: min_len must not exceed max_len, got 3 > 2"),
        (lambda: fc.LocalMax(normalize=1), "LocalMax: normalize must be True or False, got 1"),
    ],
)
def test_refused(make, message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


def test_bad_calls():
    x, d = torch.randn(5, 3), torch.rand(5)
    for call, error, message in (
        (lambda: fc.segment_pool(x, rule=fc.LabelChange()), ValueError, "labels must be passed with LabelChange"),
        (
            lambda: fc.segment_pool(x, rule="top-k:2", labels=torch.zeros(5).long()),
            ValueError,
            "labels must be passed with",
        ),
        (
            lambda: fc.segment_pool(x, rule="label-change", labels=torch.zeros(4).long()),
            ValueError,
            "labels must have shape [5], one per row, got [4]",
        ),
        (lambda: fc.segment_pool(x, rule="label-change", labels=torch.zeros(5)), TypeError, "labels must be integers"),
        (lambda: fc.select_boundaries(None, "label-change", labels=[1, 2]), TypeError, "labels must be a tensor"),
        (
            lambda: fc.select_boundaries(d, fc.Lookback(2, 0.5)),
            ValueError,
            "d must have shape [..., 2], one distance per lag",
        ),
        (lambda: fc.select_boundaries(None, "top-k:2"), TypeError, "d must be"),
        (lambda: fc.select_boundaries(d, "top-k:2", lengths=torch.tensor([5])), ValueError, "lengths is for padded"),
        (lambda: fc.select_boundaries(d, "top-k:2", cu_seqlens=torch.tensor([0, 9])), ValueError, "cu_seqlens"),
        (lambda: fc.normalize_distance(torch.zeros(3).long()), TypeError, "d must be"),
    ):
        with pytest.raises(error, match=re.escape(message)):
            call()


def test_empty_input():
    for rule in RULES:
        d, labels = torch.zeros(0, window(rule)), torch.zeros(0).long()
        assert parts(select(rule, d, labels)) == []
        assert parts(select(rule, torch.zeros(2, 0, window(rule)), labels.view(2, 0))) == []

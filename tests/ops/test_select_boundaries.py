"""``select_boundaries`` and its relatives against SciPy, arithmetic and the definition of the rules."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
import scipy.signal
import torch
from torch import Tensor

import fastcompress as fc
from fastcompress.reference import OPS
from fastcompress.reference.select_boundaries import is_peak
from fastcompress.rules import max_segments
from tests.support.sample_inputs import (
    DTYPES,
    DTYPES_AND_RULES,
    RAGGED,
    RULES,
    Batch,
    assert_same_bits,
    batches,
    offsets,
    row_groups,
    strided,
)

KINDS = ("iid", "ties", "nan", "plateaus", "rising", "infinite")
SPANS = list(itertools.pairwise(offsets(RAGGED).tolist()))
LAYOUT = {"cu_seqlens": offsets(RAGGED)}
Parts = list[tuple[int, int]]


def distances(kind: str, rows: int = sum(RAGGED), dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    d = torch.rand(rows, generator=g, dtype=torch.float64)
    if kind == "ties":
        d = torch.randint(4, (rows,), generator=g) / 4
    elif kind == "nan":
        d[torch.rand(rows, generator=g) < 0.15] = torch.nan
    elif kind == "plateaus":
        d = d[torch.arange(rows) // 2]
    elif kind == "rising":
        d = torch.arange(rows) / rows
    elif kind == "infinite":
        d[torch.rand(rows, generator=g) < 0.1] = torch.inf
        d[torch.rand(rows, generator=g) < 0.1] = -torch.inf
    return d.to(dtype)


def as_parts(segments: fc.Segments) -> Parts:
    return list(zip(segments.starts.tolist(), segments.lengths.tolist(), strict=True))


def from_boundaries(boundaries: list[list[int]], spans: Parts = SPANS) -> tuple[Parts, list[int]]:
    """Return the segments, and their count per sequence, given the frames of each sequence that start one."""
    parts, counts = [], []
    for (begin, end), inner in zip(spans, boundaries, strict=True):
        edges = [begin, *(begin + t for t in inner), end] if end > begin else []
        parts += [(a, b - a) for a, b in itertools.pairwise(edges)]
        counts.append(max(len(edges) - 1, 0))
    return parts, counts


def assert_segments(segments: fc.Segments, boundaries: list[list[int]], spans: Parts = SPANS) -> None:
    parts, counts = from_boundaries(boundaries, spans)
    assert as_parts(segments) == parts
    assert segments.counts.tolist() == counts
    assert segments.cu_segments.tolist() == [0, *itertools.accumulate(counts)]


def inner_distances(d: Tensor) -> list[np.ndarray]:
    """Return the distances of each sequence, without the last frame, which has none."""
    return [d[begin : max(end - 1, begin)].numpy() for begin, end in SPANS]


def scipy_peaks(d: np.ndarray, order: int) -> np.ndarray:
    if not len(d):
        return np.zeros(0, np.int64)
    return scipy.signal.argrelextrema(d, np.greater, order=order, mode="clip")[0]


# Each rule against an oracle


# Orders: a peak exceeds its neighbours, some more values, or every value of its sequence. Dtypes: how d is read.
@pytest.mark.parametrize(
    ("dtype", "kind", "order"),
    [
        *((torch.float32, kind, order) for kind in KINDS for order in (1, 2, 3, 10, 100)),
        *((dtype, kind, 2) for dtype in (torch.float16, torch.float64) for kind in KINDS),
    ],
    ids=str,
)
def test_local_max_is_argrelextrema(dtype: torch.dtype, kind: str, order: int):
    d = distances(kind, dtype=dtype)
    expected = [(scipy_peaks(part, order) + 1).tolist() for part in inner_distances(d)]
    assert_segments(fc.select_boundaries(d, fc.LocalMax(order), **LAYOUT), expected)


# Prominences: most peaks, some, or none have it; 0 and less are no condition. A threshold is a separate condition.
@pytest.mark.parametrize(
    ("kind", "prominence", "threshold"),
    [
        *(
            (kind, prominence, None)
            for kind in ("iid", "ties", "nan", "rising")
            for prominence in (0.05, 0.25, 0.6, 2, 0, -1)
        ),
        *((kind, 0.25, threshold) for kind in ("iid", "ties") for threshold in (0.5, -1, 2)),
    ],
)
def test_prominence_is_peak_prominences(kind: str, prominence: float, threshold: float | None):
    d = distances(kind)
    rule = fc.LocalMax(threshold=threshold, prominence=prominence)
    expected = []
    for part in inner_distances(d):
        peaks = scipy_peaks(part, 1)
        keep = scipy.signal.peak_prominences(part.astype(np.float64), peaks)[0] >= prominence
        if threshold is not None:
            keep &= part[peaks] > threshold
        expected.append((peaks[keep] + 1).tolist())
    assert_segments(fc.select_boundaries(d, rule, **LAYOUT), expected)


def test_prominence_at_equality_counts():
    d = torch.tensor([0.0, 0.75, 0.25, 0.5, 0.25, 0.0, 0.0])
    assert as_parts(fc.select_boundaries(d, fc.LocalMax(prominence=0.25))) == [(0, 2), (2, 2), (4, 3)]
    assert as_parts(fc.select_boundaries(d, fc.LocalMax(prominence=0.2500001))) == [(0, 2), (2, 5)]


# Thresholds: some are rounded by a dtype, and some are exact. Kinds: the values of d.
@pytest.mark.parametrize(
    ("kind", "threshold"),
    [
        *(("iid", threshold) for threshold in (0.15, 0.1, 0.5, 0.25, 0.7, 0, 1, -1, math.inf, -math.inf)),
        *((kind, 0.25) for kind in KINDS if kind != "iid"),
        *(("infinite", threshold) for threshold in (math.inf, -math.inf)),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threshold_compares_as_torch(dtype: torch.dtype, kind: str, threshold: float):
    d = distances(kind, dtype=dtype)
    d[3::7] = threshold  # equal after rounding to the dtype: no boundary
    over = d > threshold
    assert not over[3::7].any()
    expected = [(over[begin : max(end - 1, begin)].nonzero().view(-1) + 1).tolist() for begin, end in SPANS]
    assert_segments(fc.select_boundaries(d, fc.Threshold(threshold), **LAYOUT), expected)
    peaks = [[t + 1 for t in scipy_peaks(part, 1)] for part in inner_distances(d.double())]
    both = [[t for t in a if t in b] for a, b in zip(peaks, expected, strict=True)]
    assert_segments(fc.select_boundaries(d, fc.LocalMax(threshold=threshold), **LAYOUT), both)


@pytest.mark.parametrize("threshold", (1e300, -1e300, 7e4, -7e4, 1e-300, 0.5 + 2**-12 + 2**-40))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threshold_that_the_dtype_does_not_hold(dtype: torch.dtype, threshold: float):
    """Thresholds that overflow to infinity or underflow to 0. The last one is rounded twice, as in torch."""
    d = torch.tensor([math.inf, 0.5, 0.5 + 2**-11, -math.inf, 0, 2**-14, -6e4, 6e4, 0.5 + 2**-12, 0]).to(dtype)
    expected = (d[:-1] > threshold).nonzero().view(-1) + 1
    segments = fc.select_boundaries(d, fc.Threshold(threshold))
    assert segments.starts.tolist() == [0, *expected.tolist()]
    reference = OPS["select_boundaries"](d, None, None, None, *fc.Threshold(threshold).op_args(), True)
    assert_same_bits(segments.starts, reference[0])


LARGEST = 2**63 - 1


@pytest.mark.parametrize("compact", (True, False))
@pytest.mark.parametrize(
    ("rule", "starts"),
    [
        (fc.Uniform(LARGEST), [0]),
        (fc.Uniform(LARGEST, tail="drop"), []),
        (fc.LocalMax(LARGEST), [0, 4]),
        (fc.LocalMax(min_len=LARGEST), [0]),
        (fc.LocalMax(min_len=LARGEST, max_len=LARGEST), [0]),
        (fc.LocalMax(max_len=LARGEST), [0, 2, 4]),
        (fc.Threshold(0.5, min_len=LARGEST), [0]),
        (fc.Threshold(0.5, max_len=LARGEST), [0, 2, 4, 6]),
    ],
    ids=str,
)
def test_largest_integers(rule: fc.Rule, starts: list[int], compact: bool):
    d = torch.tensor([0.1, 0.6, 0.2, 0.9, 0.3, 0.7, 0.0])
    segments = fc.select_boundaries(d, rule, compact=compact)
    assert segments.starts[: int(segments.cu_segments[-1])].tolist() == starts


class Counted(list):
    """A list that counts its reads."""

    reads = 0

    def __getitem__(self, index):
        self.reads += 1
        return super().__getitem__(index)


def test_reference_reads_no_further_than_the_run():
    d = Counted([0.0, 1.0, 0.0])
    assert is_peak(d, 1, 10**4)
    assert d.reads <= 4 * len(d)


@pytest.mark.parametrize("size", (1, 2, 3, 5, 17, 64, 65, 66, 1000))
def test_uniform_is_arithmetic(size: int):
    d = distances("nan")  # not read
    every = [list(range(size, end - begin, size)) for begin, end in SPANS]
    assert_segments(fc.select_boundaries(d, fc.Uniform(size), **LAYOUT), every)
    segments = fc.select_boundaries(d, fc.Uniform(size, tail="drop"), **LAYOUT)
    whole = [(begin + i * size, size) for begin, end in SPANS for i in range((end - begin) // size)]
    assert as_parts(segments) == whole
    assert segments.counts.tolist() == [frames // size for frames in RAGGED]


def cut(candidates: list[int], frames: int, min_len: int, max_len: int | None) -> list[int]:
    """Return the starts of segments, from left to right.

    The next segment starts at the first candidate that is at least ``min_len`` after the start of the last one, but at
    most ``max_len`` after it."""
    result, start = [], 0
    while True:
        allowed = [t for t in candidates if t >= start + min_len]
        if max_len is not None:
            allowed.append(start + max_len)
        start = min(allowed, default=frames)
        if start >= frames:
            return result
        result.append(start)


LENGTHS = ((1, None), (2, None), (5, None), (100, None), (1, 1), (1, 2), (1, 4), (1, 64), (2, 2), (2, 3), (3, 7),
           (7, 7), (20, 100))  # fmt: skip


# Lengths: either bound, both or neither has an effect. Kinds: any candidates, many, with gaps between them, none.
@pytest.mark.parametrize(
    ("kind", "min_len", "max_len"),
    [*(("iid", *both) for both in LENGTHS), *((kind, 3, 7) for kind in ("ties", "nan", "rising"))],
)
@pytest.mark.parametrize("rule", (fc.Threshold(0.5), fc.LocalMax(), fc.LocalMax(3)), ids=str)
def test_min_len_and_max_len(kind: str, rule: fc.Rule, min_len: int, max_len: int | None):
    d = distances(kind)
    expected = []
    for part, frames in zip(inner_distances(d), RAGGED, strict=True):
        found = np.flatnonzero(part > 0.5) if isinstance(rule, fc.Threshold) else scipy_peaks(part, rule.order)
        expected.append(cut((found + 1).tolist(), frames, min_len, max_len))
    rule = dataclasses.replace(rule, min_len=min_len, max_len=max_len)
    assert_segments(fc.select_boundaries(d, rule, **LAYOUT), expected)


def test_min_len_and_max_len_with_prominence():
    d = distances("iid")
    expected = []
    for part, frames in zip(inner_distances(d), RAGGED, strict=True):
        peaks = scipy_peaks(part, 1)
        peaks = peaks[scipy.signal.peak_prominences(part.astype(np.float64), peaks)[0] >= 0.3]
        expected.append(cut((peaks + 1).tolist(), frames, 4, 9))
    assert_segments(fc.select_boundaries(d, fc.LocalMax(prominence=0.3, min_len=4, max_len=9), **LAYOUT), expected)


# Layouts


@pytest.mark.parametrize(("kind", "seed"), [("iid", 0), ("nan", 1)])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_row_groups_are_runs_segmented_alone(rule: fc.Rule, kind: str, seed: int):
    d, groups = distances(kind), row_groups(sum(RAGGED), seed)
    parts, counts = [], []
    for begin, end in SPANS:
        before = len(parts)
        for group, run in itertools.groupby(range(begin, end), key=lambda t: int(groups[t])):
            rows = list(run)
            if group == 0:
                parts += [(t, 1) for t in rows]
            elif group > 0:
                alone = fc.select_boundaries(d[rows], rule)
                parts += [(rows[0] + a, n) for a, n in as_parts(alone)]
        counts.append(len(parts) - before)
    segments = fc.select_boundaries(d, rule, **LAYOUT, row_group=groups)
    assert as_parts(segments) == parts
    assert segments.counts.tolist() == counts


@pytest.mark.parametrize("kind", ("iid", "nan"))
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_padded_equals_packed(rule: fc.Rule, kind: str):
    d, width = distances(kind), max(RAGGED) + 2
    padded = torch.full((len(RAGGED), width), 5.0)  # reading padding would give a boundary
    for row, (begin, end) in zip(padded, SPANS, strict=True):
        row[: end - begin] = d[begin:end]
    packed = fc.select_boundaries(d, rule, **LAYOUT)
    segments = fc.select_boundaries(padded, rule, lengths=torch.tensor(RAGGED))
    sequence = torch.repeat_interleave(torch.arange(len(RAGGED)), packed.counts)
    shift = sequence * width - LAYOUT["cu_seqlens"][sequence]
    assert torch.equal(segments.starts, packed.starts + shift)
    for name in ("lengths", "cu_segments", "frame_cu_seqlens", "counts"):
        assert torch.equal(getattr(segments, name), getattr(packed, name)), name
    assert (segments.padded_length, packed.padded_length) == (width, None)
    assert (segments.num_rows, packed.num_rows) == (padded.numel(), d.numel())
    assert torch.equal(segments.seconds(25), packed.seconds(25))
    # The last distance of each sequence must not be read either.
    last = [end - 1 for begin, end in SPANS if end > begin]
    assert as_parts(fc.select_boundaries(d.index_fill(0, torch.tensor(last), torch.inf), rule, **LAYOUT)) == as_parts(
        packed
    )


@pytest.mark.parametrize(
    ("rule", "dtype"),
    [*((rule, torch.bool) for rule in RULES), *((RULES[0], dtype) for dtype in (torch.int64, torch.float32))],
    ids=str,
)
def test_attention_mask_drops_frames(rule: fc.Rule, dtype: torch.dtype):
    d = distances("iid", 90).view(3, 30)
    mask = torch.ones(3, 30, dtype=dtype)
    mask[0, :11] = mask[1, 20:] = mask[2, 9:14] = 0
    segments = fc.select_boundaries(d, rule, attention_mask=mask)
    runs = [(0, 11, 30), (1, 0, 20), (2, 0, 9), (2, 14, 30)]
    parts = [(30 * b + i + s, n) for b, i, j in runs for s, n in as_parts(fc.select_boundaries(d[b, i:j], rule))]
    assert as_parts(segments) == parts


@pytest.mark.parametrize(("dtype", "rule"), DTYPES_AND_RULES, ids=str)
def test_same_as_reference_in_every_layout(dtype: torch.dtype, rule: fc.Rule):
    for batch in batches(1, dtype):
        for kind in ("iid", "ties", "nan"):
            d = distances(kind, batch.x.shape[:-1].numel(), dtype).view(batch.x.shape[:-1])
            for compact in (True, False):
                segments = fc.select_boundaries(d, rule, **batch.layout, compact=compact)
                groups = batch.layout.get("row_group")
                if (mask := batch.layout.get("attention_mask")) is not None:
                    groups = mask.int() * 2 - 1
                layout = (batch.layout.get("cu_seqlens"), batch.layout.get("lengths"), groups)
                expected = OPS["select_boundaries"](d, *layout, *rule.op_args(), compact)
                for name, tensor in zip(("starts", "lengths", "cu_segments"), expected, strict=True):
                    assert_same_bits(getattr(segments, name), tensor, f"{batch} {kind} {name}")


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_strides_do_not_matter(rule: fc.Rule):
    d = distances("iid")
    expected = as_parts(fc.select_boundaries(d, rule, **LAYOUT))
    for name, other in strided(d[:, None]):
        assert as_parts(fc.select_boundaries(other[:, 0], rule, **LAYOUT)) == expected, name
    spread = torch.stack([LAYOUT["cu_seqlens"], LAYOUT["cu_seqlens"] + 1], dim=1)[:, 0]
    assert not spread.is_contiguous()
    assert as_parts(fc.select_boundaries(d, rule, cu_seqlens=spread)) == expected


# Segments from boundaries, and the methods of Segments


def selected() -> list[tuple[Batch, fc.Segments]]:
    result = []
    for batch, rule in itertools.product(batches(1, torch.float32), (fc.LocalMax(), fc.Threshold(0.3))):
        d = distances("iid", batch.x.shape[:-1].numel()).view(batch.x.shape[:-1])
        result.append((batch, fc.select_boundaries(d, rule, **batch.layout)))
    return result


def assert_same_segments(actual: fc.Segments, expected: fc.Segments, what: object) -> None:
    for name in ("starts", "lengths", "cu_segments", "frame_cu_seqlens"):
        assert_same_bits(getattr(actual, name), getattr(expected, name), f"{what}: {name}")
    assert (actual.num_rows, actual.padded_length) == (expected.num_rows, expected.padded_length), what


@pytest.mark.parametrize("case", selected(), ids=lambda case: str(case[0]))
def test_round_trips(case: tuple[Batch, fc.Segments]):
    batch, segments = case
    shape = batch.x.shape[:-1]
    offset = {k: v for k, v in batch.layout.items() if k in ("cu_seqlens", "lengths")}
    for dtype in (torch.int64, torch.int32):
        from_ids = fc.segments_from_ids(segments.ids().view(shape).to(dtype), **offset)
        assert_same_segments(from_ids, segments, "from_ids")
    mask = torch.zeros(shape, dtype=torch.bool)
    mask.view(-1)[segments.starts] = True
    for form in (mask, mask.int() * 7, mask.to(torch.uint8)):
        assert_same_segments(fc.segments_from_mask(form, **batch.layout), segments, "from_mask")
    if not {"row_group", "attention_mask", "lengths"} & set(batch.layout) and len(shape) == 1:
        shuffled = segments.starts[torch.randperm(len(segments.starts))]
        for starts in (shuffled, shuffled.int(), torch.cat([shuffled, shuffled])):
            again = fc.segments_from_starts(starts, segments.num_rows, **offset)
            assert_same_segments(again, segments, "from_starts")


@pytest.mark.parametrize("compact", (True, False))
@pytest.mark.parametrize("case", selected(), ids=lambda case: str(case[0]))
def test_ids_counts_and_seconds(case: tuple[Batch, fc.Segments], compact: bool):
    batch, segments = case
    if not compact:  # an empty tail changes only the shapes
        tail = segments.starts.new_full((4,), segments.num_rows)
        segments = fc.Segments(
            torch.cat([segments.starts, tail]),
            torch.cat([segments.lengths, tail * 0]),
            segments.cu_segments,
            segments.frame_cu_seqlens,
            segments.num_rows,
            segments.padded_length,
        )
    ids, seconds, counts = [-1] * segments.num_rows, [], [0] * len(batch.sequences())
    for index, (start, length) in enumerate(as_parts(segments)[: int(segments.cu_segments[-1])]):
        ids[start : start + length] = [index] * length
        (sequence,) = (i for i, (begin, end) in enumerate(batch.sequences()) if begin <= start < end)
        begin = batch.sequences()[sequence][0]
        seconds.append([(start - begin) / 12.5, (start + length - begin) / 12.5])
        counts[sequence] += 1
    assert segments.ids().tolist() == ids
    assert segments.counts.tolist() == counts
    assert segments.seconds(12.5)[: len(seconds)].tolist() == seconds
    assert segments.seconds(12.5).dtype == torch.float64 and segments.seconds(12.5).shape == (len(segments.starts), 2)


def test_mask_takes_min_len_and_max_len():
    mask = torch.zeros(20, dtype=torch.bool)
    mask[[1, 2, 4, 10]] = True
    segments = fc.segments_from_mask(mask, cu_seqlens=torch.tensor([0, 13, 20]), min_len=2, max_len=5)
    assert segments.starts.tolist() == [0, *cut([1, 2, 4, 10], 13, 2, 5), 13, 18]


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_not_compact_has_the_bound_and_an_empty_tail(rule: fc.Rule):
    name, size, _, _, min_len, max_len, _ = rule.op_args()
    for batch in batches(1, torch.float32):
        d = distances("iid", batch.x.shape[:-1].numel()).view(batch.x.shape[:-1])
        compact = fc.select_boundaries(d, rule, **batch.layout)
        loose = fc.select_boundaries(d, rule, **batch.layout, compact=False)
        bound = max_segments(name, size, min_len, max_len, d.numel(), len(batch.sequences()))
        if {"row_group", "attention_mask"} & set(batch.layout):
            bound = d.numel()
        count = len(compact.starts)
        assert len(loose.starts) == len(loose.lengths) == bound, batch
        assert as_parts(loose) == as_parts(compact) + [(d.numel(), 0)] * (bound - count), batch
        assert torch.equal(loose.cu_segments, compact.cu_segments) and int(loose.cu_segments[-1]) == count
        assert torch.equal(loose.ids(), compact.ids()), batch

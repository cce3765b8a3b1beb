"""Definition of the rules: a loop over the frames of each sequence, on the host, one value at a time.

``csrc/rule.h`` is the compiled form of this file; tests check that both give the same boundaries.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastcompress.checks import check_layout_values, sequence_ranges
from fastcompress.rules import max_segments

#: Row group of a row that is a segment of its own. Negative: the row is dropped; positive: it is pooled by the rule.
KEEP = 0


def is_peak(d: list[float], t: int, order: int) -> bool:
    """Return whether ``d[t]`` is a strict local maximum: ``scipy.signal.argrelextrema(d, np.greater, order=order)``."""
    for shift in range(1, min(order, len(d)) + 1):  # for larger shifts both sides are clipped
        if not (d[t] > d[max(t - shift, 0)] and d[t] > d[min(t + shift, len(d) - 1)]):
            return False
    return True


def prominence(d: list[float], t: int) -> float:
    """Return the prominence of the peak at ``t``, as ``scipy.signal.peak_prominences`` does.

    On each side, the base is the lowest value before the next value that is higher than the peak, or NaN. The
    prominence is the height of the peak above the higher base.
    """
    bases = []
    for step in (-1, 1):
        base, i = d[t], t
        while 0 <= i < len(d) and d[i] <= d[t]:
            base = min(base, d[i])
            i += step
        bases.append(base)
    return d[t] - max(bases)


def split_run(
    d: list[float],
    frames: int,
    rule: str,
    size: int,
    threshold: float,
    prominence_min: float,
    min_len: int,
    max_len: int,
) -> list[int]:
    """Return the starts of the segments of one run of ``frames`` frames.

    Args:
        d: Distances between neighbouring frames, ``frames - 1`` of them.
        frames: Number of frames, at least 1.
        rule: Name of the rule.
        size: Size of ``Uniform`` or order of ``LocalMax``.
        threshold: Distance that a boundary must exceed.
        prominence_min: Smallest prominence of a peak; 0 accepts every peak.
        min_len: Smallest length of a segment in frames.
        max_len: Largest length of a segment in frames; 0 means no limit.
    """

    def is_candidate(t: int) -> bool:
        if rule == "uniform":
            return t % size == 0
        if rule == "threshold":
            return d[t - 1] > threshold
        return (
            d[t - 1] > threshold
            and is_peak(d, t - 1, size)
            and (prominence_min <= 0 or prominence(d, t - 1) >= prominence_min)
        )

    starts = [0]
    for t in range(1, frames):
        length = t - starts[-1]
        if (length >= min_len and is_candidate(t)) or length == max_len:
            starts.append(t)
    return starts


def select_boundaries(
    d: Tensor,
    cu_seqlens: Tensor | None,
    lengths: Tensor | None,
    row_group: Tensor | None,
    rule: str,
    size: int,
    threshold: float,
    prominence: float,
    min_len: int,
    max_len: int,
    keep_tail: bool,
    compact: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return starts and lengths of segments, ``[M]`` int64, and ``cu_segments`` ``[B + 1]`` int32."""
    check_layout_values(d.shape, cu_seqlens, lengths)
    distances = d.reshape(-1).tolist()
    row_group_list = None if row_group is None else row_group.reshape(-1).tolist()
    if threshold != -math.inf:
        threshold = torch.tensor(threshold, dtype=d.dtype, device="cpu").item() if d.is_floating_point() else threshold
    segments: list[tuple[int, int]] = []
    counts = [0]
    for begin, end in sequence_ranges(d.shape, cu_seqlens, lengths):
        t = begin
        while t < end:
            group = 1 if row_group_list is None else row_group_list[t]
            stop = t + 1
            if group > KEEP:
                while stop < end and (row_group_list is None or row_group_list[stop] == group):
                    stop += 1
                starts = split_run(
                    distances[t : stop - 1], stop - t, rule, size, threshold, prominence, min_len, max_len
                )
                ends = [*starts[1:], stop - t]
                if rule == "uniform" and not keep_tail and ends[-1] - starts[-1] < size:
                    starts.pop()
                segments += [(t + a, b - a) for a, b in zip(starts, ends, strict=False)]
            elif group == KEEP:
                segments.append((t, 1))
            t = stop
        counts.append(len(segments))
    if not compact:
        bound = (
            d.numel()
            if row_group is not None
            else max_segments(rule, size, min_len, max_len, d.numel(), len(counts) - 1)
        )
        segments += [(d.numel(), 0)] * (bound - len(segments))
    rows = torch.tensor(segments, dtype=torch.int64, device=d.device).reshape(-1, 2)
    cu_segments = torch.tensor(counts, dtype=torch.int32, device=d.device)
    return rows[:, 0].contiguous(), rows[:, 1].contiguous(), cu_segments

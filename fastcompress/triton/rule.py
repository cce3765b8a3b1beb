"""Boundaries that a rule selects, for many rows at once, before ``min_len`` and ``max_len`` are applied.

fastcompress/reference/select_boundaries.py is the definition; csrc/rule.h is its form in C++.

``step`` is the distance between a row and the previous row. A boundary at a row means that a segment starts there.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def run_begin(row, begin, group, ROW_GROUP, ROWS: tl.constexpr):
    """Return the first row, at or after ``begin``, of the run of row group ``group`` that contains ``row``. Scalars."""
    i = tl.arange(0, ROWS)
    first = row
    found = row * 0
    while found == 0:
        at = first - 1 - i  # [ROWS], the nearest row first
        other = tl.load(ROW_GROUP + at, mask=at >= begin, other=0)
        distance = tl.min(tl.where((at < begin) | (other != group), i, ROWS), 0)
        found = (distance < ROWS).to(tl.int64)
        first -= distance
    return first


@triton.jit
def frame_in_run(row, begin, alive, changes, group, ROW_GROUP, HAS_ROW_GROUP: tl.constexpr, ROWS: tl.constexpr):
    """Return the position of each row in its run, [ROWS] int64, for consecutive rows."""
    run = begin
    if HAS_ROW_GROUP:
        w = tl.arange(0, ROWS)
        # Rows before the first change belong to the run of the first row, which may start long before these rows.
        at_first = w == 0
        first = tl.max(tl.where(at_first, row, -1), 0)
        outer = first
        if tl.max(tl.where(at_first & alive & (changes == 0), 1, 0), 0) > 0:
            first_begin = tl.max(tl.where(at_first, begin, -1), 0)
            first_group = tl.max(tl.where(at_first, group, -1), 0)
            outer = run_begin(first, first_begin, first_group, ROW_GROUP, ROWS)
        run = tl.associative_scan(tl.where(changes, row, outer), 0, _larger)
    return row - run


@triton.jit
def is_peak(row, step, wants, begin, end, group, D, ROW_GROUP, order, HAS_ROW_GROUP: tl.constexpr, ROWS: tl.constexpr):
    """Return whether each row has a strict local maximum among the ``order`` distances on either side in its run.

    The first and last distance of a run are never maxima. The neighbours of ``step`` [ROWS] are read from ``D``. If
    that is None, they are taken from the other rows, which must then include ``order`` rows on both sides of each row
    whose result is used.
    """
    left = wants  # whether the run extends further on that side
    right = wants
    w = tl.arange(0, ROWS)
    shift = 1
    while (shift <= order) & (tl.max((wants & (left | right)).to(tl.int32), 0) > 0):
        left = left & (row - shift > begin)
        right = right & (row + shift < end)
        if HAS_ROW_GROUP:
            left = left & (tl.load(ROW_GROUP + row - shift - 1, mask=left, other=0) == group)
            right = right & (tl.load(ROW_GROUP + row + shift, mask=right, other=0) == group)
        if D is None:
            before = tl.gather(step, tl.maximum(w - shift, 0), 0)
            after = tl.gather(step, tl.minimum(w + shift, ROWS - 1), 0)
        else:
            before = tl.load(D + row - 1 - shift, mask=left, other=0).to(step.dtype)
            after = tl.load(D + row - 1 + shift, mask=right, other=0).to(step.dtype)
        wants = wants & ((left == 0) | (step > before)) & ((right == 0) | (step > after))
        if shift == 1:
            wants = wants & left & right
        shift += 1
    return wants


@triton.jit
def lowest_base(row, step, peak, limit, group, D, ROW_GROUP, SIDE: tl.constexpr, HAS_ROW_GROUP: tl.constexpr):
    """Return the lowest distance on one side (SIDE -1: left, 1: right) before one that is higher than the peak.

    The end of the run or a NaN ends the side too.
    """
    base = step
    going = peak
    shift = 1
    while tl.max(going.to(tl.int32), 0) > 0:
        if SIDE < 0:
            going = going & (row - shift > limit)
            if HAS_ROW_GROUP:
                going = going & (tl.load(ROW_GROUP + row - shift - 1, mask=going, other=0) == group)
        else:
            going = going & (row + shift < limit)
            if HAS_ROW_GROUP:
                going = going & (tl.load(ROW_GROUP + row + shift, mask=going, other=0) == group)
        value = tl.load(D + row - 1 + SIDE * shift, mask=going, other=0).to(step.dtype)
        going = going & (value <= step)
        base = tl.where(going & (value < base), value, base)
        shift += 1
    return base


@triton.jit
def is_whole(row, size, end, group, candidate, ROW_GROUP, HAS_ROW_GROUP: tl.constexpr):
    """Return whether the ``size`` rows from each candidate on are all in its run."""
    whole = candidate & (row + size <= end)
    if HAS_ROW_GROUP:
        shift = 1
        while (shift < size) & (tl.max(whole.to(tl.int32), 0) > 0):
            whole = whole & (tl.load(ROW_GROUP + row + shift, mask=whole, other=0) == group)
            shift += 1
    return whole


@triton.jit
def judge_rows(
    row, step, alive, changes, begin, end, group, D, ROW_GROUP, size, threshold_bits, RULE: tl.constexpr,
    HAS_ROW_GROUP: tl.constexpr, KEEP_TAIL: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Return whether the rule selects a boundary at each row, and whether a segment may start there, [ROWS] bool each.

    ``min_len``, ``max_len`` and a prominence are not applied. A boundary at which no segment may start ends the
    previous segment only.
    """
    may_start = alive
    if RULE == "uniform":
        wants = alive & (frame_in_run(row, begin, alive, changes, group, ROW_GROUP, HAS_ROW_GROUP, ROWS) % size == 0)
        if not KEEP_TAIL:
            whole = is_whole(row, size, end, group, wants & (group > 0), ROW_GROUP, HAS_ROW_GROUP)
            may_start = whole | (alive & (group == 0))
    else:
        threshold = threshold_bits.to(tl.int64).to(tl.float64, bitcast=True).to(step.dtype)
        wants = alive & (changes == 0) & (step > threshold)
        if RULE == "local-max":
            wants = is_peak(row, step, wants, begin, end, group, D, ROW_GROUP, size, HAS_ROW_GROUP, ROWS)
    return wants, may_start

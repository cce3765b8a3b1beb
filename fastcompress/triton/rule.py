"""What a rule wants, asked of many rows at once.

fastcompress/reference/select_boundaries.py is the definition, csrc/rule.h its form in C++.

``step`` is the distance between a row and the row before it; a boundary at a row is a segment that starts there.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def run_begin(row, begin, group, ROW_GROUP, ROWS: tl.constexpr):
    """First row, not before ``begin``, of the run of ``group`` that goes up to ``row``; scalars."""
    i = tl.arange(0, ROWS)
    first = row
    found = row * 0
    while found == 0:
        at = first - 1 - i  # [ROWS], 0 the nearest
        other = tl.load(ROW_GROUP + at, mask=at >= begin, other=0)
        distance = tl.min(tl.where((at < begin) | (other != group), i, ROWS), 0)
        found = (distance < ROWS).to(tl.int64)
        first -= distance
    return first


@triton.jit
def frame_in_run(row, begin, alive, changes, group, ROW_GROUP, HAS_ROW_GROUP: tl.constexpr, ROWS: tl.constexpr):
    """Frames of a row's run before it, [ROWS] int64, for consecutive rows."""
    run = begin
    if HAS_ROW_GROUP:
        w = tl.arange(0, ROWS)
        # A row before the first change of these rows is in the run of the first row, which may start far before it.
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
    """Strict local maximum among the ``order`` distances on either side inside the run, whose first and last distance
    are none. The neighbours of ``step`` [ROWS] are read from ``D``, or where that is None from the other rows, which
    must then reach ``order`` rows beyond each that matters.
    """
    left = wants  # whether the comparison still goes on on that side
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
    """Lowest distance between a peak and higher ground, the end of the run or a NaN, on the left (SIDE -1) or right."""
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
    """Whether the ``size`` rows from each candidate on are in its run."""
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
    """Whether the rule wants a boundary at rows, and whether a segment may start there, [ROWS] each; without regard to
    ``min_len``, ``max_len`` and a prominence."""
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

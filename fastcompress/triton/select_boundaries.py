"""Segment boundaries from given distances.

The rule is evaluated for all rows in parallel. Only ``min_len`` and ``max_len`` depend on the previous boundary. For
them, one program per sequence walks from segment to segment over one byte per row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastcompress.triton.common import (
    BATCH_SIZES,
    Sequences,
    accumulate,
    double_bits,
    flat,
    launch,
    place_rows,
    prepare_sequences,
)
from fastcompress.triton.rule import judge_rows, lowest_base
from fastcompress.triton.tiles import (
    STARTS,
    STOPS,
    bounded_size,
    collect_segments,
    num_tiles,
    rounded_threshold,
)

#: Bit of the byte of a row, in addition to those of tiles.py: the rule selects a boundary here; the walk decides.
WANTED = tl.constexpr(4)

#: Rows per program, one per thread.
ROWS = 128
#: Rows that a walk reads per step.
WALK_ROWS = 128


def mark_boundaries(
    d: Tensor,
    row_group: Tensor | None,
    sequences: Sequences,
    rule: str,
    size: int,
    threshold: float,
    prominence: float,
    min_len: int,
    max_len: int,
    keep_tail: bool,
) -> Tensor:
    """Mark where segments stop and start, ``d`` [rows] -> ``[rows]`` uint8 with the bits ``STOPS`` and ``STARTS``.

    One launch; two with ``min_len`` or ``max_len``.
    """
    flags = torch.empty(d.shape, dtype=torch.uint8, device=d.device)
    walks = rule != "uniform" and (min_len > 1 or max_len > 0)
    wanted = torch.empty_like(flags) if walks else None
    launch(
        select_boundaries_fwd_kernel, (triton.cdiv(d.numel(), ROWS),), d,
        d, row_group, sequences.begin, sequences.end, sequences.count, sequences.steps, flags, wanted, d.numel(),
        bounded_size(size, d.numel()), rounded_threshold(threshold, d.dtype), double_bits(prominence), RULE=rule,
        HAS_ROW_GROUP=row_group is not None, HAS_PROMINENCE=prominence > 0, KEEP_TAIL=keep_tail,
        ACC=accumulate(d.dtype), ROWS=ROWS,
    )  # fmt: skip
    if walks:
        launch(
            walk_sequences_fwd_kernel,
            (sequences.count,),
            d,
            wanted,
            flags,
            sequences.begin,
            sequences.end,
            min_len,
            max_len,
            ROWS=WALK_ROWS,
        )
    return flags


def select_boundaries(
    d: Tensor, cu_seqlens: Tensor | None, lengths: Tensor | None, row_group: Tensor | None, rule: str, size: int,
    threshold: float, prominence: float, min_len: int, max_len: int, keep_tail: bool, compact: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Select boundaries from ``d``, [N] or [B, T].

    Three launches: sequences, boundaries, offsets; one more with ``min_len`` or ``max_len``. ``compact`` reads the
    number of segments from the device once; without it nothing is read.

    Returns:
        Starts and lengths [M] int64, and ``cu_segments`` [B + 1] int32.
    """
    tiles = num_tiles(d.numel(), None)
    sequences = prepare_sequences(d, d.dim(), cu_seqlens, lengths, tiles)
    row_group = flat(row_group)
    flags = mark_boundaries(
        flat(d), row_group, sequences, rule, size, threshold, prominence, min_len, max_len, keep_tail
    )
    _, starts, segment_lengths, cu_segments = collect_segments(
        None, flags, sequences, tiles, (rule, size, min_len, max_len, row_group is not None), compact
    )
    return starts, segment_lengths, cu_segments


@triton.jit(do_not_specialize=[*BATCH_SIZES, "threshold_bits", "prominence_bits"])
def select_boundaries_fwd_kernel(
    D, ROW_GROUP, BEGIN, END, num_sequences, steps, FLAGS, WANTED_FLAGS, num_rows, size, threshold_bits: tl.int64,
    prominence_bits: tl.int64, RULE: tl.constexpr, HAS_ROW_GROUP: tl.constexpr, HAS_PROMINENCE: tl.constexpr,
    KEEP_TAIL: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Write the bits of every row.

    If a walk follows (``WANTED_FLAGS``), the boundaries that the rule selects are written there, and ``FLAGS`` gets
    only the bits that do not depend on the rule. The walk reads ``WANTED_FLAGS`` and adds to ``FLAGS``, which it never
    reads.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    alive, changes, begin, end, group = place_rows(row, BEGIN, END, num_sequences, steps, ROW_GROUP, HAS_ROW_GROUP)
    linked = alive & (changes == 0)
    step = row
    if RULE != "uniform":
        step = tl.load(D + row - 1, mask=linked, other=0).to(ACC)  # [ROWS]
    wants, may_start = judge_rows(
        row,
        step,
        alive,
        changes,
        begin,
        end,
        group,
        D,
        ROW_GROUP,
        size,
        threshold_bits,
        RULE,
        HAS_ROW_GROUP,
        KEEP_TAIL,
        ROWS,
    )
    if HAS_PROMINENCE:
        left = lowest_base(row, step, wants, begin, group, D, ROW_GROUP, -1, HAS_ROW_GROUP)
        right = lowest_base(row, step, wants, end, group, D, ROW_GROUP, 1, HAS_ROW_GROUP)
        height = step.to(tl.float64) - tl.where(left > right, left, right).to(tl.float64)
        wants = wants & (height >= prominence_bits.to(tl.int64).to(tl.float64, bitcast=True))
    stops = changes
    if WANTED_FLAGS is None:
        stops = stops | wants
    else:
        kind = tl.where(changes, STOPS, 0) | tl.where(wants, WANTED, 0)
        tl.store(WANTED_FLAGS + row, kind.to(tl.uint8), mask=row < num_rows)
    flags = tl.where(stops, STOPS, 0) | tl.where(may_start & stops, STARTS, 0)
    tl.store(FLAGS + row, flags.to(tl.uint8), mask=row < num_rows)


@triton.jit
def walk_sequences_fwd_kernel(WANTED_FLAGS, FLAGS, BEGIN, END, min_len, max_len, ROWS: tl.constexpr):
    """Find the next start from each start of one sequence per program, applying ``min_len`` and ``max_len``."""
    b = tl.program_id(0)
    end = tl.load(END + b)
    start = tl.load(BEGIN + b)
    i = tl.arange(0, ROWS)
    while start < end:
        first = start + 1
        next_start = first - first - 1
        while next_start < 0:
            row = first + i  # [ROWS]
            kind = tl.load(WANTED_FLAGS + row, mask=row < end, other=STOPS).to(tl.int32)
            length = row - start
            wanted = ((kind & WANTED) != 0) & (length >= min_len)
            stops = ((kind & STOPS) != 0) | wanted | ((length == max_len) & (max_len > 0))
            nearest = tl.min(tl.where(stops, i, ROWS), 0)
            if nearest < ROWS:
                next_start = first + nearest
                kind_there = tl.max(tl.where(i == nearest, kind, 0), 0)
                if (kind_there & STOPS) == 0:  # changes of run and the end of the sequence are marked already
                    tl.store(FLAGS + next_start, STOPS | STARTS)
            first += ROWS
        start = next_start

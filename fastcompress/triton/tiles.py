"""Find segments, number them and compute their means in one launch.

Each program processes one tile of rows:

1. It computes the distances of its rows, and of the neighbouring rows on which their boundaries depend.
2. It decides which rows start a segment.
3. It gets the number of segments before the tile from the earlier tiles (``common.look_back``).
4. It computes the means of the segments that start in the tile, and reads further rows if the last one continues after
   the tile.

The same kernel collects given boundaries (``RULE`` "flags"), with or without means.

Memory traffic: for the distances, x is read once from memory, and ROWS / owned rows times from the L2 cache. For the
means it is read once more, from cache. The means are written once. Arithmetic per element: two products and two sums
for the distances, one sum for the means. The sizes below follow from these counts; they have not been measured on a
GPU.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastcompress.rules import max_segments
from fastcompress.triton.common import (
    BATCH_SIZES,
    NEXT_TILE,
    TOTAL,
    Sequences,
    accumulate,
    double_bits,
    launch,
    look_back,
    place_rows,
    upper_bound,
    warps,
)
from fastcompress.triton.dot import cosine_distance, row_dot_and_square
from fastcompress.triton.rule import judge_rows
from fastcompress.triton.segment_reduce import divide, segment_tile, sum_rows

#: Bits of the byte of a row. STOPS: the previous segment ends before this row. STARTS, only with STOPS: a segment
#: starts at this row.
STOPS = tl.constexpr(1)
STARTS = tl.constexpr(2)
#: Rows per tile if boundaries are read, not computed.
FLAG_ROWS = 128


@dataclass(frozen=True)
class Window:
    """Rows that a tile reads.

    Attributes:
        rows: Number of rows.
        halo: First row whose boundary the tile can compute.
        judged: End of the rows whose boundaries the tile can compute.
        owned: Number of rows, from ``halo`` on, that belong to the tile. The judged rows after them belong to the next
            tile; the window includes them because most segments of this tile end in them.
    """

    rows: int
    halo: int
    judged: int
    owned: int


def scored_window(rule: str, order: int, dtype: torch.dtype) -> Window:
    """Return the window of a rule: 64 rows, or 128 if the halo would be a large part of 64.

    64 rows are one tile of partial sums (``common.warps``). fp64 always takes 64, for lack of registers.
    """
    if rule == "uniform":
        return flag_window(True)
    reach = order if rule == "local-max" else 0
    rows = 64 if reach <= 4 or dtype == torch.float64 else 128
    halo, judged = 1 + reach, rows - reach
    return Window(rows, halo, judged, judged - halo - rows // 8)


def flag_window(means: bool) -> Window:
    """Return the window for boundaries that are read; ``means`` adds rows in which most segments end."""
    return Window(FLAG_ROWS, 0, FLAG_ROWS, FLAG_ROWS - 8 if means else FLAG_ROWS)


def num_tiles(rows: int, window: Window | None) -> int:
    """Return the number of tiles, at least one, because a tile writes ``cu_segments``."""
    tiles: int = triton.cdiv(rows, (window or flag_window(False)).owned)
    return max(1, tiles)


def bounded_size(size: int, rows: int) -> int:
    """Limit a size or order to more than all rows, which has the same effect and cannot overflow in sums."""
    return min(size, rows + 1)


@functools.lru_cache(maxsize=1024)
def rounded_threshold(threshold: float, dtype: torch.dtype) -> int:
    """Return the bits of the threshold, rounded to the dtype of the distances.

    The tensor is on the CPU, whatever the default device is: another device would synchronize.
    """
    return double_bits(torch.tensor(threshold, dtype=dtype, device="cpu").item())


@dataclass(frozen=True)
class Scoring:
    """A fused rule and its inputs.

    Attributes:
        rule: Name of the rule, or ``"flags"`` for given boundaries.
        keys: Rows ``[N, K]`` to compute distances from, or flags ``[N]`` uint8.
        row_group: Row groups, ``[N]`` int32, or ``None``.
        size: Size of ``Uniform`` or order of ``LocalMax``.
        threshold_bits: Bits of the threshold; see ``rounded_threshold``.
        keep_tail: Whether ``Uniform`` keeps a short last segment.
        window: Rows that a tile reads.
    """

    rule: str
    keys: Tensor
    row_group: Tensor | None
    size: int
    threshold_bits: int
    keep_tail: bool
    window: Window


def collect_segments(
    rows: Tensor | None,
    boundaries: Scoring | Tensor,
    sequences: Sequences,
    tiles: int,
    bound_args: tuple[str, int, int, int, bool],
    compact: bool,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
    """Find or read boundaries, collect the segments, and compute their means. One launch.

    Args:
        rows: Rows to compute means of, ``[N, D]``, or ``None``.
        boundaries: How to find boundaries, or flags ``[N]`` uint8 (``mark_boundaries``).
        sequences: Sequences prepared for ``tiles`` tiles.
        tiles: Number of tiles.
        bound_args: Rule, size, min_len, max_len, and whether there are row groups.
        compact: Whether to read the number of segments and return exactly that many.

    Returns:
        Values [M, D] (``None`` without ``rows``), starts and lengths [M] int64, and ``cu_segments`` [B + 1] int32.
    """
    rule, size, min_len, max_len, has_group = bound_args
    bound = sequences.rows
    if not has_group:
        bound = max_segments(rule, size, min_len, max_len, sequences.rows, sequences.count)
    device = sequences.state.device
    # Two allocations: results that share storage break compiled graphs.
    starts, lengths = (torch.empty(bound, dtype=torch.int64, device=device) for _ in range(2))
    cu_segments = torch.empty(sequences.count + 1, dtype=torch.int32, device=device)
    values = None
    tile = {"SEGMENTS": 16, "COLUMNS": 16}
    width, stride, acc = 0, 0, tl.float32
    if rows is not None:
        width, stride, acc = rows.shape[1], rows.stride(0), accumulate(rows.dtype)
        values = torch.empty((bound, width), dtype=rows.dtype, device=device)
        tile = segment_tile(width, rows.dtype)
    flags = isinstance(boundaries, Tensor)
    if isinstance(boundaries, Tensor):
        boundaries = Scoring("flags", boundaries, None, 1, 0, True, flag_window(rows is not None))
    keys, window, row_group = boundaries.keys, boundaries.window, boundaries.row_group
    # The look-back reads one word per thread.
    scores = not flags and boundaries.rule != "uniform"
    dtypes = [tensor.dtype for tensor in (keys, rows) if tensor is not None]
    num_warps = max(warps(dtype, max(1, window.rows // 64) if scores else 1) for dtype in dtypes)
    registers = 0
    if scores:  # fp64, and Threshold in half types on sm_120, spill with the default limit
        registers = 168 if torch.float64 in dtypes else 192 if num_warps <= 4 and boundaries.rule == "threshold" else 0
    clearing = 0 if compact else triton.cdiv(bound, window.rows)
    launch(
        segment_pool_fwd_kernel, (tiles + clearing,), starts,
        rows, stride, width, keys, keys.stride(0), keys.shape[1] if keys.dim() == 2 else 0, row_group,
        sequences.begin, sequences.end, sequences.count, sequences.steps, sequences.rows, sequences.state, tiles,
        starts, lengths, cu_segments, values, bound, boundaries.size, boundaries.threshold_bits,
        window.halo, window.judged, window.owned, RULE=boundaries.rule, HAS_ROW_GROUP=row_group is not None,
        KEEP_TAIL=boundaries.keep_tail, ACC=acc,
        KEY_ACC=tl.float32 if flags else accumulate(keys.dtype), ROWS=window.rows,
        WORDS=32 * num_warps, num_warps=num_warps, registers=registers, **tile,
    )  # fmt: skip
    if compact:
        total = sequences.read_total()
        starts, lengths = first_rows(starts, total), first_rows(lengths, total)
        values = None if values is None else first_rows(values, total)
    return values, starts, lengths, cu_segments


def first_rows(tensor: Tensor, count: int) -> Tensor:
    """Return the first ``count`` rows; a copy if that saves more than a tenth of the memory of the upper bound."""
    rows = tensor[:count]
    return rows if 10 * count >= 9 * tensor.shape[0] else rows.clone()


@triton.jit
def judge_window(
    row, KEYS, key_stride, key_width, ROW_GROUP, BEGIN, END, num_sequences, steps, num_rows, size, threshold_bits,
    RULE: tl.constexpr, HAS_ROW_GROUP: tl.constexpr, KEEP_TAIL: tl.constexpr, KEY_ACC: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Return whether a segment stops before each row, and whether one starts at it, [ROWS] bool each.

    The result is correct for the judged rows of a window only.
    """
    if RULE == "flags":
        flags = tl.load(KEYS + row, mask=(row >= 0) & (row < num_rows), other=STOPS).to(tl.int32)
        stops = (flags & STOPS) != 0
        starts = stops & ((flags & STARTS) != 0)
    else:
        alive, changes, begin, end, group = place_rows(row, BEGIN, END, num_sequences, steps, ROW_GROUP, HAS_ROW_GROUP)
        step = row
        if RULE != "uniform":
            w = tl.arange(0, ROWS)
            own = KEYS + row * key_stride
            # Distance between each row and the previous row. The square of the previous row is gathered from that row.
            dot, square = row_dot_and_square(
                own - key_stride, alive & (changes == 0), own, alive & (group > 0), key_width, ROWS, KEY_ACC
            )
            square_before = tl.gather(square, tl.maximum(w - 1, 0), 0)
            step = cosine_distance(dot, square_before, square).to(KEY_ACC)
        wants, may_start = judge_rows(
            row, step, alive, changes, begin, end, group, None, ROW_GROUP, size, threshold_bits, RULE, HAS_ROW_GROUP,
            KEEP_TAIL, ROWS,
        )  # fmt: skip
        stops = changes | wants
        starts = stops & may_start
    return stops, starts


@triton.jit
def clear_rest(
    piece, STATE, STARTS, LENGTHS, VALUES, width, bound, num_rows, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Write the empty segments after the last one, in one piece of the output.

    This waits for the total number of segments. Only tiles that are already running delay it, so it cannot deadlock.
    """
    total = tl.atomic_add(STATE + TOTAL, 0, sem="relaxed")
    while total == 0:
        total = tl.atomic_add(STATE + TOTAL, 0, sem="relaxed")
    place = piece * ROWS + tl.arange(0, ROWS)  # [ROWS]
    rest = (place >= total - 1) & (place < bound)
    if tl.max(rest.to(tl.int32), 0) > 0:
        tl.store(STARTS + place, tl.zeros((ROWS,), tl.int64) + num_rows, mask=rest)
        tl.store(LENGTHS + place, tl.zeros((ROWS,), tl.int64), mask=rest)
        if VALUES is not None:
            for k in range(0, width, COLUMNS):
                column = k + tl.arange(0, COLUMNS)
                target = VALUES + (place * width)[:, None] + column[None, :]
                zeros = tl.zeros((ROWS, COLUMNS), VALUES.dtype.element_ty)
                tl.store(target, zeros, mask=rest[:, None] & (column < width)[None, :])


@triton.jit
def write_cu_segments(CU_SEGMENTS, END, num_sequences, steps, row, starts, first, last, tile, num_tiles, before):
    """Write ``cu_segments`` of the sequences that end in rows (first, last].

    The first tile also writes those that end at row 0, and the last tile all that remain. ``before`` is the number of
    segments before the tile.
    """
    b = upper_bound(END, num_sequences, first, steps)
    b = tl.where(tile == 0, 0, b)
    stop = upper_bound(END, num_sequences, last, steps)
    stop = tl.where(tile == num_tiles - 1, num_sequences, stop)
    while b < stop:
        i = b + tl.arange(0, 16)  # [16]
        end = tl.load(END + i, mask=i < stop, other=0)
        count = tl.sum((starts[None, :] & (row[None, :] < end[:, None])).to(tl.int32), 1)  # [16], over [16, ROWS]
        tl.store(CU_SEGMENTS + 1 + i, (before + count).to(tl.int32), mask=i < stop)
        b += 16
    if tile == 0:
        tl.store(CU_SEGMENTS, 0)


@triton.jit(do_not_specialize=[*BATCH_SIZES, "threshold_bits"])
def segment_pool_fwd_kernel(
    X, stride, width, KEYS, key_stride, key_width, ROW_GROUP, BEGIN, END, num_sequences, steps, num_rows, STATE,
    num_tiles, STARTS, LENGTHS, CU_SEGMENTS, VALUES, bound, size, threshold_bits: tl.int64, halo, judged, owned,
    RULE: tl.constexpr, HAS_ROW_GROUP: tl.constexpr, KEEP_TAIL: tl.constexpr, ACC: tl.constexpr, KEY_ACC: tl.constexpr,
    ROWS: tl.constexpr, WORDS: tl.constexpr, SEGMENTS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    # Tiles are numbered in the order in which programs start, so no program waits for one that has not started.
    tile = tl.atomic_add(STATE + NEXT_TILE, 1, sem="relaxed")
    if tile >= num_tiles:
        clear_rest(tile - num_tiles, STATE, STARTS, LENGTHS, VALUES, width, bound, num_rows, ROWS, COLUMNS)
    else:
        w = tl.arange(0, ROWS)
        first = tile * owned
        last = tl.minimum(first + owned, num_rows)
        base = first - halo
        row = base + w  # [ROWS]
        stops, starts = judge_window(
            row, KEYS, key_stride, key_width, ROW_GROUP, BEGIN, END, num_sequences, steps, num_rows, size,
            threshold_bits, RULE, HAS_ROW_GROUP, KEEP_TAIL, KEY_ACC, ROWS,
        )  # fmt: skip
        stops = stops & (w >= halo) & (w < judged)
        starts = starts & (row >= first) & (row < last)
        count = tl.sum(starts.to(tl.int32), 0)
        before = look_back(STATE, tile, count.to(tl.int64), WORDS)
        write_cu_segments(CU_SEGMENTS, END, num_sequences, steps, row, starts, first, last, tile, num_tiles, before)
        if tile == num_tiles - 1:
            tl.atomic_xchg(STATE + TOTAL, before + count + 1, sem="relaxed")

        # If the last segment does not end in the judged rows, read further windows to find its end row.
        next_base = base + judged - halo
        open_end = next_base + halo
        if (count > 0) & (tl.max(tl.where(stops, w, -1), 0) == tl.max(tl.where(starts, w, -1), 0)):
            nearest = tl.full((), ROWS, tl.int32)
            while nearest == ROWS:
                later, _ = judge_window(
                    next_base + w, KEYS, key_stride, key_width, ROW_GROUP, BEGIN, END, num_sequences, steps, num_rows,
                    size, threshold_bits, RULE, HAS_ROW_GROUP, KEEP_TAIL, KEY_ACC, ROWS,
                )  # fmt: skip
                nearest = tl.min(tl.where(later & (w >= halo) & (w < judged), w, ROWS), 0)
                open_end = next_base + nearest
                next_base += judged - halo

        rank = tl.cumsum(starts.to(tl.int32), 0) - 1  # [ROWS]
        for c in range(0, count, SEGMENTS):
            lane = c + tl.arange(0, SEGMENTS)  # [SEGMENTS]
            # There are never more than `bound` segments; the comparison keeps stores inside the buffers in any case.
            used = (lane < count) & (before + lane < bound)
            picked = starts[None, :] & (rank[None, :] == lane[:, None])  # [SEGMENTS, ROWS]
            at = tl.max(tl.where(picked, w[None, :], -1), 1)  # [SEGMENTS]
            behind = stops[None, :] & (w[None, :] > at[:, None])  # [SEGMENTS, ROWS]
            until = tl.min(tl.where(behind, w[None, :], ROWS), 1)  # [SEGMENTS]
            start = base + at
            length = tl.where(used, tl.where(until < ROWS, base + until, open_end) - start, 0)
            place = before + lane
            tl.store(STARTS + place, start, mask=used)
            tl.store(LENGTHS + place, length, mask=used)
            if VALUES is not None:
                for k in range(0, width, COLUMNS):
                    column = k + tl.arange(0, COLUMNS)  # [COLUMNS]
                    total = sum_rows(X, stride, start, length, column, width, None, None, ACC, SEGMENTS, COLUMNS)
                    mean = divide(total, tl.maximum(length, 1).to(ACC)[:, None], ACC)
                    target = VALUES + (place * width)[:, None] + column[None, :]
                    mask = used[:, None] & (column < width)[None, :]
                    tl.store(target, mean.to(VALUES.dtype.element_ty), mask=mask)

"""Reductions over segments and their adjoints.

A program processes several segments at once, one row of each per step, so that short segments have as many loads in
flight as long ones. Frames are added in order within blocks of 64 frames, then the blocks in order. A missing frame is
added as -0, which changes no value, not even the sign of a zero.

Memory traffic: every row of a segment is read once and every output is written once. Invalid starts and lengths are
clamped to the rows that exist; with FASTCOMPRESS_CHECK=1 they raise.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastcompress.checks import check_segment_values, checks_at_once
from fastcompress.triton.common import (
    BATCH_SIZES,
    accumulate,
    as_rows,
    column_block,
    flat,
    launch,
    upper_bound,
    warps,
)
from fastcompress.triton.dot import row_dot, steps_in_flight

#: Frames per block of a sum.
BLOCK = tl.constexpr(64)
#: Elements of a tile [segments, columns]: 16 per thread (8 in fp64), so that both sums of an element stay in registers.
TILE = 2048
#: Largest width of a row, as in the CUDA ops. The second grid dimension runs over columns and is limited to 65,535.
MAX_WIDTH = 1 << 21
#: Rows per program of the adjoint.
EXPAND_ROWS = 16


def segment_tile(width: int, dtype: torch.dtype) -> dict[str, int]:
    """Return the tile of a program: pieces of up to 512 bytes of a row, and segments for ``TILE`` elements in all."""
    columns = column_block(width, dtype, 256)
    return {"SEGMENTS": min(16 if dtype == torch.float64 else 64, TILE // columns), "COLUMNS": columns}


def segment_grid(segments: int, width: int, tile: dict[str, int]) -> tuple[int, int]:
    """Return the grid of a launch over segments and columns."""
    if width > MAX_WIDTH:
        raise RuntimeError(f"rows must not be wider than {MAX_WIDTH}, got {width}")
    return triton.cdiv(segments, tile["SEGMENTS"]), triton.cdiv(width, tile["COLUMNS"])


def check_at_once(starts: Tensor, lengths: Tensor, num_rows: int) -> None:
    """Check the values of segments if ``FASTCOMPRESS_CHECK=1``, which synchronizes."""
    if checks_at_once(starts):
        check_segment_values(starts, lengths, num_rows)


def segment_reduce(x: Tensor, starts: Tensor, lengths: Tensor, reduce: str) -> Tensor:
    """Reduce each segment to one row, ``[N, D]`` -> ``[M, D]`` in the dtype of ``x``. One launch."""
    return _reduce(x, None, starts, lengths, reduce)


def segment_weighted_mean(x: Tensor, weights: Tensor, starts: Tensor, lengths: Tensor) -> Tensor:
    """Compute weighted means; ``weights`` are [N] in the accumulation dtype. One launch."""
    return _reduce(x, flat(weights), starts, lengths, "mean")


def _reduce(x: Tensor, weights: Tensor | None, starts: Tensor, lengths: Tensor, reduce: str) -> Tensor:
    check_at_once(starts, lengths, x.shape[0])
    out = torch.empty((starts.shape[0], x.shape[1]), dtype=x.dtype, device=x.device)
    rows = as_rows(x)
    tile = segment_tile(x.shape[1], x.dtype)
    grid = segment_grid(starts.shape[0], x.shape[1], tile)
    launch(
        segment_reduce_fwd_kernel, grid, x, rows, rows.stride(0), rows.shape[1], rows.shape[0], weights, flat(starts),
        flat(lengths), starts.shape[0], out, num_warps=warps(x.dtype),
        REDUCE=reduce, ACC=accumulate(x.dtype), **tile,
    )  # fmt: skip
    return out


def segment_max_backward(grad: Tensor, x: Tensor, y: Tensor, starts: Tensor, lengths: Tensor) -> Tensor:
    """Compute the gradient of ``x`` [N, D] from ``grad`` and the maxima ``y`` [M, D]. Two launches: zeros, gradient."""
    check_at_once(starts, lengths, x.shape[0])
    out = torch.zeros(x.shape, dtype=x.dtype, device=x.device)
    rows, grad_rows, y_rows = as_rows(x), as_rows(grad), as_rows(y)
    tile = segment_tile(x.shape[1], x.dtype)
    grid = segment_grid(starts.shape[0], x.shape[1], tile)
    launch(
        segment_max_bwd_kernel, grid, x,
        grad_rows, grad_rows.stride(0), y_rows, y_rows.stride(0), rows, rows.stride(0), rows.shape[1], rows.shape[0],
        flat(starts), flat(lengths), starts.shape[0], out, ACC=accumulate(x.dtype), **tile,
    )  # fmt: skip
    return out


def segment_weighted_mean_backward(
    grad: Tensor, x: Tensor, y: Tensor, weights: Tensor, starts: Tensor, lengths: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute the gradients of ``x`` [N, D] and ``weights`` [N]. Three launches: zeros of each, gradients."""
    check_at_once(starts, lengths, x.shape[0])
    out = torch.zeros(x.shape, dtype=x.dtype, device=x.device)
    grad_weights = torch.zeros(weights.shape, dtype=weights.dtype, device=x.device)
    rows, grad_rows, y_rows = as_rows(x), as_rows(grad), as_rows(y)
    columns = column_block(x.shape[1], x.dtype, 128)
    launch(
        segment_weighted_mean_bwd_kernel, (triton.cdiv(starts.shape[0], 16),), x, grad_rows, grad_rows.stride(0),
        y_rows, y_rows.stride(0), rows, rows.stride(0), rows.shape[1], rows.shape[0], flat(weights), flat(starts),
        flat(lengths), starts.shape[0], out, grad_weights, ACC=accumulate(x.dtype), SEGMENTS=16, COLUMNS=columns,
    )  # fmt: skip
    return out, grad_weights


def segment_expand(y: Tensor, starts: Tensor, lengths: Tensor, num_rows: int, reduce: str) -> Tensor:
    """Apply the adjoint of ``segment_reduce``, ``[M, D]`` -> ``[num_rows, D]``; 0 in gaps. One launch."""
    check_at_once(starts, lengths, num_rows)
    out = torch.empty((num_rows, y.shape[1]), dtype=y.dtype, device=y.device)
    rows = as_rows(y)
    columns = column_block(y.shape[1], y.dtype, 256)
    launch(
        segment_expand_fwd_kernel, (triton.cdiv(num_rows, EXPAND_ROWS),), y, rows, rows.stride(0), rows.shape[1],
        flat(starts), flat(lengths), starts.shape[0], starts.shape[0].bit_length(), out, num_rows, REDUCE=reduce,
        ACC=accumulate(y.dtype), ROWS=EXPAND_ROWS, COLUMNS=columns,
    )  # fmt: skip
    return out


@triton.jit
def divide(a, b, ACC: tl.constexpr):
    """Divide with correct rounding, which `/` guarantees in fp64 only."""
    if ACC == tl.float64:
        return a / b
    else:
        a, b = tl.broadcast(a, b)
        return tl.div_rn(a, b)


@triton.jit
def minus_zeros(SHAPE: tl.constexpr, ACC: tl.constexpr):
    """Return -0. It is computed because Triton would turn the constant -0.0 into 0."""
    return tl.zeros(SHAPE, ACC) * -1.0


@triton.jit
def load_segments(STARTS, LENGTHS, m, num_segments, num_rows):
    """Load starts and lengths, [SEGMENTS] int64, clamped to the rows that exist; 0 and 0 after the last segment."""
    start = tl.load(STARTS + m, mask=m < num_segments, other=0)
    length = tl.load(LENGTHS + m, mask=m < num_segments, other=0)
    start = tl.minimum(tl.maximum(start, 0), num_rows)
    length = tl.minimum(tl.maximum(length, 0), num_rows - start)
    return start, length


@triton.jit
def sum_rows(
    X, stride, start, length, column, width, WEIGHTS, head,
    ACC: tl.constexpr, SEGMENTS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Sum segments, [SEGMENTS, COLUMNS] in ACC; an empty segment gives -0.

    ``WEIGHTS`` has a weight per row, or is None. ``head`` [SEGMENTS], if it is not None, replaces the weights of first
    rows.
    """
    nothing = minus_zeros((1, 1), ACC)
    inside = column[None, :] < width
    unroll: tl.constexpr = steps_in_flight(X.dtype)
    longest = tl.max(length, 0)
    total = minus_zeros((SEGMENTS, COLUMNS), ACC)  # [SEGMENTS, COLUMNS]
    for first in range(0, longest, BLOCK):
        block = minus_zeros((SEGMENTS, COLUMNS), ACC)  # [SEGMENTS, COLUMNS]
        for p in tl.range(first, tl.minimum(first + BLOCK, longest), loop_unroll_factor=unroll):
            here = p < length  # [SEGMENTS]
            pointers = (X + (start + p) * stride)[:, None] + column[None, :]
            row = tl.load(pointers, mask=here[:, None] & inside, other=0).to(ACC)  # [SEGMENTS, COLUMNS]
            if WEIGHTS is not None:
                weight = tl.load(WEIGHTS + start + p, mask=here, other=0)
                if head is not None:
                    weight = tl.where(p == 0, head, weight)
                row = row * weight[:, None]
            block += tl.where(here[:, None], row, nothing)
        total += block
    return total


@triton.jit
def sum_weights(WEIGHTS, start, length, ACC: tl.constexpr, SEGMENTS: tl.constexpr):
    """Sum the weights of segments, [SEGMENTS], in the order of ``sum_rows``."""
    nothing = minus_zeros((1,), ACC)
    longest = tl.max(length, 0)
    total = minus_zeros((SEGMENTS,), ACC)  # [SEGMENTS]
    for first in range(0, longest, BLOCK):
        block = minus_zeros((SEGMENTS,), ACC)  # [SEGMENTS]
        for p in tl.range(first, tl.minimum(first + BLOCK, longest), loop_unroll_factor=4):
            here = p < length
            block += tl.where(here, tl.load(WEIGHTS + start + p, mask=here, other=0), nothing)
        total += block
    return total


@triton.jit
def picked_row(start, length, REDUCE: tl.constexpr):
    """Return the row that ``first``, ``last`` or ``middle`` picks from a segment that is not empty."""
    if REDUCE == "first":
        return start
    elif REDUCE == "last":
        return start + length - 1
    else:
        return start + (length - 1) // 2


@triton.jit(do_not_specialize=BATCH_SIZES)
def segment_reduce_fwd_kernel(
    X, stride, width, num_rows, WEIGHTS, STARTS, LENGTHS, num_segments, OUT,
    REDUCE: tl.constexpr, ACC: tl.constexpr, SEGMENTS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0).to(tl.int64) * SEGMENTS + tl.arange(0, SEGMENTS)  # [SEGMENTS]
    start, length = load_segments(STARTS, LENGTHS, m, num_segments, num_rows)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)  # [COLUMNS]
    inside = column[None, :] < width
    filled = (length > 0)[:, None]
    if REDUCE == "sum" or REDUCE == "mean":
        out = sum_rows(X, stride, start, length, column, width, WEIGHTS, None, ACC, SEGMENTS, COLUMNS)
        if WEIGHTS is not None:
            weight = sum_weights(WEIGHTS, start, length, ACC, SEGMENTS)[:, None]
            out = divide(out, weight, ACC)
            filled = weight != 0
        elif REDUCE == "mean":
            out = divide(out, tl.maximum(length, 1).to(ACC)[:, None], ACC)
        out = tl.where(filled, out, 0)
    elif REDUCE == "max":
        pointers = (X + start * stride)[:, None] + column[None, :]
        out = tl.load(pointers, mask=filled & inside, other=0).to(ACC)  # [SEGMENTS, COLUMNS]
        for p in tl.range(1, tl.max(length, 0), loop_unroll_factor=steps_in_flight(X.dtype)):
            here = (p < length)[:, None]
            pointers = (X + (start + p) * stride)[:, None] + column[None, :]
            row = tl.load(pointers, mask=here & inside, other=0).to(ACC)  # [SEGMENTS, COLUMNS]
            out = tl.where(here & ((row > out) | ((row != row) & (out == out))), row, out)
    else:
        pointers = (X + picked_row(start, length, REDUCE) * stride)[:, None] + column[None, :]
        out = tl.load(pointers, mask=filled & inside, other=0)
    target = OUT + m[:, None] * width + column[None, :]
    tl.store(target, out.to(OUT.dtype.element_ty), mask=(m < num_segments)[:, None] & inside)


@triton.jit(do_not_specialize=BATCH_SIZES)
def segment_max_bwd_kernel(
    GRAD, grad_stride, Y, y_stride, X, stride, width, num_rows, STARTS, LENGTHS, num_segments, OUT,
    ACC: tl.constexpr, SEGMENTS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write the gradient to the first row that equals the maximum; the output is zero before the launch."""
    m = tl.program_id(0).to(tl.int64) * SEGMENTS + tl.arange(0, SEGMENTS)  # [SEGMENTS]
    start, length = load_segments(STARTS, LENGTHS, m, num_segments, num_rows)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)  # [COLUMNS]
    inside = column[None, :] < width
    filled = (length > 0)[:, None] & inside
    grad = tl.load(GRAD + (m * grad_stride)[:, None] + column[None, :], mask=filled, other=0)  # [SEGMENTS, COLUMNS]
    best = tl.load(Y + (m * y_stride)[:, None] + column[None, :], mask=filled, other=0).to(ACC)
    wanted = filled  # [SEGMENTS, COLUMNS], true until a frame with the maximum is found
    for p in range(0, tl.max(length, 0)):
        row = start + p
        here = wanted & (p < length)[:, None]
        x = tl.load(X + (row * stride)[:, None] + column[None, :], mask=here, other=0).to(ACC)
        here = here & ((x == best) | ((x != x) & (best != best)))
        tl.store(OUT + (row * width)[:, None] + column[None, :], grad, mask=here)
        wanted = wanted & (here == 0)


@triton.jit(do_not_specialize=BATCH_SIZES)
def segment_weighted_mean_bwd_kernel(
    GRAD, grad_stride, Y, y_stride, X, stride, width, num_rows, WEIGHTS, STARTS, LENGTHS, num_segments, OUT,
    GRAD_WEIGHTS, ACC: tl.constexpr, SEGMENTS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0).to(tl.int64) * SEGMENTS + tl.arange(0, SEGMENTS)  # [SEGMENTS]
    start, length = load_segments(STARTS, LENGTHS, m, num_segments, num_rows)
    weight = sum_weights(WEIGHTS, start, length, ACC, SEGMENTS)  # [SEGMENTS]
    valid = weight != 0
    grad_row = GRAD + m * grad_stride
    mean_slope = row_dot(grad_row, valid, Y + m * y_stride, valid, width, SEGMENTS, ACC)  # [SEGMENTS] fp64
    for p in range(0, tl.max(length, 0)):
        here = valid & (p < length)
        row = start + p
        slope = row_dot(grad_row, here, X + row * stride, here, width, SEGMENTS, ACC) - mean_slope
        tl.store(GRAD_WEIGHTS + row, (slope / weight.to(tl.float64)).to(ACC), mask=here)
        share = divide(tl.load(WEIGHTS + row, mask=here, other=0), weight, ACC)
        for k in range(0, width, COLUMNS):
            column = k + tl.arange(0, COLUMNS)
            mask = here[:, None] & (column < width)[None, :]
            grad = tl.load(grad_row[:, None] + column[None, :], mask=mask, other=0).to(ACC)  # [SEGMENTS, COLUMNS]
            target = OUT + (row * width)[:, None] + column[None, :]
            tl.store(target, (share[:, None] * grad).to(OUT.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=BATCH_SIZES)
def segment_expand_fwd_kernel(
    Y, stride, width, STARTS, LENGTHS, num_segments, steps, OUT, num_rows,
    REDUCE: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Each row looks up its segment, so that every element is written once, rows in gaps included."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    # Take the last segment that starts at or before the row. If several share a start, all but the last are empty.
    m = upper_bound(STARTS, num_segments, row, steps) - 1
    start = tl.load(STARTS + m, mask=m >= 0, other=0)
    length = tl.load(LENGTHS + m, mask=m >= 0, other=0)
    if REDUCE == "sum" or REDUCE == "mean":
        taken = (m >= 0) & (row - start < length)
    else:
        taken = (m >= 0) & (length > 0) & (row == picked_row(start, length, REDUCE))
    divisor = tl.maximum(length, 1).to(ACC)[:, None]
    for k in range(0, width, COLUMNS):
        column = k + tl.arange(0, COLUMNS)
        inside = (column < width)[None, :]
        pointers = Y + (m * stride)[:, None] + column[None, :]
        y = tl.load(pointers, mask=taken[:, None] & inside, other=0)  # [ROWS, COLUMNS]
        if REDUCE == "mean":
            y = divide(y.to(ACC), divisor, ACC).to(OUT.dtype.element_ty)
        target = OUT + row[:, None] * width + column[None, :]
        tl.store(target, y, mask=(row < num_rows)[:, None] & inside)

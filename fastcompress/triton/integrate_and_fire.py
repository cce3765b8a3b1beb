"""Integrate-and-fire: weighted sums of runs of rows that may share their first and last rows, and their gradients.

Memory traffic: the forward pass reads the rows once, and shared rows again, and writes the tokens. The backward pass
reads the rows and, for each row, the gradients of its tokens. Invalid starts and lengths are clamped to the rows that
exist; with FASTCOMPRESS_CHECK=1 they raise.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastcompress.checks import check_token_values, checks_at_once
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
from fastcompress.triton.dot import row_dot
from fastcompress.triton.segment_reduce import divide, load_segments, segment_grid, segment_tile, sum_rows

#: Rows, or tokens, per program of the backward pass.
ROWS = 16


def integrate_rows(
    x: Tensor, weights: Tensor, first: Tensor, divisors: Tensor | None, starts: Tensor, lengths: Tensor
) -> Tensor:
    """Compute weighted sums of rows, ``[N, D]`` -> ``[M, D]`` in the dtype of ``x``. One launch."""
    if checks_at_once(starts):
        check_token_values(starts, lengths, x.shape[0])
    out = torch.empty((starts.shape[0], x.shape[1]), dtype=x.dtype, device=x.device)
    rows = as_rows(x)
    tile = segment_tile(x.shape[1], x.dtype)
    launch(
        integrate_rows_fwd_kernel, segment_grid(starts.shape[0], x.shape[1], tile), x, rows, rows.stride(0),
        rows.shape[1], rows.shape[0], flat(weights), flat(first), flat(divisors), flat(starts), flat(lengths),
        starts.shape[0], out, num_warps=warps(x.dtype), ACC=accumulate(x.dtype), **tile,
    )  # fmt: skip
    return out


def integrate_rows_backward(
    grad: Tensor, x: Tensor, weights: Tensor, first: Tensor, starts: Tensor, lengths: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of ``x`` [N, D], ``weights`` [N] and ``first`` [M]. Two launches: rows, first weights."""
    num_rows, count = x.shape[0], starts.shape[0]
    if checks_at_once(starts):
        check_token_values(starts, lengths, num_rows)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    grad_weights = torch.empty(weights.shape, dtype=weights.dtype, device=x.device)
    grad_first = torch.empty(first.shape, dtype=first.dtype, device=x.device)
    rows, grad_rows = as_rows(x), as_rows(grad)
    given = (grad_rows, grad_rows.stride(0), rows, rows.stride(0), rows.shape[1], num_rows)
    tokens = (flat(starts), flat(lengths), count)
    launch(
        integrate_rows_bwd_kernel, (triton.cdiv(num_rows, ROWS),), x, *given, flat(weights), flat(first), *tokens,
        count.bit_length(), out, grad_weights, ACC=accumulate(x.dtype), ROWS=ROWS,
        COLUMNS=column_block(x.shape[1], x.dtype, 128),
    )  # fmt: skip
    launch(
        integrate_rows_bwd_first_kernel,
        (triton.cdiv(count, ROWS),),
        x,
        *given,
        *tokens,
        grad_first,
        ACC=accumulate(x.dtype),
        ROWS=ROWS,
    )
    return out, grad_weights, grad_first


@triton.jit(do_not_specialize=BATCH_SIZES)
def integrate_rows_fwd_kernel(
    X, stride, width, num_rows, WEIGHTS, FIRST, DIVISORS, STARTS, LENGTHS, num_segments, OUT,
    ACC: tl.constexpr, SEGMENTS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0).to(tl.int64) * SEGMENTS + tl.arange(0, SEGMENTS)  # [SEGMENTS]
    start, length = load_segments(STARTS, LENGTHS, m, num_segments, num_rows)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)  # [COLUMNS]
    head = tl.load(FIRST + m, mask=m < num_segments, other=0)
    out = sum_rows(X, stride, start, length, column, width, WEIGHTS, head, ACC, SEGMENTS, COLUMNS)
    if DIVISORS is not None:
        out = divide(out, tl.load(DIVISORS + m, mask=m < num_segments, other=1)[:, None], ACC)
    out = tl.where((length > 0)[:, None], out, 0)
    target = OUT + m[:, None] * width + column[None, :]
    tl.store(target, out.to(OUT.dtype.element_ty), mask=(m < num_segments)[:, None] & (column < width)[None, :])


@triton.jit(do_not_specialize=BATCH_SIZES)
def integrate_rows_bwd_kernel(
    GRAD, grad_stride, X, stride, width, num_rows, WEIGHTS, FIRST, STARTS, LENGTHS, num_segments, steps, OUT,
    GRAD_WEIGHTS, ACC: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Each row finds its tokens: the one that contains it after its first row, and those whose first row it is."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    inside = row < num_rows
    begin = upper_bound(STARTS, num_segments, row - 1, steps)  # first token that starts at this row or later
    end = upper_bound(STARTS, num_segments, row, steps)
    m = begin - 1
    start = tl.load(STARTS + m, mask=m >= 0, other=0)
    length = tl.load(LENGTHS + m, mask=m >= 0, other=0)
    covered = inside & (m >= 0) & (row - start < length)
    slope = row_dot(GRAD + m * grad_stride, covered, X + row * stride, covered, width, ROWS, ACC)
    tl.store(GRAD_WEIGHTS + row, tl.where(covered, slope, 0).to(ACC), mask=inside)
    weight = tl.load(WEIGHTS + row, mask=inside, other=0)
    most = tl.max(tl.where(inside, end - begin, 0), 0)
    for k in range(0, width, COLUMNS):
        column = k + tl.arange(0, COLUMNS)
        in_row = (column < width)[None, :]
        grad = tl.load(GRAD + (m * grad_stride)[:, None] + column[None, :], mask=covered[:, None] & in_row, other=0)
        total = weight[:, None] * grad.to(ACC)  # [ROWS, COLUMNS]
        empty = covered == 0
        for i in range(0, most):
            opened = begin + i
            here = inside & (opened < end)
            factor = tl.load(FIRST + opened, mask=here, other=0)
            pointers = GRAD + (opened * grad_stride)[:, None] + column[None, :]
            grad = tl.load(pointers, mask=here[:, None] & in_row, other=0)
            term = factor[:, None] * grad.to(ACC)
            total = tl.where(here[:, None], tl.where(empty[:, None], term, total + term), total)
            empty = empty & (here == 0)
        total = tl.where(empty[:, None], 0, total)
        target = OUT + (row * width)[:, None] + column[None, :]
        tl.store(target, total.to(OUT.dtype.element_ty), mask=inside[:, None] & in_row)


@triton.jit(do_not_specialize=BATCH_SIZES)
def integrate_rows_bwd_first_kernel(
    GRAD, grad_stride, X, stride, width, num_rows, STARTS, LENGTHS, num_segments, GRAD_FIRST,
    ACC: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    start, length = load_segments(STARTS, LENGTHS, m, num_segments, num_rows)
    filled = length > 0
    slope = row_dot(GRAD + m * grad_stride, filled, X + start * stride, filled, width, ROWS, ACC)
    tl.store(GRAD_FIRST + m, tl.where(filled, slope, 0).to(ACC), mask=m < num_segments)

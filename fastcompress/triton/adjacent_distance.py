"""Cosine distance of rows that are ``lag`` apart, and its gradient.

Memory traffic: the forward pass reads x once (the partner rows come from cache if ``lag`` rows fit there) and writes 4
N bytes. The backward pass reads x once for the dot products and once, from cache, for the sum, and writes the gradient
once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastcompress.reference.adjacent_distance import accumulate_dtype
from fastcompress.triton.common import (
    BATCH_SIZES,
    accumulate,
    as_rows,
    column_block,
    flat,
    launch,
    place_rows,
    prepare_sequences,
    warps,
)
from fastcompress.triton.dot import EPS, clamped_norm, cosine_distance, row_dot, row_dot_and_square

#: Rows per program: with 32 columns per step, 16 partial sums per thread.
ROWS = 64
#: Rows per program of the gradient, which keeps five dot products in registers.
BACKWARD_ROWS = 32


def adjacent_distance(x: Tensor, cu_seqlens: Tensor | None, lengths: Tensor | None, lag: int) -> Tensor:
    """Compute distances, ``[N]`` or ``[B, T]`` fp32 (fp64 for fp64 input); NaN without a partner.

    Two launches: sequences, distances.
    """
    out = torch.empty(x.shape[:-1], dtype=accumulate_dtype(x.dtype), device=x.device)
    rows = as_rows(x)
    sequences = prepare_sequences(x, x.dim() - 1, cu_seqlens, lengths)
    launch(
        adjacent_distance_fwd_kernel, (triton.cdiv(rows.shape[0], ROWS),), x,
        rows, rows.stride(0), rows.shape[1], sequences.begin, sequences.end, sequences.count, sequences.steps, out,
        rows.shape[0], min(lag, max(1, rows.shape[0])), num_warps=warps(x.dtype), ACC=accumulate(x.dtype),
        ROWS=ROWS,
    )  # fmt: skip
    return out


def adjacent_distance_backward(
    grad: Tensor, x: Tensor, cu_seqlens: Tensor | None, lengths: Tensor | None, lag: int
) -> Tensor:
    """Compute the gradient of ``x`` from ``grad``, ``[N]`` or ``[B, T]``. Two launches: sequences, gradient."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows = as_rows(x)
    sequences = prepare_sequences(x, x.dim() - 1, cu_seqlens, lengths)
    launch(
        adjacent_distance_bwd_kernel, (triton.cdiv(rows.shape[0], BACKWARD_ROWS),), x,
        flat(grad), rows, rows.stride(0), rows.shape[1], sequences.begin, sequences.end, sequences.count,
        sequences.steps, out, rows.shape[0], min(lag, max(1, rows.shape[0])), num_warps=warps(x.dtype),
        ACC=accumulate(x.dtype), ROWS=BACKWARD_ROWS, COLUMNS=column_block(rows.shape[1], x.dtype, 64),
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=BATCH_SIZES)
def adjacent_distance_fwd_kernel(
    X, stride, width, BEGIN, END, num_sequences, steps, OUT, num_rows, lag,
    ACC: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    alive, _, _, end, _ = place_rows(row, BEGIN, END, num_sequences, steps, BEGIN, False)
    pair = alive & (row + lag < end)
    a = X + row * stride
    b = X + (row + lag) * stride
    # The square of the partner row is computed again: the partner can belong to another program.
    square_a = row_dot(a, pair, a, pair, width, ROWS, ACC)  # [ROWS] fp64
    dot, square_b = row_dot_and_square(a, pair, b, pair, width, ROWS, ACC)
    d = cosine_distance(dot, square_a, square_b).to(ACC)
    tl.store(OUT + row, tl.where(pair, d, float("nan")), mask=row < num_rows)


@triton.jit
def pair_factors(A, square_a, B, square_b, pair, grad, width, ROWS: tl.constexpr, ACC: tl.constexpr):
    """Return the factors with which pairs (a, b) of rows enter their gradients, [ROWS] each.

    These are the factor of a in the gradient of a and of b in that of b (fp64), the factor of each in the gradient of
    the other (ACC), and whether the pair contributes at all.
    """
    dot = row_dot(A, pair, B, pair, width, ROWS, ACC)
    norm_a, norm_b = clamped_norm(square_a), clamped_norm(square_b)
    pair = pair & ((square_a != 0) | (square_b != 0))
    grad = tl.where(pair, grad, 0).to(tl.float64)
    cosine = dot / (norm_a * norm_b)
    eps = tl.full((1,), EPS, tl.float64)
    own_a = tl.where(pair & (norm_a > eps), cosine / (norm_a * norm_a) * grad, 0)
    own_b = tl.where(pair & (norm_b > eps), cosine / (norm_b * norm_b) * grad, 0)
    return own_a, own_b, (-grad / (norm_a * norm_b)).to(ACC), pair


@triton.jit(do_not_specialize=BATCH_SIZES)
def adjacent_distance_bwd_kernel(
    GRAD, X, stride, width, BEGIN, END, num_sequences, steps, OUT, num_rows, lag,
    ACC: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    alive, _, begin, end, _ = place_rows(row, BEGIN, END, num_sequences, steps, BEGIN, False)
    has_next = alive & (row + lag < end)
    has_previous = alive & (row - lag >= begin)
    own = X + row * stride
    after = X + (row + lag) * stride
    before = X + (row - lag) * stride
    square = row_dot(own, alive, own, alive, width, ROWS, ACC)  # [ROWS] fp64
    square_next = row_dot(after, has_next, after, has_next, width, ROWS, ACC)
    square_previous = row_dot(before, has_previous, before, has_previous, width, ROWS, ACC)
    grad_next = tl.load(GRAD + row, mask=has_next, other=0)
    grad_previous = tl.load(GRAD + row - lag, mask=has_previous, other=0)
    factor, _, cross_next, has_next = pair_factors(
        own, square, after, square_next, has_next, grad_next, width, ROWS, ACC
    )
    _, factor_previous, cross_previous, has_previous = pair_factors(
        before, square_previous, own, square, has_previous, grad_previous, width, ROWS, ACC
    )
    factor = (factor + factor_previous).to(ACC)
    for k in range(0, width, COLUMNS):
        column = (k + tl.arange(0, COLUMNS))[None, :]
        inside = column < width
        used = (has_next | has_previous)[:, None]  # [ROWS, 1]
        x = tl.load(own[:, None] + column, mask=used & inside, other=0).to(ACC)  # [ROWS, COLUMNS]
        following = tl.load(after[:, None] + column, mask=has_next[:, None] & inside, other=0).to(ACC)
        previous = tl.load(before[:, None] + column, mask=has_previous[:, None] & inside, other=0).to(ACC)
        out = tl.where(used, factor[:, None] * x, 0)
        out = tl.where(has_next[:, None], out + cross_next[:, None] * following, out)
        out = tl.where(has_previous[:, None], out + cross_previous[:, None] * previous, out)
        target = OUT + row[:, None] * width + column
        tl.store(target, out.to(OUT.dtype.element_ty), mask=(row < num_rows)[:, None] & inside)

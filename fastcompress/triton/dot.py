"""The canonical dot product and the cosine distance; fastcompress/reference/adjacent_distance.py is the definition."""

from __future__ import annotations

import triton
import triton.language as tl

#: Partial sums of the canonical dot product.
LANES = tl.constexpr(32)
#: Smallest norm that divides.
EPS = tl.constexpr(1e-8)


@triton.constexpr_function
def steps_in_flight(pointer_type):
    """How often loops are unrolled: with tiles of 2048 elements a program has 8 KB on the way, of each operand.

    Not a ``triton.jit`` helper, whose result is no constant in Triton 3.6."""
    return 2 if pointer_type.element_ty.primitive_bitwidth == 16 else 1


@triton.jit
def add_partial_sums(sums, ROWS: tl.constexpr):
    """``[ROWS, 32]`` -> ``[ROWS]`` fp64: j and j + 16, then + 8, + 4, + 2, + 1. A sum over an axis of two has no order
    that could differ."""
    sums = sums.to(tl.float64)
    sums = tl.sum(tl.reshape(sums, (ROWS, 2, 16)), 1)  # [ROWS, 16]
    sums = tl.sum(tl.reshape(sums, (ROWS, 2, 8)), 1)  # [ROWS, 8]
    sums = tl.sum(tl.reshape(sums, (ROWS, 2, 4)), 1)  # [ROWS, 4]
    sums = tl.sum(tl.reshape(sums, (ROWS, 2, 2)), 1)  # [ROWS, 2]
    return tl.sum(sums, 1)


@triton.jit
def row_dot(A, a_mask, B, b_mask, width, ROWS: tl.constexpr, ACC: tl.constexpr):
    """``a . b`` of the rows that start at ``A`` and ``B`` [ROWS]; a row that is masked is zero. [ROWS] fp64."""
    lane = tl.arange(0, LANES)
    sums = tl.zeros((ROWS, LANES), ACC)  # [ROWS, LANES]
    for k in tl.range(0, width, LANES, loop_unroll_factor=steps_in_flight(A.dtype)):
        column = (k + lane)[None, :]
        a = tl.load(A[:, None] + column, mask=a_mask[:, None] & (column < width), other=0).to(ACC)
        b = tl.load(B[:, None] + column, mask=b_mask[:, None] & (column < width), other=0).to(ACC)
        sums += a * b
    return add_partial_sums(sums, ROWS)


@triton.jit
def row_dot_and_square(A, a_mask, B, b_mask, width, ROWS: tl.constexpr, ACC: tl.constexpr):
    """``a . b`` and ``b . b``, with one read of each row."""
    lane = tl.arange(0, LANES)
    dots = tl.zeros((ROWS, LANES), ACC)  # [ROWS, LANES]
    squares = tl.zeros((ROWS, LANES), ACC)  # [ROWS, LANES]
    for k in tl.range(0, width, LANES, loop_unroll_factor=steps_in_flight(A.dtype)):
        column = (k + lane)[None, :]
        a = tl.load(A[:, None] + column, mask=a_mask[:, None] & (column < width), other=0).to(ACC)
        b = tl.load(B[:, None] + column, mask=b_mask[:, None] & (column < width), other=0).to(ACC)
        dots += a * b
        squares += b * b
    return add_partial_sums(dots, ROWS), add_partial_sums(squares, ROWS)


@triton.jit
def clamped_norm(square):
    norm = tl.sqrt(square)  # fp64: correctly rounded
    eps = tl.full((1,), EPS, tl.float64)
    return tl.where(norm < eps, eps, norm)  # NaN stays


@triton.jit
def cosine_distance(dot, square_a, square_b):
    """fp64, of products in fp64. Two zero rows are alike."""
    d = 1.0 - dot / (clamped_norm(square_a) * clamped_norm(square_b))
    return tl.where((square_a == 0) & (square_b == 0), 0.0, d)

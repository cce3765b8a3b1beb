"""The canonical dot product and the cosine distance; fastcompress/reference/adjacent_distance.py is the definition."""

from __future__ import annotations

import triton
import triton.language as tl

#: Number of partial sums of the canonical dot product.
LANES = tl.constexpr(32)
#: Lower limit of a norm that is used as a divisor.
EPS = tl.constexpr(1e-8)


@triton.constexpr_function
def steps_in_flight(pointer_type):
    """Return the unroll factor of loops: a program with tiles of 2048 elements then has 8 KB per operand in flight.

    This is a ``constexpr_function`` because the result of a ``triton.jit`` function is not a constant in Triton 3.6.
    """
    return 2 if pointer_type.element_ty.primitive_bitwidth == 16 else 1


@triton.jit
def add_partial_sums(sums, ROWS: tl.constexpr):
    """Add partial sums pairwise, ``[ROWS, 32]`` -> ``[ROWS]`` fp64: j and j + 16, then j + 8, j + 4, j + 2, j + 1.

    Every ``tl.sum`` is over an axis of two elements, so its order cannot differ.
    """
    sums = sums.to(tl.float64)
    sums = tl.sum(tl.reshape(sums, (ROWS, 2, 16)), 1)  # [ROWS, 16]
    sums = tl.sum(tl.reshape(sums, (ROWS, 2, 8)), 1)  # [ROWS, 8]
    sums = tl.sum(tl.reshape(sums, (ROWS, 2, 4)), 1)  # [ROWS, 4]
    sums = tl.sum(tl.reshape(sums, (ROWS, 2, 2)), 1)  # [ROWS, 2]
    return tl.sum(sums, 1)


@triton.jit
def row_dot(A, a_mask, B, b_mask, width, ROWS: tl.constexpr, ACC: tl.constexpr):
    """Return ``a . b`` of the rows that start at the pointers ``A`` and ``B`` [ROWS], fp64. Masked rows are zero."""
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
    """Return ``a . b`` and ``b . b`` like ``row_dot``, with one read of each row."""
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
    """Return ``max(sqrt(square), EPS)`` in fp64, where ``tl.sqrt`` rounds correctly."""
    norm = tl.sqrt(square)
    eps = tl.full((1,), EPS, tl.float64)
    return tl.where(norm < eps, eps, norm)  # NaN stays


@triton.jit
def cosine_distance(dot, square_a, square_b):
    """Return the cosine distance in fp64 from dot products in fp64. The distance of two zero rows is 0."""
    d = 1.0 - dot / (clamped_norm(square_a) * clamped_norm(square_b))
    return tl.where((square_a == 0) & (square_b == 0), 0.0, d)

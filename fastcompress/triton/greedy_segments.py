"""Greedy segments; fastcompress/reference/greedy_segments.py is the definition.

The first kernel computes the norms of all rows and is bandwidth bound. In the second, one program per sequence
processes its frames in order. Each frame takes two passes over the columns. The first, in wide steps, adds the previous
frame to the sum of its segment and writes the products of the sum with this frame. The second adds the products in the
order of the canonical dot product, 32 at a time. Sum and products, two numbers per column, are in scratch memory of the
program and stay in the L1 cache.

The second kernel is latency bound. Its time is the number of frames of the longest sequence, times one read of a frame,
two round trips to the L1 cache and width / 32 dependent additions.
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
    double_bits,
    launch,
    prepare_sequences,
    warps,
)
from fastcompress.triton.dot import LANES, add_partial_sums, clamped_norm, row_dot

#: Rows per program of the norms.
ROWS = 64
#: Maximum columns per step of the wide pass: 16 numbers per thread of each of four operands.
COLUMNS = 2048


def greedy_boundaries(
    x: Tensor, cu_seqlens: Tensor | None, lengths: Tensor | None, threshold: float, max_len: int
) -> Tensor:
    """Return the frames that start a segment, ``[N]`` or ``[B, T]`` bool. Three launches: sequences, norms, walk."""
    out = torch.empty(x.shape[:-1], dtype=torch.bool, device=x.device)
    starts = out.view(torch.uint8)
    rows = as_rows(x)
    count, width = rows.shape
    sequences = prepare_sequences(x, x.dim() - 1, cu_seqlens, lengths)
    inverse_norms = torch.empty(count, dtype=torch.float64, device=x.device)
    launch(
        greedy_norms_kernel, (triton.cdiv(count, ROWS),), x,
        rows, rows.stride(0), width, inverse_norms, starts, count, num_warps=warps(x.dtype), ACC=accumulate(x.dtype),
        ROWS=ROWS,
    )  # fmt: skip
    columns = min(COLUMNS, max(LANES.value, triton.next_power_of_2(width)))
    pitch = triton.cdiv(width, columns) * columns
    totals = torch.empty(sequences.count, pitch, dtype=accumulate_dtype(x.dtype), device=x.device)
    products = torch.empty_like(totals)
    launch(
        greedy_walk_kernel, (sequences.count,), x,
        rows, rows.stride(0), width, sequences.begin, sequences.end, inverse_norms, totals, products, pitch, starts,
        double_bits(1 - threshold), max_len or 2**63 - 1, num_warps=warps(x.dtype), ACC=accumulate(x.dtype),
        COLUMNS=columns,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=BATCH_SIZES)
def greedy_norms_kernel(X, stride, width, INVERSE_NORMS, STARTS, num_rows, ACC: tl.constexpr, ROWS: tl.constexpr):
    """Compute 1 / norm of every row in fp64, and clear the starts."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    inside = row < num_rows
    a = X + row * stride
    square = row_dot(a, inside, a, inside, width, ROWS, ACC)  # [ROWS] fp64
    tl.store(INVERSE_NORMS + row, 1.0 / clamped_norm(square), mask=inside)
    tl.store(STARTS + row, tl.zeros((ROWS,), tl.uint8), mask=inside)


@triton.jit(do_not_specialize=["least_bits", "max_len"])
def greedy_walk_kernel(
    X, stride, width, BEGIN, END, INVERSE_NORMS, TOTALS, PRODUCTS, pitch, STARTS, least_bits: tl.int64,
    max_len: tl.int64, ACC: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Find the starts of the segments of one sequence per program."""
    b = tl.program_id(0).to(tl.int64)
    begin, end = tl.load(BEGIN + b), tl.load(END + b)
    least = least_bits.to(tl.int64).to(tl.float64, bitcast=True)
    TOTALS += b * pitch
    PRODUCTS += b * pitch
    lane = tl.arange(0, LANES)  # [LANES]
    if begin < end:
        tl.store(STARTS + begin, 1)
        last_inverse = tl.load(INVERSE_NORMS + begin)
        start = begin  # first row of the open segment
        t = begin + 1
        while t < end:
            inverse = tl.load(INVERSE_NORMS + t)
            scale = last_inverse.to(ACC)
            for k in range(0, width, COLUMNS):
                column = k + tl.arange(0, COLUMNS)  # [COLUMNS]
                inside = column < width
                last = tl.load(X + (t - 1) * stride + column, mask=inside, other=0).to(ACC)
                x = tl.load(X + t * stride + column, mask=inside, other=0).to(ACC)
                total = tl.load(TOTALS + column, mask=inside & (start < t - 1), other=0)
                total += last * scale
                tl.store(TOTALS + column, total)
                tl.store(PRODUCTS + column, total * x)
            tl.debug_barrier()  # wait until all threads have written their products
            sums = tl.zeros((LANES,), ACC)  # [LANES]
            for k in tl.range(0, width, LANES, loop_unroll_factor=8):
                sums += tl.load(PRODUCTS + k + lane)
            tl.debug_barrier()  # wait until all threads have read them, before the next frame overwrites them
            dot = tl.sum(add_partial_sums(sums[None, :], 1), 0)
            length = t - start
            joins = (dot * inverse >= least * length.to(tl.float64)) & (length < max_len)
            start = tl.where(joins, start, t)
            tl.store(STARTS + t, (start == t).to(tl.uint8))
            last_inverse = inverse
            t += 1

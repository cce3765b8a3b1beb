"""Minimum-variance segments by dynamic programming; see fastcompress/reference/min_variance.py.

One program finds the segments of one block. The costs of segments and the smallest costs of the last two numbers of
segments are in global memory, since each row needs those of the next rows.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastcompress.reference.min_variance import LARGEST
from fastcompress.rules import MIN_VARIANCE_BLOCK as BLOCK
from fastcompress.triton.common import Sequences, flat, launch, prepare_sequences

#: Rows per program: the power of two from ``BLOCK`` on.
ROWS = triton.next_power_of_2(BLOCK)
_LARGEST = tl.constexpr(LARGEST)


def min_variance_boundaries(
    d: Tensor, cu_seqlens: Tensor | None, lengths: Tensor | None, row_group: Tensor | None, rate: float, max_len: int
) -> Tensor:
    """Return the rows that start a segment; see the reference. Nothing is read from the device.

    Scratch memory: ``8 * max_len + 2 * ceil(1500 / rate) + 16`` bytes per row.
    """
    if not 1 <= rate <= max_len:
        raise ValueError(f"rate must be between 1 and max_len, {max_len}, got {rate}")
    if d.shape[-1] < max_len - 1:
        raise ValueError(f"d must have max_len - 1 = {max_len - 1} distances per row, got {d.shape[-1]}")
    shape = d.shape[:-1]
    sequences = prepare_sequences(d, d.dim() - 1, cu_seqlens, lengths)
    rows = d.reshape(-1, d.shape[-1]).contiguous()
    count, longest = len(rows), min(max_len, BLOCK)
    out = torch.zeros(count, dtype=torch.uint8, device=d.device)
    sizes = block_sizes(sequences, flat(row_group)).int()
    counts = (sizes.double() / rate).ceil().int()
    most = math.ceil(min(BLOCK, count) / rate)
    costs = torch.empty(longest, count, dtype=torch.float64, device=d.device)
    best = torch.empty(2, count, dtype=torch.float64, device=d.device)
    choices = torch.empty(most, count, dtype=torch.int16, device=d.device)
    launch(
        min_variance_fwd_kernel, (count,), d, rows, rows.stride(0), sizes, counts, costs, best, choices, out,
        count, longest, num_warps=8, ROWS=ROWS,
    )  # fmt: skip
    return out.view(torch.bool).view(shape)


def block_sizes(sequences: Sequences, row_group: Tensor | None) -> Tensor:
    """Return the number of rows of the block that starts at each row, ``[N]`` int64; 0 where no block starts."""
    row = torch.arange(sequences.rows, device=sequences.begin.device)
    if not sequences.count or not sequences.rows:
        return torch.zeros_like(row)
    found = torch.searchsorted(sequences.end, row, right=True)
    index = found.clamp_max(sequences.count - 1)
    inside = (found < sequences.count) & (sequences.begin[index] <= row)
    first = inside & (sequences.begin[index] == row)
    if row_group is not None:
        inside &= row_group > 0
        first |= row_group != row_group.roll(1)
        first &= inside
    after_last = torch.cat([first[1:] | ~inside[1:], first.new_ones(1)]) | (sequences.end[index] == row + 1)
    run = torch.where(first, row, -1).cummax(0).values
    end = torch.where(inside & after_last, row + 1, sequences.rows).flip(0).cummin(0).values.flip(0)
    return torch.where(inside & ((row - run) % BLOCK == 0), (end - row).clamp_max(BLOCK), 0)


@triton.jit(do_not_specialize=["window", "num_rows", "max_len"])
def min_variance_fwd_kernel(
    D, window, SIZES, COUNTS, COSTS, BEST, CHOICES, OUT, num_rows, max_len,
    ROWS: tl.constexpr,
):  # fmt: skip
    begin = tl.program_id(0).to(tl.int64)
    size = tl.load(SIZES + begin)
    if size > 0:
        count = tl.load(COUNTS + begin)
        longest = tl.minimum(size, max_len)
        stride = tl.zeros((1,), tl.int64) + num_rows
        one = tl.full((1,), 1, tl.float64)
        t = tl.arange(0, ROWS)
        inside = t < size
        own = begin + t
        of_first = tl.zeros((ROWS,), tl.float64)
        tl.store(COSTS + own, of_first, mask=inside)
        tl.store(BEST + own, of_first, mask=inside)  # of the pairs of one row
        tl.debug_barrier()
        for length in range(2, longest + 1):
            fits = t + length <= size
            distance = tl.load(D + own * window + length - 2, mask=fits, other=0).to(tl.float64)
            distance = tl.where(tl.abs(distance) <= _LARGEST, distance, one)
            of_first = of_first + distance
            pairs = tl.load(BEST + (length % 2) * stride + own + 1, mask=fits, other=0) + of_first
            tl.store(BEST + (1 - length % 2) * stride + own, pairs, mask=fits)
            tl.store(COSTS + (length - 1) * stride + own, pairs / (one * length), mask=fits)
            tl.debug_barrier()
        for k in range(1, count + 1):
            first = tl.maximum(size - k * longest, count - k)
            last = tl.minimum(size - k, (count - k) * longest)
            reached = (t >= first) & (t <= last)
            least = tl.full((ROWS,), float("inf"), tl.float64)
            choice = tl.zeros((ROWS,), tl.int32)
            for length in range(1, longest + 1):
                fits = reached & (t + length <= size)
                is_end = t + length == size
                rest = tl.load(BEST + ((k - 1) % 2) * stride + own + length, mask=fits & (t + length < size), other=0)
                rest = tl.where(is_end & (k > 1), float("inf"), rest)
                rest = tl.where((k == 1) & (t + length < size), float("inf"), rest)
                cost = tl.load(COSTS + (length - 1) * stride + own, mask=fits, other=float("inf"))
                total = cost + rest
                better = total < least
                least = tl.where(better, total, least)
                choice = tl.where(better, length, choice)
            tl.store(BEST + (k % 2) * stride + own, least, mask=inside)
            tl.store(CHOICES + (k - 1) * stride + own, choice.to(tl.int16), mask=inside)
            tl.debug_barrier()
        at = begin
        tl.store(OUT + at, 1)
        for step in range(1, count):
            at = at + tl.load(CHOICES + (count - step) * num_rows.to(tl.int64) + at).to(tl.int64)
            tl.store(OUT + at, 1)

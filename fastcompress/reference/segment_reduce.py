"""Definition of the reductions over segments and of their adjoints.

Sums are computed in fp32 (fp64 for fp64 input). Frames are added in order within blocks of ``BLOCK`` frames, counted
from the first frame of the segment; then the blocks are added in order. One division and one rounding to the dtype of
the input follow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fastcompress.checks import check_segment_values
from fastcompress.reference.adjacent_distance import accumulate_dtype, canonical_dot

#: Frames per block of a sum. Changing it changes results; see docs/numerics.md.
BLOCK = 64


def positions(starts: Tensor, lengths: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield for each position p in a segment: p, the segments longer than p, and their rows at that position."""
    for p in range(int(lengths.max()) if lengths.numel() else 0):
        active = (lengths > p).nonzero().squeeze(1)
        yield p, active, starts[active] + p


def sum_in_order(row: Callable[[int, Tensor, Tensor], Tensor], starts: Tensor, lengths: Tensor, like: Tensor) -> Tensor:
    """Sum segments in the canonical order, ``[M, ...]``; an empty segment gives 0.

    Args:
        row: Function that returns the terms to add for one item of ``positions``.
        starts: First row of each segment, ``[M]`` int64.
        lengths: Rows of each segment, ``[M]`` int64.
        like: An empty tensor ``[0, ...]`` with the dtype and row shape of the result.
    """
    total = like.new_zeros(starts.shape[0], *like.shape[1:])
    block = torch.zeros_like(total)
    for p, active, index in positions(starts, lengths):
        rows = row(p, active, index)
        block[active] = rows if p % BLOCK == 0 else block[active] + rows
        done = active[(lengths[active] == p + 1) | ((p + 1) % BLOCK == 0)]
        total[done] = block[done] if p < BLOCK else total[done] + block[done]
    return total


def _ordered_sum(rows: Tensor, starts: Tensor, lengths: Tensor) -> Tensor:
    """Sum the rows of each segment, ``[N, ...]`` -> ``[M, ...]`` in the dtype of ``rows``."""
    return sum_in_order(lambda p, active, index: rows[index], starts, lengths, rows[:0])


def _picked_rows(starts: Tensor, lengths: Tensor, reduce: str) -> Tensor:
    """Return the row that ``"first"``, ``"last"`` or ``"middle"`` picks from each segment, ``[M]`` int64."""
    offset = {"first": torch.zeros_like(lengths), "last": lengths - 1, "middle": (lengths - 1) // 2}[reduce]
    return starts + offset


def segment_reduce(x: Tensor, starts: Tensor, lengths: Tensor, reduce: str) -> Tensor:
    """Reduce each segment to one row, ``[N, D]`` -> ``[M, D]``."""
    check_segment_values(starts, lengths, x.shape[0])
    dtype = accumulate_dtype(x.dtype)
    if reduce in ("sum", "mean"):
        total = _ordered_sum(x.to(dtype), starts, lengths)
        if reduce == "mean":
            total = total / lengths.clamp_min(1).to(dtype)[:, None]
        return total.to(x.dtype)
    out = x.new_zeros(starts.shape[0], x.shape[1])
    if reduce == "max":
        for p, active, index in positions(starts, lengths):
            row, best = x[index], out[active]
            out[active] = torch.where((row > best) | (row.isnan() & ~best.isnan()) | (p == 0), row, best)
        return out
    filled = (lengths > 0).nonzero().squeeze(1)
    out[filled] = x[_picked_rows(starts, lengths, reduce)[filled]]
    return out


def segment_max_backward(grad: Tensor, x: Tensor, y: Tensor, starts: Tensor, lengths: Tensor) -> Tensor:
    """Send the gradient to the first frame that equals the maximum (the first NaN, if the maximum is NaN)."""
    grad_x = x.new_zeros(x.shape)  # contiguous, like the result of every backend
    given = torch.zeros_like(y, dtype=torch.bool)
    for _, active, index in positions(starts, lengths):
        here = ((x[index] == y[active]) | (x[index].isnan() & y[active].isnan())) & ~given[active]
        grad_x[index] = torch.where(here, grad[active], 0)
        given[active] |= here
    return grad_x


def segment_weighted_mean(x: Tensor, weights: Tensor, starts: Tensor, lengths: Tensor) -> Tensor:
    """Compute the weighted mean of each segment, ``[N, D]`` -> ``[M, D]``; 0 if its weights sum to 0."""
    check_segment_values(starts, lengths, x.shape[0])
    dtype = accumulate_dtype(x.dtype)
    total = _ordered_sum(x.to(dtype) * weights[:, None], starts, lengths)
    weight = _ordered_sum(weights, starts, lengths)[:, None]
    return torch.where(weight == 0, 0, total / weight).to(x.dtype)


def segment_weighted_mean_backward(
    grad: Tensor, x: Tensor, y: Tensor, weights: Tensor, starts: Tensor, lengths: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute the gradients of ``x`` and ``weights``; 0 for rows in no segment and if the weights ``W`` sum to 0.

    For a row ``t`` of segment ``s``, ``grad_x[t] = w[t] / W * grad[s]`` and ``grad_w[t] = grad[s] . (x[t] - y[s]) /
    W``.
    """
    dtype = accumulate_dtype(x.dtype)
    weight = _ordered_sum(weights, starts, lengths)
    grad_x, grad_weights = x.new_zeros(x.shape), weights.new_zeros(weights.shape)
    for _, active, index in positions(starts, lengths):
        w = weight[active]
        share = weights[index] / w
        slope = (canonical_dot(grad[active], x[index]) - canonical_dot(grad[active], y[active])) / w
        grad_x[index] = torch.where(w[:, None] == 0, 0, share[:, None] * grad[active].to(dtype)).to(x.dtype)
        grad_weights[index] = torch.where(w == 0, 0, slope).to(dtype)
    return grad_x, grad_weights


def segment_expand(y: Tensor, starts: Tensor, lengths: Tensor, num_rows: int, reduce: str) -> Tensor:
    """Apply the adjoint of ``segment_reduce`` by ``sum``, ``mean``, ``first``, ``last`` or ``middle``."""
    check_segment_values(starts, lengths, num_rows)
    out = y.new_zeros(num_rows, y.shape[1])
    if reduce in ("sum", "mean"):
        if reduce == "mean":
            dtype = accumulate_dtype(y.dtype)
            y = (y.to(dtype) / lengths.clamp_min(1).to(dtype)[:, None]).to(y.dtype)
        for _, active, index in positions(starts, lengths):
            out[index] = y[active]
        return out
    filled = (lengths > 0).nonzero().squeeze(1)
    out[_picked_rows(starts, lengths, reduce)[filled]] = y[filled]
    return out

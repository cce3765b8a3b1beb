"""Definition of the reductions over segments and of their adjoints.

Sums are taken in fp32 (fp64 for fp64), in frame order inside blocks of ``BLOCK`` frames counted from the first frame of
the segment, the blocks then added in order; then one division and one rounding to the dtype of the input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fastcompress.checks import check_segment_values
from fastcompress.reference.adjacent_distance import accumulate_dtype, canonical_dot

BLOCK = 64


def positions(starts: Tensor, lengths: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """For each position p in a segment: p, the segments longer than p, and the rows that stand there."""
    for p in range(int(lengths.max()) if lengths.numel() else 0):
        active = (lengths > p).nonzero().squeeze(1)
        yield p, active, starts[active] + p


def sum_in_order(row: Callable[[int, Tensor, Tensor], Tensor], starts: Tensor, lengths: Tensor, like: Tensor) -> Tensor:
    """Sums of segments, ``[M, ...]``, 0 for an empty one.

    Args:
        row: of the arguments of :func:`positions` what is added.
        like: rows ``[0, ...]`` of the result's dtype.
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
    """``[N, ...]`` -> ``[M, ...]``, in the dtype of ``rows``."""
    return sum_in_order(lambda p, active, index: rows[index], starts, lengths, rows[:0])


def _picked_rows(starts: Tensor, lengths: Tensor, reduce: str) -> Tensor:
    offset = {"first": torch.zeros_like(lengths), "last": lengths - 1, "middle": (lengths - 1) // 2}[reduce]
    return starts + offset


def segment_reduce(x: Tensor, starts: Tensor, lengths: Tensor, reduce: str) -> Tensor:
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
    """The gradient goes to the first frame that holds the maximum (the first NaN, if the maximum is NaN)."""
    grad_x = x.new_zeros(x.shape)  # contiguous, as every result is
    given = torch.zeros_like(y, dtype=torch.bool)
    for _, active, index in positions(starts, lengths):
        here = ((x[index] == y[active]) | (x[index].isnan() & y[active].isnan())) & ~given[active]
        grad_x[index] = torch.where(here, grad[active], 0)
        given[active] |= here
    return grad_x


def segment_weighted_mean(x: Tensor, weights: Tensor, starts: Tensor, lengths: Tensor) -> Tensor:
    check_segment_values(starts, lengths, x.shape[0])
    dtype = accumulate_dtype(x.dtype)
    total = _ordered_sum(x.to(dtype) * weights[:, None], starts, lengths)
    weight = _ordered_sum(weights, starts, lengths)[:, None]
    return torch.where(weight == 0, 0, total / weight).to(x.dtype)


def segment_weighted_mean_backward(
    grad: Tensor, x: Tensor, y: Tensor, weights: Tensor, starts: Tensor, lengths: Tensor
) -> tuple[Tensor, Tensor]:
    """``grad_x[t] = w[t] / W * grad[s]``, ``grad_w[t] = grad[s] . (x[t] - y[s]) / W``; 0 for ``W = 0`` and in gaps."""
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
    """Adjoint of ``segment_reduce`` for ``sum``, ``mean``, ``first``, ``last`` and ``middle``."""
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

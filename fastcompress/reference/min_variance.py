"""Definition of minimum-variance segments: dynamic programming over the first row and the number of segments.

The variance of a segment of ``L`` unit frames is the sum of their squared distances to their mean,
``L - |sum|^2 / L``. With the distances ``d = 1 - cos`` of all pairs of its frames it is ``2 / L`` times the sum of
``d``, which also holds for zero frames by the convention of the distance. The factor 2 changes no comparison.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastcompress.checks import check_layout_values, sequence_ranges
from fastcompress.rules import MIN_VARIANCE_BLOCK as BLOCK

#: Largest distance that is used, so that no sum overflows.
LARGEST = 1e100


def segment_costs(d: Tensor, max_len: int) -> list[Tensor]:
    """Return half the variance of the segments that start at each frame, ``[n]`` per length up to ``max_len``.

    The sum over the pairs is built from the right: the pairs of the ``L`` frames from ``t`` are those of the ``L - 1``
    frames from ``t + 1``, plus the pairs of frame ``t``, which are added by increasing lag.

    Args:
        d: Distances of frame ``t`` to frame ``t + lag``, ``[n, window]`` fp64; column ``lag - 1``. Distances that are
            not finite, or beyond ``LARGEST``, count as 1, like that of a zero frame.
        max_len: Largest length of a segment in frames.

    Returns:
        Costs, fp64; infinite where the segment would end after frame ``n - 1``.
    """
    n = d.shape[0]
    d = torch.where(d.abs() <= LARGEST, d, 1.0)
    pairs, of_first = d.new_zeros(n), d.new_zeros(n)
    costs = [pairs]
    for length in range(2, max_len + 1):
        if length > n:
            costs.append(d.new_full((n,), math.inf))
            continue
        of_first = of_first + d[:, length - 2]
        following = torch.cat([pairs[1:], pairs[:1]])  # the last one is not used
        pairs = following + of_first
        fits = torch.arange(n, device=d.device) + length <= n
        costs.append(torch.where(fits, pairs / length, math.inf))
    return costs


def block_starts(d: Tensor, count: int, max_len: int) -> list[int]:
    """Return the first frames of the ``count`` segments of one block that have the smallest sum of costs.

    ``best[k][t]`` is the smallest cost of ``k`` segments from frame ``t`` to the end; it adds the cost of the first
    segment to ``best[k - 1]``. Of equal sums, the shortest first segment is taken, so that the starts are the
    lexicographically smallest.

    Args:
        d: Distances inside the block, ``[n, window]`` fp64; see ``segment_costs``.
        count: Number of segments; ``count <= n <= count * max_len``.
        max_len: Largest length of a segment in frames.
    """
    n = d.shape[0]
    costs = segment_costs(d, max_len)
    frames = torch.arange(n + 1, device=d.device)
    best = [torch.where(frames == n, 0.0, math.inf).double()]
    for _ in range(count):
        padded = torch.cat([best[-1], best[-1].new_full((max_len,), math.inf)])
        sums = [costs[length - 1] + padded[length : length + n] for length in range(1, max_len + 1)]
        least = sums[0]
        for other in sums[1:]:
            least = torch.where(other < least, other, least)
        best.append(torch.cat([least, least.new_full((1,), math.inf)]))
    values, cost_values = [row.tolist() for row in best], [row.tolist() for row in costs]
    starts, t = [0], 0
    for k in range(count - 1, 0, -1):  # segments after the one that starts at t
        for length in range(1, max_len + 1):
            rest = n - t - length
            possible = k <= rest <= k * max_len
            if possible and cost_values[length - 1][t] + values[k][t + length] == values[k + 1][t]:
                break
        t += length
        starts.append(t)
    return starts


def min_variance_boundaries(
    d: Tensor, cu_seqlens: Tensor | None, lengths: Tensor | None, row_group: Tensor | None, rate: float, max_len: int
) -> Tensor:
    """Return the rows that start a segment, bool of shape ``d.shape[:-1]``; False for rows outside all runs.

    A run is a sequence, or with row groups a run of rows of one positive group. It is cut into blocks of ``BLOCK``
    rows, counted from its first row; a block of ``n`` rows has ``ceil(n / rate)`` segments.

    Args:
        d: Distances to the following rows, ``[N, window]`` or ``[B, T, window]`` with ``window >= max_len - 1``.
        cu_seqlens: Offsets of packed input, or ``None``.
        lengths: Lengths of padded input, or ``None``.
        row_group: Row groups of the leading shape of ``d``, or ``None``.
        rate: Rows per segment, from 1 to ``max_len``.
        max_len: Largest length of a segment in rows.
    """
    if not 1 <= rate <= max_len:
        raise ValueError(f"rate must be between 1 and max_len, {max_len}, got {rate}")
    if d.shape[-1] < max_len - 1:
        raise ValueError(f"d must have max_len - 1 = {max_len - 1} distances per row, got {d.shape[-1]}")
    shape = d.shape[:-1]
    check_layout_values(d.shape, cu_seqlens, lengths)
    rows = d.reshape(-1, d.shape[-1]).double()
    groups = None if row_group is None else row_group.reshape(-1).tolist()
    starts: list[int] = []
    for begin, end in sequence_ranges(shape, cu_seqlens, lengths):
        first = begin
        while first < end:
            last = end if groups is None else first + 1
            while last < end and groups is not None and groups[last] == groups[first]:
                last += 1
            if groups is None or groups[first] > 0:
                for block in range(first, last, BLOCK):
                    n = min(BLOCK, last - block)
                    found = block_starts(rows[block : block + n], math.ceil(n / rate), max_len)
                    starts += [block + t for t in found]
            first = last
    mask = torch.zeros(rows.shape[0], dtype=torch.bool, device=d.device)
    mask[torch.tensor(starts, dtype=torch.int64, device=d.device)] = True
    return mask.view(shape)

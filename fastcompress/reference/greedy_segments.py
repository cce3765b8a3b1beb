"""Definition of greedy segments: a loop over the frames of each sequence."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcompress.checks import check_layout_values, sequence_ranges
from fastcompress.reference.adjacent_distance import accumulate_dtype, canonical_dot, norm


def greedy_boundaries(
    x: Tensor, cu_seqlens: Tensor | None, lengths: Tensor | None, threshold: float, max_len: int
) -> Tensor:
    """Return the frames that start a segment, bool of shape ``x.shape[:-1]``. ``max_len`` 0 means no limit.

    A normalized frame is ``x * (1 / max(|x|, EPS))``. The reciprocal is computed in fp64. It is rounded to the
    accumulation dtype to normalize a frame, and not rounded in the comparison. The sum of the normalized frames of a
    segment has the accumulation dtype.
    """
    if max_len < 0:
        raise ValueError(f"max_len must not be negative, got {max_len}")
    check_layout_values(x.shape, cu_seqlens, lengths)
    rows = x.flatten(0, -2)
    dtype, least = accumulate_dtype(x.dtype), 1 - threshold
    inverse_norms = (1 / norm(canonical_dot(rows, rows))).tolist()
    starts = torch.zeros(rows.shape[0], dtype=torch.bool, device=x.device)
    for begin, end in sequence_ranges(x.shape[:-1], cu_seqlens, lengths):
        total, length = rows.new_zeros(rows.shape[1], dtype=dtype), 0
        for t in range(begin, end):
            frame = rows[t].to(dtype)
            dot = canonical_dot(total, frame).item()
            joins = length > 0 and dot * inverse_norms[t] >= least * length and (max_len == 0 or length < max_len)
            starts[t] = not joins
            unit = frame * torch.tensor(inverse_norms[t], dtype=dtype, device=x.device)
            total, length = (total + unit, length + 1) if joins else (unit, 1)
    return starts.view(x.shape[:-1])

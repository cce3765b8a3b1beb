"""Segments of frames that are alike on average: the merge of SA-MAP."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcompress.checks import (
    check_float,
    check_layout,
    check_layout_values,
    check_number,
    check_whole,
)
from fastcompress.dispatch.call import Op, call
from fastcompress.ops.select_boundaries import segments_from_mask
from fastcompress.segments import Segments

_greedy_op: Op[Tensor] = torch.ops.fastcompress.greedy_boundaries.default


def greedy_segments(
    x: Tensor,
    threshold: float,
    *,
    max_len: int | None = None,
    cu_seqlens: Tensor | None = None,
    lengths: Tensor | None = None,
    compact: bool = True,
) -> Segments:
    """Segments of frames that are alike on average (the merge of SA-MAP; average linkage).

    Left to right, a frame joins the open segment iff the mean of its cosines to all of the segment's frames is at least
    ``1 - threshold``; else it starts one. That mean is the frame's dot product with the segment's sum of unit frames,
    divided by its length, so that each frame is read once. A zero frame has cosine 0 to all; a frame that is not finite
    is a segment of its own. Not differentiable; :func:`segment_reduce` pools, with weights if there are some.

    Args:
        x: ``[N, D]`` packed or ``[B, T, D]`` padded; fp32, fp16, bf16 or fp64, summed in fp32 (fp64 for fp64).
        threshold: the largest mean distance; 0.15 for SA-MAP's cosine of 0.85.
        max_len: a segment that reaches this length is cut.
        cu_seqlens, lengths: as in :func:`adjacent_distance`.
        compact: as in :func:`select_boundaries`; without it there are ``N + B`` segments, the tail of them empty.

    Raises:
        TypeError, ValueError: an argument that does not fit.
    """
    check_float("x", x)
    check_layout(x, 2, cu_seqlens, lengths)
    check_number("threshold", threshold)
    check_whole("max_len", max_len, 1, optional=True)
    mask = call(
        _greedy_op,
        (x.detach(), cu_seqlens, lengths, threshold, max_len or 0),
        False,
        lambda: check_layout_values(x.shape, cu_seqlens, lengths),
    )
    return segments_from_mask(mask, cu_seqlens=cu_seqlens, lengths=lengths, compact=compact)


@torch.library.register_fake("fastcompress::greedy_boundaries")
def _(x: Tensor, cu_seqlens: Tensor | None, lengths: Tensor | None, threshold: float, max_len: int) -> Tensor:
    return x.new_empty(x.shape[:-1], dtype=torch.bool)

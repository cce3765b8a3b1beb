"""Greedy segments by average linkage: the merge of SA-MAP."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcompress.checks import (
    as_number,
    as_optional_whole,
    check_float,
    check_layout,
    check_layout_values,
    unnest,
)
from fastcompress.dispatch.call import Op, call
from fastcompress.ops.select_boundaries import segments_from_mask
from fastcompress.rules import finite
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
    """Group neighbouring frames whose mean cosine similarity is high (the merge of SA-MAP; average linkage).

    From left to right, a frame joins the open segment if the mean of its cosines to all frames of that segment is at
    least ``1 - threshold``; otherwise it starts a segment. The mean is computed as the dot product of the frame with
    the sum of the normalized frames of the segment, divided by its length, so each frame is read once. The cosine of a
    zero frame with any frame is 0. A frame that is not finite is a segment of its own. Boundaries are not
    differentiable; pool the segments with ``segment_reduce``.

    Args:
        x: Frames, ``[N, D]`` packed, ``[B, T, D]`` padded or ``[B, j, D]`` nested (jagged); fp32, fp16, bf16 or fp64.
            Sums are fp32 (fp64 for fp64).
        threshold: Largest mean distance, 1 - cosine, within a segment; 0.15 for the cosine of 0.85 of SA-MAP.
        max_len: Largest length of a segment in frames; ``None`` for no limit.
        cu_seqlens: See ``adjacent_distance``.
        lengths: See ``adjacent_distance``.
        compact: See ``select_boundaries``. With ``False`` there are ``N + B`` segments; the trailing ones are
            empty.

    Returns:
        The segments.

    Raises:
        TypeError: If an argument has a wrong type or dtype.
        ValueError: If a shape, device or value is invalid; the message names it.
    """
    x, cu_seqlens = unnest("x", x, cu_seqlens, lengths)
    check_float("x", x)
    check_layout(x, 2, cu_seqlens, lengths)
    threshold = finite(as_number("threshold", threshold))
    max_len = as_optional_whole("max_len", max_len, 1)
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

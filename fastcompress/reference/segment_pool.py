"""Definition of the fused op: distances, boundaries and means in sequence."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastcompress.reference.adjacent_distance import adjacent_distance
from fastcompress.reference.segment_reduce import segment_reduce
from fastcompress.reference.select_boundaries import select_boundaries


def segment_pool(
    x: Tensor,
    keys: Tensor | None,
    cu_seqlens: Tensor | None,
    lengths: Tensor | None,
    row_group: Tensor | None,
    *rule_and_compact: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return values ``[M, D]``, starts and lengths ``[M]`` int64, and ``cu_segments`` ``[B + 1]`` int32."""
    d = adjacent_distance(x if keys is None else keys, cu_seqlens, lengths, 1)
    starts, segment_lengths, cu_segments = select_boundaries(d, cu_seqlens, lengths, row_group, *rule_and_compact)
    values = segment_reduce(x.flatten(0, -2), starts, segment_lengths, "mean")
    return values, starts, segment_lengths, cu_segments

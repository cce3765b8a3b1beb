"""The fused op: distances, boundaries and means, in one launch if the rule allows it."""

from __future__ import annotations

from torch import Tensor

from fastcompress.reference.adjacent_distance import accumulate_dtype
from fastcompress.triton.adjacent_distance import adjacent_distance
from fastcompress.triton.common import as_rows, flat, prepare_sequences
from fastcompress.triton.select_boundaries import mark_boundaries
from fastcompress.triton.tiles import (
    Scoring,
    bounded_size,
    collect_segments,
    flag_window,
    num_tiles,
    rounded_threshold,
    scored_window,
)

#: Largest order of a fused local maximum. The halo of ``order`` rows on each side must be a small part of a tile.
MAX_ORDER = 16


def segment_pool(
    x: Tensor, keys: Tensor | None, cu_seqlens: Tensor | None, lengths: Tensor | None, row_group: Tensor | None,
    rule: str, size: int, threshold: float, prominence: float, min_len: int, max_len: int, keep_tail: bool,
    compact: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Pool ``x``, [N, D] or [B, T, D].

    Two launches for fused rules (Uniform; Threshold; LocalMax up to order 16 without prominence; all without
    ``min_len`` and ``max_len``): a small one that checks the sequences and clears the state, and one that does the
    work. Otherwise five launches: sequences twice, distances, boundaries, means; six with ``min_len`` or ``max_len``.

    ``compact`` reads the number of segments from the device once. Buffers have the size of the upper bound; their head
    is returned, as a copy if that saves more than a tenth. Without ``compact`` nothing is read.

    Returns:
        Values [M, D], starts and lengths [M] int64, and ``cu_segments`` [B + 1] int32.
    """
    rows = as_rows(x)
    row_group = flat(row_group)
    scored = x if keys is None else keys
    bound_args = (rule, size, min_len, max_len, row_group is not None)
    limited = rule != "uniform" and (min_len > 1 or max_len > 0 or prominence > 0)
    if not limited and (rule != "local-max" or size <= MAX_ORDER):
        window = scored_window(rule, size, scored.dtype)
        tiles = num_tiles(rows.shape[0], window)
        sequences = prepare_sequences(x, x.dim() - 1, cu_seqlens, lengths, tiles)
        bits = rounded_threshold(threshold, accumulate_dtype(scored.dtype))
        size = bounded_size(size, rows.shape[0])
        boundaries: Scoring | Tensor = Scoring(rule, as_rows(scored), row_group, size, bits, keep_tail, window)
    else:
        d = adjacent_distance(scored, cu_seqlens, lengths, 1)
        tiles = num_tiles(rows.shape[0], flag_window(True))
        sequences = prepare_sequences(x, x.dim() - 1, cu_seqlens, lengths, tiles)
        boundaries = mark_boundaries(
            flat(d), row_group, sequences, rule, size, threshold, prominence, min_len, max_len, keep_tail
        )
    values, starts, lengths, cu_segments = collect_segments(rows, boundaries, sequences, tiles, bound_args, compact)
    assert values is not None
    return values, starts, lengths, cu_segments

"""Merging by likeness to a whole segment, or to frames that are no neighbours: what no boundary rule can say."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastcompress.checks import (
    check_float,
    check_layout,
    check_number,
    check_same_device,
    check_values_of_rows,
    check_whole,
    read_count,
)
from fastcompress.dispatch.call import Op
from fastcompress.dispatch.schemas import LIBRARY
from fastcompress.ops.adjacent_distance import adjacent_distance
from fastcompress.ops.scalar_rules import Runs, find_checked_runs, find_runs, ranks, top_k_starts
from fastcompress.ops.segment_reduce import segment_reduce
from fastcompress.ops.select_boundaries import frame_offsets, segments_from_mask
from fastcompress.reference.adjacent_distance import accumulate_dtype
from fastcompress.segments import Segments, row_segments

_nearest_op: Op[tuple[Tensor, Tensor]] = torch.ops.fastcompress.nearest_odd.default


@dataclass(eq=False)
class Merged:
    """Tokens of :func:`bipartite_merge` or :func:`iterative_fusion`, packed, in the order of their places in time.

    Attributes:
        values: ``[M, D]``, in the dtype of the frames.
        cu_seqlens: ``[B + 1]`` int32, tokens before each sequence.
        sizes: ``[M]`` fp32 (fp64 with fp64 frames), the frames of each token, or the sum of what was given for them:
            ``size``, or ``weights``, of a further round.
        ids: ``[N]`` int64, the token of each row of ``x.reshape(-1, D)``; -1: none.
    """

    values: Tensor
    cu_seqlens: Tensor
    sizes: Tensor
    ids: Tensor


torch.export.register_dataclass(Merged, serialized_type_name="fastcompress.Merged")


def bipartite_merge(
    x: Tensor,
    rate: float,
    *,
    window: int | None = 0,
    keys: Tensor | None = None,
    size: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    lengths: Tensor | None = None,
) -> Merged:
    """Merges even frames into the odd ones that are most like them (ToMe: Bolya et al., arXiv 2210.09461).

    Frames are counted from 0 in each sequence. Each even frame looks for its best odd one, by the cosine of their
    ``keys``, no further than ``window`` allows; the even frames with the best of these cosines are merged into their
    partners, as many as it takes. An odd frame may take several. A token is the mean of its frames, weighted by
    ``size`` (0 if those are all 0), and stands where its odd frame did; a frame that is merged with none stays as it
    is. Ties go to the earlier frame, and to the nearer partner.

    ``window=0`` is A-ToMe (arXiv 2306.16009), one round; ``None`` is ToMe; between is bipartite merging inside a
    temporal window (arXiv 2605.25179, whose exact matching is not published).

    Args:
        x: ``[N, D]`` packed or ``[B, T, D]`` padded.
        rate: frames a token that are aimed at: ``T`` frames become ``max(ceil(T / rate), T - merges possible)``, no
            fewer than about ``T / 2``. More takes several rounds.
        window: how far a partner may be beyond the next frame: 0, the next alone; ``w``, up to ``w`` frames away on
            either side; ``None``, anywhere in the sequence.
        keys: ``[..., K]``; ``None``: ``x``.
        size: ``[...]`` floating, frames that each row stands for already; ``None``: 1.
        cu_seqlens, lengths: as in :func:`adjacent_distance`.

    Returns:
        The tokens; gradients go to ``x``. Their number is read from the device once; with ``window=None`` also where
        each sequence is.

    Raises:
        TypeError, ValueError: an argument that does not fit.
    """
    check_float("x", x)
    check_layout(x, 2, cu_seqlens, lengths)
    check_number("rate", rate)
    if not rate >= 1:
        raise ValueError(f"rate must be at least 1, got {rate}")
    check_whole("window", window, 0, optional=True)
    keys = x if keys is None else keys
    check_float("keys", keys)
    check_same_device("keys", keys, x)
    if keys.shape[:-1] != x.shape[:-1]:
        raise ValueError(f"keys must have shape {[*x.shape[:-1], 'K']}, got {list(keys.shape)}")
    if size is not None:
        check_values_of_rows("size", size, x)
    runs = find_checked_runs(x.shape[:-1], x.device, cu_seqlens, lengths)
    rows = x.flatten(0, -2)
    count = rows.shape[0]
    offsets = frame_offsets(x, x.dim() == 3, cu_seqlens, lengths)
    row = torch.arange(count, device=x.device)
    if window is None:
        near, partner = _nearest_op(keys.detach(), cu_seqlens, lengths)
    else:
        layout = {"cu_seqlens": cu_seqlens, "lengths": lengths}
        near, partner = _nearest_within(keys.detach(), runs, row, max(1, window), window == 0, layout)
    even = runs.inside & (runs.place % 2 == 0) & (near < torch.inf)
    rank = ranks(torch.where(even, -near, -torch.inf), (~even).long(), runs)
    wanted = (runs.length.double() / rate).ceil().long()
    merged = even & (rank < runs.length - wanted)
    # Each row's token: the place of the row that stays, counted among those that stay.
    stays = runs.inside & ~merged
    number = stays.long().cumsum(0) - 1
    ids = torch.where(runs.inside, number[torch.where(merged, partner, row)], -1)
    weights = None if size is None else size.reshape(-1)
    if window == 0:  # neighbours: tokens are runs of rows as they are
        opens = runs.inside.clone()
        opens[1:] &= ~merged[:-1]
        starts = opens.nonzero()[:, 0]
        segments = row_segments(starts, 1 + merged[starts].long(), count)
    else:
        sorted_ids, by_token = torch.sort(torch.where(runs.inside, ids, count), stable=True)
        token = torch.arange(read_count(stays.sum()), device=x.device)
        starts = torch.searchsorted(sorted_ids, token)
        segments = row_segments(starts, torch.searchsorted(sorted_ids, token, right=True) - starts, count)
        rows, weights = rows[by_token], None if weights is None else weights[by_token]
    values = _weighted_means(rows, segments, weights)
    if weights is None:
        sizes = segments.lengths.to(accumulate_dtype(x.dtype))
    else:
        sizes = segment_reduce(weights.to(accumulate_dtype(x.dtype))[:, None], segments, "sum")[:, 0]
    kept = torch.nn.functional.pad(stays.long().cumsum(0), (1, 0))
    if x.dim() == 3:
        begin = torch.arange(x.shape[0] + 1, device=x.device) * x.shape[1]
    else:
        begin = offsets.long().clamp(0, count)
    return Merged(values, kept[begin].int(), sizes, ids)


def iterative_fusion(
    x: Tensor,
    count: int,
    *,
    weights: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    lengths: Tensor | None = None,
) -> Merged:
    """Halves sequences, round after round, until none has over ``count`` tokens (FastLongSpeech: arXiv 2507.14815).

    A round merges the neighbours that are most alike, chains of them into one, so that ``T`` tokens become
    ``max(ceil(T / 2), count)``: :class:`TopK` of what the round before left. A token is the weighted mean of its
    frames, 0 if their weights are all 0; one that is merged with none stays as it is.

    Args:
        x: ``[N, D]`` packed or ``[B, T, D]`` padded.
        count: tokens of each sequence at the end, at least 1; a shorter one stays as it is.
        weights: ``[...]`` floating, such as a CTC head's probability that a frame is no blank; ``None``: 1. What a
            token weighs in the next round is the sum over its frames.
        cu_seqlens, lengths: as in :func:`adjacent_distance`.

    Returns:
        The tokens, in order, their ``sizes`` the sums of weights; gradients go to ``x`` and ``weights``. The number of
        tokens is read from the device in each round, and before the first, with packed input, the length of the longest
        sequence.

    Raises:
        TypeError, ValueError: an argument that does not fit.
    """
    check_float("x", x)
    check_layout(x, 2, cu_seqlens, lengths)
    check_whole("count", count, 1)
    wide = accumulate_dtype(x.dtype)
    if weights is not None:
        check_values_of_rows("weights", weights, x)
    runs = find_checked_runs(x.shape[:-1], x.device, cu_seqlens, lengths)
    values = x if x.dim() == 2 else x[runs.inside.view(x.shape[:2])]
    if weights is None:
        sizes = values.new_ones(values.shape[0], dtype=wide)
    else:
        sizes = (weights if x.dim() == 2 else weights[runs.inside.view(x.shape[:2])]).to(wide)
    offsets = frame_offsets(x, x.dim() == 3, cu_seqlens, lengths)
    ids = torch.where(runs.inside, runs.inside.long().cumsum(0) - 1, -1)
    if x.dim() == 3:
        longest = x.shape[1]
    elif torch.compiler.is_compiling():  # a round too many changes nothing
        longest = x.shape[0]
    else:
        longest = int(runs.length.max()) if x.shape[0] else 0
    while longest > count:
        runs = find_runs(values.shape[:-1], values.device, offsets, None, None)
        wanted = torch.where(runs.length > count, ((runs.length + 1) // 2).clamp_min(count), runs.length)
        d = adjacent_distance(values.detach(), cu_seqlens=offsets)
        segments = segments_from_mask(top_k_starts(wanted, d, runs), cu_seqlens=offsets)
        values = _weighted_means(values, segments, sizes)
        sizes = segment_reduce(sizes[:, None], segments, "sum")[:, 0]
        ids = follow_ids(ids, segments.ids())
        offsets = segments.cu_segments
        longest = max((longest + 1) // 2, count)
    return Merged(values, offsets.int(), sizes, ids)


def follow_ids(ids: Tensor, further: Tensor) -> Tensor:
    """Return the token of each row after a further round: ``further[ids]``, where -1 stays -1.

    Args:
        ids: ``[N]`` int64, the token of each row after the rounds before, -1 for none.
        further: ``[M]`` int64, the token that each of the ``M`` tokens went to, -1 for none.
    """
    return torch.cat([further, further.new_full((1,), -1)])[ids]  # -1 reads the last element


def _weighted_means(rows: Tensor, segments: Segments, weights: Tensor | None) -> Tensor:
    """Means of segments that all have rows. One of a single row is that row, bit for bit and whatever it weighs: what
    is not merged does not depend on what else the batch holds, or on the number of rounds."""
    if weights is not None:
        alone = torch.zeros_like(weights, dtype=torch.bool).index_copy(0, segments.starts, segments.lengths == 1)
        weights = torch.where(alone, 1.0, weights)
    return segment_reduce(rows, segments, "mean", weights)


def _nearest_within(
    keys: Tensor, runs: Runs, row: Tensor, window: int, ahead: bool, layout: dict[str, Tensor | None]
) -> tuple[Tensor, Tensor]:
    """The least distance of each row to one of the other parity up to ``window`` away, or only ``ahead``; inf if there
    is none. And which row that is. One pass over the keys for each odd lag."""
    count = row.shape[0]
    best = torch.full((count,), torch.inf, dtype=accumulate_dtype(keys.dtype), device=keys.device)
    partner = row.clone()
    if not torch.compiler.is_compiling():  # no two rows are further apart; a traced program would be for as many
        window = min(window, max(1, count - 1))
    for lag in range(1, window + 1, 2):
        d = adjacent_distance(keys, lag=lag, **layout).reshape(-1).nan_to_num(torch.inf)
        candidates = [(d, lag)]
        if not ahead:
            candidates.append((torch.nn.functional.pad(d, (lag, 0), value=torch.inf)[:count], -lag))
        for found, step in candidates:
            better = found < best  # of equals the nearer, then the later
            best, partner = torch.where(better, found, best), torch.where(better, row + step, partner)
    return best, partner


def _nearest_odd(keys: Tensor, cu_seqlens: Tensor | None, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    """The same among all rows of the sequence, for even ones: a matrix of even and odd rows, sequence by sequence.

    An op, as tracing would take the loop for that of one batch. Products are those of the library for matrices: equal
    distances may differ in their last digit.
    """
    runs = find_runs(keys.shape[:-1], keys.device, cu_seqlens, lengths, None)
    rows = keys.flatten(0, -2)
    wide = accumulate_dtype(keys.dtype)
    best = torch.full(rows.shape[:1], torch.inf, dtype=wide, device=keys.device)
    partner = torch.arange(rows.shape[0], device=keys.device)
    begins = runs.first.nonzero()[:, 0]
    for begin, length in torch.stack([begins, runs.length[begins]], 1).tolist():
        part = rows[begin : begin + length].to(wide)
        norm = part.norm(dim=-1, keepdim=True)
        unit = part / norm.clamp_min(1e-8)
        with torch.autocast(keys.device.type, enabled=False):
            distance = (1 - unit[::2] @ unit[1::2].T).nan_to_num(torch.inf, torch.inf, torch.inf)  # [even, odd]
        if not distance.shape[1]:
            continue
        distance = distance.masked_fill((norm[::2] == 0) & (norm[1::2] == 0).T, 0.0)  # zero rows are alike
        least = distance.amin(1)
        # Of equals the nearer, then the later: odd row j lies 2 (j - i) + 1 behind even row i.
        steps = torch.arange(distance.shape[0], dtype=torch.int32, device=keys.device)
        away = 2 * (steps[None, : distance.shape[1]] - steps[:, None]) + 1
        order = 2 * away.abs() - (away > 0).int()
        first = torch.where(distance == least[:, None], order, 4 * length).amin(1).long()
        step = torch.where(first % 2 == 1, (first + 1) // 2, -(first // 2))
        best[begin : begin + length : 2] = least
        partner[begin : begin + length : 2] += torch.where(first < 4 * length, step, 0)
    return best, partner


LIBRARY.impl("nearest_odd", _nearest_odd, "CompositeExplicitAutograd")


@torch.library.register_fake("fastcompress::nearest_odd")
def _(keys: Tensor, cu_seqlens: Tensor | None, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    rows = keys.flatten(0, -2).shape[0]
    best = keys.new_empty(rows, dtype=accumulate_dtype(keys.dtype))
    return best, keys.new_empty(rows, dtype=torch.int64)

"""Token merging in rounds and between frames that are not neighbours, which a boundary rule cannot express."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastcompress.checks import (
    as_number,
    as_optional_whole,
    as_whole,
    check_float,
    check_layout,
    check_not_batched,
    check_same_device,
    check_values_of_rows,
    is_readable,
    read_count,
    unnest,
)
from fastcompress.dispatch.call import Op, differentiable_once
from fastcompress.dispatch.schemas import LIBRARY
from fastcompress.ops.adjacent_distance import adjacent_distance
from fastcompress.ops.scalar_rules import Runs, find_checked_runs, find_runs, ranks, top_k_starts
from fastcompress.ops.segment_reduce import segment_reduce
from fastcompress.ops.select_boundaries import frame_offsets, num_sequences, segments_from_mask
from fastcompress.reference.adjacent_distance import accumulate_dtype
from fastcompress.segments import Segments, Tokens, row_segments

_nearest_op: Op[tuple[Tensor, Tensor]] = torch.ops.fastcompress.nearest_odd.default
_fusion_op: Op[tuple[Tensor, Tensor, Tensor, Tensor]] = torch.ops.fastcompress.iterative_fusion.default
_weighted_backward_op: Op[tuple[Tensor, Tensor]] = torch.ops.fastcompress.segment_weighted_mean_backward.default
_expand_op: Op[Tensor] = torch.ops.fastcompress.segment_expand.default
_fusion_backward_op: Op[tuple[Tensor, Tensor]] = torch.ops.fastcompress.iterative_fusion_backward.default


@dataclass(eq=False, repr=False)
class Merged(Tokens):
    """Packed tokens of [`bipartite_merge`][] or [`iterative_fusion`][], in order of time.

    Attributes:
        values: Tokens, ``[M, D]`` in the dtype of the frames.
        cu_seqlens: Number of tokens before each sequence, ``[B + 1]`` int32.
        sizes: Number of frames of each token, or the sum of their ``size`` or ``weights`` if those were given, ``[M]``
            fp32 (fp64 with fp64 frames). Pass them as ``size`` or ``weights`` of a further round.
        ids: Token of each row of ``x.reshape(-1, D)``, ``[N]`` int64; -1 for padding.
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
    """Merge even frames into their most similar odd frames (ToMe: Bolya et al., arXiv 2210.09461).

    Frames are counted from 0 in each sequence. The partner of an even frame is the odd frame within ``window`` whose
    ``keys`` have the largest cosine with its own. The even frames with the largest cosines are merged into their
    partners, as many as ``rate`` requires; an odd frame can take several. A token is the mean of its frames weighted by
    ``size`` (0 if all sizes are 0), at the position of its odd frame. A frame that is not merged stays unchanged. Of
    equal cosines, the earlier frame is merged first, and the nearer partner is taken.

    ``window=0`` is one round of A-ToMe (arXiv 2306.16009); ``None`` is ToMe. A value between is bipartite merging
    inside a temporal window (arXiv 2605.25179, whose exact matching is not published).

    Args:
        x: Frames, ``[N, D]`` packed, ``[B, T, D]`` padded or ``[B, j, D]`` nested (jagged); fp32, fp16, bf16 or fp64.
        rate: Frames per token to aim at, at least 1. ``T`` frames become ``ceil(T / rate)`` tokens, but a round merges
            even frames only, so at least about ``T / 2``; larger rates take several rounds.
        window: Range of partners. 0: the next frame only; ``w``: up to ``w`` frames away on either side; ``None``: the
            whole sequence.
        keys: Features to compare, ``[..., K]`` with the leading shape of ``x``; ``None`` means ``x``.
        size: Number of frames that were merged into each row, floating point with the leading shape of ``x``; ``None``
            means 1.
        cu_seqlens: See [`adjacent_distance`][].
        lengths: See [`adjacent_distance`][].

    Returns:
        The tokens. Gradients go to ``x``. The number of tokens is read from the device once; with ``window=None`` the
        sequence boundaries are read too.

    Raises:
        TypeError: If an argument has a wrong type or dtype.
        ValueError: If a shape, device or value is invalid; the message names it.
    """
    x, cu_seqlens = unnest("x", x, cu_seqlens, lengths)
    check_float("x", x)
    check_layout(x, 2, cu_seqlens, lengths)
    check_not_batched("bipartite_merge", x)
    rate = as_number("rate", rate)
    if not rate >= 1:
        raise ValueError(f"rate must be at least 1, got {rate}")
    window = as_optional_whole("window", window, 0)
    keys = x if keys is None else unnest("keys", keys)[0]
    check_float("keys", keys)
    check_same_device("keys", keys, x)
    if keys.shape[:-1] != x.shape[:-1]:
        raise ValueError(f"keys must have shape {[*x.shape[:-1], 'K']}, got {list(keys.shape)}")
    if size is not None:
        size, _ = unnest("size", size)
        check_values_of_rows("size", size, x)
    runs = find_checked_runs(x.shape[:-1], x.device, cu_seqlens, lengths)
    rows = x.flatten(0, -2)
    count = rows.shape[0]
    offsets = frame_offsets(x, x.dim() == 3, cu_seqlens, lengths)
    row = torch.arange(count, dtype=torch.int64, device=x.device)
    if window is None:
        near, partner = _nearest_op(keys.detach(), cu_seqlens, lengths)
    else:
        layout = {"cu_seqlens": cu_seqlens, "lengths": lengths}
        near, partner = _nearest_within(keys.detach(), runs, row, max(1, window), window == 0, layout)
    even = runs.inside & (runs.place % 2 == 0) & (near < torch.inf)
    rank = ranks(torch.where(even, -near, -torch.inf), (~even).long(), runs)
    wanted = (runs.length.double() / rate).ceil().long()
    merged = even & (rank < runs.length - wanted)
    # The token of a row is the index, among the rows that stay, of itself or of the partner it is merged into.
    stays = runs.inside & ~merged
    number = stays.long().cumsum(0) - 1
    ids = torch.where(runs.inside, number[torch.where(merged, partner, row)], -1)
    weights = None if size is None else size.reshape(-1)
    if window == 0:  # tokens are runs of neighbouring rows, which need no sorting
        opens = runs.inside.clone()
        opens[1:] &= ~merged[:-1]
        starts = opens.nonzero()[:, 0]
        segments = row_segments(starts, 1 + merged[starts].long(), count)
    else:
        sorted_ids, by_token = torch.sort(torch.where(runs.inside, ids, count), stable=True)
        token = torch.arange(read_count(stays.sum()), dtype=torch.int64, device=x.device)
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
        begin = torch.arange(x.shape[0] + 1, dtype=torch.int64, device=x.device) * x.shape[1]
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
    """Halve sequences in rounds until each has at most ``count`` tokens (FastLongSpeech: arXiv 2507.14815).

    A round merges the most similar neighbours, so that ``T`` tokens become ``max(ceil(T / 2), count)``; a chain of
    similar neighbours becomes one token. A round equals [`TopK`][] on the tokens of the previous round. A token is
    the weighted mean of its frames, 0 if all their weights are 0. A frame that is not merged stays unchanged.

    Args:
        x: Frames, ``[N, D]`` packed, ``[B, T, D]`` padded or ``[B, j, D]`` nested (jagged); fp32, fp16, bf16 or fp64.
        count: Largest number of tokens per sequence, at least 1; a shorter sequence stays unchanged.
        weights: Weights, floating point with the leading shape of ``x``, such as the probability of a CTC head that a
            frame is not blank; ``None`` means 1. The weight of a token is the sum over its frames.
        cu_seqlens: See [`adjacent_distance`][].
        lengths: See [`adjacent_distance`][].

    Returns:
        The tokens, with sums of weights as ``sizes``. Gradients go to ``x`` and ``weights``. The number of tokens is
        read from the device in each round; with packed input, the length of the longest sequence is read before the
        first. In a traced program all rounds are one op.

    Raises:
        TypeError: If an argument has a wrong type or dtype.
        ValueError: If a shape, device or value is invalid; the message names it.
    """
    x, cu_seqlens = unnest("x", x, cu_seqlens, lengths)
    check_float("x", x)
    check_layout(x, 2, cu_seqlens, lengths)
    count = as_whole("count", count, 1)
    if weights is not None:
        weights, _ = unnest("weights", weights)
        check_values_of_rows("weights", weights, x)
    if is_readable(x):
        return Merged(*_fuse(x, weights, cu_seqlens, lengths, count))
    return Merged(*_fusion_op(x, weights, cu_seqlens, lengths, count))  # the number of rounds follows the length


def _fuse(
    x: Tensor,
    weights: Tensor | None,
    cu_seqlens: Tensor | None,
    lengths: Tensor | None,
    count: int,
    rounds: list[tuple[Tensor, Tensor, Segments]] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the fields of the result of ``iterative_fusion``; append values, sizes and segments of each round."""
    wide = accumulate_dtype(x.dtype)
    runs = find_checked_runs(x.shape[:-1], x.device, cu_seqlens, lengths)
    values = x if x.dim() == 2 else x[runs.inside.view(x.shape[:2])]
    if weights is None:
        sizes = values.new_ones(values.shape[0], dtype=wide)
    else:
        sizes = (weights if x.dim() == 2 else weights[runs.inside.view(x.shape[:2])]).to(wide)
    offsets = frame_offsets(x, x.dim() == 3, cu_seqlens, lengths)
    ids = torch.where(runs.inside, runs.inside.long().cumsum(0) - 1, -1)
    longest = x.shape[1] if x.dim() == 3 else int(runs.length.max()) if x.shape[0] else 0
    while longest > count:
        runs = find_runs(values.shape[:-1], values.device, offsets, None, None)
        wanted = torch.where(runs.length > count, ((runs.length + 1) // 2).clamp_min(count), runs.length)
        d = adjacent_distance(values.detach(), cu_seqlens=offsets)
        segments = segments_from_mask(top_k_starts(wanted, d, runs), cu_seqlens=offsets)
        if rounds is not None:
            rounds.append((values, sizes, segments))
        values = _weighted_means(values, segments, sizes)
        sizes = segment_reduce(sizes[:, None], segments, "sum")[:, 0]
        ids = follow_ids(ids, segments.ids())
        offsets = segments.cu_segments
        longest = max((longest + 1) // 2, count)
    # Without any round the results would share the memory of the input.
    return values.clone() if values is x else values, offsets, sizes.clone() if sizes is weights else sizes, ids


def follow_ids(ids: Tensor, further: Tensor) -> Tensor:
    """Return the token of each row after a further round: ``further[ids]``, where -1 stays -1.

    Args:
        ids: ``[N]`` int64, the token of each row after the rounds before, -1 for none.
        further: ``[M]`` int64, the token that each of the ``M`` tokens went to, -1 for none.
    """
    return torch.cat([further, further.new_full((1,), -1)])[ids]  # -1 reads the last element


def _weighted_means(rows: Tensor, segments: Segments, weights: Tensor | None) -> Tensor:
    """Compute weighted means of segments that are not empty.

    A segment of a single row gives that row, bit for bit, whatever its weight. So a frame that is not merged does not
    depend on the rest of the batch or on the number of rounds.
    """
    if weights is not None:
        weights = torch.where(_alone(segments, weights), 1.0, weights)
    return segment_reduce(rows, segments, "mean", weights)


def _alone(segments: Segments, weights: Tensor) -> Tensor:
    """Return whether each row is a segment of its own, bool of the shape of ``weights``."""
    return torch.zeros_like(weights, dtype=torch.bool).index_copy(0, segments.starts, segments.lengths == 1)


def _nearest_within(
    keys: Tensor, runs: Runs, row: Tensor, window: int, ahead: bool, layout: dict[str, Tensor | None]
) -> tuple[Tensor, Tensor]:
    """Find the nearest row of the other parity within a window, with one pass over the keys per odd lag.

    Args:
        keys: Features, ``[..., K]``.
        runs: Runs of the rows.
        row: Indices of the rows, ``[N]`` int64.
        window: Largest offset of a partner, at least 1.
        ahead: If true, only rows after the row can be partners.
        layout: ``cu_seqlens`` and ``lengths``.

    Returns:
        The smallest distance of each row, ``[N]``, infinite without a partner, and the row of the partner, ``[N]``
        int64.
    """
    count = row.shape[0]
    best = torch.full((count,), torch.inf, dtype=accumulate_dtype(keys.dtype), device=keys.device)
    partner = row.clone()
    if is_readable(keys):  # no two rows are further apart; a trace must not depend on their number
        window = min(window, max(1, count - 1))
    for lag in range(1, window + 1, 2):
        d = adjacent_distance(keys, lag=lag, **layout).reshape(-1).nan_to_num(torch.inf)
        candidates = [(d, lag)]
        if not ahead:
            candidates.append((torch.nn.functional.pad(d, (lag, 0), value=torch.inf)[:count], -lag))
        for found, step in candidates:
            better = found < best  # of equal distances take the nearer row, then the later
            best, partner = torch.where(better, found, best), torch.where(better, row + step, partner)
    return best, partner


def _nearest_odd(keys: Tensor, cu_seqlens: Tensor | None, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    """Find the nearest odd row of each even row in its sequence, with one matrix product per sequence.

    This is an op because tracing would fix the number of sequences of the loop. Matrix products do not use the
    canonical dot product, so distances that should be equal may differ by rounding.

    Returns:
        Like ``_nearest_within``; odd rows have no partner.
    """
    runs = find_runs(keys.shape[:-1], keys.device, cu_seqlens, lengths, None)
    rows = keys.flatten(0, -2)
    wide = accumulate_dtype(keys.dtype)
    best = torch.full(rows.shape[:1], torch.inf, dtype=wide, device=keys.device)
    partner = torch.arange(rows.shape[0], dtype=torch.int64, device=keys.device)
    begins = runs.first.nonzero()[:, 0]
    for begin, length in torch.stack([begins, runs.length[begins]], 1).tolist():
        part = rows[begin : begin + length].to(wide)
        norm = part.norm(dim=-1, keepdim=True)
        unit = part / norm.clamp_min(1e-8)
        with torch.autocast(keys.device.type, enabled=False):
            distance = (1 - unit[::2] @ unit[1::2].T).nan_to_num(torch.inf, torch.inf, torch.inf)  # [even, odd]
        if not distance.shape[1]:
            continue
        distance = distance.masked_fill((norm[::2] == 0) & (norm[1::2] == 0).T, 0.0)  # two zero rows have distance 0
        least = distance.amin(1)
        # Of equal distances take the nearer row, then the later: odd row j is 2 (j - i) + 1 rows after even row i.
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


def _fused(
    x: Tensor, weights: Tensor | None, cu_seqlens: Tensor | None, lengths: Tensor | None, count: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run all rounds of ``iterative_fusion``. This is an op because tracing would fix the number of rounds."""
    with torch.no_grad():
        return _fuse(x, weights, cu_seqlens, lengths, count)


def _fused_backward(
    grad: Tensor,
    grad_sizes: Tensor,
    x: Tensor,
    weights: Tensor | None,
    cu_seqlens: Tensor | None,
    lengths: Tensor | None,
    count: int,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of ``x`` and ``weights`` (empty without weights), by running the rounds again."""
    rounds: list[tuple[Tensor, Tensor, Segments]] = []
    with torch.no_grad():
        values = _fuse(x, weights, cu_seqlens, lengths, count, rounds)[0]
    for before, sizes, segments in reversed(rounds):
        starts, lengths_of_tokens, alone = segments.starts, segments.lengths, _alone(segments, sizes)
        weighting = torch.where(alone, 1.0, sizes)
        grad, slopes = _weighted_backward_op(grad, before, values, weighting, starts, lengths_of_tokens)
        grad_sizes = _expand_op(grad_sizes[:, None], starts, lengths_of_tokens, len(sizes), "sum")[:, 0]
        grad_sizes, values = torch.where(alone, 0.0, slopes) + grad_sizes, before
    if x.dim() == 3:
        inside = find_runs(x.shape[:-1], x.device, cu_seqlens, lengths, None).inside.view(x.shape[:2])
        grad = x.new_zeros(x.shape).index_put((inside,), grad)
        grad_sizes = grad_sizes.new_zeros(x.shape[:2]).index_put((inside,), grad_sizes)
    # A result of an op must not share memory with an argument.
    grad = grad if rounds or x.dim() == 3 else grad.clone()
    return grad, x.new_empty(0) if weights is None else grad_sizes.to(weights.dtype, copy=True)


LIBRARY.impl("iterative_fusion", _fused, "CompositeExplicitAutograd")
LIBRARY.impl("iterative_fusion_backward", _fused_backward, "CompositeExplicitAutograd")


@torch.library.register_fake("fastcompress::iterative_fusion")
def _(
    x: Tensor, weights: Tensor | None, cu_seqlens: Tensor | None, lengths: Tensor | None, count: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens = torch.library.get_ctx().new_dynamic_size()
    offsets = x.new_empty(num_sequences(x.shape, x.dim() == 3, cu_seqlens) + 1, dtype=torch.int32)
    sizes = x.new_empty(tokens, dtype=accumulate_dtype(x.dtype))
    rows = x.shape[0] * x.shape[1] if x.dim() == 3 else x.shape[0]
    return x.new_empty((tokens, x.shape[-1])), offsets, sizes, x.new_empty(rows, dtype=torch.int64)


@torch.library.register_fake("fastcompress::iterative_fusion_backward")
def _(
    grad: Tensor,
    grad_sizes: Tensor,
    x: Tensor,
    weights: Tensor | None,
    cu_seqlens: Tensor | None,
    lengths: Tensor | None,
    count: int,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(0) if weights is None else weights.new_empty(weights.shape)


def _setup_fusion(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weights, cu_seqlens, lengths, ctx.count = inputs
    _, offsets, sizes, ids = output
    ctx.mark_non_differentiable(offsets, ids, *(() if weights is not None else (sizes,)))
    # Copies, because the caller may change its offsets before the backward pass.
    ctx.save_for_backward(x, weights, *(None if t is None else t.clone() for t in (cu_seqlens, lengths)))


def _fusion_backward(ctx: Any, grad: Tensor, _: Tensor, grad_sizes: Tensor, __: Tensor) -> tuple[Any, ...]:
    x, weights, cu_seqlens, lengths = ctx.saved_tensors
    found = _fusion_backward_op(grad, grad_sizes, x, weights, cu_seqlens, lengths, ctx.count)
    return found[0], None if weights is None else found[1], None, None, None


torch.library.register_autograd("fastcompress::iterative_fusion", _fusion_backward, setup_context=_setup_fusion)
differentiable_once("iterative_fusion_backward")

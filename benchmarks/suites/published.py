"""Compression as it is published: loops, or tensor operations, in PyTorch, written from the papers' definitions.

Every form takes packed frames, ``[N, D]``, and the rest of a ``Batch``, and returns the tokens of all sequences, one
after the other. Those that are published for one sequence are wrapped in ``each``.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fastcompress.nn import LearnedBoundary


@dataclass(frozen=True)
class Batch:
    """What the forms take next to the frames.

    Attributes:
        lengths: Frames of each sequence; ``cu_seqlens`` is ``[B + 1]`` int32.
        alpha: Weights of integrate-and-fire, ``[N]`` fp32, below 1; they fire at about every third frame.
        labels: Labels of a CTC head, ``[N]`` int64, in runs of a few frames.
        blank: Probability of a CTC head's blank, ``[N]`` fp32, high for two frames of three.
        router: Router of H-Net, frozen; its projections are random, so that about every other frame is a boundary.
    """

    lengths: list[int]
    cu_seqlens: Tensor
    alpha: Tensor
    labels: Tensor
    blank: Tensor
    router: LearnedBoundary

    @property
    def few(self) -> int:
        """A number of tokens that a few halvings reach."""
        return max(self.lengths) // 7


def cosines(x: Tensor) -> Tensor:
    """Compute the cosines of neighbours, ``[T - 1]`` fp32."""
    x = x.float()
    return F.cosine_similarity(x[:-1], x[1:], dim=-1)


def means(x: Tensor, starts: Sequence[int]) -> Tensor:
    """Compute the means of the segments that begin at ``starts``.

    By ``split``, whose backward is one concatenation; the backward of a slice is as large as the sequence.
    """
    return torch.stack([segment.mean(0) for segment in x.split(_sizes(starts, len(x)))])


def _sizes(starts: Sequence[int], rows: int) -> list[int]:
    return [b - a for a, b in itertools.pairwise([*starts, rows])]


def _kept(length: int, rate: float) -> int:
    return -int(-length // rate)


def _most_similar(similarity: Tensor, count: int) -> Tensor:
    """Return the indices of the ``count`` largest values, the first of equal ones."""
    return similarity.argsort(descending=True, stable=True)[:count]


def _sum(x: Tensor, ids: Tensor, count: int) -> Tensor:
    """Sum the rows with the same id in fp32, ``[count, D]``."""
    return x.new_zeros(count, x.shape[1], dtype=torch.float32).index_add(0, ids, x.float())


def each(form: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Batch], Tensor]:
    """Apply a form of one sequence to one sequence after the other."""
    return lambda x, batch: torch.cat([form(part) for part in x.split(batch.lengths)])


# --- integrate-and-fire -----------------------------------------------------------------------------------------------


def _padded(x: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    frames, alpha = (pad_sequence(list(rows.split(batch.lengths)), True) for rows in (x, batch.alpha))
    return frames, alpha.double()


def fire_by_scatter(x: Tensor, batch: Batch) -> Tensor:
    """As torch_cif: add each frame to the token that is open before it and to the one that is open after it.

    Sums of weights are in fp64, for the same tokens; no frame fires twice here, so there is no loop over further fires.
    """
    x, alpha = _padded(x, batch)
    sums = alpha.cumsum(1)
    right = sums.floor().long()
    left = right.roll(1, 1)
    left[:, 0] = 0
    counts = right[:, -1]
    over = torch.where(right > left, sums - right, 0.0)
    out = x.new_zeros(x.shape[0], int(counts.max()) + 1, x.shape[2], dtype=torch.float32)
    out = out.scatter_add(1, left[..., None].expand(x.shape), (alpha - over).float()[..., None] * x)
    out = out.scatter_add(1, right[..., None].expand(x.shape), over.float()[..., None] * x)
    return torch.cat([row[:n] for row, n in zip(out, counts.tolist(), strict=True)]).to(x.dtype)


def fire_by_loop(x: Tensor, batch: Batch) -> Tensor:
    """As FunASR: frame after frame, all sequences at once. By ``unbind``, for the reason in ``means``."""
    x, alpha = _padded(x, batch)
    filled, frame = alpha.new_zeros(len(x)), x.new_zeros(x.shape[0], x.shape[2], dtype=torch.float32)
    frames, fires = [], []
    for row, weight in zip(x.unbind(1), alpha.unbind(1), strict=True):
        room = 1.0 - filled
        filled = filled + weight
        fire = filled >= 1.0
        now = torch.where(fire, room, weight)
        frame = frame + now.float()[:, None] * row
        frames.append(frame)
        fires.append(fire)
        filled = torch.where(fire, filled - 1.0, filled)
        frame = torch.where(fire[:, None], (weight - now).float()[:, None] * row, frame)
    return torch.stack(frames, 1)[torch.stack(fires, 1)].to(x.dtype)


# --- merging ----------------------------------------------------------------------------------------------------------


def greedy_by_loop(x: Tensor) -> Tensor:
    """As SA-MAP: frame after frame against the members of the open group."""
    unit = F.normalize(x.float(), dim=-1)
    starts = [0]
    for t in range(1, len(x)):
        if not bool((unit[starts[-1] : t] @ unit[t]).mean() >= 0.5):
            starts.append(t)
    return means(x, starts)


def _merge(x: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """Add rows ``source`` to rows ``target`` and average; sources are dropped."""
    total = x.float().index_add(0, target, x[source].float())
    ones = x.new_ones(len(x), dtype=torch.float32)
    count = ones.index_add(0, target, ones[: len(source)])
    stays = torch.ones(len(x), dtype=torch.bool, device=x.device).index_fill(0, source, False)
    return (total[stays] / count[stays, None]).to(x.dtype)


def adjacent_merge(x: Tensor) -> Tensor:
    """As A-ToMe: the most similar pairs of an even and the next odd frame."""
    source = 2 * _most_similar(cosines(x)[::2], len(x) - _kept(len(x), 1.6))
    return _merge(x, source, source + 1)


def anywhere(x: Tensor, reach: int | None = None) -> Tensor:
    """As ToMe: each even frame's best odd one; tokens put back in order. At a rate of 2."""
    unit = F.normalize(x.float(), dim=-1)
    cosine = unit[::2] @ unit[1::2].T
    if reach is not None:
        away = torch.arange(1, len(x), 2, device=x.device) - torch.arange(0, len(x), 2, device=x.device)[:, None]
        cosine = cosine.masked_fill(away.abs() > reach, -torch.inf)
    best, partner = cosine.max(1)
    merged = _most_similar(best, len(x) - _kept(len(x), 2.0))
    return _merge(x, 2 * merged, 2 * partner[merged] + 1)


def nearby(x: Tensor) -> Tensor:
    """Local temporal bipartite merging: as ToMe, where frames further apart than five are not partners.

    Its matching is not published; this masks the matrix outside a band.
    """
    return anywhere(x, reach=5)


def _chains(x: Tensor, keep: int) -> Tensor:
    """Return the token of each frame when the most similar neighbours are merged until ``keep`` are left."""
    merged = _most_similar(cosines(x), len(x) - keep)
    return torch.ones(len(x), dtype=torch.long, device=x.device).index_fill(0, merged + 1, 0).cumsum(0) - 1


def fusion(x: Tensor, batch: Batch) -> Tensor:
    """As FastLongSpeech: rounds of the most similar neighbours, sequence after sequence, weights carried along."""
    tokens = []
    for part, weight in zip(x.split(batch.lengths), batch.alpha.split(batch.lengths), strict=True):
        while len(part) > batch.few:
            keep = max(-(-len(part) // 2), batch.few)
            ids = _chains(part, keep)
            total = _sum(part.float() * weight[:, None], ids, keep)
            weight = weight.new_zeros(keep).index_add(0, ids, weight)
            part = (total / weight[:, None]).to(x.dtype)
        tokens.append(part)
    return torch.cat(tokens)


def top_k(x: Tensor) -> Tensor:
    """As FastAdaSP: the most similar neighbours are merged, chains of them into one."""
    keep = _kept(len(x), 3.0)
    ids = _chains(x, keep)
    return (_sum(x, ids, keep) / torch.bincount(ids, minlength=keep)[:, None]).to(x.dtype)


# --- boundaries -------------------------------------------------------------------------------------------------------


def novelty(x: Tensor) -> Tensor:
    """As AdaTS: frame after frame, weighted by what it adds. Frames keep their gradient, which its code detaches."""
    weights, starts = [1.0], [0]
    for t, cosine in enumerate(cosines(x.detach()).tolist(), start=1):
        if 1 - cosine > 0.2:
            starts.append(t)
        weights.append(max(1 - cosine, 0.0) + 1e-6)
    sizes = _sizes(starts, len(x))
    pairs = zip(x.split(sizes), torch.tensor(weights, device=x.device)[:, None].split(sizes), strict=True)
    return torch.stack([(w * segment.float()).sum(0) / w.sum() for segment, w in pairs]).to(x.dtype)


def _scaled(x: Tensor) -> Tensor:
    """Compute the distances of neighbours, ``[T - 1]`` fp32, scaled to 0 to 1 in the sequence."""
    d = 1 - cosines(x.detach())
    return (d - d.min()) / (d.max() - d.min())


def prominent_peaks(x: Tensor) -> Tensor:
    """As UnsupSeg: SciPy's peaks of some prominence."""
    from scipy.signal import find_peaks

    peaks, _ = find_peaks(_scaled(x).cpu().numpy(), prominence=0.1)
    return means(x, [0, *(peaks + 1).tolist()])


def high_peaks(x: Tensor) -> Tensor:
    """As Segmental CPC: peaks by their height over the neighbours, and means as a product with ``1 - tanh``.

    Boundaries are 0 or 1, as its steep ``tanh`` makes most of them; one in between would spoil all that follow.
    """
    d = _scaled(x)
    heights = []
    for reach in (1, 2):
        ends = F.pad(d[None, None], (reach, reach), mode="replicate")[0, 0]
        heights.append(torch.minimum(d - ends[: -2 * reach], d - ends[2 * reach :]).clamp_min(0))
    p = torch.minimum((torch.maximum(*heights) - 0.04).clamp_min(0), heights[0])
    place = F.pad((p > 0).float(), (1, 0)).cumsum(0)
    token = torch.arange(int(place[-1]) + 1, device=x.device)
    inside = 1 - torch.tanh(1e5 * (token[:, None] - place).abs())  # [tokens, frames]
    return (inside / inside.sum(1, keepdim=True)).to(x.dtype) @ x


def least_variance(x: Tensor, rate: float = 3.0, longest: int = 8) -> Tensor:
    """As Kamper, with an exact number of segments: dynamic programming, a step per segment over all frames at once."""
    unit, n = F.normalize(x.detach().double(), dim=-1), len(x)
    sums = F.pad(unit.cumsum(0), (0, 0, 1, 0))
    cost = torch.full((longest, n), torch.inf, dtype=torch.float64, device=x.device)
    for size in range(1, min(longest, n) + 1):
        total = sums[size:] - sums[:-size]
        cost[size - 1, : n - size + 1] = size - total.square().sum(1) / size
    best = torch.full((n + longest,), torch.inf, dtype=torch.float64, device=x.device)
    best[n] = 0
    choices = []
    for _ in range(_kept(n, rate)):
        least, chosen = (cost + best.unfold(0, longest, 1)[1:].T).min(0)
        choices.append(chosen)
        best = F.pad(least, (0, longest), value=torch.inf)
    starts = [0]
    for choice in torch.stack(choices[::-1]).tolist()[:-1]:
        starts.append(starts[-1] + choice[starts[-1]] + 1)
    return means(x, starts)


def lookback(x: Tensor) -> Tensor:
    """As Affinity Pooling: the last three members of the open group."""
    near = [(1 - F.cosine_similarity(x[:-lag].float(), x[lag:].float()) <= 0.5).tolist() for lag in (1, 2, 3)]
    starts = [0]
    for t in range(1, len(x)):
        if not any(near[lag - 1][t - lag] for lag in range(1, min(3, t - starts[-1]) + 1)):
            starts.append(t)
    return means(x, starts)


def label_change(x: Tensor, batch: Batch, weighted: bool) -> Tensor:
    """As CTC compression: one matrix of weights per sequence, and a batched product.

    Each frame of a segment weighs the same, or ``alpha``, in the place of the CTC head's probability of its label.
    """
    runs = [[len(list(run)) for _, run in itertools.groupby(row.tolist())] for row in batch.labels.split(batch.lengths)]
    given = batch.alpha if weighted else torch.ones_like(batch.alpha)
    frames = pad_sequence(list(x.split(batch.lengths)), True)
    weights = frames.new_zeros(len(frames), max(map(len, runs)), frames.shape[1])
    for matrix, sizes, row in zip(weights, runs, given.split(batch.lengths), strict=True):
        begin = 0
        for line, part in zip(matrix, row.split(sizes), strict=False):
            line[begin : begin + len(part)] = part / part.sum()
            begin += len(part)
    out = torch.bmm(weights, frames)
    return torch.cat([row[: len(sizes)] for row, sizes in zip(out, runs, strict=True)])


def route(x: Tensor, batch: Batch) -> Tensor:
    """As H-Net, packed: frames at boundaries, times a confidence that is 1 and has a gradient.

    Cosines of projections are in fp32, for the same tokens.
    """
    query, key = F.linear(x[:-1], batch.router.query.weight), F.linear(x[1:], batch.router.key.weight)
    cosine = (F.normalize(query.float(), dim=-1) * F.normalize(key.float(), dim=-1)).sum(-1)
    p = F.pad(((1 - cosine) / 2).clamp(0, 1), (1, 0), value=1.0).index_fill(0, batch.cu_seqlens[:-1].long(), 1.0)
    chosen = p > 0.5
    confidence = p[chosen, None]
    return x[chosen] * (confidence + (1 - confidence).detach()).to(x.dtype)


def speech(x: Tensor, batch: Batch) -> Tensor:
    """As Speech-LLaMA: frames whose blank is not likely, gathered, one sequence at a time."""
    kept = zip(x.split(batch.lengths), (batch.blank <= 0.9).split(batch.lengths), strict=True)
    return torch.cat([part[keep] for part, keep in kept])

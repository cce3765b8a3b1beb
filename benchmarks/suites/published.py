"""Compression as it is published: loops, or tensor operations, in PyTorch, written from the papers' definitions.

Every form takes a ``Batch`` and returns the tokens of all sequences, one after the other.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from benchmarks.harness import cases
from fastcompress.nn import LearnedBoundary


@dataclass(frozen=True)
class MethodCase:
    """Frames of each sequence, and their width."""

    name: str
    lengths: tuple[int, ...]
    dim: int

    @property
    def few(self) -> int:
        """A number of tokens that a few halvings reach."""
        return max(self.lengths) // 7


@dataclass(frozen=True)
class Batch(cases.Batch):
    """A batch as the forms take it.

    Attributes:
        x: Frames, ``[N, D]``; ``cu_seqlens`` is ``[B + 1]`` int32.
        alpha: Weights of integrate-and-fire, ``[N]`` fp32, below 1; they fire at about every third frame.
        labels: Labels of a CTC head, ``[N]`` int64, in runs of a few frames.
        blank: Probability of a CTC head's blank, ``[N]`` fp32, high for two frames of three.
        router: Router of H-Net, frozen; its projections are random, so that about every other frame is a boundary.
    """

    case: MethodCase
    x: Tensor
    cu_seqlens: Tensor
    alpha: Tensor
    labels: Tensor
    blank: Tensor
    router: LearnedBoundary

    def parts(self) -> list[Tensor]:
        """The frames of each sequence."""
        return list(self.x.split(list(self.case.lengths)))


# --- what the published forms share ----------------------------------------------------------------------------------


def cosines(x: Tensor) -> Tensor:
    """Cosines of neighbours, ``[T - 1]`` fp32."""
    x = x.float()
    return F.cosine_similarity(x[:-1], x[1:], dim=-1)


def means(x: Tensor, starts: Sequence[int]) -> Tensor:
    """Means of the segments that begin at ``starts``.

    By ``split``, whose backward is one concatenation; the backward of a slice is as large as the sequence.
    """
    sizes = [b - a for a, b in zip(starts, [*starts[1:], len(x)], strict=True)]
    return torch.stack([segment.mean(0) for segment in x.split(sizes)])


def each(form: Callable[[Tensor], Tensor]) -> Callable[[Batch], Tensor]:
    """Apply a form of one sequence to one sequence after the other."""
    return lambda batch: torch.cat([form(part) for part in batch.parts()])


# --- integrate-and-fire -----------------------------------------------------------------------------------------------


def _padded(batch: Batch) -> tuple[Tensor, Tensor]:
    lengths = list(batch.case.lengths)
    return pad_sequence(batch.parts(), True), pad_sequence(list(batch.alpha.split(lengths)), True).double()


def fire_by_scatter(batch: Batch) -> Tensor:
    """As torch_cif: add each frame to the token that is open before it and to the one that is open after it.

    Sums of weights are in fp64, for the same tokens; no frame fires twice here, so there is no loop over further fires.
    """
    x, alpha = _padded(batch)
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


def fire_by_loop(batch: Batch) -> Tensor:
    """As FunASR: frame after frame, all sequences at once. By ``unbind``, for the reason in ``means``."""
    x, alpha = _padded(batch)
    columns = x.unbind(1)
    filled, frame = alpha.new_zeros(len(x)), x.new_zeros(x.shape[0], x.shape[2], dtype=torch.float32)
    frames, fires = [], []
    for t in range(x.shape[1]):
        room = 1.0 - filled
        filled = filled + alpha[:, t]
        fires.append(filled >= 1.0)
        now = torch.where(fires[-1], room, alpha[:, t])
        frame = frame + now.float()[:, None] * columns[t]
        frames.append(frame)
        filled = torch.where(fires[-1], filled - 1.0, filled)
        frame = torch.where(fires[-1][:, None], (alpha[:, t] - now).float()[:, None] * columns[t], frame)
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


def adjacent_merge(x: Tensor) -> Tensor:
    """As A-ToMe: the most similar pairs of an even and the next odd frame."""
    order = cosines(x)[::2].argsort(descending=True, stable=True)
    merged = order[: len(x) - _kept(len(x), 1.6)]
    total = x.float()
    count = x.new_ones(len(x), dtype=torch.float32)
    total = total.index_add(0, 2 * merged + 1, x[2 * merged].float())
    count = count.index_add(0, 2 * merged + 1, x.new_ones(len(merged), dtype=torch.float32))
    stays = torch.ones(len(x), dtype=torch.bool, device=x.device).index_fill(0, 2 * merged, False)
    return (total[stays] / count[stays, None]).to(x.dtype)


def _kept(length: int, rate: float) -> int:
    return -int(-length // rate)


def anywhere(x: Tensor) -> Tensor:
    """As ToMe: each even frame's best odd one; tokens put back in order."""
    return _bipartite(x, None)


def nearby(x: Tensor) -> Tensor:
    """Local temporal bipartite merging: as ToMe, where frames further apart than five are not partners.

    Its matching is not published; this masks the matrix outside a band.
    """
    away = torch.arange(1, len(x), 2, device=x.device) - torch.arange(0, len(x), 2, device=x.device)[:, None]
    return _bipartite(x, away.abs() > 5)


def _bipartite(x: Tensor, apart: Tensor | None) -> Tensor:
    """A round of merging at a rate of 2; ``apart``, ``[even, odd]`` bool, marks pairs that may not merge."""
    unit = F.normalize(x.float(), dim=-1)
    cosine = unit[::2] @ unit[1::2].T
    best, partner = (cosine if apart is None else cosine.masked_fill(apart, -torch.inf)).max(1)
    merged = best.argsort(descending=True, stable=True)[: len(x) - _kept(len(x), 2.0)]
    target = 2 * partner[merged] + 1
    total = x.float().index_add(0, target, x[2 * merged].float())
    count = x.new_ones(len(x), dtype=torch.float32).index_add(0, target, x.new_ones(len(merged), dtype=torch.float32))
    stays = torch.ones(len(x), dtype=torch.bool, device=x.device).index_fill(0, 2 * merged, False)
    return (total[stays] / count[stays, None]).to(x.dtype)


def fusion(batch: Batch) -> Tensor:
    """As FastLongSpeech: rounds of the most similar neighbours, sequence after sequence, weights carried along."""
    tokens = []
    for x, weight in zip(batch.parts(), batch.alpha.split(list(batch.case.lengths)), strict=True):
        while len(x) > batch.case.few:
            keep = max(-(-len(x) // 2), batch.case.few)
            merged = cosines(x).argsort(descending=True, stable=True)[: len(x) - keep]
            ids = torch.ones(len(x), dtype=torch.long, device=x.device).index_fill(0, merged + 1, 0).cumsum(0) - 1
            total = x.new_zeros(keep, x.shape[1], dtype=torch.float32).index_add(0, ids, x.float() * weight[:, None])
            weight = weight.new_zeros(keep).index_add(0, ids, weight)
            x = (total / weight[:, None]).to(x.dtype)
        tokens.append(x)
    return torch.cat(tokens)


# --- boundaries -------------------------------------------------------------------------------------------------------


def novelty(x: Tensor) -> Tensor:
    """As AdaTS: frame after frame, weighted by what it adds. Frames keep their gradient, which its code detaches."""
    near = cosines(x.detach()).tolist()
    weights, starts = [1.0], [0]
    for t, cosine in enumerate(near, start=1):
        if 1 - cosine > 0.2:
            starts.append(t)
        weights.append(max(1 - cosine, 0.0) + 1e-6)
    weight = torch.tensor(weights, device=x.device)[:, None]
    sizes = [b - a for a, b in zip(starts, [*starts[1:], len(x)], strict=True)]
    pairs = zip(x.split(sizes), weight.split(sizes), strict=True)
    return torch.stack([(w * segment.float()).sum(0) / w.sum() for segment, w in pairs]).to(x.dtype)


def scaled(x: Tensor) -> Tensor:
    """Distances of neighbours, ``[T - 1]`` fp32, scaled to 0 to 1 in the sequence."""
    d = 1 - cosines(x.detach())
    return (d - d.min()) / (d.max() - d.min())


def prominent_peaks(x: Tensor) -> Tensor:
    """As UnsupSeg: SciPy's peaks of some prominence."""
    from scipy.signal import find_peaks

    peaks, _ = find_peaks(scaled(x).cpu().numpy(), prominence=0.1)
    return means(x, [0, *(peaks + 1).tolist()])


def high_peaks(x: Tensor) -> Tensor:
    """As Segmental CPC: peaks by their height over the neighbours, and means as a product with ``1 - tanh``.

    Boundaries are 0 or 1, as its steep ``tanh`` makes most of them; one in between would spoil all that follow.
    """
    d = scaled(x)
    heights = []
    for reach in (1, 2):
        ends = F.pad(d[None, None], (reach, reach), mode="replicate")[0, 0]
        heights.append(torch.minimum(d - ends[: -2 * reach], d - ends[2 * reach :]).clamp_min(0))
    p = torch.minimum((torch.maximum(*heights) - 0.04).clamp_min(0), heights[0])
    place = F.pad((p > 0).float(), (1, 0)).cumsum(0)
    token = torch.arange(int(place[-1]) + 1, device=x.device)
    inside = 1 - torch.tanh(1e5 * (token[:, None] - place).abs())  # [tokens, frames]
    return (inside / inside.sum(1, keepdim=True)).to(x.dtype) @ x


def top_k(x: Tensor) -> Tensor:
    """As FastAdaSP: the most similar neighbours are merged, chains of them into one."""
    keep = _kept(len(x), 3.0)
    merged = cosines(x).argsort(descending=True, stable=True)[: len(x) - keep]
    starts = torch.ones(len(x), dtype=torch.bool, device=x.device).index_fill(0, merged + 1, False)
    ids = starts.long().cumsum(0) - 1
    total = x.new_zeros(keep, x.shape[1], dtype=torch.float32).index_add(0, ids, x.float())
    return (total / torch.bincount(ids, minlength=keep)[:, None]).to(x.dtype)


def lookback(x: Tensor) -> Tensor:
    """As Affinity Pooling: the last three members of the open group."""
    near = [(1 - F.cosine_similarity(x[:-lag].float(), x[lag:].float()) <= 0.5).tolist() for lag in (1, 2, 3)]
    starts = [0]
    for t in range(1, len(x)):
        if not any(near[lag - 1][t - lag] for lag in range(1, min(3, t - starts[-1]) + 1)):
            starts.append(t)
    return means(x, starts)


def label_change(batch: Batch, posterior: Tensor | None = None) -> Tensor:
    """As CTC compression: one matrix of weights per sequence, and a batched product.

    Each frame of a segment weighs the same, or what is given, such as the CTC head's probability of its label.
    """
    lengths = list(batch.case.lengths)
    runs = [[len(list(run)) for _, run in itertools.groupby(row.tolist())] for row in batch.labels.split(lengths)]
    given = torch.ones(len(batch.x), device=batch.x.device) if posterior is None else posterior
    x = pad_sequence(batch.parts(), True)
    weights = x.new_zeros(len(x), max(map(len, runs)), x.shape[1])
    for b, (sizes, row) in enumerate(zip(runs, given.split(lengths), strict=True)):
        begin = 0
        for i, part in enumerate(row.split(sizes)):
            weights[b, i, begin : begin + len(part)] = part / part.sum()
            begin += len(part)
    out = torch.bmm(weights, x)
    return torch.cat([row[: len(sizes)] for row, sizes in zip(out, runs, strict=True)])


def weighted_label_change(batch: Batch) -> Tensor:
    return label_change(batch, batch.alpha)


def route(batch: Batch) -> Tensor:
    """As H-Net, packed: frames at boundaries, times a confidence that is 1 and has a gradient.

    Cosines of projections are in fp32, for the same tokens.
    """
    x, router = batch.x, batch.router
    query, key = F.linear(x[:-1], router.query.weight), F.linear(x[1:], router.key.weight)
    cosine = (F.normalize(query.float(), dim=-1) * F.normalize(key.float(), dim=-1)).sum(-1)
    p = F.pad(((1 - cosine) / 2).clamp(0, 1), (1, 0), value=1.0).index_fill(0, batch.cu_seqlens[:-1].long(), 1.0)
    chosen = p > 0.5
    confidence = p[chosen, None]
    return x[chosen] * (confidence + (1 - confidence).detach()).to(x.dtype)


# --- selection --------------------------------------------------------------------------------------------------------


def speech(batch: Batch) -> Tensor:
    """As Speech-LLaMA: frames whose blank is not likely, gathered, one sequence at a time."""
    kept = zip(batch.parts(), (batch.blank <= 0.9).split(list(batch.case.lengths)), strict=True)
    return torch.cat([x[keep] for x, keep in kept])

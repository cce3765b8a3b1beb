"""Segment pooling in PyTorch without a compiler, and by other libraries.

Each form takes frames, ``[N, D]``, and their ``Batch``, and returns ``Tokens``: the values and where the segments
start. Scores are always in fp32: cosines in half precision find other segments.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

import fastcompress as fc
from benchmarks.harness.cases import Batch

#: Rule of ``min_variance``: about as many tokens as local maxima give.
MIN_VARIANCE = fc.MinVariance(rate=3.0)
#: Frames per block of the blocked scores: 64 x 1280 in fp32 are a third of a megabyte.
_BLOCK = 64


@dataclass
class Tokens:
    """What an implementation returns.

    Attributes:
        values: Means, ``[M, D]``, in the dtype of the input (``[B, S, D]`` for padded input).
        starts: First row of each segment, ``[M]``; ``None`` for an implementation that has none.
    """

    values: Tensor
    starts: Tensor | None


def fastcompress_pool(x: Tensor, batch: Batch, compact: bool = True) -> Tokens:
    """Run the library; without ``compact`` it does not read the number of segments."""
    pooled = fc.segment_pool(x, cu_seqlens=batch.cu_seqlens, rule=batch.rule, compact=compact)
    return Tokens(pooled.values, pooled.segments.starts)


def min_variance(x: Tensor, batch: Batch) -> Tokens:
    """Run the library with minimum-variance segments, whatever the rule of the batch is."""
    return fastcompress_pool(x, replace(batch, rule=MIN_VARIANCE))


# --- scores: [N, D] -> [N - 1] fp32, 1 - cosine of each frame and the next -------------------------------------------


def cosine(x: Tensor) -> Tensor:
    """``F.cosine_similarity``, as the documentation of PyTorch suggests."""
    x = x.float()
    return 1 - F.cosine_similarity(x[:-1], x[1:], dim=-1)


def bmm(x: Tensor) -> Tensor:
    """Dot products as a batched matrix product, which makes no ``[N, D]`` temporary in fp32."""
    x = x.float()
    dot = torch.bmm(x[:-1].unsqueeze(1), x[1:].unsqueeze(2)).view(-1)
    norm = torch.linalg.vector_norm(x, dim=-1).clamp_min(1e-8)
    distances: Tensor = 1 - dot / (norm[:-1] * norm[1:])
    return distances


def blocked(x: Tensor) -> Tensor:
    """``cosine`` in blocks whose temporaries stay in the L2 cache: Python overhead against memory traffic."""
    rows = x.shape[0] - 1
    return torch.cat([cosine(x[i : min(i + _BLOCK, rows) + 1]) for i in range(0, rows, _BLOCK)])


# --- boundaries ------------------------------------------------------------------------------------------------------


def segment_ends(scores: Tensor, last: Tensor, rule: fc.Rule) -> Tensor:
    """Return whether a segment ends at each frame, ``[N]`` bool, by scores and last frames of sequences, ``[N]``.

    Raises:
        ValueError: ``rule`` is neither local maxima nor a threshold.
    """
    if isinstance(rule, fc.Threshold):
        return (scores > rule.threshold) | last
    if rule != fc.LocalMax():
        raise ValueError(f"rule must be LocalMax() or a Threshold, got {rule}")
    # Infinities keep the first and the last pair of a sequence from being maxima, as scipy.signal.argrelextrema does.
    inf = float("inf")
    scores = scores.masked_fill(last, inf)
    before = F.pad(scores[:-1], (1, 0), value=inf)
    after = F.pad(scores[1:], (0, 1), value=inf)
    return ((scores > before) & (scores > after)) | last


def last_frames(x: Tensor, batch: Batch) -> Tensor:
    """Return whether a frame is the last of its sequence, ``[N]`` bool."""
    last = torch.zeros(x.shape[0], dtype=torch.bool, device=x.device)
    last[batch.cu_seqlens[1:].long() - 1] = True
    return last


# --- pooling: x [N, D], offsets [M + 1], ids [N] -> [M, D] -----------------------------------------------------------


def embedding_bag(x: Tensor, offsets: Tensor, ids: Tensor) -> Tensor:
    """Segments as bags of an embedding table."""
    return F.embedding_bag(torch.arange(x.shape[0], device=x.device), x, offsets[:-1], mode="mean")


def scatter_reduce(x: Tensor, offsets: Tensor, ids: Tensor) -> Tensor:
    """``Tensor.scatter_reduce``."""
    out = x.new_zeros(offsets.shape[0] - 1, x.shape[1])
    return out.scatter_reduce(0, ids.unsqueeze(1).expand_as(x), x, "mean", include_self=False)


def index_add(x: Tensor, offsets: Tensor, ids: Tensor) -> Tensor:
    """``Tensor.index_add`` and a division."""
    out = x.new_zeros(offsets.shape[0] - 1, x.shape[1])
    return out.index_add(0, ids, x) / offsets.diff().unsqueeze(1).to(x.dtype)


def segment_csr(x: Tensor, offsets: Tensor, ids: Tensor) -> Tensor:
    """torch-scatter."""
    means: Tensor = importlib.import_module("torch_scatter").segment_csr(x, offsets, reduce="mean")
    return means


def jagged(x: Tensor, offsets: Tensor, ids: Tensor) -> Tensor:
    """FBGEMM, whose jagged tensors become dense: segments padded to the longest, summed."""
    importlib.import_module("fbgemm_gpu")
    lengths = offsets.diff()
    dense: Tensor = torch.ops.fbgemm.jagged_to_padded_dense(x, [offsets], [int(lengths.max())])
    return dense.sum(1) / lengths.unsqueeze(1).to(x.dtype)


# --- whole forms -----------------------------------------------------------------------------------------------------


def vectorised(
    scores: Callable[[Tensor], Tensor], pool: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> Callable[[Tensor, Batch], Tokens]:
    """Compute scores, boundaries and means, each for the whole batch at once."""

    def form(x: Tensor, batch: Batch) -> Tokens:
        with torch.no_grad():
            end = segment_ends(F.pad(scores(x), (0, 1)), last_frames(x, batch), batch.rule)
            offsets = F.pad(end.nonzero().squeeze(1) + 1, (1, 0))
        return Tokens(pool(x, offsets, end.cumsum(0) - end.long()), offsets[:-1])

    return form


def window_offsets(batch: Batch) -> Tensor:
    """Return the offsets of the segments of a ``Uniform`` rule, ``[M + 1]``: windows that start again at each sequence.

    Raises:
        ValueError: The rule is not ``Uniform``.
    """
    if not isinstance(batch.rule, fc.Uniform):
        raise ValueError(f"rule must be Uniform, got {batch.rule}")
    size, cu = batch.rule.size, batch.cu_seqlens.long()
    counts = (cu.diff() + size - 1) // size
    first = F.pad(counts.cumsum(0), (1, 0))  # number of windows before each sequence
    sequence = torch.repeat_interleave(torch.arange(len(counts), device=cu.device), counts)
    starts = cu[sequence] + (torch.arange(len(sequence), device=cu.device) - first[sequence]) * size
    return torch.cat([starts, cu[-1:]])


def windows(pool: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[Tensor, Batch], Tokens]:
    """Compute the means of windows of one size, each for the whole batch at once."""

    def form(x: Tensor, batch: Batch) -> Tokens:
        with torch.no_grad():
            offsets = window_offsets(batch)
            ids = torch.repeat_interleave(torch.arange(len(offsets) - 1, device=x.device), offsets.diff())
        return Tokens(pool(x, offsets, ids), offsets[:-1])

    return form


def mean_pooling(x: Tensor, batch: Batch) -> Tokens:
    """``mean_pooling`` of flash-linear-attention, whose windows have a power of two of frames; it returns no starts."""
    pooling = importlib.import_module("fla.ops.utils.pooling")
    if not isinstance(batch.rule, fc.Uniform):
        raise ValueError(f"rule must be Uniform, got {batch.rule}")
    means = pooling.mean_pooling(x.view(1, len(x), 1, -1), batch.rule.size, batch.cu_seqlens.long())
    return Tokens(means.view(-1, x.shape[1]), None)


def loop(x: Tensor, batch: Batch) -> Tokens:
    """Loop over sequences and segments in Python, cut by ``split``, whose backward is one concatenation."""
    values, starts, origin = [], [], 0
    for frames in x.split(batch.cu_seqlens.diff().tolist()):
        with torch.no_grad():
            last = F.pad(torch.zeros(len(frames) - 1, dtype=torch.bool, device=x.device), (0, 1), value=True)
            ends = segment_ends(F.pad(cosine(frames), (0, 1)), last, batch.rule).nonzero().squeeze(1) + 1
        values.append(torch.stack([segment.mean(0) for segment in frames.split(F.pad(ends, (1, 0)).diff().tolist())]))
        starts.append(F.pad(ends[:-1], (1, 0)) + origin)
        origin += len(frames)
    return Tokens(torch.cat(values), torch.cat(starts))


def average_pool(x: Tensor, batch: Batch) -> Tokens:
    """AvgPool1d of padded ``[B, T, D]``: fixed windows, so no scores, no boundaries and no ragged output."""
    return Tokens(F.avg_pool1d(x.transpose(1, 2), batch.window).transpose(1, 2), None)

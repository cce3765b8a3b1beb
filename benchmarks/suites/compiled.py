"""Segment pooling under ``torch.compile``, in the forms that were the fastest of those tried.

The number of segments depends on the data, so there are at least two compiled regions with ``nonzero`` between them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness.cases import Batch
from benchmarks.suites.eager import Tokens, cosine, embedding_bag, index_add, last_frames, segment_ends, window_offsets


def prepare(threads: int) -> None:
    """Drop what was compiled before, and compile for ``threads`` threads from now on; 0 for a GPU.

    Inductor writes the number of threads into the code and, unless told, may find code for another one in its cache.
    """
    import torch._inductor.config as inductor

    torch._dynamo.reset()  # or the ninth shape would run uncompiled
    if threads:
        inductor.cpp.threads = threads
        inductor.compile_threads = 1  # no pool of compiler processes next to what is timed


@functools.cache
def compiled(function: Callable[..., Any], **how: Any) -> Callable[..., Any]:
    """Compile a function, once more after ``prepare``."""
    return torch.compile(function, **how)


def _cosine(x: Tensor) -> Tensor:
    return F.pad(cosine(x), (0, 1))


def _two_sums(x: Tensor) -> Tensor:
    """Compute dot product and norm of each row as two sums of one loop; ``cosine_similarity`` compiles to three.

    The roll pairs the last row with the first, which no segment end depends on.
    """
    x = x.float()
    dot = (x * x.roll(-1, 0)).sum(-1)
    norm = (x * x).sum(-1).sqrt().clamp_min(1e-8)
    return 1 - dot / (norm * norm.roll(-1, 0))


def _ends(scores: Callable[[Tensor], Tensor], x: Tensor, last: Tensor, rule: Any) -> tuple[Tensor, Tensor]:
    end = segment_ends(scores(x), last, rule)
    return end, end.cumsum(0) - end.long()


def _find(scores: Callable[[Tensor], Tensor], x: Tensor, batch: Batch, how: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Return the offsets of the segments, and the segment of each frame."""
    with torch.no_grad():
        end, ids = compiled(_ends, dynamic=False, **how)(scores, x.detach(), last_frames(x, batch), batch.rule)
        return F.pad(end.nonzero().squeeze(1) + 1, (1, 0)), ids


def _gather(x: Tensor, offsets: Tensor, longest: int) -> Tensor:
    """Sum ``longest`` rows per segment, those past its end masked: no atomic additions, one loop, one write."""
    row = offsets[:-1, None] + torch.arange(longest, device=x.device)
    inside = (row < offsets[1:, None]).unsqueeze(2)
    total = torch.where(inside, x[row.clamp_max(x.shape[0] - 1)].float(), 0.0).sum(1)
    return (total / offsets.diff().unsqueeze(1)).to(x.dtype)


def _expand(grad: Tensor, ids: Tensor, lengths: Tensor) -> Tensor:
    """Compute the adjoint of the segment mean: ``[M, D]`` to ``[N, D]``."""
    return (grad.float() / lengths.unsqueeze(1))[ids].to(grad.dtype)


class _SegmentMean(torch.autograd.Function):
    """A mean whose backward is one compiled gather."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, offsets: Tensor, ids: Tensor, gather: bool, how: dict[str, Any]) -> Tensor:
        ctx.save_for_backward(ids, offsets.diff())
        ctx.how = how
        if not gather:
            return embedding_bag(x, offsets, ids)
        torch._dynamo.mark_dynamic(offsets, 0)
        means: Tensor = compiled(_gather, **how)(x, offsets, int(offsets.diff().max()))
        return means

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return compiled(_expand, dynamic=True, **ctx.how)(grad, *ctx.saved_tensors), None, None, None, None


def plain(x: Tensor, batch: Batch, **how: Any) -> Tokens:
    """Compile the form that one would write: ``cosine_similarity``, ``index_add``, autograd's backward.

    Args:
        how: Arguments of ``torch.compile``, such as ``mode="max-autotune"``.
    """
    offsets, ids = _find(_cosine, x, batch, how)
    return Tokens(compiled(index_add, dynamic=True, **how)(x, offsets, ids), offsets[:-1])


def tuned(x: Tensor, batch: Batch, gather: bool, **how: Any) -> Tokens:
    """Compile scores and backward written by hand; pool by a compiled gather or the eager ``embedding_bag``.

    The gather is compiled for the longest segment of the batch; with other data it compiles again. ``how`` are
    arguments of ``torch.compile``.
    """
    offsets, ids = _find(_two_sums, x, batch, how)
    means = _SegmentMean.apply(x, offsets, ids, gather, how)  # type: ignore[no-untyped-call]  # of torch
    return Tokens(means, offsets[:-1])


def windows(x: Tensor, batch: Batch, **how: Any) -> Tokens:
    """Compile the mean of windows of one size; ``how`` are arguments of ``torch.compile``."""
    with torch.no_grad():
        offsets = window_offsets(batch)
        ids = torch.repeat_interleave(torch.arange(len(offsets) - 1, device=x.device), offsets.diff())
    return Tokens(compiled(index_add, dynamic=True, **how)(x, offsets, ids), offsets[:-1])

"""Segment pooling under ``torch.compile``, in the forms that were the fastest of those tried.

The number of segments depends on the data, so there are at least two compiled regions with ``nonzero`` between them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastcompress as fc
from benchmarks.harness.cases import Inputs
from benchmarks.suites.eager import Call, Tokens, cosine_scores, embedding_bag, last_frames, segment_ends


def prepare(threads: int) -> None:
    """Drop what was compiled before, and compile for ``threads`` threads from now on; 0 for a GPU.

    Inductor writes the number of threads into the code and, unless told, may find code for another one in its cache.
    """
    import torch._functorch.config
    import torch._inductor.config as inductor

    torch._dynamo.reset()  # or the ninth shape would run uncompiled
    if not threads:
        torch._functorch.config.donated_buffer = False  # a compiled backward is timed again and again on one forward
        return
    inductor.cpp.threads = threads
    inductor.compile_threads = 1  # no pool of compiler processes next to what is timed


def _ends_plain(x: Tensor, last: Tensor, rule: fc.Rule) -> tuple[Tensor, Tensor]:
    end = segment_ends(F.pad(cosine_scores(x), (0, 1)), last, rule)
    return end, end.cumsum(0) - end.long()


def _ends_tuned(x: Tensor, last: Tensor, rule: fc.Rule) -> tuple[Tensor, Tensor]:
    """Compute dot product and norm of each row as two sums of one loop; ``cosine_similarity`` compiles to three.

    The roll pairs the last row with the first, which ``last`` masks.
    """
    x = x.float()
    dot = (x * x.roll(-1, 0)).sum(-1)
    norm = (x * x).sum(-1).sqrt().clamp_min(1e-8)
    end = segment_ends(1 - dot / (norm * norm.roll(-1, 0)), last, rule)
    return end, end.cumsum(0) - end.long()


def _mean_index_add(x: Tensor, ids: Tensor, lengths: Tensor) -> Tensor:
    return x.new_zeros(lengths.shape[0], x.shape[1]).index_add(0, ids, x) / lengths.unsqueeze(1).to(x.dtype)


def _mean_gather(x: Tensor, offsets: Tensor, longest: int) -> Tensor:
    """Sum ``longest`` rows per segment, those past its end masked: no atomic additions, one loop, one write."""
    row = offsets[:-1, None] + torch.arange(longest, device=x.device)
    inside = (row < offsets[1:, None]).unsqueeze(2)
    total = torch.where(inside, x[row.clamp_max(x.shape[0] - 1)].float(), 0.0).sum(1)
    return (total / offsets.diff().unsqueeze(1)).to(x.dtype)


def _expand(grad: Tensor, ids: Tensor, lengths: Tensor) -> Tensor:
    """The adjoint of the segment mean: ``[M, D]`` to ``[N, D]``."""
    return (grad.float() / lengths.unsqueeze(1))[ids].to(grad.dtype)


def _find(ends: Callable[..., tuple[Tensor, Tensor]], inputs: Inputs) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        end, ids = ends(inputs.x.detach(), last_frames(inputs), inputs.rule)
        return F.pad(end.nonzero().squeeze(1) + 1, (1, 0)), ids


def plain(**how: Any) -> Call:
    """The vectorised form as one would write it: ``cosine_similarity``, ``index_add``, autograd's backward.

    Args:
        how: Arguments of ``torch.compile``, such as ``mode="max-autotune"``.
    """
    ends = torch.compile(_ends_plain, dynamic=False, **how)
    mean = torch.compile(_mean_index_add, dynamic=True, **how)

    def call(inputs: Inputs) -> Tokens:
        offsets, ids = _find(ends, inputs)
        return Tokens(mean(inputs.x, ids, offsets.diff()), offsets[:-1])

    return call


class _SegmentMean(torch.autograd.Function):
    """A mean whose backward is one compiled gather."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, offsets: Tensor, ids: Tensor, mean: Callable[..., Tensor], expand: Callable[..., Tensor]
    ) -> Tensor:
        ctx.save_for_backward(ids, offsets.diff())
        ctx.expand = expand
        return mean(x, offsets, ids)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return ctx.expand(grad, *ctx.saved_tensors), None, None, None, None


def tuned(pool: str, **how: Any) -> Call:
    """Scores and backward by hand, compiled; pooling by a compiled ``"gather"`` or the eager ``"embedding_bag"``.

    The gather is compiled for the longest segment of the batch; with other data it compiles again. ``how`` are
    arguments of ``torch.compile``.
    """
    ends = torch.compile(_ends_tuned, dynamic=False, **how)
    expand = torch.compile(_expand, dynamic=True, **how)
    gather = torch.compile(_mean_gather, **how)

    def gather_mean(x: Tensor, offsets: Tensor, ids: Tensor) -> Tensor:
        torch._dynamo.mark_dynamic(offsets, 0)
        return gather(x, offsets, int(offsets.diff().max()))

    mean = gather_mean if pool == "gather" else embedding_bag

    def call(inputs: Inputs) -> Tokens:
        offsets, ids = _find(ends, inputs)
        means = _SegmentMean.apply(inputs.x, offsets, ids, mean, expand)  # type: ignore[no-untyped-call]  # of torch
        return Tokens(means, offsets[:-1])

    return call

"""Compression as ``torch.nn`` modules, fixed and learned.

Every module is called with ``x`` ``[N, D]`` and ``cu_seqlens=``, or with ``x`` ``[B, T, D]`` and ``lengths=``. It
returns an object with ``values`` ``[M, D]`` and ``cu_seqlens`` ``[B + 1]``. All of them can be the compressor of
``fastcompress.lalm`` and ``fastcompress.integrations``.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor

from fastcompress.checks import (
    as_number,
    as_optional_whole,
    as_whole,
    check_dense,
    check_float,
    check_layout,
    check_not_batched,
    unnest,
)
from fastcompress.ops.adjacent_distance import adjacent_distance
from fastcompress.ops.greedy_segments import greedy_segments
from fastcompress.ops.integrate_and_fire import Fired, as_firing, integrate_and_fire, quantity_loss
from fastcompress.ops.scalar_rules import Runs, find_checked_runs, find_runs
from fastcompress.ops.segment_pool import segment_pool
from fastcompress.ops.segment_reduce import REDUCTIONS, Reduce, segment_reduce
from fastcompress.ops.select_boundaries import frame_offsets, segments_from_mask, select_boundaries
from fastcompress.ops.token_merging import Merged, bipartite_merge, follow_ids, iterative_fusion
from fastcompress.rules import Rule, Threshold, as_rule
from fastcompress.segments import Pooled

__all__ = [
    "BipartiteMerge",
    "GreedySegments",
    "IntegrateAndFire",
    "IterativeFusion",
    "LearnedBoundary",
    "LearnedCompressor",
    "NoveltyPool",
    "SegmentPool",
    "ratio_loss",
    "straight_through",
]


class SegmentPool(torch.nn.Module):
    """Pool frames into segments with a fixed rule and reduction. Has no parameters.

    Args:
        rule: A rule or its text form.
        reduce: Reduction of [`fastcompress.segment_reduce`][].
        compact: See [`fastcompress.segment_pool`][].
    """

    def __init__(self, rule: Rule | str, reduce: Reduce = "mean", compact: bool = True) -> None:
        super().__init__()
        self.rule: Rule = as_rule(rule)
        self.reduce: Reduce = _as_reduce(reduce)
        self.compact: bool = compact

    def forward(
        self,
        x: Tensor,
        cu_seqlens: Tensor | None = None,
        lengths: Tensor | None = None,
        attention_mask: Tensor | None = None,
        row_group: Tensor | None = None,
        keys: Tensor | None = None,
        labels: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> Pooled:
        """Pool a batch.

        Args:
            x: Frames, ``[N, D]`` packed, ``[B, T, D]`` padded or ``[B, j, D]`` nested (jagged).
            cu_seqlens: Offsets of packed input, ``[B + 1]``; see [`fastcompress.segment_pool`][], as for the others.
            lengths: Lengths of padded input, ``[B]``.
            attention_mask: Mask of padded input, ``[B, T]``: 1 keeps a frame, 0 drops it.
            row_group: Row groups, int32 ``[N]`` or ``[B, T]``.
            keys: Features to compute the distances from instead of ``x``.
            labels: Labels for ``LabelChange``.
            weights: Weights of a weighted mean.
        """
        return segment_pool(
            x,
            self.rule,
            cu_seqlens=cu_seqlens,
            lengths=lengths,
            attention_mask=attention_mask,
            row_group=row_group,
            keys=keys,
            labels=labels,
            reduce=self.reduce,
            weights=weights,
            compact=self.compact,
        )

    def extra_repr(self) -> str:
        return f"rule={self.rule}, reduce={self.reduce}, compact={self.compact}"


class NoveltyPool(torch.nn.Module):
    """Pool segments of similar frames with weights that favour new frames (AdaTS). Has no parameters.

    A frame starts a segment if its distance ``d`` to the previous frame exceeds ``threshold``, as with
    [`fastcompress.Threshold`][]. A token is the mean of its frames weighted by ``max(d, 0) + 1e-6``; a frame whose
    ``d`` is NaN has weight ``1e-6``. The first frame of a sequence has weight 1, a choice that the published code
    leaves open. Gradients go to ``x`` with the weights taken as constants.

    Args:
        threshold: Largest distance, 1 - cosine, between neighbouring frames of a segment; 0.15 in AdaTS.
    """

    def __init__(self, threshold: float = 0.15) -> None:
        super().__init__()
        self.rule: Threshold = Threshold(threshold)

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None, lengths: Tensor | None = None) -> Pooled:
        """Compress a batch.

        Args:
            x: Frames, ``[N, D]`` packed, ``[B, T, D]`` padded or ``[B, j, D]`` nested (jagged).
            cu_seqlens: Offsets of packed input, ``[B + 1]``; see [`fastcompress.segment_pool`][], also for errors.
            lengths: Lengths of padded input, ``[B]``.
        """
        x, cu_seqlens = unnest("x", x, cu_seqlens, lengths)
        check_float("x", x)
        d = adjacent_distance(x.detach(), cu_seqlens=cu_seqlens, lengths=lengths)
        segments = select_boundaries(d, self.rule, cu_seqlens=cu_seqlens, lengths=lengths)
        runs = find_runs(x.shape[:-1], x.device, cu_seqlens, lengths, None)
        before = torch.nn.functional.pad(d.reshape(-1), (1, 0))[:-1]
        novelty = torch.where(runs.first, 1.0, before.nan_to_num(0.0).clamp_min(0.0) + 1e-6)
        return Pooled(segment_reduce(x, segments, "mean", novelty.view(x.shape[:-1])), segments)

    def extra_repr(self) -> str:
        return f"threshold={self.rule.threshold}"


def _as_ratio(ratio: float) -> float:
    ratio = as_number("ratio", ratio)
    if not 1 < ratio < math.inf:
        raise ValueError(f"ratio must be more than 1 and finite, got {ratio}")
    return ratio


def _as_reduce(reduce: Reduce) -> Reduce:
    if reduce not in REDUCTIONS:
        raise ValueError(f"reduce must be one of {', '.join(REDUCTIONS)}, got {reduce!r}")
    return reduce


def _check_width(x: Tensor, width: int) -> None:
    check_float("x", x)
    if x.dim() not in (2, 3) or x.shape[-1] != width:
        raise ValueError(f"x must have shape [N, {width}] or [B, T, {width}], got {list(x.shape)}")


def _usable_rows(x: Tensor, runs: Runs) -> tuple[Tensor, Tensor]:
    """Return the rows ``[N, D]``, with zeros for excluded and non-finite rows, and a mask of the others, ``[N]`` bool.

    A mask after the product is not enough, since the gradient of a product with NaN is NaN even if the upstream
    gradient is 0.
    """
    rows = x.reshape(-1, x.shape[-1])
    usable = runs.inside & rows.detach().isfinite().all(-1)
    return torch.where(usable[:, None], rows, 0.0), usable


class LearnedCompressor(torch.nn.Module):
    """Base class of learned compressors, whose auxiliary loss keeps the ratio near a target.

    Attributes:
        ratio: Target ratio, in frames per token.
        loss_weight: Factor with which the caller should add ``loss`` to the training loss.
        loss: Auxiliary loss of the last call, a scalar; ``None`` before the first call.
    """

    def __init__(self, ratio: float, loss_weight: float) -> None:
        super().__init__()
        self.ratio: float = _as_ratio(ratio)
        self.loss_weight: float = as_number("loss_weight", loss_weight)
        self.loss: Tensor | None = None

    def _warn_without_gradient(self, x: Tensor) -> None:
        """Warn if the loss of a module in training cannot reach its parameters or its input."""
        if not self.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return
        if x.requires_grad or any(parameter.requires_grad for parameter in self.parameters()):
            warnings.warn(
                f"the loss of {type(self).__name__} has no gradient: it was computed under torch.no_grad in training "
                "mode, as reentrant checkpointing does; use checkpoint(..., use_reentrant=False)",
                RuntimeWarning,
                stacklevel=3,
            )

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without the loss, whose autograd graph can be neither copied nor pickled."""
        return {**self.__dict__, "loss": None}


class BipartiteMerge(torch.nn.Module):
    """Merge similar frames with [`fastcompress.bipartite_merge`][]. Has no parameters.

    A rate above 2 takes several rounds, each with the same rate; later rounds merge the tokens of earlier ones,
    weighted by their sizes.

    Args:
        rate: Frames per token to aim at, at least 1.
        window: See [`fastcompress.bipartite_merge`][].
    """

    def __init__(self, rate: float, window: int | None = 0) -> None:
        super().__init__()
        self.rate: float = as_number("rate", rate)
        if not 1 <= self.rate < math.inf:
            raise ValueError(f"rate must be at least 1 and finite, got {rate}")
        self.window: int | None = as_optional_whole("window", window, 0)
        self.rounds: int = max(1, math.ceil(math.log2(self.rate)))

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None, lengths: Tensor | None = None) -> Merged:
        """Compress a batch.

        Args:
            x: Frames, ``[N, D]`` packed, ``[B, T, D]`` padded or ``[B, j, D]`` nested (jagged).
            cu_seqlens: Offsets of packed input, ``[B + 1]``.
            lengths: Lengths of padded input, ``[B]``.
        """
        rate = self.rate ** (1 / self.rounds)
        merged = bipartite_merge(x, rate, window=self.window, cu_seqlens=cu_seqlens, lengths=lengths)
        for _ in range(self.rounds - 1):
            further = bipartite_merge(
                merged.values, rate, window=self.window, size=merged.sizes, cu_seqlens=merged.cu_seqlens
            )
            ids = follow_ids(merged.ids, further.ids)
            merged = Merged(further.values, further.cu_seqlens, further.sizes, ids)
        return merged

    def extra_repr(self) -> str:
        return f"rate={self.rate}, window={self.window}"


class IterativeFusion(torch.nn.Module):
    """Merge frames with [`fastcompress.iterative_fusion`][], without weights. Has no parameters.

    Args:
        count: Largest number of tokens per sequence, at least 1.
    """

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count: int = as_whole("count", count, 1)

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None, lengths: Tensor | None = None) -> Merged:
        """Compress a batch.

        Args:
            x: Frames, ``[N, D]`` packed, ``[B, T, D]`` padded or ``[B, j, D]`` nested (jagged).
            cu_seqlens: Offsets of packed input, ``[B + 1]``.
            lengths: Lengths of padded input, ``[B]``.
        """
        return iterative_fusion(x, self.count, cu_seqlens=cu_seqlens, lengths=lengths)

    def extra_repr(self) -> str:
        return f"count={self.count}"


class GreedySegments(torch.nn.Module):
    """Pool the segments of [`fastcompress.greedy_segments`][] into their means. Has no parameters.

    Args:
        threshold: See [`fastcompress.greedy_segments`][].
        max_len: Largest length of a segment in frames; ``None`` for no limit.
    """

    def __init__(self, threshold: float, max_len: int | None = None) -> None:
        super().__init__()
        self.threshold: float = as_number("threshold", threshold)
        self.max_len: int | None = as_optional_whole("max_len", max_len, 1)

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None, lengths: Tensor | None = None) -> Pooled:
        """Compress a batch.

        Args:
            x: Frames, ``[N, D]`` packed, ``[B, T, D]`` padded or ``[B, j, D]`` nested (jagged).
            cu_seqlens: Offsets of packed input, ``[B + 1]``.
            lengths: Lengths of padded input, ``[B]``.
        """
        segments = greedy_segments(x, self.threshold, max_len=self.max_len, cu_seqlens=cu_seqlens, lengths=lengths)
        return Pooled(segment_reduce(x, segments), segments)

    def extra_repr(self) -> str:
        return f"threshold={self.threshold}, max_len={self.max_len}"


class IntegrateAndFire(LearnedCompressor):
    """Compress with [`fastcompress.integrate_and_fire`][] and learned weights (CIF, arXiv 1905.11235).

    The weight of a frame is the sigmoid of a linear layer, initialized to ``1 / ratio`` for every frame. In training
    the weights of a sequence of ``T`` frames are scaled so that it fires ``ceil(T / ratio)`` tokens, and ``loss``
    trains their sum towards that number; the caller adds it to the training loss. In evaluation the weights are not
    scaled, and a short sequence may fire no token.

    Args:
        width: Width ``D`` of the frames.
        ratio: Frames per token to aim at; more than 1.
        tail: See [`fastcompress.integrate_and_fire`][]; used in evaluation.
        loss_weight: Factor for the caller to apply to ``loss``, which is [`fastcompress.quantity_loss`][] divided by
            the mean target number of tokens per sequence.
    """

    def __init__(self, width: int, ratio: float = 3.0, tail: float | None = 0.5, loss_weight: float = 0.1) -> None:
        super().__init__(ratio, loss_weight)
        self.tail: float | None = as_firing(1.0, tail)[1]
        self.weight: torch.nn.Linear = torch.nn.Linear(width, 1)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize the layer so that every frame has the weight ``1 / ratio``."""
        torch.nn.init.zeros_(self.weight.weight)
        torch.nn.init.constant_(self.weight.bias, -math.log(self.ratio - 1))

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None, lengths: Tensor | None = None) -> Fired:
        """Compress a batch.

        Args:
            x: Frames, ``[N, D]`` packed, ``[B, T, D]`` padded or ``[B, j, D]`` nested (jagged).
            cu_seqlens: Offsets of packed input, ``[B + 1]``; see [`fastcompress.segment_pool`][], also for errors.
            lengths: Lengths of padded input, ``[B]``.
        """
        x, cu_seqlens = unnest("x", x, cu_seqlens, lengths)
        _check_width(x, self.weight.in_features)
        check_layout(x, 2, cu_seqlens, lengths)
        # A frame that is not finite has weight 0, so that it affects its own token and no other.
        runs = find_checked_runs(x.shape[:-1], x.device, cu_seqlens, lengths)
        rows, usable = _usable_rows(x, runs)
        alpha = torch.where(usable, self.weight(rows)[..., 0].float().sigmoid(), 0.0).view(x.shape[:-1])
        frames = frame_offsets(x, x.dim() == 3, cu_seqlens, lengths).diff()
        wanted = (frames.double() / self.ratio).ceil().long()  # integers would divide in the default dtype
        fired = integrate_and_fire(
            x,
            alpha,
            cu_seqlens=cu_seqlens,
            lengths=lengths,
            tail=self.tail,
            target_lengths=wanted if self.training else None,
        )
        per_sequence = (wanted.double().sum() / torch.sym_max(1, wanted.shape[0])).clamp_min(1.0)
        self.loss: Tensor | None = (quantity_loss(fired, wanted) / per_sequence).float()
        self._warn_without_gradient(x)
        return fired

    def extra_repr(self) -> str:
        return f"ratio={self.ratio}, tail={self.tail}"


def straight_through(probability: Tensor) -> Tensor:
    """Straight-through estimator: 1 in the forward pass, the gradient of ``probability`` in the backward pass.

    Multiplying tokens by it leaves them unchanged and trains the boundary probabilities (H-Net: Hwang et al.,
    arXiv 2507.07955).

    Args:
        probability: Probabilities of any shape; fp32, fp16, bf16 or fp64.

    Returns:
        A tensor of the shape and dtype of ``probability``.
    """
    check_float("probability", probability)
    return probability + (1 - probability).detach()


def ratio_loss(probability: Tensor, boundary: Tensor, ratio: float) -> Tensor:
    """Compute the ratio loss of H-Net (arXiv 2507.07955), which is smallest if ``1 / R`` of the frames are boundaries.

    The loss is ``R / (R - 1) * ((R - 1) F G + (1 - F) (1 - G))``.

    Args:
        probability: Probability of a boundary at each frame, ``[N]`` floating point; ``G`` is its mean, which has the
            gradient.
        boundary: True where a frame is a boundary, ``[N]`` bool; ``F`` is its mean.
        ratio: ``R``, frames per token to aim at; more than 1.

    Returns:
        A scalar in the dtype of ``probability``, 0 if there is no frame.

    Raises:
        TypeError: If an argument has a wrong type or dtype.
        ValueError: If a shape or the ratio is invalid.
    """
    check_float("probability", probability)
    check_dense("boundary", boundary)
    if boundary.dtype != torch.bool:
        raise TypeError(f"boundary must be bool, got {boundary.dtype}")
    wrong = probability.dim() != 1 or boundary.dim() != 1
    # Tracing cannot compare two counts that depend on data.
    if wrong or not torch.compiler.is_compiling() and probability.shape != boundary.shape:
        shapes = f"{list(probability.shape)} and {list(boundary.shape)}"
        raise ValueError(f"probability and boundary must have the same shape [N], got {shapes}")
    ratio = _as_ratio(ratio)
    count: int = torch.sym_max(1, probability.shape[0])
    f, g = boundary.to(probability.dtype).sum() / count, probability.sum() / count
    loss = ratio / (ratio - 1) * ((ratio - 1) * f * g + (1 - f) * (1 - g))
    any_frame: int = torch.sym_min(1, probability.shape[0])  # 0 without frames, also if their number is symbolic
    return loss * any_frame


class LearnedBoundary(LearnedCompressor):
    """Pool segments whose boundaries are learned (the router of H-Net, arXiv 2507.07955).

    ``p[t] = (1 - cos(W_q x[t - 1], W_k x[t])) / 2`` is the probability that frame ``t`` starts a segment; it is 1 for
    the first frame of a sequence. Frame ``t`` starts a segment if ``p[t] > 1 / 2``. Each token is multiplied by
    [`straight_through`][] of the ``p`` of its first frame, which leaves the token unchanged and trains ``W_q`` and
    ``W_k``. Both are initialized to the identity. Add ``loss`` to the training loss: without it, training may end
    with no boundary at all or with one at every frame.

    Args:
        width: Width ``D`` of the frames.
        ratio: Frames per token to aim at; more than 1.
        reduce: Reduction of [`fastcompress.segment_reduce`][]; H-Net uses ``"first"``.
        loss_weight: Factor for the caller to apply to ``loss``, which is [`ratio_loss`][].
    """

    def __init__(self, width: int, ratio: float = 3.0, reduce: Reduce = "mean", loss_weight: float = 0.1) -> None:
        super().__init__(ratio, loss_weight)
        self.reduce: Reduce = _as_reduce(reduce)
        self.query: torch.nn.Linear = torch.nn.Linear(width, width, bias=False)
        self.key: torch.nn.Linear = torch.nn.Linear(width, width, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize both projections to the identity."""
        for projection in (self.query, self.key):
            torch.nn.init.eye_(projection.weight)

    def probability(self, x: Tensor) -> Tensor:
        """Return ``p`` of the frames of one sequence, ``[N, D]`` -> ``[N]`` fp32; 1 for the first frame."""
        cosine = torch.nn.functional.cosine_similarity(self.query(x[:-1]).float(), self.key(x[1:]).float(), dim=-1)
        first = cosine.new_ones(torch.sym_min(1, x.shape[0]))
        return torch.cat([first, (1 - cosine) / 2])

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None, lengths: Tensor | None = None) -> Pooled:
        """Compress a batch.

        Args:
            x: Frames, ``[N, D]`` packed, ``[B, T, D]`` padded or ``[B, j, D]`` nested (jagged).
            cu_seqlens: Offsets of packed input, ``[B + 1]``; see [`fastcompress.segment_pool`][], also for errors.
            lengths: Lengths of padded input, ``[B]``.
        """
        x, cu_seqlens = unnest("x", x, cu_seqlens, lengths)
        _check_width(x, self.query.in_features)
        check_not_batched("LearnedBoundary", x)
        check_layout(x, 2, cu_seqlens, lengths)
        runs = find_checked_runs(x.shape[:-1], x.device, cu_seqlens, lengths)
        rows, usable = _usable_rows(x, runs)
        probability = self.probability(rows)
        # A comparison with NaN is false: a pair with a non-finite frame gives no boundary and no gradient.
        pair = usable & torch.nn.functional.pad(usable, (1, 0))[:-1]
        probability = torch.where(runs.first, 1.0, torch.where(pair, probability, 0.5))
        boundary = probability.detach() > 0.5
        self.loss: Tensor | None = ratio_loss(probability[runs.inside], boundary[runs.inside], self.ratio)
        self._warn_without_gradient(x)
        mask = boundary.view(x.shape[:-1])
        segments = segments_from_mask(mask, cu_seqlens=cu_seqlens, lengths=lengths)
        values = segment_reduce(x, segments, self.reduce)
        return Pooled(values * straight_through(probability)[segments.starts, None].to(values.dtype), segments)

    def extra_repr(self) -> str:
        return f"ratio={self.ratio}, reduce={self.reduce}"

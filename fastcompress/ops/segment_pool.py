"""The fused op: find segments and pool them in one pass."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastcompress.checks import check_float, check_layout, check_layout_values, check_same_device, is_readable, unnest
from fastcompress.dispatch.call import Op, call
from fastcompress.ops.adjacent_distance import adjacent_distance
from fastcompress.ops.banded_distance import banded_distance
from fastcompress.ops.segment_reduce import Reduce, segment_reduce
from fastcompress.ops.select_boundaries import fake_segments, frame_offsets, num_sequences, select_boundaries
from fastcompress.rules import LabelChange, LocalMax, Lookback, MinVariance, Rule, as_rule
from fastcompress.segments import Pooled, Segments

_op: Op[tuple[Tensor, Tensor, Tensor, Tensor]] = torch.ops.fastcompress.segment_pool.default
_expand_op: Op[Tensor] = torch.ops.fastcompress.segment_expand.default


def segment_pool(
    x: Tensor,
    rule: Rule | str = LocalMax(),  # noqa: B008  (immutable)
    *,
    cu_seqlens: Tensor | None = None,
    lengths: Tensor | None = None,
    attention_mask: Tensor | None = None,
    row_group: Tensor | None = None,
    keys: Tensor | None = None,
    labels: Tensor | None = None,
    reduce: Reduce = "mean",
    weights: Tensor | None = None,
    compact: bool = True,
) -> Pooled:
    """Pool frames into segments of variable length.

    The result equals [`adjacent_distance`][], [`select_boundaries`][] and [`segment_reduce`][] in sequence, bit
    for bit. Mean pooling by ``Uniform``, ``Threshold``, or ``LocalMax`` without ``prominence`` and ``normalize`` runs
    in one pass over ``x``. Everything else, and ``keys`` of another dtype than ``x``, runs as these three ops.

    Args:
        x: Frames, ``[N, D]`` packed, ``[B, T, D]`` padded or ``[B, j, D]`` nested (jagged); fp32, fp16, bf16 or fp64.
            The other arguments of nested frames are packed or nested.
        rule: A rule or its text form, such as ``"local-max:order=2"``.
        cu_seqlens: Frames before each sequence of packed input, ``[B + 1]`` int32 or int64; ``None`` for one sequence.
        lengths: Frames of each sequence of padded input, ``[B]`` int32 or int64; ``None`` if there is no padding.
        attention_mask: Mask of padded input, ``[B, T]`` bool or numbers: 1 keeps a frame, 0 drops it. Other values
            raise an error; an additive mask becomes such a mask by ``mask >= 0``.
        row_group: Row groups, int32 ``[N]`` or ``[B, T]``. Negative: the frame is dropped; 0: it is a segment of its
            own; k > 0: the rule pools it with its neighbours of the same k.
        labels: Labels for ``LabelChange``, integer ``[N]`` or ``[B, T]``.
        keys: Features to compute the distances from instead of ``x``, ``[..., K]`` with the leading shape of ``x``.
        reduce: See [`segment_reduce`][].
        weights: See [`segment_reduce`][].
        compact: If true, size the result exactly, which reads the number of segments from the device. If false, return
            the upper bound of the rule; the trailing segments are empty and their values 0.

    Returns:
        The packed tokens and their segments; [`Pooled`][] makes them padded or nested. Gradients go to ``x`` and
        ``weights``; boundaries have no gradient.

    Raises:
        TypeError: If an argument has a wrong type or dtype.
        ValueError: If a shape, device or value is invalid; the message names it.

    Examples:
        >>> x = torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 2.0]])
        >>> pooled = segment_pool(x, "threshold:0.5")
        >>> pooled
        Pooled(2 tokens of 1 sequence, width 2, float32)
        >>> pooled.values
        tensor([[2., 0.],
                [0., 2.]])
        >>> pooled.segments.lengths
        tensor([2, 1])
    """
    rule = as_rule(rule)
    x, cu_seqlens = unnest("x", x, cu_seqlens, lengths)
    check_float("x", x)
    if x.dim() not in (2, 3):
        raise ValueError(f"x must have shape [N, D] or [B, T, D], got {list(x.shape)}")
    if keys is not None:
        keys, _ = unnest("keys", keys)
        check_float("keys", keys)
        check_same_device("keys", keys, x)
        if keys.dim() != x.dim() or keys.shape[:-1] != x.shape[:-1]:
            wanted = ", ".join(map(str, x.shape[:-1]))
            raise ValueError(f"keys must have shape [{wanted}, K], one row per row of x, got {list(keys.shape)}")
        keys = keys.detach()
    if weights is not None:
        weights, _ = unnest("weights", weights)
    if labels is not None:
        labels, _ = unnest("labels", labels)
        check_same_device("labels", labels, x)
        if labels.shape != x.shape[:-1]:
            raise ValueError(f"labels must have shape {list(x.shape[:-1])}, one per row, got {list(labels.shape)}")
    fused = rule.fused and reduce == "mean" and weights is None and (keys is None or keys.dtype == x.dtype)
    if not fused:
        # Uniform and LabelChange need no distances; Uniform still reads their shape.
        scored = x if keys is None else keys
        with torch.no_grad():
            d: Tensor | None = None
            if isinstance(rule, (Lookback, MinVariance)):
                if is_readable(x):  # no frame is further away, and no segment longer
                    if isinstance(rule, Lookback):
                        rule = replace(rule, window=min(rule.window, max(1, x.shape[-2])))
                    else:
                        rule = replace(rule, max_len=min(rule.max_len, max(x.shape[-2], math.ceil(rule.rate))))
                d = banded_distance(scored, rule.window, cu_seqlens=cu_seqlens, lengths=lengths)
            elif rule.needs_distance:
                d = adjacent_distance(scored, cu_seqlens=cu_seqlens, lengths=lengths)
            elif not isinstance(rule, LabelChange):
                d = torch.zeros(x.shape[:-1], dtype=torch.float32, device=x.device)
        segments = select_boundaries(
            d,
            rule,
            labels=labels,
            cu_seqlens=cu_seqlens,
            lengths=lengths,
            attention_mask=attention_mask,
            row_group=row_group,
            compact=compact,
        )
        return Pooled(segment_reduce(x, segments, reduce, weights), segments)
    row_group = check_layout(x, 2, cu_seqlens, lengths, attention_mask, row_group)
    offsets = frame_offsets(x, x.dim() == 3, cu_seqlens, lengths)
    values, starts, segment_lengths, cu_segments = call(
        _op,
        (x, keys, cu_seqlens, lengths, row_group, *rule.op_args(), compact),
        torch.is_grad_enabled() and x.requires_grad,
        lambda: check_layout_values(x.shape, cu_seqlens, lengths),
    )
    if x.dim() == 3:
        return Pooled(
            values,
            Segments(starts, segment_lengths, cu_segments, offsets, x.shape[0] * x.shape[1], x.shape[1]),
        )
    return Pooled(values, Segments(starts, segment_lengths, cu_segments, offsets, x.shape[0]))


@torch.library.register_fake("fastcompress::segment_pool")
def _(
    x: Tensor,
    keys: Tensor | None,
    cu_seqlens: Tensor | None,
    lengths: Tensor | None,
    row_group: Tensor | None,
    rule: str,
    size: int,
    threshold: float,
    prominence: float,
    min_len: int,
    max_len: int,
    keep_tail: bool,
    compact: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = x.shape[0] * x.shape[1] if x.dim() == 3 else x.shape[0]
    sequences = num_sequences(x.shape, x.dim() == 3, cu_seqlens)
    segments = fake_segments(x, rows, sequences, row_group is not None, rule, size, min_len, max_len, compact)
    return x.new_empty((segments[0].shape[0], x.shape[-1])), *segments


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.shape = inputs[0].shape
    _, starts, segment_lengths, cu_segments = output
    ctx.mark_non_differentiable(starts, segment_lengths, cu_segments)
    ctx.save_for_backward(starts, segment_lengths)


def _backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    starts, segment_lengths = ctx.saved_tensors
    rows = ctx.shape[0] * ctx.shape[1] if len(ctx.shape) == 3 else ctx.shape[0]
    grad_x = _expand_op(grad, starts, segment_lengths, rows, "mean").reshape(ctx.shape)
    return grad_x, *(None,) * 12


torch.library.register_autograd("fastcompress::segment_pool", _backward, setup_context=_setup_context)

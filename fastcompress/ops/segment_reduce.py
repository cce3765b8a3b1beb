"""Reductions over segments, and ``segment_expand``, the adjoint of their sum."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from fastcompress.checks import as_integer, check_float, check_segment_values, check_values_of_rows, unnest
from fastcompress.dispatch.call import Op, call, differentiable_once
from fastcompress.segments import Segments, check_segments

_ops = torch.ops.fastcompress
_reduce_op: Op[Tensor] = _ops.segment_reduce.default
_max_backward_op: Op[Tensor] = _ops.segment_max_backward.default
_weighted_op: Op[Tensor] = _ops.segment_weighted_mean.default
_weighted_backward_op: Op[tuple[Tensor, Tensor]] = _ops.segment_weighted_mean_backward.default
_expand_op: Op[Tensor] = _ops.segment_expand.default

Reduce = Literal["mean", "sum", "max", "first", "last", "middle"]
REDUCTIONS: tuple[str, ...] = get_args(Reduce)


def segment_reduce(x: Tensor, segments: Segments, reduce: Reduce = "mean", weights: Tensor | None = None) -> Tensor:
    """Reduce each segment to one row.

    Sums are computed in fp32 (fp64 for fp64 input) in a fixed order and rounded once, so the result has the same bits
    on every backend and with any number of threads. An empty segment gives 0.

    Args:
        x: Rows that were segmented, ``[N, D]``, ``[B, T, D]`` or jagged nested ``[B, j, D]``; fp32, fp16, bf16 or fp64.
        segments: Segments of these rows.
        reduce: ``"mean"``, ``"sum"``, ``"max"`` (NaN if any frame is NaN), or one frame of the segment: ``"first"``,
            ``"last"`` or ``"middle"`` (the earlier of the two middle frames).
        weights: Weights of a weighted mean, floating point, one per row, with the leading shape of ``x``; only with
            ``"mean"``. They are normalized in each segment, in fp32 (fp64 with fp64 ``x``). A segment whose weights sum
            to 0 gives 0.

    Returns:
        Reduced rows, ``[M, D]`` in the dtype of ``x``. Gradients go to ``x`` and ``weights``. ``"max"`` and a weighted
        mean have first-order gradients only; the others have gradients of any order.

    Raises:
        TypeError: If an argument has a wrong type or dtype.
        ValueError: If a shape, device or value is invalid; the message names it.
    """
    x, _ = unnest("x", x)
    check_float("x", x)
    if x.dim() not in (2, 3):
        raise ValueError(f"x must have shape [N, D] or [B, T, D], got {list(x.shape)}")
    rows = x.flatten(0, 1) if x.dim() == 3 else x
    check_segments(segments, rows)
    if segments.num_rows != rows.shape[0]:
        raise ValueError(f"segments must have the rows of x, {rows.shape[0]}, got segments of {segments.num_rows} rows")
    if not isinstance(reduce, str) or reduce not in REDUCTIONS:
        raise ValueError(f"reduce must be one of {', '.join(REDUCTIONS)}, got {reduce!r}")
    starts, lengths = segments.starts, segments.lengths
    args: tuple[Any, ...]
    if weights is None:
        op, args = _reduce_op, (rows, starts, lengths, reduce)
        needs_grad = torch.is_grad_enabled() and rows.requires_grad
    else:
        if reduce != "mean":
            raise ValueError(f"weights need reduce='mean', got reduce={reduce!r}")
        weights, _ = unnest("weights", weights)
        check_values_of_rows("weights", weights, x)
        weights = weights.reshape(-1).to(torch.float64 if x.dtype == torch.float64 else torch.float32)
        op, args = _weighted_op, (rows, weights, starts, lengths)
        needs_grad = torch.is_grad_enabled() and (rows.requires_grad or weights.requires_grad)
    return call(op, args, needs_grad, lambda: check_segment_values(starts, lengths, rows.shape[0]))


def segment_expand(y: Tensor, segments: Segments) -> Tensor:
    """Repeat the row of each segment for all its frames: the adjoint of the segment sum.

    Args:
        y: One row per segment, ``[M, D]``; fp32, fp16, bf16 or fp64.
        segments: ``M`` segments of ``N`` rows.

    Returns:
        Rows, ``[N, D]`` in the dtype of ``y``; 0 for rows in no segment. ``y`` gets gradients of any order.

    Raises:
        TypeError: If an argument has a wrong type or dtype.
        ValueError: If a shape, device or value is invalid; the message names it.
    """
    check_float("y", y)
    check_segments(segments, y)
    starts, lengths, num_rows = segments.starts, segments.lengths, as_integer("num_rows", segments.num_rows)
    if y.dim() != 2 or y.shape[0] != starts.shape[0]:
        raise ValueError(f"y must have shape [{starts.shape[0]}, D], one row per segment, got {list(y.shape)}")
    return call(
        _expand_op,
        (y, starts, lengths, num_rows, "sum"),
        torch.is_grad_enabled() and y.requires_grad,
        lambda: check_segment_values(starts, lengths, num_rows),
    )


@torch.library.register_fake("fastcompress::segment_reduce")
def _(x: Tensor, starts: Tensor, lengths: Tensor, reduce: str) -> Tensor:
    return x.new_empty((starts.shape[0], x.shape[1]))


@torch.library.register_fake("fastcompress::segment_max_backward")
def _(grad: Tensor, x: Tensor, y: Tensor, starts: Tensor, lengths: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake("fastcompress::segment_weighted_mean")
def _(x: Tensor, weights: Tensor, starts: Tensor, lengths: Tensor) -> Tensor:
    return x.new_empty((starts.shape[0], x.shape[1]))


@torch.library.register_fake("fastcompress::segment_weighted_mean_backward")
def _(grad: Tensor, x: Tensor, y: Tensor, weights: Tensor, starts: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weights.new_empty(weights.shape)


@torch.library.register_fake("fastcompress::segment_expand")
def _(y: Tensor, starts: Tensor, lengths: Tensor, num_rows: int, reduce: str) -> Tensor:
    return y.new_empty((num_rows, y.shape[1]))


def _setup_reduce(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, starts, lengths, ctx.reduce = inputs
    ctx.num_rows = x.shape[0]
    saved = (x, output) if ctx.reduce == "max" else ()
    ctx.save_for_backward(starts, lengths, *saved)


def _reduce_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    starts, lengths, *saved = ctx.saved_tensors
    if ctx.reduce == "max":
        return _max_backward_op(grad, *saved, starts, lengths), None, None, None
    return _expand_op(grad, starts, lengths, ctx.num_rows, ctx.reduce), None, None, None


def _setup_weighted(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weights, starts, lengths = inputs
    ctx.save_for_backward(x, output, weights, starts, lengths)


def _weighted_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    grad_x, grad_weights = _weighted_backward_op(grad, *ctx.saved_tensors)
    return grad_x, grad_weights, None, None


def _setup_expand(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, starts, lengths, _, ctx.reduce = inputs
    ctx.save_for_backward(starts, lengths)


def _expand_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return _reduce_op(grad, *ctx.saved_tensors, ctx.reduce), None, None, None, None


torch.library.register_autograd("fastcompress::segment_reduce", _reduce_backward, setup_context=_setup_reduce)
torch.library.register_autograd(
    "fastcompress::segment_weighted_mean", _weighted_backward, setup_context=_setup_weighted
)
torch.library.register_autograd("fastcompress::segment_expand", _expand_backward, setup_context=_setup_expand)
differentiable_once("segment_max_backward")
differentiable_once("segment_weighted_mean_backward")

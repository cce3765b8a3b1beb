"""Cosine distance between frames ``lag`` apart."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastcompress.checks import check_float, check_layout, check_layout_values
from fastcompress.dispatch.call import Op, call, differentiable_once

_op: Op[Tensor] = torch.ops.fastcompress.adjacent_distance.default
_backward_op: Op[Tensor] = torch.ops.fastcompress.adjacent_distance_backward.default


def adjacent_distance(
    x: Tensor, *, cu_seqlens: Tensor | None = None, lengths: Tensor | None = None, lag: int = 1
) -> Tensor:
    """Cosine distance between each frame and the one ``lag`` frames later.

    ``d[t] = 1 - x[t] . x[t + lag] / (max(|x[t]|, eps) max(|x[t + lag]|, eps))`` with ``eps = 1e-8``, never computed in
    a half type. Two zero rows are alike, ``d = 0``; a zero row beside another has ``d = 1``. A non-finite frame, and
    the last ``lag`` frames of a sequence, which have no partner, have NaN.

    Args:
        x: ``[N, D]`` packed or ``[B, T, D]`` padded; fp32, fp16, bf16 or fp64.
        cu_seqlens: ``[B + 1]`` int32 or int64, with packed input; ``None``: one sequence.
        lengths: ``[B]`` int32 or int64, with padded input; ``None``: every frame counts.
        lag: frames between the two, at least 1.

    Returns:
        ``[N]`` or ``[B, T]``, fp32 (fp64 for fp64). Differentiable once; gradients of frames without a
        partner are not used.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a shape, device or value that does not fit, named in the message.
    """
    check_float("x", x)
    check_layout(x, 2, cu_seqlens, lengths)
    if isinstance(lag, bool) or not isinstance(lag, (int, torch.SymInt)):
        raise TypeError(f"lag must be an integer, got {lag!r}")
    if lag < 1:
        raise ValueError(f"lag must be at least 1, got {lag}")
    needs_grad = torch.is_grad_enabled() and x.requires_grad
    return call(
        _op, (x, cu_seqlens, lengths, lag), needs_grad, lambda: check_layout_values(x.shape, cu_seqlens, lengths)
    )


@torch.library.register_fake("fastcompress::adjacent_distance")
def _(x: Tensor, cu_seqlens: Tensor | None, lengths: Tensor | None, lag: int) -> Tensor:
    return x.new_empty(x.shape[:-1], dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)


@torch.library.register_fake("fastcompress::adjacent_distance_backward")
def _(grad: Tensor, x: Tensor, cu_seqlens: Tensor | None, lengths: Tensor | None, lag: int) -> Tensor:
    return x.new_empty(x.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, cu_seqlens, lengths, ctx.lag = inputs
    ctx.save_for_backward(x, cu_seqlens, lengths)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, cu_seqlens, lengths = ctx.saved_tensors
    return _backward_op(grad, x, cu_seqlens, lengths, ctx.lag), None, None, None


torch.library.register_autograd("fastcompress::adjacent_distance", _backward, setup_context=_setup_context)
differentiable_once("adjacent_distance_backward")

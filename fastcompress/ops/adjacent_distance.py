"""Cosine distance between frames that are ``lag`` apart."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastcompress.checks import as_integer, check_float, check_layout, check_layout_values, unnest
from fastcompress.dispatch.call import Op, call, differentiable_once

_op: Op[Tensor] = torch.ops.fastcompress.adjacent_distance.default
_backward_op: Op[Tensor] = torch.ops.fastcompress.adjacent_distance_backward.default


def adjacent_distance(
    x: Tensor, *, cu_seqlens: Tensor | None = None, lengths: Tensor | None = None, lag: int = 1
) -> Tensor:
    """Compute the cosine distance between each frame and the frame ``lag`` frames later.

    ``d[t] = 1 - x[t] . x[t + lag] / (max(|x[t]|, eps) max(|x[t + lag]|, eps))`` with ``eps = 1e-8``, computed in fp32
    (fp64 for fp64 input). The distance of two zero frames is 0, that of a zero frame and a nonzero frame is 1. It is
    NaN if a frame is not finite, and for the last ``lag`` frames of a sequence, which have no partner.

    Args:
        x: Frames, ``[N, D]`` packed, ``[B, T, D]`` padded or ``[B, j, D]`` nested (jagged); fp32, fp16, bf16 or fp64.
        cu_seqlens: Frames before each sequence of packed input, ``[B + 1]`` int32 or int64; ``None`` for one sequence.
        lengths: Frames of each sequence of padded input, ``[B]`` int32 or int64; ``None`` if there is no padding.
        lag: Offset of the partner in frames, at least 1.

    Returns:
        Distances, ``[N]`` or ``[B, T]``, fp32 (fp64 for fp64 input); packed if ``x`` is nested. They have first-order
        gradients; the incoming gradient of a frame without a partner is ignored.

    Raises:
        TypeError: If an argument has a wrong type or dtype.
        ValueError: If a shape, device or value is invalid; the message names it.

    Examples:
        >>> adjacent_distance(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 2.0]]))
        tensor([1., 0., nan])
    """
    x, cu_seqlens = unnest("x", x, cu_seqlens, lengths)
    check_float("x", x)
    check_layout(x, 2, cu_seqlens, lengths)
    lag = as_integer("lag", lag)
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
    # Copies, because the caller may change its offsets before the backward pass.
    ctx.save_for_backward(x, *(None if t is None else t.clone() for t in (cu_seqlens, lengths)))


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, cu_seqlens, lengths = ctx.saved_tensors
    return _backward_op(grad, x, cu_seqlens, lengths, ctx.lag), None, None, None


torch.library.register_autograd("fastcompress::adjacent_distance", _backward, setup_context=_setup_context)
differentiable_once("adjacent_distance_backward")

"""Cosine distances between each frame and several later frames."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcompress.checks import as_whole, check_float, check_layout, check_layout_values, unnest
from fastcompress.dispatch.call import Op, call

_op: Op[Tensor] = torch.ops.fastcompress.banded_distance.default


def banded_distance(
    x: Tensor, window: int, *, cu_seqlens: Tensor | None = None, lengths: Tensor | None = None
) -> Tensor:
    """Compute the cosine distances between each frame and the frames 1 to ``window`` frames later.

    Column ``lag - 1`` equals ``adjacent_distance(x, lag=lag)``, bit for bit; all columns take one pass
    over ``x``. The distances are not differentiable.

    Args:
        x: Frames, ``[N, D]`` packed, ``[B, T, D]`` padded or ``[B, j, D]`` nested (jagged); fp32, fp16, bf16 or fp64.
        window: Number of later frames, at least 1.
        cu_seqlens: See [`fastcompress.adjacent_distance`][].
        lengths: See [`fastcompress.adjacent_distance`][].

    Returns:
        Distances, ``[N, window]`` or ``[B, T, window]``, fp32 (fp64 for fp64 input); NaN without a partner.

    Raises:
        TypeError: If an argument has a wrong type or dtype.
        ValueError: If a shape, device or value is invalid; the message names it.

    Examples:
        >>> banded_distance(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 2.0]]), 2)
        tensor([[1., 1.],
                [0., nan],
                [nan, nan]])
    """
    x, cu_seqlens = unnest("x", x, cu_seqlens, lengths)
    check_float("x", x)
    check_layout(x, 2, cu_seqlens, lengths)
    window = as_whole("window", window, 1)
    x = x.detach()
    return call(_op, (x, cu_seqlens, lengths, window), False, lambda: check_layout_values(x.shape, cu_seqlens, lengths))


@torch.library.register_fake("fastcompress::banded_distance")
def _(x: Tensor, cu_seqlens: Tensor | None, lengths: Tensor | None, window: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], window), dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)

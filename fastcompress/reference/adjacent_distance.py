"""Definition of the distance between frames, and of the dot product that every backend reproduces bit for bit."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastcompress.checks import check_layout_values

#: Number of partial sums of the canonical dot product. Changing it changes results; see docs/numerics.md.
LANES = 32
#: Lower limit of a norm that is used as a divisor.
EPS = 1e-8


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the accumulation dtype: fp64 for fp64, fp32 for every other floating dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def canonical_dot(a: Tensor, b: Tensor) -> Tensor:
    """Compute the dot product of rows, ``[..., D]`` -> ``[...]`` fp64, in the order that all backends share.

    Partial sum ``j`` adds the elements ``i = j (mod LANES)`` in increasing ``i``; each product and each sum is rounded
    to fp32 (fp64 for fp64 input). The partial sums are then added pairwise in fp64: ``j`` and ``j + LANES / 2``, then
    ``j`` and ``j + LANES / 4``, and so on.
    """
    dtype = accumulate_dtype(a.dtype)
    missing = -a.shape[-1] % LANES
    a = F.pad(a.to(dtype), (0, missing)).unflatten(-1, (-1, LANES))
    b = F.pad(b.to(dtype), (0, missing)).unflatten(-1, (-1, LANES))
    sums = a.new_zeros(*a.shape[:-2], LANES)
    for step in range(a.shape[-2]):
        sums = sums + a[..., step, :] * b[..., step, :]
    sums = sums.double()
    while sums.shape[-1] > 1:
        half = sums.shape[-1] // 2
        sums = sums[..., :half] + sums[..., half:]
    return sums[..., 0]


def norm(square: Tensor) -> Tensor:
    """Return ``max(sqrt(square), EPS)`` in fp64.

    ``math.sqrt`` rounds correctly; ``torch.sqrt`` does not if MKL computes it.
    """
    roots = [math.sqrt(value) for value in square.reshape(-1).tolist()]
    return torch.tensor(roots, dtype=torch.float64, device=square.device).reshape(square.shape).clamp_min(EPS)


def cosine_distance(a: Tensor, b: Tensor) -> Tensor:
    """Compute ``1 - cos`` of rows, ``[..., D]`` -> ``[...]`` in the accumulation dtype.

    The distance of two rows with a squared norm of zero is 0; that of one such row and another row is 1. A row that is
    not finite gives NaN. A row whose square overflows gives NaN if the product with the other row overflows too, else
    1.
    """
    square_a, square_b = canonical_dot(a, a), canonical_dot(b, b)
    d = 1 - canonical_dot(a, b) / (norm(square_a) * norm(square_b))
    d = torch.where((square_a == 0) & (square_b == 0), 0, d)
    return d.to(accumulate_dtype(a.dtype))


def pair_mask(x: Tensor, cu_seqlens: Tensor | None, lengths: Tensor | None, lag: int) -> Tensor:
    """Return whether rows ``t`` and ``t + lag`` are frames of the same sequence, bool of shape ``x.shape[:-1]``."""
    if x.dim() == 3:
        row = torch.arange(x.shape[1], dtype=torch.int64, device=x.device)
        if lengths is None:
            return (row + lag < x.shape[1]).expand(x.shape[:2])
        return row + lag < lengths[:, None]
    row = torch.arange(x.shape[0], dtype=torch.int64, device=x.device)
    if cu_seqlens is None:
        return row + lag < x.shape[0]
    ends = cu_seqlens[1:].long()
    end = torch.cat([ends, ends.new_full((1,), x.shape[0])])[torch.searchsorted(ends, row, right=True)]
    return row + lag < end


def adjacent_distance(x: Tensor, cu_seqlens: Tensor | None, lengths: Tensor | None, lag: int) -> Tensor:
    """Compute the distance of each row to the row ``lag`` rows later, ``[..., D]`` -> ``[...]``; NaN without one."""
    check_layout_values(x.shape, cu_seqlens, lengths)
    lag = min(lag, x.shape[-2])  # no pair is further apart, and row + lag must not overflow
    valid = pair_mask(x, cu_seqlens, lengths, lag)
    other = x.roll(-lag, dims=-2)  # rows that wrap around are masked by `valid`
    d = cosine_distance(x, other) if x.shape[-2] else x.new_zeros(x.shape[:-1], dtype=accumulate_dtype(x.dtype))
    return torch.where(valid, d, torch.nan)


def adjacent_distance_backward(
    grad: Tensor, x: Tensor, cu_seqlens: Tensor | None, lengths: Tensor | None, lag: int
) -> Tensor:
    """Compute the gradient of ``x`` from that of the distances; each row belongs to two pairs, as first and as second.

    With ``u = x / |x|``, the gradient of ``d = 1 - u . v`` with respect to ``x`` is ``((u . v) u - v) / |x|``. A norm
    below ``EPS`` is the constant ``EPS``, and the gradient is ``-v / EPS``. Pairs of two zero rows, and rows without a
    partner, get 0.
    """
    dtype, grad_dtype = accumulate_dtype(x.dtype), x.dtype
    lag = min(lag, x.shape[-2])
    valid = pair_mask(x, cu_seqlens, lengths, lag)
    a, b = x, x.roll(-lag, dims=-2)
    square_a, square_b = canonical_dot(a, a), canonical_dot(b, b)
    valid = valid & ~((square_a == 0) & (square_b == 0))
    norm_a, norm_b = norm(square_a), norm(square_b)
    cosine = canonical_dot(a, b) / (norm_a * norm_b)
    scale = torch.where(valid, grad.double(), 0)

    def own(length: Tensor) -> Tensor:
        return torch.where(valid & (length > EPS), cosine / length.square() * scale, 0)

    # The order of the sum is part of the definition: the row itself (from both pairs), the following row, the previous.
    factor = (own(norm_a) + own(norm_b).roll(lag, dims=-1)).to(dtype)[..., None]
    cross = (-scale / (norm_a * norm_b)).to(dtype)[..., None]
    next_valid, previous_valid = valid[..., None], valid.roll(lag, dims=-1)[..., None]
    x = x.to(dtype)
    out = torch.where(next_valid | previous_valid, factor * x, 0)
    out = torch.where(next_valid, out + cross * x.roll(-lag, dims=-2), out)
    out = torch.where(previous_valid, out + cross.roll(lag, dims=-2) * x.roll(lag, dims=-2), out)
    return out.to(grad_dtype).contiguous()

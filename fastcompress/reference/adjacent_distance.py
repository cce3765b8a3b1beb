"""Definition of the distance between frames, and of the dot product that every backend repeats to the bit."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastcompress.checks import check_layout_values

#: Partial sums of the canonical dot product; chosen and frozen, see docs/numerics.md.
LANES = 32
#: Smallest norm that divides.
EPS = 1e-8


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 for fp64, fp32 for every other floating type."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def canonical_dot(a: Tensor, b: Tensor) -> Tensor:
    """Dot product of rows, ``[..., D]`` -> ``[...]`` fp64, in the one order that all backends share.

    Partial sum ``j`` takes the elements ``i = j (mod LANES)`` in increasing ``i``, product and sum rounded separately
    to fp32 (fp64 for fp64). The partial sums are then added in fp64, halving: ``j`` and ``j + LANES / 2``, and so on.
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
    """``max(sqrt(square), EPS)``; the root correctly rounded, which ``torch.sqrt`` is not where MKL computes it."""
    roots = [math.sqrt(value) for value in square.reshape(-1).tolist()]
    return torch.tensor(roots, dtype=torch.float64, device=square.device).reshape(square.shape).clamp_min(EPS)


def cosine_distance(a: Tensor, b: Tensor) -> Tensor:
    """``1 - cos`` of rows, ``[..., D]`` -> ``[...]`` in the accumulation dtype.

    Two rows whose squared norms are both zero are alike, 0; one such row beside another is at distance 1. Rows that are
    not finite give NaN; a row whose square overflows does too, or 1 beside one with which its product does not.
    """
    square_a, square_b = canonical_dot(a, a), canonical_dot(b, b)
    d = 1 - canonical_dot(a, b) / (norm(square_a) * norm(square_b))
    d = torch.where((square_a == 0) & (square_b == 0), 0, d)
    return d.to(accumulate_dtype(a.dtype))


def pair_mask(x: Tensor, cu_seqlens: Tensor | None, lengths: Tensor | None, lag: int) -> Tensor:
    """``x.shape[:-1]`` bool: whether row t and row t + lag are both frames of one sequence."""
    if x.dim() == 3:
        row = torch.arange(x.shape[1], device=x.device)
        if lengths is None:
            return (row + lag < x.shape[1]).expand(x.shape[:2])
        return row + lag < lengths[:, None]
    row = torch.arange(x.shape[0], device=x.device)
    if cu_seqlens is None:
        return row + lag < x.shape[0]
    ends = cu_seqlens[1:].long()
    end = torch.cat([ends, ends.new_full((1,), x.shape[0])])[torch.searchsorted(ends, row, right=True)]
    return row + lag < end


def adjacent_distance(x: Tensor, cu_seqlens: Tensor | None, lengths: Tensor | None, lag: int) -> Tensor:
    check_layout_values(x.shape, cu_seqlens, lengths)
    lag = min(lag, x.shape[-2])  # no pair is further apart, and sums with the lag must not overflow
    valid = pair_mask(x, cu_seqlens, lengths, lag)
    other = x.roll(-lag, dims=-2)  # what wraps around is not valid
    d = cosine_distance(x, other) if x.shape[-2] else x.new_zeros(x.shape[:-1], dtype=accumulate_dtype(x.dtype))
    return torch.where(valid, d, torch.nan)


def adjacent_distance_backward(
    grad: Tensor, x: Tensor, cu_seqlens: Tensor | None, lengths: Tensor | None, lag: int
) -> Tensor:
    """Gradient of ``x``: each row takes part in the pair that it starts and in the pair that it ends.

    With ``u = x / |x|``, the gradient of ``d = 1 - u . v`` by ``x`` is ``((u . v) u - v) / |x|``; below ``EPS`` the
    norm is the constant ``EPS`` and only ``-v / EPS`` remains. Pairs of two zero rows and pairs beyond a sequence
    get 0.
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

    # Row t: its share of the pair it starts and of the pair it ends, then its partner behind, then the one before.
    factor = (own(norm_a) + own(norm_b).roll(lag, dims=-1)).to(dtype)[..., None]
    cross = (-scale / (norm_a * norm_b)).to(dtype)[..., None]
    next_valid, previous_valid = valid[..., None], valid.roll(lag, dims=-1)[..., None]
    x = x.to(dtype)
    out = torch.where(next_valid | previous_valid, factor * x, 0)
    out = torch.where(next_valid, out + cross * x.roll(-lag, dims=-2), out)
    out = torch.where(previous_valid, out + cross.roll(lag, dims=-2) * x.roll(lag, dims=-2), out)
    return out.to(grad_dtype).contiguous()

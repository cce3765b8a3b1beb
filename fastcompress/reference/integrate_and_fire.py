"""Definition of continuous integrate-and-fire: frame after frame of one sequence, a token fired once enough is there.

Differentiable by autograd, which makes it the definition of the gradients as well. Below it the sums that its ops take,
whose order is that of a segment (reduce.py): a token begins with the row in which the last one fired, or with the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastcompress.checks import check_token_values
from fastcompress.reference.adjacent_distance import accumulate_dtype, canonical_dot
from fastcompress.reference.segment_reduce import positions, sum_in_order


def integrate_and_fire(
    x: Tensor, alpha: Tensor, beta: float, target: int | None, tail: float | None
) -> tuple[list[Tensor], list[int]]:
    """Tokens ``[D]`` of a sequence, and the frame in which each fired.

    Args:
        x: ``[T, D]``; fp64.
        alpha: ``[T]``, not negative; fp64.
        beta, target, tail: of :func:`fastcompress.integrate_and_fire`.
    """
    if target is not None:
        total = alpha.sum()
        if total == 0:
            return [], []
        alpha = alpha * (target * beta / total)
    tokens: list[Tensor] = []
    ends: list[int] = []
    filled, token = alpha.new_zeros(()), torch.zeros_like(x[:1]).sum(0)
    for t, weight in enumerate(alpha):
        left = weight
        # What is short of a token by rounding is none: the last of `target` fires at the end whatever it is short of.
        while filled + left >= beta and (target is None or len(tokens) < target):
            part = beta - filled
            tokens.append(token + part * x[t])
            ends.append(t)
            left = left - part
            filled, token = alpha.new_zeros(()), torch.zeros_like(token)
        filled, token = filled + left, token + left * x[t]
    if target is not None:
        if len(tokens) < target:
            tokens.append(token)
            ends.append(len(x) - 1)
    elif tail is not None and filled > 0 and filled >= tail * beta:
        tokens.append(token * (beta / filled))
        ends.append(len(x) - 1)
    return tokens, ends


def integrate_rows(
    x: Tensor, weights: Tensor, first: Tensor, divisors: Tensor | None, starts: Tensor, lengths: Tensor
) -> Tensor:
    """``first[m] x[start]`` and ``weights[t] x[t]`` for the rows of the token behind it, over ``divisors[m]``."""
    check_token_values(starts, lengths, x.shape[0])
    wide = x.to(accumulate_dtype(x.dtype))

    def row(p: int, active: Tensor, index: Tensor) -> Tensor:
        return wide[index] * (first[active] if p == 0 else weights[index])[:, None]

    total = sum_in_order(row, starts, lengths, wide[:0])
    return (total if divisors is None else total / divisors[:, None]).to(x.dtype)


def integrate_rows_backward(
    grad: Tensor, x: Tensor, weights: Tensor, first: Tensor, starts: Tensor, lengths: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Of ``x``, ``weights`` and ``first``. A row's tokens are added in order; rows in none, and weights of first rows,
    get 0."""
    check_token_values(starts, lengths, x.shape[0])
    dtype = accumulate_dtype(x.dtype)
    wide = grad.to(dtype)
    grad_x = torch.zeros(x.shape, dtype=dtype, device=x.device)
    grad_weights, grad_first = torch.zeros_like(weights), torch.zeros_like(first)
    reached = torch.zeros(x.shape[0], dtype=torch.bool, device=x.device)
    for p, active, index in positions(starts, lengths):
        if p == 0:
            grad_first[active] = canonical_dot(grad[active], x[index]).to(dtype)
        else:
            grad_x[index] = weights[index][:, None] * wide[active]
            grad_weights[index] = canonical_dot(grad[active], x[index]).to(dtype)
            reached[index] = True
    for m, start in enumerate(starts.tolist()):
        term = first[m] * wide[m]
        grad_x[start] = grad_x[start] + term if reached[start] else term
        reached[start] = True
    return grad_x.to(x.dtype), grad_weights, grad_first

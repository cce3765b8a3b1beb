"""Definition of continuous integrate-and-fire, one frame of one sequence at a time, and of the ops that compute it.

``integrate_and_fire`` is differentiated by autograd, so it also defines the gradients. The ops below it add the rows of
a token in the order of ``segment_reduce``. The first row of a token is the row in which the previous token fired.
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
    """Return the tokens of one sequence, each ``[D]``, and the frame in which each fired.

    Args:
        x: Frames, ``[T, D]`` fp64.
        alpha: Weights, ``[T]`` fp64, not negative.
        beta: Weight per token.
        target: Number of tokens to scale the weights to, or ``None``.
        tail: Share of ``beta`` from which the remaining weight fires, or ``None``; see
            ``fastcompress.integrate_and_fire``.
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
        # Rounding must not fire more than `target` tokens; if it fires one too few, the last one fires after the loop.
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
    """Sum ``first[m] x[start]`` and ``weights[t] x[t]`` of the following rows of a token; divide by ``divisors[m]``."""
    check_token_values(starts, lengths, x.shape[0])
    wide = x.to(accumulate_dtype(x.dtype))

    def row(p: int, active: Tensor, index: Tensor) -> Tensor:
        return wide[index] * (first[active] if p == 0 else weights[index])[:, None]

    total = sum_in_order(row, starts, lengths, wide[:0])
    return (total if divisors is None else total / divisors[:, None]).to(x.dtype)


def integrate_rows_backward(
    grad: Tensor, x: Tensor, weights: Tensor, first: Tensor, starts: Tensor, lengths: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of ``x``, ``weights`` and ``first``.

    The tokens that contain a row are added in order. Rows in no token, and the ``weights`` of first rows, get 0.
    """
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

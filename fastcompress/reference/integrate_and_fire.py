"""Definition of continuous integrate-and-fire: frame after frame of one sequence, a token fired once enough is there.

Differentiable by autograd, which makes it the definition of the gradients as well.
"""

from __future__ import annotations

import torch
from torch import Tensor


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

"""Continuous integrate-and-fire (CIF: Dong and Xu, ICASSP 2020): weights add up along the frames, and each time their
sum reaches a threshold a token is fired, the weighted sum of the frames since the last one.

A frame in which a token fires is split between that token and the next. Where tokens begin and end and what they take
of which frame is found over scalars, in fp64; one op, ``integrate_rows``, then reads each frame once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastcompress.checks import (
    check_float,
    check_layout,
    check_layout_values,
    check_number,
    check_token_values,
    check_values_of_rows,
    read_count,
)
from fastcompress.dispatch.call import Op, call, differentiable_once
from fastcompress.ops.select_boundaries import frame_offsets
from fastcompress.reference.adjacent_distance import accumulate_dtype
from fastcompress.segments import pad_tokens

_op: Op[Tensor] = torch.ops.fastcompress.integrate_rows.default
_backward_op: Op[tuple[Tensor, Tensor, Tensor]] = torch.ops.fastcompress.integrate_rows_backward.default


@dataclass(eq=False)
class Fired:
    """Tokens of :func:`integrate_and_fire`, packed.

    Attributes:
        values: ``[M, D]``, in the dtype of the frames.
        cu_seqlens: ``[B + 1]`` int32, tokens before each sequence.
        ends: ``[M]`` int64, the row of ``x.reshape(-1, D)`` in which each token fired, from which on a stream has it.
        total: ``[B]`` fp64, the sum of each sequence's weights as they were given, with a gradient: for
            :func:`quantity_loss`.
        remainder: ``[B]`` fp64, what was left unfired at the end of each sequence, before ``tail`` was looked at.
    """

    values: Tensor
    cu_seqlens: Tensor
    ends: Tensor
    total: Tensor
    remainder: Tensor

    def to_padded(self) -> tuple[Tensor, Tensor]:
        """As of :class:`fastcompress.Pooled`: ``values`` as ``[B, S, D]``, zeros behind each sequence, and the token
        counts ``[B]`` int32."""
        return pad_tokens(self.values, self.cu_seqlens)


torch.export.register_dataclass(Fired, serialized_type_name="fastcompress.Fired")


def integrate_and_fire(
    x: Tensor,
    alpha: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    lengths: Tensor | None = None,
    beta: float = 1.0,
    target_lengths: Tensor | None = None,
    tail: float | None = 0.5,
) -> Fired:
    """Sums frames by weights that add up to ``beta`` in each token.

    Token ``i`` of a sequence is ``sum_t w[i, t] x[t]``, where ``w[i, t]`` is what the interval from ``sum(alpha[:t])``
    to ``sum(alpha[:t + 1])`` has in common with the one from ``i beta`` to ``(i + 1) beta``. How many there are is

    * ``target_lengths``, if given (training): the weights are scaled so that they add up to that many;
    * else as often as the sum reaches ``beta``, and once more for what is left at the end, if that is at least ``tail``
      of ``beta``: that token is scaled up as if ``beta`` had been reached.

    Args:
        x: frames, ``[N, D]`` packed or ``[B, T, D]`` padded; fp32, fp16, bf16 or fp64.
        alpha: weights, not negative, ``[N]`` or ``[B, T]``, floating; added up in fp64.
        cu_seqlens: ``[B + 1]`` int32 or int64, with packed input; ``None``: one sequence.
        lengths: ``[B]`` int32 or int64, with padded input; ``None``: every frame counts.
        beta: of a token; positive.
        target_lengths: ``[B]`` integer, tokens of each sequence. A sequence whose weights add up to nothing gets none.
        tail: from 0 to 1; ``None``: what is left at the end is dropped.

    Returns:
        The tokens. Their number is read from the device, and with packed input the length of the longest sequence.
        Gradients go to ``x`` and ``alpha``: where the sum crosses a multiple of ``beta`` moves with the weights, and a
        token with it.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a shape, device or value that does not fit, named in the message.
    """
    check_float("x", x)
    if x.dim() not in (2, 3):
        raise ValueError(f"x must have shape [N, D] or [B, T, D], got {list(x.shape)}")
    check_values_of_rows("alpha", alpha, x)
    check_firing(beta, tail)
    check_layout(x, 2, cu_seqlens, lengths)
    offsets = frame_offsets(x, x.dim() == 3, cu_seqlens, lengths)
    count = offsets.shape[0] - 1
    _check_values(x, alpha, cu_seqlens, lengths, target_lengths, count)
    rows = x.flatten(0, -2)
    if rows.shape[0] == 0 or count == 0:
        nothing = (alpha.double() * 0).sum() * x.new_zeros(count, dtype=torch.float64)
        return Fired(rows[:0], offsets * 0, offsets[:0].long(), nothing, nothing.detach())
    begin, end = _bounds(x, offsets)
    row = torch.arange(rows.shape[0], device=x.device)
    sequence = torch.searchsorted(begin[1:].contiguous(), row, right=True)
    inside = (row >= begin[sequence]) & (row < end[sequence])
    weight = usable(alpha.reshape(-1)) * inside
    before, after, total = _sums(x, weight, begin, end, sequence, row, inside)
    reached = total
    if target_lengths is not None:
        tokens = torch.where(total > 0, target_lengths.to(x.device).clamp_min(0), 0).long()
        weight = weight * (tokens.double() * beta / torch.where(total > 0, total, 1.0))[sequence]
        before, after, reached = _sums(x, weight, begin, end, sequence, row, inside)
    fired, remainder = left_over(reached, beta)
    if target_lengths is None:
        if not torch.compiler.is_compiling() and x.device.type == "cpu" and float(fired.detach().sum()) >= 2**31:
            much = float(total.detach().sum())
            raise ValueError(f"alpha adds up to {much:g}: more tokens of beta {beta:g} than int32 counts")
        tokens = fired.long() if tail is None else (fired + fires_at_end(remainder, beta, tail)).long()
    cu_tokens = torch.nn.functional.pad(tokens.cumsum(0), (1, 0))
    # The token that is open when a frame ends; as many as there are is for what is left over.
    most = tokens[sequence].double()
    _, right, share = shares(before, after, weight, beta)
    right = torch.where(inside, torch.minimum(right, most), most)
    token = torch.arange(read_count(cu_tokens[-1]), device=x.device)
    owner = torch.searchsorted(cu_tokens[1:].contiguous(), token, right=True)
    local = token - cu_tokens[owner]
    # Slots, one a token and one a sequence for what is left over: `right` rises in them, so that a search finds where a
    # token is open at the end of a frame for the first time, and where it no longer is.
    slot = token + owner
    opened = (cu_tokens[:-1] + torch.arange(count, device=x.device))[sequence] + right.long()
    # A GPU adds in an order in which sums may fall by a rounding: what is found stays a run of frames nevertheless.
    ends = torch.minimum(torch.searchsorted(opened, slot + 1), end[owner] - 1)
    begins = torch.where(local > 0, torch.minimum(torch.searchsorted(opened, slot), ends), begin[owner])
    rest = opening(local.double(), right[begins], after[begins], beta)
    first = torch.where(local > 0, rest, share[begins])
    divisors = None
    if target_lengths is None and tail is not None:  # what is left at the end is scaled up to `beta`
        divisors = torch.where(local == fired[owner], remainder[owner] / beta, 1.0)
    values = integrate_rows(rows, share, first, divisors, begins, ends - begins + 1)
    return Fired(values, cu_tokens.int(), ends, total, remainder.detach())


# What the whole and the streamed form compute alike, all of it in fp64: numbers of tokens too, because an integer
# tensor times a number would be in fp32.


def usable(alpha: Tensor) -> Tensor:
    """Weights in fp64. Where values are not looked at, what is negative or no number counts for nothing: sums rise."""
    weight = alpha.double()
    return torch.where((weight >= 0) & (weight < torch.inf), weight, 0.0)


def shares(before: Tensor, after: Tensor, weight: Tensor, beta: float) -> tuple[Tensor, Tensor, Tensor]:
    """The tokens that are open before and after each frame, and what it gives to the former.

    Args:
        before, after: sums of the weights of a sequence.
    """
    left, right = (before / beta).floor(), (after / beta).floor()
    return left, right, torch.where(right > left, (left + 1) * beta - before, weight)


def opening(token: Tensor, right: Tensor, after: Tensor, beta: float) -> Tensor:
    """What each token takes of the frame that opens it: what that frame leaves over, or all it needs.

    Args:
        right, after: of that frame, the token that is open after it, and the sum.
    """
    return torch.where(token == right, after - token * beta, beta)


def left_over(total: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """How often the sum reached ``beta``, and what is left of it."""
    fired = (total / beta).floor()
    return fired, (total - fired * beta).clamp_min(0)


def fires_at_end(remainder: Tensor, beta: float, tail: float) -> Tensor:
    """Whether what is left makes a token: not if it is so little that fp32 could not scale it up."""
    return (remainder >= tail * beta) & (remainder > 1e-30 * beta)


def integrate_rows(
    x: Tensor, weights: Tensor, first: Tensor, divisors: Tensor | None, starts: Tensor, lengths: Tensor
) -> Tensor:
    """Token ``m`` is ``first[m] x[s] + sum(weights[t] x[t] for t in range(s + 1, s + lengths[m]))``, ``s = starts[m]``,
    over ``divisors[m]``: summed in the order of a segment, rounded once.

    Args:
        x: ``[N, D]``.
        weights, first, divisors: ``[N]``, ``[M]``, ``[M]`` or none; floating, rounded to fp32 (fp64 with fp64 ``x``).
        starts, lengths: ``[M]`` int64: tokens have rows, in order, and share no more than a first row with those
            before.
    """
    wide = accumulate_dtype(x.dtype)
    scalars = [None if t is None else t.to(wide) for t in (weights, first, divisors)]
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *scalars))
    return call(
        _op, (x, *scalars, starts, lengths), needs_grad, lambda: check_token_values(starts, lengths, x.shape[0])
    )


@torch.library.register_fake("fastcompress::integrate_rows")
def _(x: Tensor, weights: Tensor, first: Tensor, divisors: Tensor | None, starts: Tensor, lengths: Tensor) -> Tensor:
    return x.new_empty((starts.shape[0], x.shape[1]))


@torch.library.register_fake("fastcompress::integrate_rows_backward")
def _(
    grad: Tensor, x: Tensor, weights: Tensor, first: Tensor, starts: Tensor, lengths: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), weights.new_empty(weights.shape), first.new_empty(first.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs, output)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, weights, first, divisors, starts, lengths, y = ctx.saved_tensors
    if divisors is None:
        return *_backward_op(grad, x, weights, first, starts, lengths), None, None, None
    # Each row's weight over the divisor of its token, the last that starts before it.
    of_row = torch.nn.functional.pad(divisors, (1, 0), value=1.0)[
        torch.searchsorted(starts, torch.arange(x.shape[0], device=x.device))
    ]
    grad_x, slopes, first_slopes = _backward_op(grad, x, weights / of_row, first / divisors, starts, lengths)
    grad_divisors = -(grad.to(divisors.dtype) * y.to(divisors.dtype)).sum(-1) / divisors
    return grad_x, slopes / of_row, first_slopes / divisors, grad_divisors, None, None


torch.library.register_autograd("fastcompress::integrate_rows", _backward, setup_context=_setup)
differentiable_once("integrate_rows_backward")


def quantity_loss(fired: Fired, target_lengths: Tensor) -> Tensor:
    """Mean of ``|sum(alpha) - target|`` over sequences: makes CIF fire as often as there are units (Dong and Xu, 2020).

    Args:
        fired: of :func:`integrate_and_fire`.
        target_lengths: ``[B]`` int32 or int64, units of each sequence.

    Returns:
        A scalar in fp64, 0 for no sequence. Its gradient goes to the weights.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: another number of sequences.
    """
    if not isinstance(fired, Fired):
        raise TypeError(f"fired must be a result of integrate_and_fire, got {type(fired).__name__}")
    _check_target_lengths(target_lengths, fired.total.shape[0])
    return (fired.total - target_lengths.to(fired.total.device)).abs().sum() / max(1, fired.total.shape[0])


def check_firing(beta: float, tail: float | None) -> None:
    """Checks when tokens fire."""
    check_number("beta", beta)
    if not 0 < beta < math.inf:
        raise ValueError(f"beta must be positive and finite, got {beta}")
    if tail is None:
        return
    check_number("tail", tail)
    if not 0 <= tail <= 1:
        raise ValueError(f"tail must lie in [0, 1], got {tail}")


def _check_target_lengths(target_lengths: Tensor, count: int) -> None:
    if not isinstance(target_lengths, Tensor) or target_lengths.dtype not in (torch.int32, torch.int64):
        got = getattr(target_lengths, "dtype", type(target_lengths).__name__)
        raise TypeError(f"target_lengths must be an int32 or int64 tensor, got {got}")
    if target_lengths.shape != (count,):
        raise ValueError(f"target_lengths must have shape [{count}], got {list(target_lengths.shape)}")


def _check_values(
    x: Tensor,
    alpha: Tensor,
    cu_seqlens: Tensor | None,
    lengths: Tensor | None,
    target_lengths: Tensor | None,
    count: int,
) -> None:
    if target_lengths is not None:
        _check_target_lengths(target_lengths, count)
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return
    check_layout_values(x.shape, cu_seqlens, lengths)
    if target_lengths is not None and count:
        if int(target_lengths.min()) < 0:
            raise ValueError(f"target_lengths must not be negative, got {int(target_lengths.min())}")
        tokens = sum(target_lengths.tolist())
        if tokens >= 2**31:
            raise ValueError(f"target_lengths add up to {tokens}: more tokens than int32 counts")
    wrong = ~((alpha >= 0) & (alpha < torch.inf))
    if lengths is not None:
        wrong &= torch.arange(alpha.shape[1]) < lengths[:, None]
    if bool(wrong.any()):
        raise ValueError(f"alpha must be finite and not negative, got {float(alpha[wrong][0])}")


def _bounds(x: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """First row and end row of each sequence, int64 ``[B]``, inside the rows whatever the offsets hold."""
    if x.dim() == 2:
        inside = offsets.long().clamp(0, x.shape[0]).cummax(0).values
        return inside[:-1], inside[1:]
    begin = torch.arange(x.shape[0], device=x.device) * x.shape[1]
    return begin, begin + offsets.diff().clamp(0, x.shape[1])


def _sums(
    x: Tensor, weight: Tensor, begin: Tensor, end: Tensor, sequence: Tensor, row: Tensor, inside: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums of a sequence's weights before and after each row, and of all of them: each sequence for itself, so that no
    other of the batch changes a digit."""
    if x.dim() == 3:
        padded = weight.view(x.shape[:2])
        place = row - begin[sequence]
    else:
        place = torch.where(inside, row - begin[sequence], 0)
        # Scalars: a traced program takes more room for them rather than a size that it does not know.
        longest = weight.shape[0] if torch.compiler.is_compiling() else int((end - begin).max())
        slots = torch.where(inside, sequence * longest + place, begin.shape[0] * longest)
        flat = weight.new_zeros(begin.shape[0] * longest + 1).index_add(0, slots, weight)
        padded = flat[:-1].view(begin.shape[0], longest)
    sums = torch.nn.functional.pad(padded.cumsum(1), (1, 0))
    return sums[sequence, place], sums[sequence, place + 1], sums[:, -1]

"""Continuous integrate-and-fire (CIF: Dong and Xu, ICASSP 2020).

Weights are accumulated along the frames. Each time the sum reaches a threshold, a token fires: the weighted sum of the
frames since the previous token. The frame in which a token fires is split between that token and the next.

The first and last frame of each token and the weights of its frames are computed from the weights alone, in fp64. The
op ``integrate_rows`` then reads each frame once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastcompress.checks import (
    as_number,
    check_float,
    check_layout,
    check_layout_values,
    check_not_batched,
    check_token_values,
    check_values_of_rows,
    is_readable,
    read_count,
    unnest,
    values_are_checked,
)
from fastcompress.dispatch.call import Op, call, differentiable_once
from fastcompress.ops.select_boundaries import frame_offsets
from fastcompress.reference.adjacent_distance import accumulate_dtype
from fastcompress.segments import Tokens

_op: Op[Tensor] = torch.ops.fastcompress.integrate_rows.default
_backward_op: Op[tuple[Tensor, Tensor, Tensor]] = torch.ops.fastcompress.integrate_rows_backward.default


@dataclass(eq=False, repr=False)
class Fired(Tokens):
    """Packed tokens of [`integrate_and_fire`][].

    Attributes:
        values: Tokens, ``[M, D]`` in the dtype of the frames.
        cu_seqlens: Number of tokens before each sequence, ``[B + 1]`` int32.
        ends: Row of ``x.reshape(-1, D)`` in which each token fired, ``[M]`` int64.
        total: Sum of the weights of each sequence before scaling, ``[B]`` fp64. Has a gradient, for
            [`quantity_loss`][].
        remainder: Weight that was left after the last full token of each sequence, ``[B]`` fp64; ``tail`` decides
            whether it fires.
    """

    values: Tensor
    cu_seqlens: Tensor
    ends: Tensor
    total: Tensor
    remainder: Tensor


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
    """Sum frames into tokens, each of which takes a total weight of ``beta`` (CIF: Dong and Xu, ICASSP 2020).

    Token ``i`` of a sequence is ``sum_t w[i, t] x[t]``, where ``w[i, t]`` is the length of the overlap of the interval
    from ``sum(alpha[:t])`` to ``sum(alpha[:t + 1])`` with the interval from ``i beta`` to ``(i + 1) beta``.

    * With ``target_lengths`` (training), the weights of a sequence are scaled so that exactly that many tokens fire.
    * Without it, a token fires each time the sum reaches ``beta``. The weight left at the end fires one more token if
      it is at least ``tail * beta``; that token is scaled up as if the weight had reached ``beta``.

    Args:
        x: Frames, ``[N, D]`` packed, ``[B, T, D]`` padded or ``[B, j, D]`` nested (jagged); fp32, fp16, bf16 or fp64.
        alpha: Weights, ``[N]`` or ``[B, T]`` (or nested like ``x``) floating point, finite and not negative;
            accumulated in fp64.
        cu_seqlens: Frames before each sequence of packed input, ``[B + 1]`` int32 or int64; ``None`` for one sequence.
        lengths: Frames of each sequence of padded input, ``[B]`` int32 or int64; ``None`` if there is no padding.
        beta: Weight per token; positive.
        target_lengths: Tokens of each sequence, ``[B]`` int32 or int64. A sequence whose weights sum to 0 gets no
            token.
        tail: Share of ``beta``, from 0 to 1, from which the weight left at the end fires; ``None`` always drops it.

    Returns:
        The tokens. Their number is read from the device, and with packed input also the length of the longest sequence.
        Gradients go to ``x`` and ``alpha``; they include the shift of token boundaries with the weights.

    Raises:
        TypeError: If an argument has a wrong type or dtype.
        ValueError: If a shape, device or value is invalid; the message names it.

    Examples:
        >>> x = torch.tensor([[1.0], [2.0], [3.0]])
        >>> integrate_and_fire(x, torch.tensor([0.5, 1.0, 0.5])).values
        tensor([[1.5000],
                [2.5000]])
    """
    x, cu_seqlens = unnest("x", x, cu_seqlens, lengths)
    alpha, _ = unnest("alpha", alpha)
    check_float("x", x)
    check_not_batched("integrate_and_fire", x)
    if x.dim() not in (2, 3):
        raise ValueError(f"x must have shape [N, D] or [B, T, D], got {list(x.shape)}")
    check_values_of_rows("alpha", alpha, x)
    beta, tail = as_firing(beta, tail)
    check_layout(x, 2, cu_seqlens, lengths)
    offsets = frame_offsets(x, x.dim() == 3, cu_seqlens, lengths)
    count = offsets.shape[0] - 1
    _check_values(x, alpha, cu_seqlens, lengths, target_lengths, count)
    rows = x.flatten(0, -2)
    if rows.shape[0] == 0 or count == 0:
        nothing = (alpha.double() * 0).sum() * x.new_zeros(count, dtype=torch.float64)
        return Fired(rows[:0].clone(), offsets * 0, offsets[:0].long(), nothing, nothing.detach())
    begin, end = _bounds(x, offsets)
    row = torch.arange(rows.shape[0], dtype=torch.int64, device=x.device)
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
        if values_are_checked(fired) and float(fired.detach().sum()) >= 2**31:
            much = float(total.detach().sum())
            raise ValueError(f"alpha must add up to fewer than 2**31 tokens of beta {beta:g}, got {much:g}")
        tokens = fired.long() if tail is None else (fired + fires_at_end(remainder, beta, tail)).long()
    cu_tokens = torch.nn.functional.pad(tokens.cumsum(0), (1, 0))
    # `right` is the token that is open after each frame. The number of tokens is the index of the unused weight.
    most = tokens[sequence].double()
    _, right, share = shares(before, after, weight, beta)
    right = torch.where(inside, torch.minimum(right, most), most)
    token = torch.arange(read_count(cu_tokens[-1]), dtype=torch.int64, device=x.device)
    owner = torch.searchsorted(cu_tokens[1:].contiguous(), token, right=True)
    local = token - cu_tokens[owner]
    # Each token has a slot, and each sequence one more for the unused weight. The open slot never decreases from frame
    # to frame, so a binary search finds the first frame after which a token is open, and the first after which it is
    # not.
    slot = token + owner
    opened = (cu_tokens[:-1] + torch.arange(count, dtype=torch.int64, device=x.device))[sequence] + right.long()
    # On a GPU the order of additions can make a sum decrease by a rounding error; the clamps keep runs of frames valid.
    ends = torch.minimum(torch.searchsorted(opened, slot + 1), end[owner] - 1)
    begins = torch.where(local > 0, torch.minimum(torch.searchsorted(opened, slot), ends), begin[owner])
    rest = opening(local.double(), right[begins], after[begins], beta)
    first = torch.where(local > 0, rest, share[begins])
    divisors = None
    if target_lengths is None and tail is not None:  # scale the last token up to `beta`
        divisors = torch.where(local == fired[owner], remainder[owner] / beta, 1.0)
    values = integrate_rows(rows, share, first, divisors, begins, ends - begins + 1)
    return Fired(values, cu_tokens.int(), ends, total, remainder.detach())


# The following functions are shared with streaming. All values are fp64, numbers of tokens included, because an integer
# tensor times a Python number would be fp32.


def usable(alpha: Tensor) -> Tensor:
    """Return weights in fp64, with 0 for a negative or non-finite weight, so that sums never decrease.

    Values are checked on the CPU only; this keeps other devices safe.
    """
    weight = alpha.double()
    return torch.where((weight >= 0) & (weight < torch.inf), weight, 0.0)


def shares(before: Tensor, after: Tensor, weight: Tensor, beta: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the tokens that are open before and after each frame, and the weight that each frame gives to the former.

    Args:
        before: Sum of the weights of the sequence before each frame, ``[N]`` fp64.
        after: The same sum after each frame.
        weight: Weight of each frame, ``[N]`` fp64.
        beta: Weight per token.
    """
    left, right = (before / beta).floor(), (after / beta).floor()
    return left, right, torch.where(right > left, (left + 1) * beta - before, weight)


def opening(token: Tensor, right: Tensor, after: Tensor, beta: float) -> Tensor:
    """Return the weight that each token takes from the frame that opens it: at most ``beta``.

    Args:
        token: Index of each token in its sequence, ``[M]`` fp64.
        right: Token that is open after the opening frame, ``[M]`` fp64.
        after: Sum of the weights after the opening frame, ``[M]`` fp64.
        beta: Weight per token.
    """
    return torch.where(token == right, after - token * beta, beta)


def left_over(total: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Return the number of full tokens in each sum, and the weight that remains."""
    fired = (total / beta).floor()
    return fired, (total - fired * beta).clamp_min(0)


def fires_at_end(remainder: Tensor, beta: float, tail: float) -> Tensor:
    """Return whether the remaining weight fires a token. A weight too small to be scaled up in fp32 does not."""
    return (remainder >= tail * beta) & (remainder > 1e-30 * beta)


def integrate_rows(
    x: Tensor, weights: Tensor, first: Tensor, divisors: Tensor | None, starts: Tensor, lengths: Tensor
) -> Tensor:
    """Compute weighted sums of runs of rows that may share their first row with the run before.

    Token ``m`` is ``first[m] x[s] + sum(weights[t] x[t] for t in range(s + 1, s + lengths[m]))`` with ``s =
    starts[m]``, divided by ``divisors[m]``. It is summed in the order of ``segment_reduce`` and rounded once.

    Args:
        x: Rows, ``[N, D]``.
        weights: Weight of each row in the token that contains it after its first row, ``[N]`` floating point; rounded
            to fp32 (fp64 with fp64 ``x``), as are ``first`` and ``divisors``.
        first: Weight of the first row of each token, ``[M]``.
        divisors: Divisor of each token, ``[M]``, or ``None``.
        starts: First row of each token, ``[M]`` int64, in order.
        lengths: Rows of each token, ``[M]`` int64, at least 1. A token may share its first row with the tokens before
            it, and no other row.

    Returns:
        Tokens, ``[M, D]`` in the dtype of ``x``.
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
    # Fold the divisor of each token into the weights of its rows; the token of a row is the last that starts before it.
    of_row = torch.nn.functional.pad(divisors, (1, 0), value=1.0)[
        torch.searchsorted(starts, torch.arange(x.shape[0], dtype=torch.int64, device=x.device))
    ]
    grad_x, slopes, first_slopes = _backward_op(grad, x, weights / of_row, first / divisors, starts, lengths)
    grad_divisors = -(grad.to(divisors.dtype) * y.to(divisors.dtype)).sum(-1) / divisors
    return grad_x, slopes / of_row, first_slopes / divisors, grad_divisors, None, None


torch.library.register_autograd("fastcompress::integrate_rows", _backward, setup_context=_setup)
differentiable_once("integrate_rows_backward")


def quantity_loss(fired: Fired, target_lengths: Tensor) -> Tensor:
    """Compute the mean of ``|sum(alpha) - target|`` over sequences: the quantity loss of CIF (Dong and Xu, 2020).

    It trains the weights so that as many tokens fire as a sequence has output units.

    Args:
        fired: Result of [`integrate_and_fire`][].
        target_lengths: Units of each sequence, ``[B]`` int32 or int64.

    Returns:
        A scalar in fp64, 0 if there is no sequence. Its gradient goes to the weights.

    Raises:
        TypeError: If an argument has a wrong type or dtype.
        ValueError: If ``target_lengths`` is for another number of sequences.
    """
    if not isinstance(fired, Fired):
        raise TypeError(f"fired must be a result of integrate_and_fire, got {type(fired).__name__}")
    _check_target_lengths(target_lengths, fired.total.shape[0])
    return (fired.total - target_lengths.to(fired.total.device)).abs().sum() / max(1, fired.total.shape[0])


def as_firing(beta: float, tail: float | None) -> tuple[float, float | None]:
    """Return ``beta`` (positive and finite) and ``tail`` (in [0, 1], or ``None``) as Python numbers."""
    beta = as_number("beta", beta)
    if not 0 < beta < math.inf:
        raise ValueError(f"beta must be positive and finite, got {beta}")
    if tail is not None:
        tail = as_number("tail", tail)
        if not 0 <= tail <= 1:
            raise ValueError(f"tail must lie in [0, 1], got {tail}")
    return beta, tail


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
    if not all(t is None or values_are_checked(t) for t in (alpha, cu_seqlens, lengths, target_lengths)):
        return
    check_layout_values(x.shape, cu_seqlens, lengths)
    if target_lengths is not None and count:
        if int(target_lengths.min()) < 0:
            raise ValueError(f"target_lengths must not be negative, got {int(target_lengths.min())}")
        tokens = sum(target_lengths.tolist())
        if tokens >= 2**31:
            raise ValueError(f"target_lengths must add up to fewer than 2**31 tokens, got {tokens}")
    wrong = ~((alpha >= 0) & (alpha < torch.inf))
    if lengths is not None:
        wrong &= torch.arange(alpha.shape[1], dtype=torch.int64, device=alpha.device) < lengths[:, None]
    if bool(wrong.any()):
        raise ValueError(f"alpha must be finite and not negative, got {float(alpha[wrong][0])}")


def _bounds(x: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the first row and the end row of each sequence, ``[B]`` int64, clamped to the rows that exist."""
    if x.dim() == 2:
        inside = offsets.long().clamp(0, x.shape[0]).cummax(0).values
        return inside[:-1], inside[1:]
    begin = torch.arange(x.shape[0], dtype=torch.int64, device=x.device) * x.shape[1]
    return begin, begin + offsets.diff().clamp(0, x.shape[1])


def _sums(
    x: Tensor, weight: Tensor, begin: Tensor, end: Tensor, sequence: Tensor, row: Tensor, inside: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the sums of the weights of a sequence before and after each row, and of the whole sequence.

    Each sequence is summed separately, so that its sums do not depend on the rest of the batch.
    """
    if x.dim() == 3:
        padded = weight.view(x.shape[:2])
        place = row - begin[sequence]
    else:
        place = torch.where(inside, row - begin[sequence], 0)
        # Tracing does not know the longest sequence; it reserves more memory instead, which is small for scalars.
        longest = int((end - begin).max()) if is_readable(end) else weight.shape[0]
        slots = torch.where(inside, sequence * longest + place, begin.shape[0] * longest)
        flat = weight.new_zeros(begin.shape[0] * longest + 1).index_add(0, slots, weight)
        padded = flat[:-1].view(begin.shape[0], longest)
    sums = torch.nn.functional.pad(padded.cumsum(1), (1, 0))
    return sums[sequence, place], sums[sequence, place + 1], sums[:, -1]

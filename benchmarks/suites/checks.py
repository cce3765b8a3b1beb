"""Checks of segment pooling: a contender whose result is wrong is not timed.

The library is compared with fp64 scores and fp64 means computed here, the contenders with the segments of the library.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

import fastcompress as fc
from benchmarks.harness.cases import Inputs, exact_distances
from benchmarks.harness.compare import WrongResult
from benchmarks.suites.eager import Tokens, last_frames, offsets_and_ids, segment_ends

#: Share of the boundaries that must be equal: rounding may flip a few, another rule flips more.
MIN_EQUAL_BOUNDARIES = 0.999

_BLOCK = 4096


def exact_starts(inputs: Inputs) -> Tensor:
    """First rows of the segments, ``[M]``, by fp64 scores; those of ``Uniform`` by counting."""
    if isinstance(inputs.rule, fc.Uniform):
        offsets, size = inputs.cu_seqlens.tolist(), inputs.rule.size
        return torch.cat([torch.arange(a, b, size) for a, b in itertools.pairwise(offsets)])
    d = exact_distances(inputs.x.detach())
    return offsets_and_ids(segment_ends(d, last_frames(inputs), inputs.rule))[0][:-1]


def _lengths(starts: Tensor, rows: int) -> Tensor:
    return torch.cat([starts, starts.new_tensor([rows])]).diff()


def _means(x: Tensor, starts: Tensor, lengths: Tensor) -> Tensor:
    ids = torch.repeat_interleave(torch.arange(starts.shape[0]), lengths)
    total = torch.zeros(starts.shape[0], x.shape[1], dtype=torch.float64)
    for start in range(0, x.shape[0], _BLOCK):
        total.index_add_(0, ids[start : start + _BLOCK], x[start : start + _BLOCK].double())
    return total / lengths.unsqueeze(1)


class Expected:
    """What a call on packed ``inputs`` must return, given the first row of each segment, ``[M]``."""

    def __init__(self, inputs: Inputs, starts: Tensor) -> None:
        x = inputs.x.detach()
        self.starts = starts.long()
        self.rows, self.dtype = x.shape[0], x.dtype
        self.lengths = _lengths(self.starts, self.rows)
        self.values = _means(x, self.starts, self.lengths)
        # A serial sum of n terms in precision u is off by at most (n - 1) u times the sum of their magnitudes; one
        # more for the division, one for the rounding of the result.
        magnitude = _means(x.abs(), self.starts, self.lengths)
        self.bound = torch.finfo(x.dtype).eps * (self.lengths.unsqueeze(1) + 1) * magnitude + torch.finfo(x.dtype).tiny

    def check(self, name: str, tokens: Tokens, grad: Tensor | None = None, grad_x: Tensor | None = None) -> int:
        """Check a result, and the gradient ``grad_x``, ``[N, D]``, that comes out when ``grad``, ``[M', D]``, goes in.

        Returns:
            Number of boundaries that only one of the two has.

        Raises:
            WrongResult: It is wrong; the message begins with ``name``.
        """
        if tokens.starts is None:
            raise WrongResult(f"{name}: returns no segments")
        starts = tokens.starts.long()
        if tokens.values.dtype != self.dtype or tokens.values.shape != (starts.shape[0], self.values.shape[1]):
            got = f"{tokens.values.dtype} {list(tokens.values.shape)}"
            raise WrongResult(f"{name}: {got} for {starts.shape[0]} segments")
        mine = torch.zeros(self.rows, dtype=torch.bool).index_fill_(0, self.starts, True)
        theirs = torch.zeros(self.rows, dtype=torch.bool).index_fill_(0, starts, True)
        differing = int((mine != theirs).sum())
        if differing > (1 - MIN_EQUAL_BOUNDARIES) * self.starts.shape[0]:
            raise WrongResult(f"{name}: {differing} of {self.starts.shape[0]} boundaries differ")
        # Segments with the same start and the same length in both.
        lengths = _lengths(starts, self.rows)
        mine_at = torch.full((self.rows,), -1).index_copy_(0, self.starts, torch.arange(self.starts.shape[0]))
        index = mine_at[starts]
        same = (index >= 0) & (self.lengths[index.clamp_min(0)] == lengths)
        index = index[same]
        error = (tokens.values.detach()[same].double() - self.values[index]).abs() / self.bound[index]
        worst = float(error.max()) if error.numel() else 0.0
        if not worst <= 1:  # a NaN is wrong, too
            raise WrongResult(f"{name}: values are off by {worst:.3g} times the rounding bound")
        if grad is not None and grad_x is not None:
            _check_gradient(name, grad, grad_x, lengths)
        return differing


def _check_gradient(name: str, grad: Tensor, grad_x: Tensor, lengths: Tensor) -> None:
    if grad_x.dtype != grad.dtype or grad_x.shape != (int(lengths.sum()), grad.shape[1]):
        raise WrongResult(f"{name}: gradient is {grad_x.dtype} {list(grad_x.shape)}")
    ids = torch.repeat_interleave(torch.arange(lengths.shape[0]), lengths)
    limits, wrong = torch.finfo(grad.dtype), 0
    for start in range(0, grad_x.shape[0], _BLOCK):
        rows = ids[start : start + _BLOCK]
        expected = grad[rows].double() / lengths[rows].unsqueeze(1)
        error = (grad_x[start : start + _BLOCK].double() - expected).abs()
        # Two roundings: the reciprocal or the quotient, and the result. Negated, so that a NaN is wrong, too.
        wrong += int((~(error <= limits.eps * expected.abs() + limits.tiny)).sum())
    if wrong:
        raise WrongResult(f"{name}: {wrong} of {grad_x.numel()} gradients are off by more than rounding")


def check_average_pool(name: str, inputs: Inputs, tokens: Tokens) -> None:
    """Check that ``tokens.values`` are the means of the windows of ``inputs.x``, ``[B, T, D]``.

    Raises:
        WrongResult: They are not.
    """
    padded, size = inputs.x.detach(), inputs.window
    windows = padded[:, : padded.shape[1] // size * size].unflatten(1, (-1, size))
    if tokens.values.shape != (windows.shape[0], windows.shape[1], windows.shape[3]):
        raise WrongResult(f"{name}: {list(tokens.values.shape)} for windows {list(windows.shape)}")
    for value, window in zip(tokens.values.detach(), windows, strict=True):
        window = window.double()
        bound = torch.finfo(padded.dtype).eps * (size + 1) * window.abs().mean(1)
        if not bool(((value.double() - window.mean(1)).abs() <= bound).all()):
            raise WrongResult(f"{name}: means are off by more than rounding")

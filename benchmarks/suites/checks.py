"""Checks of segment pooling: an implementation whose result is wrong is not timed.

Every implementation, the library included, is compared with the definition in PyTorch, ``fc.backend("reference")``, in
fp64.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

import fastcompress as fc
from benchmarks.harness.cases import Batch
from benchmarks.harness.compare import WrongResult
from benchmarks.suites.eager import Tokens

#: Share of the boundaries that must be equal: rounding may flip a few, another rule flips more.
MIN_EQUAL_BOUNDARIES = 0.999

_BLOCK = 4096


class Expected:
    """What a call on packed frames ``x`` must return."""

    def __init__(self, x: Tensor, batch: Batch) -> None:
        x = x.detach()
        exact = x.double()
        with fc.backend("reference"):
            pooled = fc.segment_pool(exact, cu_seqlens=batch.cu_seqlens, rule=batch.rule)
            magnitude = fc.segment_reduce(exact.abs_(), pooled.segments)
        self.segments, self.values, self.dtype = pooled.segments, pooled.values, x.dtype
        # A serial sum of n terms in precision u is off by at most (n - 1) u times the sum of their magnitudes; one
        # more for the division, one for the rounding of the result.
        limits, lengths = torch.finfo(x.dtype), self.segments.lengths.unsqueeze(1)
        self.bound = limits.eps * (lengths + 1) * magnitude + limits.tiny

    def check(self, name: str, tokens: Tokens, grad: Tensor | None = None, grad_x: Tensor | None = None) -> int:
        """Check a result, and the gradient ``grad_x``, ``[N, D]``, that comes out when ``grad``, ``[M', D]``, goes in.

        Returns:
            Number of boundaries that only one of the two has.

        Raises:
            WrongResult: It is wrong; the message begins with ``name``.
        """
        if tokens.starts is None:
            raise WrongResult(f"{name}: returns no segments")
        starts, rows, wanted = tokens.starts.long(), self.segments.num_rows, len(self.segments.starts)
        if tokens.values.dtype != self.dtype or tokens.values.shape != (len(starts), self.values.shape[1]):
            got = f"{tokens.values.dtype} {list(tokens.values.shape)}"
            raise WrongResult(f"{name}: {got} for {len(starts)} segments")
        lengths = torch.cat([starts, starts.new_tensor([rows])]).diff()
        index = torch.full((rows,), -1).index_copy_(0, self.segments.starts, torch.arange(wanted))[starts]
        differing = len(starts) + wanted - 2 * int((index >= 0).sum())
        if differing > (1 - MIN_EQUAL_BOUNDARIES) * wanted:
            raise WrongResult(f"{name}: {differing} of {wanted} boundaries differ")
        same = (index >= 0) & (self.segments.lengths[index] == lengths)  # the same start and the same length
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
    ids = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    limits, wrong = torch.finfo(grad.dtype), 0
    for start in range(0, len(grad_x), _BLOCK):
        rows = ids[start : start + _BLOCK]
        expected = grad[rows].double() / lengths[rows].unsqueeze(1)
        error = (grad_x[start : start + _BLOCK].double() - expected).abs()
        # Two roundings: the reciprocal or the quotient, and the result. Negated, so that a NaN is wrong, too.
        wrong += int((~(error <= limits.eps * expected.abs() + limits.tiny)).sum())
    if wrong:
        raise WrongResult(f"{name}: {wrong} of {grad_x.numel()} gradients are off by more than rounding")


def check_average_pool(name: str, padded: Tensor, batch: Batch, tokens: Tokens) -> None:
    """Check that ``tokens.values`` are the means of the full windows of ``padded``, ``[B, T, D]``.

    Raises:
        WrongResult: They are not.
    """
    whole, size = padded.shape[1] // batch.window * batch.window, batch.window
    if tokens.values.shape != (len(padded), whole // size, padded.shape[2]):
        raise WrongResult(f"{name}: {list(tokens.values.shape)} for windows of {size} in {list(padded.shape)}")
    offsets = torch.tensor([0, whole], dtype=torch.int32)
    for frames, values in zip(padded, tokens.values, strict=True):
        Expected(frames[:whole], replace(batch, cu_seqlens=offsets, rule=fc.Uniform(size))).check(
            name, Tokens(values, torch.arange(0, whole, size))
        )

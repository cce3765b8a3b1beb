"""Boundaries of minimum-variance segments, for ``select_boundaries``."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcompress.checks import check_layout_values
from fastcompress.dispatch.call import Op, call
from fastcompress.rules import MIN_VARIANCE_BLOCK, MinVariance

_op: Op[Tensor] = torch.ops.fastcompress.min_variance_boundaries.default


def min_variance_boundaries(
    d: Tensor, rule: MinVariance, cu_seqlens: Tensor | None, lengths: Tensor | None, row_group: Tensor | None
) -> Tensor:
    """Return the rows that start a segment, bool of the leading shape of ``d``.

    Args:
        d: Distances to the following rows, ``[N, window]`` or ``[B, T, window]``, as of ``banded_distance``.
        rule: The rule.
        cu_seqlens: Offsets of packed input, ``[B + 1]``, or ``None``.
        lengths: Lengths of padded input, ``[B]``, or ``None``.
        row_group: Row groups, int32 ``[N]`` or ``[B, T]``, or ``None``.
    """
    return call(
        _op,
        (d, cu_seqlens, lengths, row_group, *_numbers(rule)),
        False,
        lambda: check_layout_values(d.shape, cu_seqlens, lengths),
    )


def _numbers(rule: MinVariance) -> tuple[float, int]:
    """Return the rate and the largest length of a segment, which no block exceeds."""
    return min(float(rule.rate), float(MIN_VARIANCE_BLOCK)), min(rule.max_len, MIN_VARIANCE_BLOCK)


@torch.library.register_fake("fastcompress::min_variance_boundaries")
def _(
    d: Tensor, cu_seqlens: Tensor | None, lengths: Tensor | None, row_group: Tensor | None, rate: float, max_len: int
) -> Tensor:
    return d.new_empty(d.shape[:-1], dtype=torch.bool)

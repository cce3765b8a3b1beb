"""Module forms."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastcompress.ops.segment_pool import segment_pool
from fastcompress.ops.segment_reduce import REDUCTIONS
from fastcompress.rules import Rule, as_rule
from fastcompress.segments import Pooled


class SegmentPool(torch.nn.Module):
    """:func:`fastcompress.segment_pool` with a fixed rule and reduction; no parameters.

    Args:
        rule: a rule or its text form.
        reduce: as in :func:`fastcompress.segment_reduce`.
        compact: as in :func:`fastcompress.segment_pool`.
    """

    def __init__(self, rule: Rule | str, reduce: str = "mean", compact: bool = True) -> None:
        super().__init__()
        if reduce not in REDUCTIONS:
            raise ValueError(f"reduce must be one of {', '.join(REDUCTIONS)}, got {reduce!r}")
        self.rule = as_rule(rule)
        self.reduce = reduce
        self.compact = compact

    def forward(self, x: Tensor, **layout: Any) -> Pooled:
        """``layout`` is the rest of :func:`fastcompress.segment_pool`'s arguments: ``cu_seqlens=``, ``lengths=``, …"""
        return segment_pool(x, rule=self.rule, reduce=self.reduce, compact=self.compact, **layout)

    def extra_repr(self) -> str:
        return f"rule={self.rule}, reduce={self.reduce}, compact={self.compact}"

"""Attention of packed rows by its definition."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def reference(query: Tensor, key: Tensor, value: Tensor, cu: list[int], **options: Any) -> Tensor:
    """Return attention computed with one mask over all rows."""
    rows, groups = query.shape[0], query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scale = options.get("scale") or query.shape[2] ** -0.5
    scores = torch.einsum("qhd,khd->hqk", query, key) * scale
    if cap := options.get("softcap"):
        scores = cap * (scores / cap).tanh()
    if (bias := options.get("key_bias")) is not None:
        scores = scores + bias
    row = torch.arange(rows)
    sequence = torch.searchsorted(torch.tensor(cu[1:]), row, right=True)
    seen = sequence[:, None] == sequence
    if options.get("causal", True):
        seen = seen & (row[:, None] >= row)
    if window := options.get("window"):
        seen = seen & (row[:, None] - row < window)
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), value)

"""Cosine distances between each row and several later rows: one launch per lag."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcompress.triton.adjacent_distance import adjacent_distance


def banded_distance(x: Tensor, cu_seqlens: Tensor | None, lengths: Tensor | None, window: int) -> Tensor:
    """Return the distances to the next ``window`` rows; see the reference."""
    return torch.stack([adjacent_distance(x, cu_seqlens, lengths, lag) for lag in range(1, window + 1)], -1)

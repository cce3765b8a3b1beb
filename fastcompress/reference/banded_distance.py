"""Definition of the distances of each row to several later rows."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcompress.reference.adjacent_distance import adjacent_distance


def banded_distance(x: Tensor, cu_seqlens: Tensor | None, lengths: Tensor | None, window: int) -> Tensor:
    """Compute the distances of each row to the rows 1 to ``window`` rows later, ``[..., D]`` -> ``[..., window]``."""
    if window < 1:
        raise ValueError(f"window must be at least 1, got {window}")
    return torch.stack([adjacent_distance(x, cu_seqlens, lengths, lag) for lag in range(1, window + 1)], -1)

"""The auxiliary CTC head of the reference audio LLM."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastcompress.checks import IGNORED_LABEL


def ctc_logits(head: Any, frames: Tensor) -> Tensor:
    """Return CTC logits ``[A, F, units + 1]`` of frames ``[A, F, D]``."""
    return head(frames.to(head.weight.dtype))


def ctc_loss(head: nn.Linear, frames: Tensor, lengths: Tensor, labels: Tensor) -> Tensor:
    """Return the CTC loss: each audio's loss divided by its number of units, averaged over the audios.

    Args:
        head: The CTC head.
        frames: Frames ``[A, F, D]``.
        lengths: Number of frames of each audio, ``[A]`` int64. Frames after them have no effect.
        labels: Units of each audio, ``[A, U]`` int64, at least 1; -100 after the last unit.
    """
    inside = torch.arange(frames.shape[1], device=frames.device) < lengths[:, None]
    # Zeros before the head: the gradient of a product with NaN is NaN even where its upstream gradient is 0.
    logits = ctc_logits(head, torch.where(inside[..., None], frames, 0.0))
    log_probs = logits.float().log_softmax(-1).transpose(0, 1)  # [F, A, units]
    counts = (labels != IGNORED_LABEL).sum(1)
    return nn.functional.ctc_loss(log_probs, labels.clamp_min(0), lengths, counts, blank=0, zero_infinity=True)

"""The loss of a decoder that runs packed rows."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from fastcompress.checks import IGNORED_LABEL


def label_rows(labels: Tensor) -> Tensor:
    """Return the packed rows whose next row has a label: row ``t`` predicts ``labels[t + 1]``.

    Args:
        labels: ``[T]`` int64, ``IGNORED_LABEL`` where nothing is predicted
            (:attr:`fastcompress.PackedInputs.labels`, whose first row of each sample has no label).

    Returns:
        ``[K]`` int64. The number is read from the device.
    """
    return (labels[1:] != IGNORED_LABEL).nonzero()[:, 0]


def next_token_loss(
    logits: Tensor, labels: Tensor, rows: Tensor, num_items_in_batch: Tensor | int | None = None
) -> Tensor:
    """Return the cross entropy of the labels, divided by ``num_items_in_batch``.

    Args:
        logits: ``[K, V]`` of the rows that predict a label. Half types are computed in fp32; fp32 and fp64 stay.
        labels: ``[T]`` int64 of the packed rows.
        rows: ``[K]`` int64 of :func:`label_rows`.
        num_items_in_batch: Labels of the whole optimizer step; ``None``: labels of this batch.
    """
    wide = logits if logits.dtype == torch.float64 else logits.float()
    total = torch.nn.functional.cross_entropy(wide, labels[rows + 1].to(logits.device), reduction="sum")
    return total / (max(1, rows.shape[0]) if num_items_in_batch is None else num_items_in_batch)


def batch_share(num_labels: int, num_items_in_batch: Tensor | int | None) -> Tensor | float:
    """Return the share of an optimizer step's labels that are in this batch.

    The losses of the batches of a step are added up. A loss that is a mean over a batch is multiplied by this share, so
    that it counts once per step.
    """
    return 1.0 if num_items_in_batch is None else num_labels / num_items_in_batch


def zero_of(parameters: Iterable[Tensor], device: torch.device) -> Tensor:
    """Return 0 with a gradient path to parameters that a batch did not use.

    Processes that average gradients wait until each parameter has one.
    """
    return sum((p.flatten()[:0].sum() for p in parameters if p.requires_grad), torch.zeros((), device=device))

"""Loss of a decoder that runs on packed rows."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from fastcompress.checks import IGNORED_LABEL


def label_rows(labels: Tensor) -> Tensor:
    """Return the packed rows that predict a label: row ``t`` predicts ``labels[t + 1]``.

    Args:
        labels: ``[T]`` int64, ``IGNORED_LABEL`` where nothing is predicted
            (``fastcompress.PackedInputs.labels``, in which the first row of each sample has no label).

    Returns:
        Row indices, ``[K]`` int64. ``K`` is read from the device.
    """
    return (labels[1:] != IGNORED_LABEL).nonzero()[:, 0]


def next_token_loss(
    logits: Tensor, labels: Tensor, rows: Tensor, num_items_in_batch: Tensor | int | None = None
) -> Tensor:
    """Return the cross entropy of the labels, divided by ``num_items_in_batch``.

    Args:
        logits: Logits of the rows that predict a label, ``[K, V]``. Half-precision logits are cast to fp32.
        labels: Labels of the packed rows, ``[T]`` int64.
        rows: Result of ``label_rows``, ``[K]`` int64.
        num_items_in_batch: Number of labels of the whole optimizer step; ``None``: of this batch.
    """
    wide = logits if logits.dtype == torch.float64 else logits.float()
    total = torch.nn.functional.cross_entropy(wide, labels[rows + 1].to(logits.device), reduction="sum")
    return total / (max(1, rows.shape[0]) if num_items_in_batch is None else num_items_in_batch)


def batch_share(num_labels: int, num_items_in_batch: Tensor | int | None) -> Tensor | float:
    """Return the share of an optimizer step's labels that are in this batch.

    The trainer sums the losses of the batches of a step. Multiply a loss that is a mean over a batch by this share, so
    that the sum over the step is a weighted mean.
    """
    return 1.0 if num_items_in_batch is None else num_labels / num_items_in_batch


def zero_of(parameters: Iterable[Tensor], device: torch.device) -> Tensor:
    """Return 0 with a gradient path to parameters that a batch did not use.

    Distributed training waits for the gradient of every trainable parameter on every process.
    """
    return sum((p.flatten()[:0].sum() for p in parameters if p.requires_grad), torch.zeros((), device=device))

"""Copying of rows into packed order, which is its own gradient in the other direction."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastcompress.dispatch.call import Op

pack_rows: Op[Tensor] = torch.ops.fastcompress.pack_rows.default


@torch.library.register_fake("fastcompress::pack_rows")
def _(rows: Tensor, audio: Tensor, index: Tensor, target: Tensor, is_table: bool) -> Tensor:
    return rows.new_empty((index.shape[0], rows.shape[1]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rows, audio, index, target, ctx.is_table = inputs
    ctx.num_rows, ctx.num_audio_rows = rows.shape[0], audio.shape[0]
    ctx.save_for_backward(index, target)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """Copy the gradient back to the rows that were packed.

    A row of audio, or of embeddings that are not a table, was copied at most once. Rows of a table can repeat; they get
    the gradient of ``torch.nn.Embedding``, which adds in a fixed order.
    """
    index, target = ctx.saved_tensors
    nothing = grad[:0]
    grad_rows = grad_audio = None
    if ctx.needs_input_grad[0]:
        is_text = (index >= 0) & (index < ctx.num_rows)
        if ctx.is_table:
            # An extra row collects what is not text; as padding_idx it stays 0.
            text = torch.where(is_text, index, ctx.num_rows)
            padded = torch.ops.aten.embedding_dense_backward(grad, text, ctx.num_rows + 1, ctx.num_rows, False)
            grad_rows = padded[: ctx.num_rows]
        else:
            text = torch.where(is_text, index, -1)
            grad_rows = pack_rows(grad, nothing, target[: ctx.num_rows], text, False)
    if ctx.needs_input_grad[1]:
        audio = torch.where(index < ctx.num_rows, -1, index - ctx.num_rows)
        grad_audio = pack_rows(grad, nothing, target[target.shape[0] - ctx.num_audio_rows :], audio, False)
    return grad_rows, grad_audio, None, None, None


torch.library.register_autograd("fastcompress::pack_rows", _backward, setup_context=_setup_context)

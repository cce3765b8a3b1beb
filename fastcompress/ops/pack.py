"""The ops that packing is made of: where each row goes, labels and positions, the copy.

Rows of the input are numbered 0 .. N - 1 and rows of audio N .. N + M - 1. ``pack_map`` says which row each packed row
is (``source``) and where each row went (``target``); ``pack_labels`` makes positions and labels from that;
``pack_rows`` copies, and its gradient is the copy the other way.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastcompress.ops.dispatch import Op
from fastcompress.ops.select_boundaries import num_sequences
from fastcompress.reference.pack import pack_bound

_ops = torch.ops.fastcompress
pack_map: Op[tuple[Tensor, Tensor, Tensor, Tensor]] = _ops.pack_map.default
pack_labels: Op[tuple[Tensor, Tensor]] = _ops.pack_labels.default
pack_rows: Op[Tensor] = _ops.pack_rows.default


@torch.library.register_fake("fastcompress::pack_map")
def _(
    row_group: Tensor, ids: Tensor | None, cu_seqlens: Tensor | None, lengths: Tensor | None, audio_cu_seqlens: Tensor,
    num_embeddings: int, num_audio_rows: int, compact: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if compact:
        size: int | torch.SymInt = torch.library.get_ctx().new_dynamic_size()
    else:
        size = pack_bound(row_group.numel(), audio_cu_seqlens.shape[0] - 1, num_audio_rows)
    source = row_group.new_empty((size,), dtype=torch.int64)
    target = row_group.new_empty((row_group.numel() + num_audio_rows,), dtype=torch.int64)
    sequences = num_sequences(row_group.shape, row_group.dim() == 2, cu_seqlens)
    return torch.empty_like(source), source, target, row_group.new_empty((sequences + 1,), dtype=torch.int32)


@torch.library.register_fake("fastcompress::pack_labels")
def _(source: Tensor, cu_seqlens: Tensor, row_group: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
    return torch.empty_like(source), source.new_empty((0,) if labels is None else source.shape)


@torch.library.register_fake("fastcompress::pack_rows")
def _(rows: Tensor, audio: Tensor, index: Tensor, target: Tensor, is_table: bool) -> Tensor:
    return rows.new_empty((index.shape[0], rows.shape[1]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rows, audio, index, target, ctx.is_table = inputs
    ctx.num_rows, ctx.num_audio_rows = rows.shape[0], audio.shape[0]
    ctx.save_for_backward(index, target)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """Each row of audio, and of rows that are no table, was copied once at most: its gradient is copied back. A table's
    gradient is that of ``torch.nn.Embedding``, which adds in one order."""
    index, target = ctx.saved_tensors
    nothing = grad[:0]
    grad_rows = grad_audio = None
    if ctx.needs_input_grad[0]:
        is_text = (index >= 0) & (index < ctx.num_rows)
        if ctx.is_table:
            # A row more, for what is no text; padding_idx leaves it at 0.
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

"""The copy of rows that packs a batch. ``fastcompress/reference/pack.py`` computes the indices of the rows.

Memory traffic: every packed row is read once and written once. A program copies all columns of a few rows, so each
index is loaded once. An index out of range gives zeros, or raises with FASTCOMPRESS_CHECK=1.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastcompress.checks import checks_at_once
from fastcompress.triton.common import BATCH_SIZES, as_rows, column_block, flat, launch

#: Rows per program: with 512 bytes of each per step, 16 bytes per thread of 4 warps and 4 loads in flight.
ROWS = 16


def pack_rows(rows: Tensor, audio: Tensor, index: Tensor, target: Tensor, is_table: bool) -> Tensor:
    """Copy rows of ``rows`` [V, D] followed by ``audio`` [M, D] to ``[T, D]``. One launch.

    Only the gradient uses ``target`` and ``is_table``.
    """
    if checks_at_once(index) and bool(((index < -1) | (index >= rows.shape[0] + audio.shape[0])).any()):
        raise RuntimeError("index must lie in [-1, the number of rows)")
    out = torch.empty((index.shape[0], rows.shape[1]), dtype=rows.dtype, device=rows.device)
    text_rows, audio_rows = as_rows(rows), as_rows(audio)
    launch(
        pack_rows_kernel, (triton.cdiv(index.shape[0], ROWS),), rows, text_rows, text_rows.stride(0), rows.shape[0],
        audio_rows, audio_rows.stride(0), audio.shape[0], flat(index), index.shape[0], rows.shape[1], out, ROWS=ROWS,
        COLUMNS=column_block(rows.shape[1], rows.dtype, 256),
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=BATCH_SIZES)
def pack_rows_kernel(
    TEXT, text_stride, num_texts, AUDIO, audio_stride, num_audio_rows, INDEX, count, width, OUT,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    i = tl.load(INDEX + t, mask=t < count, other=-1)
    is_text = (i >= 0) & (i < num_texts)
    is_audio = (i >= num_texts) & (i - num_texts < num_audio_rows)
    text = TEXT + tl.where(is_text, i, 0) * text_stride
    audio = AUDIO + tl.where(is_audio, i - num_texts, 0) * audio_stride
    row = tl.where(is_text, text, audio)[:, None]  # [ROWS, 1]
    taken = (is_text | is_audio)[:, None]
    target = (OUT + t * width)[:, None]
    for k in range(0, width, COLUMNS):
        column = (k + tl.arange(0, COLUMNS))[None, :]
        inside = column < width
        values = tl.load(row + column, mask=taken & inside, other=0)  # [ROWS, COLUMNS]
        tl.store(target + column, values, mask=(t < count)[:, None] & inside)

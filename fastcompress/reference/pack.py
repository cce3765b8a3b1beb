"""Definition of packing: where each row is copied, and the labels and positions of the packed rows.

A packed row is *text*, which is a row of the input with row group 0, or *audio*: each run of neighbouring rows with the
same positive row group is replaced by the rows of the next audio. Rows are numbered through the N rows of the input,
then the M rows of audio.

Everything is arithmetic on whole tensors. On a GPU it reads values on the host only with ``compact``, so the Triton
backend uses ``pack_map`` and ``pack_labels`` of this file as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastcompress.checks import IGNORED_LABEL, check_pack_values, values_are_checked
from fastcompress.reference.select_boundaries import KEEP


def pack_bound(num_rows: int, num_audios: int, num_audio_rows: int) -> int:
    """Return the largest possible number of packed rows: each audio replaces at least one row."""
    return max(num_rows - num_audios, 0) + num_audio_rows


def _sequence_rows(
    shape: torch.Size, cu_seqlens: Tensor | None, lengths: Tensor | None, row: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return whether each row is in a sequence, whether it is the first of one, and the sequence offsets [B + 1]."""
    if len(shape) == 2:
        position = row % max(shape[1], 1)
        inside = torch.ones_like(row, dtype=torch.bool)
        if lengths is not None:
            inside = (torch.arange(shape[1], dtype=torch.int64, device=row.device) < lengths[:, None]).reshape(-1)
        return inside, position == 0, torch.arange(shape[0] + 1, dtype=torch.int64, device=row.device) * shape[1]
    if cu_seqlens is None:
        return row >= 0, row == 0, torch.arange(2, dtype=torch.int64, device=row.device) * shape[0]
    bounds = cu_seqlens.long().clamp(0, shape[0])
    first = torch.zeros(shape[0] + 1, dtype=torch.bool, device=row.device).index_fill(0, bounds, True)[:-1]
    return (row >= bounds[0]) & (row < bounds[-1]), first, bounds


def _wrong_sequences(
    shape: torch.Size, cu_seqlens: Tensor | None, lengths: Tensor | None, device: torch.device
) -> Tensor:
    """Return whether ``cu_seqlens`` or ``lengths`` are invalid, as a bool tensor on their device."""
    if lengths is not None:
        return ((lengths < 0) | (lengths > shape[1])).any()
    if cu_seqlens is None:
        return torch.zeros((), dtype=torch.bool, device=device)
    return (cu_seqlens.diff() < 0).any() | (cu_seqlens[0] != 0) | (cu_seqlens[-1] != shape[0])


def _before(count: Tensor) -> Tensor:
    """Return exclusive cumulative sums followed by the total, ``[n]`` -> ``[n + 1]``."""
    return torch.nn.functional.pad(count.cumsum(0), (1, 0))


def pack_map(
    row_group: Tensor,
    ids: Tensor | None,
    cu_seqlens: Tensor | None,
    lengths: Tensor | None,
    audio_cu_seqlens: Tensor,
    num_embeddings: int,
    num_audio_rows: int,
    compact: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return ``index`` and ``source`` [T], ``target`` [N + M], all int64, and ``cu_seqlens`` [B + 1] int32.

    ``source`` is the row that each packed row is copied from, and ``target`` the packed row that each row is copied to;
    -1 means none. ``index`` is the row to read from the table of ``num_embeddings`` rows followed by audio if there are
    ``ids``, and equals ``source`` otherwise. T is exact with ``compact``, else ``pack_bound``.
    """
    device, num_audios = row_group.device, audio_cu_seqlens.shape[0] - 1
    group = row_group.reshape(-1)
    num_rows = group.shape[0]
    row = torch.arange(num_rows, dtype=torch.int64, device=device)
    inside, first, bounds = _sequence_rows(row_group.shape, cu_seqlens, lengths, row)
    text = inside & (group == KEEP)
    run = inside & (group > KEEP) & (first | (group != group.roll(1)))
    texts_before, runs_before = _before(text), _before(run).clamp_max(num_audios)
    # Invalid values are reported below or were reported before; clamping keeps every index inside its tensor.
    audio_begin = audio_cu_seqlens.long().clamp(0, num_audio_rows).cummax(0).values
    before = texts_before + audio_begin[runs_before]  # [N + 1], packed rows before each row
    # Number of text rows before each audio; the extra element at the end collects rows that do not start an audio.
    place = torch.where(run, runs_before[:-1], num_audios)
    texts_before_audio = torch.zeros(num_audios + 1, dtype=torch.int64, device=device)
    texts_before_audio = texts_before_audio.scatter(0, place, texts_before[:-1])
    audio_row = torch.arange(num_audio_rows, dtype=torch.int64, device=device)
    audio = torch.searchsorted(audio_begin[1:], audio_row, right=True)
    used = audio < runs_before[-1]
    target = torch.cat(
        [
            torch.where(text, before[:-1], -1),
            torch.where(used, audio_row + texts_before_audio[audio.clamp_max(num_audios)], -1),
        ]
    )
    size = pack_bound(num_rows, num_audios, num_audio_rows)
    if compact or values_are_checked(row_group):
        last = audio_cu_seqlens[-1]
        wrong = _wrong_sequences(row_group.shape, cu_seqlens, lengths, device) | (audio_begin != audio_cu_seqlens).any()
        wrong = wrong | (audio_cu_seqlens[0] != 0) | ((last != num_audio_rows) if compact else (last > num_audio_rows))
        wrong = wrong | (run.sum() != num_audios)
        if ids is not None:
            wrong = wrong | (text & ((ids.reshape(-1) < 0) | (ids.reshape(-1) >= num_embeddings))).any()
        count, is_wrong = torch.stack([before[-1], wrong.long()]).tolist()  # the only read from the device
        if is_wrong:
            check_pack_values(
                row_group, ids, cu_seqlens, lengths, audio_cu_seqlens, num_embeddings, num_audio_rows, compact
            )
            raise RuntimeError("fastcompress: an input of pack was invalid when it was read, and was changed since")
        size = count if compact else size
    target = torch.where(target < size, target, -1)
    source = torch.full((size + 1,), -1, dtype=torch.int64, device=device)
    source = source.scatter(
        0, torch.where(target < 0, size, target), torch.arange(len(target), dtype=torch.int64, device=device)
    )[:-1]
    index = source.clone()
    if ids is not None:
        rows_of_table = ids.reshape(-1).long()
        rows_of_table = torch.where((rows_of_table >= 0) & (rows_of_table < num_embeddings), rows_of_table, -1)
        rows_of_table = torch.cat([rows_of_table, num_embeddings + audio_row, rows_of_table.new_full((1,), -1)])
        index = rows_of_table[source]  # source -1 reads the last element, which is -1
    return index, source, target, before[bounds].clamp_max(size).int()


def pack_labels(source: Tensor, cu_seqlens: Tensor, row_group: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return ``position_ids`` [T] int64 and the packed labels [T] int64 ([0] without labels).

    Positions are 0 after the last sequence. Labels are kept for text rows, except the first row of each sequence, which
    no row precedes to predict it from; all others are ``IGNORED_LABEL``.
    """
    packed = torch.arange(source.shape[0], dtype=torch.int64, device=source.device)
    begins = cu_seqlens[:-1].long()
    sequence = torch.searchsorted(cu_seqlens[1:].contiguous(), packed.int(), right=True)
    in_sequence = sequence < begins.shape[0]
    begins = torch.nn.functional.pad(begins, (0, 1))
    position = torch.where(in_sequence, packed - begins[sequence], 0)
    if labels is None:
        return position, source.new_empty(0)
    row = torch.where((source >= 0) & (source < row_group.numel()), source, row_group.numel())
    text = torch.nn.functional.pad(row_group.reshape(-1), (0, 1), value=KEEP - 1)[row] == KEEP
    flat = torch.nn.functional.pad(labels.reshape(-1).long(), (0, 1), value=IGNORED_LABEL)
    return position, torch.where(in_sequence & text & (position > 0), flat[row], IGNORED_LABEL)


def pack_rows(rows: Tensor, audio: Tensor, index: Tensor, target: Tensor, is_table: bool) -> Tensor:
    """Copy row ``index[t]`` of ``rows`` [V, D] followed by ``audio`` [M, D] to output row ``t``; -1 gives zeros.

    Only the gradient uses ``target`` and ``is_table``.
    """
    inside = (index >= -1) & (index < rows.shape[0] + audio.shape[0])
    if not index.is_cuda and not bool(inside.all()):
        raise RuntimeError("index must lie in [-1, the number of rows)")
    # Two gathers avoid the copy of a large table that concatenation would need. An empty tensor cannot be indexed; a
    # row of zeros replaces it.
    is_text, is_audio = (index >= 0) & (index < rows.shape[0]), inside & (index >= rows.shape[0])
    zero = rows.new_zeros((1, rows.shape[1]))
    text = (rows if rows.shape[0] else zero)[torch.where(is_text, index, 0)]
    heard = (audio if audio.shape[0] else zero)[torch.where(is_audio, index - rows.shape[0], 0)]
    return torch.where(is_text[:, None], text, torch.where(is_audio[:, None], heard, zero))

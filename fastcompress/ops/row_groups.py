"""Row groups of token ids: mark each row as text, as part of an audio, or as padding."""

from __future__ import annotations

from numbers import Integral
from typing import NoReturn

import torch
from torch import Tensor

from fastcompress.checks import (
    INDEX_DTYPES,
    as_int64,
    as_mask,
    check_dense,
    check_layout,
    check_layout_values,
    check_same_device,
    sequence_ranges,
    values_are_checked,
)


def check_ids(name: str, ids: Tensor, shape: torch.Size | None = None) -> None:
    """Check that ``ids`` is a strided int32 or int64 tensor, of ``shape`` if that is given."""
    check_dense(name, ids)
    if ids.dtype not in INDEX_DTYPES:
        raise TypeError(f"{name} must be int32 or int64, got {ids.dtype}")
    if shape is not None and ids.shape != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, got {list(ids.shape)}")


def row_groups(
    input_ids: Tensor,
    placeholder: int,
    *,
    attention_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    placeholder_counts: Tensor | int | None = None,
) -> Tensor:
    """Compute row groups from token ids: -1 for masked rows, 0 for text, positive for audio.

    A run of neighbouring rows with the same positive number is one audio.

    Args:
        input_ids: Token ids, ``[B, L]`` padded or ``[N]`` packed, int32 or int64.
        placeholder: Token id that marks audio.
        attention_mask: Mask ``[B, L]`` bool or numbers: 1 keeps a row, 0 marks padding, on either side. Other values
            raise an error; an additive mask becomes such a mask by ``mask >= 0``.
        cu_seqlens: Rows before each sample of packed input, ``[B + 1]`` int32 or int64; ``None`` for one sample.
        placeholder_counts: Number of placeholders per audio. ``None``: each run of placeholders in a sample is one
            audio. 1: each placeholder is one audio. ``[A]`` int32 or int64: audio ``i`` has ``placeholder_counts[i]``
            consecutive placeholders, which separates adjacent audios. On a GPU, reading the counts would synchronize,
            so counts that do not match the placeholders do not raise; they make all audio rows -1. They do raise with
            ``FASTCOMPRESS_CHECK=1``, and in ``pack`` with ``compact``.

    Returns:
        Row groups, int32 of the shape of ``input_ids``.

    Raises:
        TypeError: If an argument has a wrong type or dtype.
        ValueError: If a shape, device or value is invalid. If the counts do not match the placeholders, the message
            names the sample and both numbers.

    Examples:
        >>> row_groups(torch.tensor([[7, 99, 99, 8, 99]]), 99)
        tensor([[0, 1, 1, 0, 1]], dtype=torch.int32)
    """
    check_ids("input_ids", input_ids)
    return find_row_groups(
        input_ids, placeholder, attention_mask, cu_seqlens, placeholder_counts, values_are_checked(input_ids)
    )


def find_row_groups(
    input_ids: Tensor,
    placeholder: int,
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    placeholder_counts: Tensor | int | None,
    reads_values: bool,
) -> Tensor:
    """Compute row groups as ``row_groups`` does; ``reads_values`` allows a synchronization to check counts."""
    placeholder = as_int64("placeholder", placeholder)
    if input_ids.dim() not in (1, 2):
        raise ValueError(f"input_ids must have shape [B, L] or [N], got {list(input_ids.shape)}")
    check_layout(input_ids, 1, cu_seqlens, None, attention_mask)
    kept = None if attention_mask is None else as_mask("attention_mask", attention_mask)
    is_audio = input_ids.long() == placeholder  # int64, because the placeholder may exceed int32
    if placeholder_counts is None:
        group = is_audio.int()
    elif isinstance(placeholder_counts, Tensor):
        check_ids("placeholder_counts", placeholder_counts)
        check_same_device("placeholder_counts", placeholder_counts, input_ids)
        if placeholder_counts.dim() != 1:
            raise ValueError(f"placeholder_counts must have shape [A], got {list(placeholder_counts.shape)}")
        if kept is not None:
            is_audio &= kept
        flat = is_audio.reshape(-1)
        if reads_values and cu_seqlens is not None:
            check_layout_values(input_ids.shape, cu_seqlens, None)
        audio = torch.searchsorted(placeholder_counts.cumsum(0), flat.cumsum(0) - 1, right=True, out_int32=True) + 1
        group = audio * flat
        matches = _counts_match(group, placeholder_counts, input_ids.shape, cu_seqlens)
        if reads_values:
            if not matches:
                _explain_counts(flat, placeholder_counts, input_ids.shape, cu_seqlens)
        elif torch.compiler.is_compiling() and not group.is_cuda:
            torch._assert_async(matches, "placeholder_counts does not match the placeholders of input_ids")
        else:  # an assertion would make the GPU unusable for the process, or cannot run
            group = torch.where(matches | ~flat, group, -1)  # pack then finds too few audio places
        group = group.view(input_ids.shape)
    elif isinstance(placeholder_counts, Integral) and placeholder_counts is not True and placeholder_counts == 1:
        number = torch.arange(1, input_ids.numel() + 1, dtype=torch.int32, device=input_ids.device)
        group = number.view(input_ids.shape) * is_audio
    else:
        raise ValueError(f"placeholder_counts must be None, 1 or a tensor, got {placeholder_counts!r}")
    return group if kept is None else group.masked_fill_(~kept, -1)


def _counts_match(group: Tensor, counts: Tensor, shape: torch.Size, cu_seqlens: Tensor | None) -> Tensor:
    """Return whether every audio has its placeholders consecutively in one sample, as a bool tensor on the device."""
    row = torch.arange(group.shape[0], dtype=torch.int64, device=group.device)
    if len(shape) == 2:
        first = row % max(shape[1], 1) == 0
    else:
        first = row == 0
        if cu_seqlens is not None:
            bounds = torch.nn.functional.pad(torch.zeros_like(first), (0, 1))
            first |= bounds.index_fill(0, cu_seqlens.long().clamp(0, group.shape[0]), True)[:-1]
    runs = (group > 0) & (first | (group != group.roll(1)))
    # Every audio then has at least one placeholder, so an equal number of runs and audios means one run per audio.
    same = (counts >= 1).all() & ((group > 0).sum() == counts.sum())
    return same & (runs.sum() == counts.shape[0])


def _explain_counts(is_audio: Tensor, counts: Tensor, shape: torch.Size, cu_seqlens: Tensor | None) -> NoReturn:
    """Raise an error that names the sample whose placeholders do not match the counts."""
    wanted, audio = counts.tolist(), 0
    for i, count in enumerate(wanted):
        if count < 1:
            raise ValueError(f"placeholder_counts must be at least 1, got {count} at index {i}")
    ranges = sequence_ranges(shape, cu_seqlens, None)
    is_audio = is_audio.cpu()
    for sample, (begin, end) in enumerate(ranges):
        places = is_audio[begin:end].nonzero()[:, 0].tolist()
        done = 0
        while done < len(places):
            left = len(places) - done
            if audio == len(wanted):
                raise ValueError(
                    f"placeholder_counts must match the placeholders: sample {sample} has {len(places)} of them, "
                    f"{left} more than the {len(wanted)} audios need"
                )
            count = wanted[audio]
            if count > left:
                raise ValueError(
                    f"placeholder_counts must match the placeholders: sample {sample} has {left} of its {len(places)} "
                    f"left for audio {audio}, which needs {count}"
                )
            if places[done + count - 1] - places[done] != count - 1:
                raise ValueError(
                    f"the {count} placeholders of audio {audio} must be next to each other, but sample {sample} has "
                    f"others between its positions {places[done]} and {places[done + count - 1]}"
                )
            done += count
            audio += 1
    raise ValueError(
        f"placeholder_counts must match the placeholders: it has {len(wanted)} audios, but there are placeholders for "
        f"only {audio} up to the last sample, {len(ranges) - 1}"
    )

"""Row groups of token ids: which rows are text, which belong to which audio, and which are padding."""

from __future__ import annotations

import os
from typing import NoReturn

import torch
from torch import Tensor

from fastcompress.checks import (
    INDEX_DTYPES,
    check_dense,
    check_int64,
    check_layout,
    check_layout_values,
    check_same_device,
    sequence_ranges,
)


def check_ids(name: str, ids: Tensor, shape: torch.Size | None = None) -> None:
    check_dense(name, ids)
    if ids.dtype not in INDEX_DTYPES:
        raise TypeError(f"{name} must be int32 or int64, got {ids.dtype}")
    if shape is not None and ids.shape != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, got {list(ids.shape)}")


def values_are_checked(tensor: Tensor) -> bool:
    """Whether the values of a tensor are to be checked: on the host always, on a device where that is asked for."""
    if torch.compiler.is_compiling():
        return False
    return tensor.device.type == "cpu" or os.environ.get("FASTCOMPRESS_CHECK") == "1"


def row_groups(
    input_ids: Tensor,
    placeholder: int,
    *,
    attention_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    placeholder_counts: Tensor | int | None = None,
) -> Tensor:
    """Row groups of token ids: -1 where the mask is 0, 0 for text, positive for audio, where neighbouring rows of one
    number are one audio.

    Args:
        input_ids: ``[B, L]`` padded or ``[N]`` packed, int32 or int64.
        placeholder: the id that stands for audio.
        attention_mask: ``[B, L]``, 0 for padding on either side.
        cu_seqlens: ``[B + 1]`` int32 or int64, with packed input; ``None``: one sample.
        placeholder_counts: how placeholders are audios. ``None``: each run of them in a sample is one. 1: each is one.
            ``[A]`` int32 or int64: audio ``i`` has so many, one after the other, so that audios next to each other stay
            apart. Counts that do not match are an error, but on a GPU (unless ``FASTCOMPRESS_CHECK=1``) they make all
            audio -1, since reading them would wait for it; :func:`pack` with ``compact`` reads them.

    Returns:
        int32 of the shape of ``input_ids``.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a shape, device or value that does not fit; counts that do not match the placeholders name the
            sample and both numbers.
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
    check_int64("placeholder", placeholder)
    if input_ids.dim() not in (1, 2):
        raise ValueError(f"input_ids must have shape [B, L] or [N], got {list(input_ids.shape)}")
    check_layout(input_ids, 1, cu_seqlens, None, attention_mask)
    kept = None if attention_mask is None else attention_mask.bool()
    is_audio = input_ids.long() == placeholder  # one beyond int32 is no id of that dtype
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
        elif group.is_cuda:
            group = torch.where(matches | ~flat, group, -1)  # so that places and audios differ in number
        else:
            torch._assert_async(matches, "placeholder_counts does not match the placeholders of input_ids")
        group = group.view(input_ids.shape)
    elif isinstance(placeholder_counts, int) and not isinstance(placeholder_counts, bool) and placeholder_counts == 1:
        number = torch.arange(1, input_ids.numel() + 1, dtype=torch.int32, device=input_ids.device)
        group = number.view(input_ids.shape) * is_audio
    else:
        raise ValueError(f"placeholder_counts must be None, 1 or a tensor, got {placeholder_counts!r}")
    return group if kept is None else group.masked_fill_(~kept, -1)


def _counts_match(group: Tensor, counts: Tensor, shape: torch.Size, cu_seqlens: Tensor | None) -> Tensor:
    """Whether each audio has its placeholders next to each other in one sample, a bool on their device."""
    row = torch.arange(group.shape[0], device=group.device)
    if len(shape) == 2:
        first = row % max(shape[1], 1) == 0
    else:
        first = row == 0
        if cu_seqlens is not None:
            bounds = torch.nn.functional.pad(torch.zeros_like(first), (0, 1))
            first |= bounds.index_fill(0, cu_seqlens.long().clamp(0, group.shape[0]), True)[:-1]
    runs = (group > 0) & (first | (group != group.roll(1)))
    # With these, every audio has a placeholder, and so many runs as audios means one for each.
    same = (counts >= 1).all() & ((group > 0).sum() == counts.sum())
    return same & (runs.sum() == counts.shape[0])


def _explain_counts(is_audio: Tensor, counts: Tensor, shape: torch.Size, cu_seqlens: Tensor | None) -> NoReturn:
    """Says which sample's placeholders are not those of whole audios."""
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
                    f"sample {sample} has {len(places)} placeholders, {left} more than the {len(wanted)} audios of "
                    "placeholder_counts account for"
                )
            count = wanted[audio]
            if count > left:
                raise ValueError(
                    f"sample {sample} has {len(places)} placeholders and {left} left for audio {audio}, but "
                    f"placeholder_counts has {count} for it"
                )
            if places[done + count - 1] - places[done] != count - 1:
                raise ValueError(
                    f"the {count} placeholders of audio {audio} must be next to each other, but sample {sample} has "
                    f"others between its positions {places[done]} and {places[done + count - 1]}"
                )
            done += count
            audio += 1
    raise ValueError(
        f"placeholder_counts has {len(wanted)} audios, but the samples have placeholders for only {audio}: none is "
        f"left after sample {len(ranges) - 1}, the last"
    )

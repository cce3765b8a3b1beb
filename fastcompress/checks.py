"""Checks of arguments. Each error names the argument and the values.

``check_*_values`` read tensors and so synchronize; they run in the reference, and to explain why a compiled kernel
refused its input.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastcompress.segments import Segments

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
INDEX_DTYPES = (torch.int32, torch.int64)


def check_float(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.dtype not in DTYPES:
        raise TypeError(f"{name} must be float32, float16, bfloat16 or float64, got {x.dtype}")


def check_same_device(name: str, tensor: Tensor, x: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.device != x.device:
        raise ValueError(f"{name} must be on the device of the input, {x.device}, got {tensor.device}")


def _check_index(name: str, tensor: Tensor, like: Tensor, shape: tuple[int, ...] | None) -> None:
    check_same_device(name, tensor, like)
    if tensor.dtype not in INDEX_DTYPES:
        raise TypeError(f"{name} must be int32 or int64, got {tensor.dtype}")
    if shape is not None and tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, got {list(tensor.shape)}")


def check_layout(
    rows: Tensor,
    rank: int,
    cu_seqlens: Tensor | None,
    lengths: Tensor | None,
    attention_mask: Tensor | None = None,
    row_group: Tensor | None = None,
) -> Tensor | None:
    """Checks how a batch is laid out, without reading any value, and returns the row groups.

    Args:
        rows: the input, whose first dimensions are ``[N]`` (packed) or ``[B, T]`` (padded).
        rank: how many dimensions a packed input has; a padded one has one more.
    """
    dim = rows.dim()
    if dim != rank and dim != rank + 1:
        shapes = "[N, D] or [B, T, D]" if rank == 2 else "[N] or [B, T]"
        raise ValueError(f"the input must have shape {shapes}, got {list(rows.shape)}")
    padded = dim == rank + 1
    if cu_seqlens is not None:
        if padded:
            raise ValueError(f"cu_seqlens goes with packed input; padded input {list(rows.shape)} takes lengths")
        _check_index("cu_seqlens", cu_seqlens, rows, None)
        if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
            raise ValueError(f"cu_seqlens must have shape [B + 1], got {list(cu_seqlens.shape)}")
    if lengths is not None:
        if not padded:
            raise ValueError(f"lengths goes with padded input; packed input {list(rows.shape)} takes cu_seqlens")
        _check_index("lengths", lengths, rows, (rows.shape[0],))
    if attention_mask is not None:
        if not padded:
            raise ValueError(f"attention_mask goes with padded input; packed input {list(rows.shape)} takes row_group")
        if lengths is not None or row_group is not None:
            raise ValueError("attention_mask excludes lengths and row_group: they say the same thing")
        check_same_device("attention_mask", attention_mask, rows)
        if attention_mask.shape != rows.shape[:2]:
            raise ValueError(
                f"attention_mask must have shape {list(rows.shape[:2])}, got {list(attention_mask.shape)}"
            )
        return torch.where(attention_mask.bool(), 1, -1).int()
    if row_group is not None:
        check_same_device("row_group", row_group, rows)
        if row_group.dtype != torch.int32:
            raise TypeError(f"row_group must be int32, got {row_group.dtype}")
        if row_group.shape != rows.shape[: dim - rank + 1]:
            wanted = list(rows.shape[: dim - rank + 1])
            raise ValueError(f"row_group must have shape {wanted}, got {list(row_group.shape)}")
        return row_group
    return None


def check_layout_values(shape: torch.Size | tuple[int, ...], cu_seqlens: Tensor | None, lengths: Tensor | None) -> None:
    """Checks the values of ``cu_seqlens`` for rows ``[N, ...]``, or of ``lengths`` for rows ``[B, T, ...]``."""
    if cu_seqlens is not None:
        offsets = cu_seqlens.tolist()
        if offsets[0] != 0:
            raise ValueError(f"cu_seqlens must start at 0, got {offsets[0]}")
        for i, (begin, end) in enumerate(zip(offsets[:-1], offsets[1:], strict=True)):
            if begin > end:
                raise ValueError(f"cu_seqlens must not decrease, got {begin} and then {end} at index {i + 1}")
        if offsets[-1] != shape[0]:
            raise ValueError(f"cu_seqlens must end at the number of rows, {shape[0]}, got {offsets[-1]}")
    if lengths is not None:
        for i, length in enumerate(lengths.tolist()):
            if not 0 <= length <= shape[1]:
                raise ValueError(f"lengths must lie in [0, {shape[1]}], the padded length, got {length} at index {i}")


def check_segments(segments: Segments, like: Tensor) -> None:
    """Checks what can be seen of segments without reading their values."""
    if not isinstance(segments, Segments):
        raise TypeError(f"segments must be fastcompress.Segments, got {type(segments).__name__}")
    for name, tensor in (("segments.starts", segments.starts), ("segments.lengths", segments.lengths)):
        check_same_device(name, tensor, like)
        if tensor.dtype != torch.int64:
            raise TypeError(f"{name} must be int64, got {tensor.dtype}")
        if tensor.dim() != 1:
            raise ValueError(f"{name} must have shape [M], got {list(tensor.shape)}")
    if segments.starts.shape != segments.lengths.shape:
        raise ValueError(
            f"segments.starts and segments.lengths must have one shape, got {list(segments.starts.shape)} "
            f"and {list(segments.lengths.shape)}"
        )


def check_segment_values(starts: Tensor, lengths: Tensor, num_rows: int) -> None:
    """Checks that segments are in order, do not overlap, and lie inside ``num_rows`` rows."""
    end = 0
    for i, (start, length) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True)):
        if length < 0:
            raise ValueError(f"segments.lengths must not be negative, got {length} at index {i}")
        if start < end:
            raise ValueError(
                f"segments.starts must not lie before the end of the last segment, {end}, got {start} at index {i}"
            )
        if start + length > num_rows:
            raise ValueError(
                f"segments must lie inside the input's {num_rows} rows, "
                f"got start {start} and length {length} at index {i}"
            )
        end = start + length

"""Argument checks. Every error names the argument and its value.

The ``check_*_values`` functions read tensor values and therefore synchronize with the device. The reference calls them
before it computes. Compiled kernels check values themselves; after one has rejected its input, these functions run to
raise an error that names the argument and the value.
"""

from __future__ import annotations

import numbers
import os
import sys
from typing import Any, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
INDEX_DTYPES = (torch.int32, torch.int64)
_INTEGERS = (*INDEX_DTYPES, torch.int16, torch.int8, torch.uint8)
#: Label of a row that is left out of the loss, as in ``torch.nn.functional.cross_entropy`` and transformers.
IGNORED_LABEL = -100


def check_dense(name: str, x: Tensor | None) -> None:
    """Check that ``x`` is a strided tensor."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.layout != torch.strided:  # sparse, jagged
        raise TypeError(f"{name} must be a dense tensor, got layout {x.layout}")
    if x.is_nested:  # its layout is also strided
        raise TypeError(
            f"{name} must be a dense tensor, got a nested one of the strided layout; make it jagged with "
            f"torch.nested.as_nested_tensor(list({name}.unbind()), layout=torch.jagged)"
        )


def unnest(
    name: str, x: Tensor, cu_seqlens: Tensor | None = None, lengths: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Return a jagged nested tensor ``[B, j, ...]`` as packed rows and their offsets ``[B + 1]``.

    Any other tensor is returned unchanged, with ``cu_seqlens``.
    """
    if not isinstance(x, Tensor) or not x.is_nested or x.layout != torch.jagged:
        return x, cu_seqlens
    nested: Any = x  # a subclass with more methods
    if cu_seqlens is not None or lengths is not None:
        raise ValueError(f"{name} is nested and has its own sequences: pass neither cu_seqlens nor lengths with it")
    if nested.lengths() is not None or nested._ragged_idx != 1:
        raise ValueError(
            f"{name} must be nested as [B, j, ...] without holes; copy it with "
            f"torch.nested.as_nested_tensor(list({name}.unbind()), layout=torch.jagged)"
        )
    return nested.values(), nested.offsets()


def check_float(name: str, x: Tensor | None) -> None:
    """Check that ``x`` is a strided tensor of one of ``DTYPES``."""
    check_dense(name, x)
    assert x is not None
    if x.dtype not in DTYPES:
        raise TypeError(f"{name} must be float32, float16, bfloat16 or float64, got {x.dtype}")


def check_integers(name: str, x: Tensor, bools: bool = False) -> None:
    """Check that a tensor has an integer dtype of any width, or bool if ``bools`` is true."""
    check_dense(name, x)
    if x.dtype not in _INTEGERS and not (bools and x.dtype == torch.bool):
        raise TypeError(f"{name} must be {'bool or integer' if bools else 'integers'}, got {x.dtype}")


def as_number(name: str, value: float) -> float:
    """Return a real number, which may be infinite, as a Python number; a NumPy number, for example, is converted.

    NaN and numbers too large for float64 raise ``ValueError``.
    """
    if type(value) not in (int, float, torch.SymInt, torch.SymFloat):
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise TypeError(f"{name} must be a number, got {value!r}")
        value = int(value) if isinstance(value, numbers.Integral) else float(value)
    is_int = isinstance(value, int)
    if (isinstance(value, float) and value != value) or (is_int and abs(value) > sys.float_info.max):
        raise ValueError(f"{name} must be a number, got {value}")
    return value


def as_integer(name: str, value: int | None, error: type[Exception] = TypeError) -> int:
    """Return an integer as a Python ``int``; a NumPy integer, for example, is converted."""
    if type(value) in (int, torch.SymInt):
        return cast(int, value)
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise error(f"{name} must be an integer, got {value!r}")
    return int(value)


def as_int64(name: str, value: int | None) -> int:
    """Return an integer that is passed to an op as int64."""
    value = as_integer(name, value)
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{name} must fit in 64 bits, got {value}")
    return value


def as_whole(name: str, value: int | None, least: int) -> int:
    """Return an integer of at least ``least`` that is passed to an op as int64."""
    value = as_integer(name, value, ValueError)
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    if isinstance(value, int) and value >= 2**63:
        raise ValueError(f"{name} must fit in 64 bits, got {value}")
    return value


def as_optional_whole(name: str, value: int | None, least: int) -> int | None:
    """Return ``None``, or an integer like ``as_whole``."""
    return None if value is None else as_whole(name, value, least)


def is_readable(tensor: Tensor) -> bool:
    """Return whether a tensor has values that the host can read: false while a program is traced."""
    if torch.compiler.is_compiling() or isinstance(tensor, FakeTensor) or tensor.is_meta:
        return False
    return not torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def values_are_checked(tensor: Tensor) -> bool:
    """Return whether to check the values of a tensor: always on the CPU, elsewhere if ``FASTCOMPRESS_CHECK=1``."""
    if not is_readable(tensor) or is_captured(tensor):
        return False
    return tensor.device.type == "cpu" or checks_at_once(tensor)


def checks_at_once(tensor: Tensor) -> bool:
    """Return whether to check values on the device of a tensor, which synchronizes.

    This is so with ``FASTCOMPRESS_CHECK=1``, except while a CUDA graph is captured.
    """
    return os.environ.get("FASTCOMPRESS_CHECK") == "1" and not is_captured(tensor)


def is_captured(tensor: Tensor) -> bool:
    """Return whether a CUDA graph is being captured, where nothing can be read."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def as_mask(name: str, mask: Tensor) -> Tensor:
    """Return a mask, which is 1 for rows to keep and 0 for others, as bool.

    Other values raise ``ValueError``: additive masks, whose 0 keeps a row, would be inverted. A mask of bools is not
    read. A mask of floats is read on every device, and by an assertion in a traced program; one of integers, which
    additive masks never are, where ``values_are_checked``.
    """
    if mask.dtype == torch.bool:
        return mask
    if mask.is_complex():
        raise TypeError(f"{name} must be bool, integers or floating point, got {mask.dtype}")
    kept = mask != 0
    fix = f"1 keeps a row and 0 drops it; an additive mask becomes one by `{name} >= 0`"
    if torch.compiler.is_compiling():
        if mask.is_floating_point():
            torch._assert_async((mask == kept).all(), f"{name} must be bool or contain only 0 and 1: {fix}")
    elif values_are_checked(mask) or (mask.is_floating_point() and is_readable(mask) and not is_captured(mask)):
        wrong = mask != kept
        if bool(wrong.any()):
            raise ValueError(f"{name} must be bool or contain only 0 and 1, got {mask[wrong][0].item():g}: {fix}")
    return kept


def check_not_batched(op: str, x: Tensor) -> None:
    """Check that an op whose result has a size that depends on values does not run under ``torch.func.vmap``."""
    if not torch.compiler.is_compiling() and torch._C._functorch.is_batchedtensor(x):
        raise NotImplementedError(f"{op} does not support torch.func.vmap: the size of its result depends on values")


def read_count(count: Tensor) -> int:
    """Read a count from its device; a traced program keeps it symbolic."""
    value = cast(int, count.item())
    torch._check(value >= 0)  # torch.export cannot know
    return value


def check_same_device(name: str, tensor: Tensor, x: Tensor) -> None:
    """Check that ``tensor`` is a strided tensor on the device of ``x``."""
    check_dense(name, tensor)
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
    """Check the layout arguments of a batch without reading tensor values, except those of a mask (``as_mask``).

    Args:
        rows: The input. Its leading dimensions are ``[N]`` (packed) or ``[B, T]`` (padded).
        rank: Number of dimensions of a packed input; a padded input has one more.
        cu_seqlens: ``[B + 1]`` int32 or int64, or ``None``.
        lengths: ``[B]`` int32 or int64, or ``None``.
        attention_mask: ``[B, T]``, 1 for rows to keep and 0 for others (``as_mask``), or ``None``.
        row_group: int32 of the leading shape, or ``None``.

    Returns:
        The row groups, int32 of the leading shape, or ``None`` if there is neither a mask nor a row group. A mask
        becomes 1 for kept rows and -1 for dropped rows.
    """
    dim = rows.dim()
    if dim != rank and dim != rank + 1:
        shapes = "[N, D] or [B, T, D]" if rank == 2 else "[N] or [B, T]"
        raise ValueError(f"the input must have shape {shapes}, got {list(rows.shape)}")
    padded = dim == rank + 1
    if cu_seqlens is not None:
        if padded:
            raise ValueError(f"cu_seqlens is for packed input; padded input {list(rows.shape)} takes lengths")
        _check_index("cu_seqlens", cu_seqlens, rows, None)
        if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
            raise ValueError(f"cu_seqlens must have shape [B + 1], got {list(cu_seqlens.shape)}")
    if lengths is not None:
        if not padded:
            raise ValueError(f"lengths is for padded input; packed input {list(rows.shape)} takes cu_seqlens")
        _check_index("lengths", lengths, rows, (rows.shape[0],))
    if attention_mask is not None:
        if not padded:
            raise ValueError(f"attention_mask is for padded input; packed input {list(rows.shape)} takes row_group")
        if lengths is not None or row_group is not None:
            raise ValueError("attention_mask cannot be combined with lengths or row_group: pass one of them")
        check_same_device("attention_mask", attention_mask, rows)
        if attention_mask.shape != rows.shape[:2]:
            raise ValueError(f"attention_mask must have shape {list(rows.shape[:2])}, got {list(attention_mask.shape)}")
        return torch.where(as_mask("attention_mask", attention_mask), 1, -1).int()
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
    """Check the values of ``cu_seqlens`` for rows ``[N, ...]``, or of ``lengths`` for rows ``[B, T, ...]``."""
    if cu_seqlens is not None:
        check_offsets("cu_seqlens", cu_seqlens.tolist(), shape[0], "the number of rows")
    if lengths is not None:
        for i, length in enumerate(lengths.tolist()):
            if not 0 <= length <= shape[1]:
                raise ValueError(f"lengths must lie in [0, {shape[1]}], the padded length, got {length} at index {i}")


def check_values_of_rows(name: str, values: Tensor, x: Tensor) -> None:
    """Check floating-point values, one per row of ``x`` ``[..., D]``."""
    check_float(name, values)
    check_same_device(name, values, x)
    if values.shape != x.shape[:-1]:
        raise ValueError(f"{name} must have shape {list(x.shape[:-1])}, one value per row, got {list(values.shape)}")


def check_segment_values(starts: Tensor, lengths: Tensor, num_rows: int) -> None:
    """Check that segments are in order, do not overlap, and lie inside ``num_rows`` rows."""
    end = 0
    for i, (start, length) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True)):
        if length < 0:
            raise ValueError(f"segments.lengths must not be negative, got {length} at index {i}")
        if start < end:
            raise ValueError(
                f"segments.starts must not lie before the end of the previous segment, {end}, got {start} at index {i}"
            )
        if start + length > num_rows:
            raise ValueError(
                f"segments must lie inside the input's {num_rows} rows, "
                f"got start {start} and length {length} at index {i}"
            )
        end = start + length


def check_token_values(starts: Tensor, lengths: Tensor, num_rows: int) -> None:
    """Check the rows that tokens cover: not empty, in order, and inside ``num_rows`` rows.

    A token may share its first row with the tokens before it, and no other row.
    """
    end = 1
    for i, (start, length) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True)):
        if length < 1:
            raise ValueError(f"lengths must be at least 1, got {length} at index {i}")
        if start < end - 1:
            raise ValueError(
                f"starts must not lie before the last row of the previous token, {end - 1}, got {start} at index {i}"
            )
        if start + length > num_rows:
            raise ValueError(
                f"tokens must lie inside the input's {num_rows} rows, "
                f"got start {start} and length {length} at index {i}"
            )
        end = start + length


def sequence_ranges(shape: torch.Size, cu_seqlens: Tensor | None, lengths: Tensor | None) -> list[tuple[int, int]]:
    """Return (first row, end row) of each sequence, for rows of shape ``[N]`` or ``[B, T]``."""
    if len(shape) == 2:
        padded = shape[1]
        sizes = [padded] * shape[0] if lengths is None else lengths.tolist()
        return [(b * padded, b * padded + size) for b, size in enumerate(sizes)]
    offsets = [0, shape[0]] if cu_seqlens is None else cu_seqlens.tolist()
    return list(zip(offsets[:-1], offsets[1:], strict=True))


def check_offsets(name: str, values: list[int], end: int, end_name: str, exact: bool = True) -> None:
    """Check the values of offsets ``[A + 1]``, which must end at ``end``, or at most there if ``exact`` is false."""
    if values[0] != 0:
        raise ValueError(f"{name} must start at 0, got {values[0]}")
    for i, (before, after) in enumerate(zip(values[:-1], values[1:], strict=True)):
        if before > after:
            raise ValueError(f"{name} must not decrease, got {before} and then {after} at index {i + 1}")
    if values[-1] != end if exact else values[-1] > end:
        raise ValueError(f"{name} must end at {'' if exact else 'or before '}{end_name}, {end}, got {values[-1]}")


def check_pack_values(
    row_group: Tensor,
    ids: Tensor | None,
    cu_seqlens: Tensor | None,
    lengths: Tensor | None,
    audio_cu_seqlens: Tensor,
    num_embeddings: int,
    num_audio_rows: int,
    compact: bool,
) -> None:
    """Check the values of the inputs of ``fastcompress.pack``. Errors name the sample."""
    check_layout_values(row_group.shape, cu_seqlens, lengths)
    check_offsets(
        "audio_cu_seqlens", audio_cu_seqlens.tolist(), num_audio_rows, "the number of audio rows", exact=compact
    )
    flat_row_group = row_group.reshape(-1).cpu()
    flat_ids = None if ids is None else ids.reshape(-1).cpu()
    num_audios, audios = audio_cu_seqlens.shape[0] - 1, 0
    ranges = sequence_ranges(row_group.shape, cu_seqlens, lengths)
    for sample, (begin, end) in enumerate(ranges):
        group = flat_row_group[begin:end]
        if flat_ids is not None:
            wrong = (group == 0) & ((flat_ids[begin:end] < 0) | (flat_ids[begin:end] >= num_embeddings))
            if wrong.any():
                position = int(wrong.nonzero()[0])
                raise ValueError(
                    f"input_ids must lie in [0, {num_embeddings}), the rows of embedding, got "
                    f"{int(flat_ids[begin + position])} in sample {sample} at position {position}"
                )
        starts = group > 0
        starts[1:] &= group[1:] != group[:-1]
        here = int(starts.sum())
        if audios + here > num_audios:
            raise ValueError(
                f"sample {sample} needs {here} audios after the {audios} of the samples before it, but audio has only "
                f"{num_audios} audios"
            )
        audios += here
    if audios < num_audios:
        raise ValueError(
            f"audio has {num_audios} audios, but the samples have only {audios} places for them: audio {audios} has "
            f"no place after sample {len(ranges) - 1}, the last"
        )

"""Results of the ops: ``Segments`` (where the segments are) and ``Pooled`` (their values)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastcompress.checks import as_integer, as_number, check_same_device, read_count


@dataclass(eq=False, repr=False)
class Segments:
    """The segments of a batch, in order.

    Rows are numbered as in ``x.reshape(-1, D)``, where ``x`` is the segmented input. Segments never overlap and never
    cross a sequence. With ``compact=False``, ``M`` is an upper bound of the number of segments, ``cu_segments[-1]`` is
    the true number, and the trailing segments are empty (``lengths`` 0, ``starts`` equal to ``num_rows``).

    Attributes:
        starts: First row of each segment, ``[M]`` int64.
        lengths: Number of frames of each segment, ``[M]`` int64.
        cu_segments: Number of segments before each sequence, ``[B + 1]`` int32.
        frame_cu_seqlens: Number of frames before each sequence, ``[B + 1]`` int32. Rows that a mask or a row group
            drops are counted; padding after ``lengths`` is not.
        num_rows: Number of rows of the input.
        padded_length: ``T`` of a padded input ``[B, T, D]``; ``None`` for packed input.
    """

    starts: Tensor
    lengths: Tensor
    cu_segments: Tensor
    frame_cu_seqlens: Tensor
    num_rows: int
    padded_length: int | None = None

    @property
    def counts(self) -> Tensor:
        """Number of segments of each sequence, ``[B]`` int32."""
        return self.cu_segments.diff()

    def ids(self) -> Tensor:
        """Return the segment index of each row, ``[num_rows]`` int64; -1 for padding and dropped rows."""
        rows = torch.arange(self.num_rows, dtype=torch.int64, device=self.starts.device)
        # Append an empty segment, so that indexing works even without any segment.
        starts = torch.cat([self.starts, self.starts.new_full((1,), self.num_rows)])
        ends = starts + torch.cat([self.lengths, self.lengths.new_zeros(1)])
        index = torch.searchsorted(starts, rows, right=True) - 1
        inside = (index >= 0) & (rows < ends[index.clamp_min(0)])
        return torch.where(inside, index, -1)

    def seconds(self, frame_rate: float) -> Tensor:
        """Return the start and end time of each segment, ``[M, 2]`` fp64, in seconds.

        Times are relative to the first row of the sequence. Rows that a mask or a row group drops count as time.

        Args:
            frame_rate: Frames per second; positive.

        Raises:
            TypeError: If ``frame_rate`` is not a number.
            ValueError: If ``frame_rate`` is not positive.
        """
        frame_rate = as_number("frame_rate", frame_rate)
        if not frame_rate > 0:
            raise ValueError(f"frame_rate must be positive, got {frame_rate}")
        num_sequences = self.cu_segments.shape[0] - 1
        if num_sequences == 0:
            return self.starts.new_zeros((self.starts.shape[0], 2), dtype=torch.float64)
        index = torch.arange(self.starts.shape[0], dtype=torch.int32, device=self.starts.device)
        sequence = torch.searchsorted(self.cu_segments, index, right=True) - 1
        sequence = sequence.clamp(0, num_sequences - 1)  # trailing empty segments of a result that is not compact
        if self.padded_length is None:
            origin = self.frame_cu_seqlens[sequence].long()
        else:
            origin = sequence * self.padded_length
        start = self.starts - origin
        return torch.stack([start, start + self.lengths], dim=1).double() / frame_rate

    def __repr__(self) -> str:
        if not isinstance(self.starts, Tensor):  # in a tree of torch.export
            return object.__repr__(self)
        what = f"{count_of(self.num_rows, 'row')} in {count_of(self.cu_segments.shape[0] - 1, 'sequence')}"
        device = "" if self.starts.device.type == "cpu" else f", {self.starts.device}"
        return f"Segments({count_of(self.starts.shape[0], 'segment')} of {what}{device})"


def row_segments(starts: Tensor, lengths: Tensor, num_rows: int) -> Segments:
    """Make ``Segments`` of one sequence of ``num_rows`` rows from starts and lengths ``[M]`` int64."""
    ends = torch.arange(2, dtype=torch.int32, device=starts.device)
    return Segments(starts, lengths, ends * starts.shape[0], ends * num_rows, num_rows)


def check_segments(segments: Segments, like: Tensor) -> None:
    """Check types, shapes, dtypes and devices of segments without reading their values."""
    if not isinstance(segments, Segments):
        raise TypeError(f"segments must be fastcompress.Segments, got {type(segments).__name__}")
    for name, tensor in (("segments.starts", segments.starts), ("segments.lengths", segments.lengths)):
        check_same_device(name, tensor, like)
        if tensor.dtype != torch.int64:
            raise TypeError(f"{name} must be int64, got {tensor.dtype}")
        if tensor.dim() != 1:
            raise ValueError(f"{name} must have shape [M], got {list(tensor.shape)}")
    if as_integer("segments.num_rows", segments.num_rows, ValueError) < 0:
        raise ValueError(f"segments.num_rows must not be negative, got {segments.num_rows}")
    if segments.starts.shape != segments.lengths.shape:
        raise ValueError(
            f"segments.starts and segments.lengths must have the same shape, got {list(segments.starts.shape)} "
            f"and {list(segments.lengths.shape)}"
        )


class Tokens:
    """Base class of packed results: tokens ``values`` ``[M, D]`` and their offsets ``cu_seqlens`` ``[B + 1]``.

    ``len()`` of a result is the number ``M`` of its tokens. Its text form has only sizes, so that printing reads
    nothing from the device.
    """

    if TYPE_CHECKING:  # at run time, dataclasses would take a property for the default of a field
        values: Tensor

        @property
        def cu_seqlens(self) -> Tensor: ...

    @property
    def max_seqlen(self) -> int:
        """Largest number of tokens of a sequence, as variable-length attention expects it; read from the device."""
        counts = self.cu_seqlens.diff()
        return read_count(counts.max()) if counts.shape[0] else 0

    @property
    def mask(self) -> Tensor:
        """True for the tokens of ``to_padded``, ``[B, S]`` bool; false for padding."""
        column = torch.arange(self.max_seqlen, dtype=torch.int64, device=self.cu_seqlens.device)
        return column < self.cu_seqlens.diff()[:, None]

    def to_padded(self, return_mask: bool = False) -> tuple[Tensor, Tensor]:
        """Return the tokens as a padded batch.

        Args:
            return_mask: Whether to return a mask instead of the numbers of tokens.

        Returns:
            The tokens ``[B, S, D]``, with trailing zeros for padding, and the number of tokens of each sequence,
            ``[B]`` int32, or ``mask``. ``S`` is the largest number of tokens of a sequence; it is read from the device.
        """
        mask = self.mask
        return self._pad(self.values, mask), mask if return_mask else self.cu_seqlens.diff()

    def _pad(self, values: Tensor, mask: Tensor) -> Tensor:
        """Return values of the tokens, ``[M, ...]``, as ``[B, S, ...]`` with zeros where ``mask`` is false."""
        # All padding reads one appended zero row, which also exists if there is no token.
        rows = torch.cat([values, values.new_zeros((1, *values.shape[1:]))])
        column = torch.arange(mask.shape[1], dtype=torch.int64, device=mask.device)
        return rows[torch.where(mask, self.cu_seqlens[:-1, None].long() + column, values.shape[0])]

    def to_nested(self) -> Tensor:
        """Return the tokens as a jagged nested tensor ``[B, j, D]``; their number is read from the device."""
        offsets = self.cu_seqlens.long()
        return torch.nested.nested_tensor_from_jagged(self.values[: read_count(offsets[-1])], offsets)

    def __len__(self) -> int:
        return self.values.shape[0]

    def __repr__(self) -> str:
        if not isinstance(self.values, Tensor):  # in a tree of torch.export
            return object.__repr__(self)
        tokens, width = self.values.shape
        what = f"{count_of(tokens, 'token')} of {count_of(self.cu_seqlens.shape[0] - 1, 'sequence')}, width {width}"
        return f"{type(self).__name__}({what}{dtype_and_device(self.values)})"


def count_of(count: int, what: str) -> str:
    """Return a count with its noun: ``"1 token"``, ``"2 tokens"``."""
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def dtype_and_device(tensor: Tensor) -> str:
    """Return the dtype of a tensor, and its device unless that is the CPU, each after a comma."""
    device = "" if tensor.device.type == "cpu" else f", {tensor.device}"
    return f", {str(tensor.dtype).removeprefix('torch.')}{device}"


@dataclass(eq=False, repr=False)
class Pooled(Tokens):
    """Pooled tokens, packed, and the segments they were pooled from.

    Attributes:
        values: Tokens, ``[M, D]`` in the dtype of the input, one row per segment.
        segments: Segment of each row of ``values``.
    """

    values: Tensor
    segments: Segments

    @property
    def cu_seqlens(self) -> Tensor:
        """Number of tokens before each sequence, ``[B + 1]`` int32, as variable-length attention expects it."""
        return self.segments.cu_segments

    def padded_lengths(self) -> Tensor:
        """Return the number of frames of each token of ``to_padded``, ``[B, S]`` int64; 0 for padding.

        Their logarithm is what proportional attention adds to the scores of a token.
        """
        return self._pad(self.segments.lengths, self.mask)


for _cls in (Segments, Pooled):
    torch.export.register_dataclass(_cls, serialized_type_name=f"fastcompress.{_cls.__name__}")

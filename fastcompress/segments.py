"""Results of the ops: ``Segments`` (where the segments are) and ``Pooled`` (their values)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastcompress.checks import check_number, check_same_device


@dataclass(eq=False)
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
        rows = torch.arange(self.num_rows, device=self.starts.device)
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
        check_number("frame_rate", frame_rate)
        if not frame_rate > 0:
            raise ValueError(f"frame_rate must be positive, got {frame_rate}")
        num_sequences = self.cu_segments.shape[0] - 1
        if num_sequences == 0:
            return self.starts.new_zeros((self.starts.shape[0], 2), dtype=torch.float64)
        index = torch.arange(self.starts.shape[0], device=self.starts.device, dtype=torch.int32)
        sequence = torch.searchsorted(self.cu_segments, index, right=True) - 1
        sequence = sequence.clamp(0, num_sequences - 1)  # trailing empty segments of a result that is not compact
        if self.padded_length is None:
            origin = self.frame_cu_seqlens[sequence].long()
        else:
            origin = sequence * self.padded_length
        start = self.starts - origin
        return torch.stack([start, start + self.lengths], dim=1).double() / frame_rate


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
    if not isinstance(segments.num_rows, (int, torch.SymInt)) or segments.num_rows < 0:
        raise ValueError(f"segments.num_rows must be a whole number, got {segments.num_rows!r}")
    if segments.starts.shape != segments.lengths.shape:
        raise ValueError(
            f"segments.starts and segments.lengths must have the same shape, got {list(segments.starts.shape)} "
            f"and {list(segments.lengths.shape)}"
        )


@dataclass(eq=False)
class Pooled:
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

    def to_padded(self) -> tuple[Tensor, Tensor]:
        """Return the tokens as ``[B, S, D]``, with zeros for padding, and their number per sequence, ``[B]`` int32.

        ``S`` is the largest number of tokens of a sequence; it is read from the device.
        """
        return pad_tokens(self.values, self.cu_seqlens)


def pad_tokens(values: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """Return packed tokens ``[M, D]`` as ``[B, S, D]``, padded with trailing zeros, and their counts ``[B]`` int32."""
    counts = cu_seqlens.diff()
    longest = int(counts.max()) if counts.numel() else 0
    column = torch.arange(longest, device=counts.device)
    inside = column < counts[:, None]
    # All padding reads one appended zero row, which also exists if there is no token.
    rows = torch.cat([values, values.new_zeros((1, values.shape[1]))])
    index = torch.where(inside, cu_seqlens[:-1, None].long() + column, values.shape[0])
    return rows[index], counts


for _cls in (Segments, Pooled):
    torch.export.register_dataclass(_cls, serialized_type_name=f"fastcompress.{_cls.__name__}")

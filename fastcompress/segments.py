"""What the ops return: :class:`Segments` (where the segments are) and :class:`Pooled` (their values)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastcompress.checks import check_number, check_same_device


@dataclass(eq=False)
class Segments:
    """The segments of a batch, in order.

    A row is a row of ``x.reshape(-1, D)``, the input that was segmented. Segments never overlap and never cross a
    sequence. Without ``compact`` the tensors have the length of an upper bound and the tail is empty segments
    (``lengths`` 0, ``starts`` ``num_rows``); ``cu_segments[-1]`` is then the true count.

    Attributes:
        starts: ``[M]`` int64, first row of each segment.
        lengths: ``[M]`` int64, frames of each segment.
        cu_segments: ``[B + 1]`` int32, segments before each sequence.
        frame_cu_seqlens: ``[B + 1]`` int32, frames before each sequence. Padding that ``lengths`` leaves out is not
            counted; rows that a mask or a row group drops are.
        num_rows: rows of the input.
        padded_length: ``T`` of a padded input ``[B, T, D]``, ``None`` for a packed one.
    """

    starts: Tensor
    lengths: Tensor
    cu_segments: Tensor
    frame_cu_seqlens: Tensor
    num_rows: int
    padded_length: int | None = None

    @property
    def counts(self) -> Tensor:
        """``[B]`` int32, segments of each sequence."""
        return self.cu_segments.diff()

    def ids(self) -> Tensor:
        """``[num_rows]`` int64, the segment of each row; -1 for a row in none (padding, dropped rows)."""
        rows = torch.arange(self.num_rows, device=self.starts.device)
        # One empty segment behind the last, so that an index always exists, also when there is no segment.
        starts = torch.cat([self.starts, self.starts.new_full((1,), self.num_rows)])
        ends = starts + torch.cat([self.lengths, self.lengths.new_zeros(1)])
        index = torch.searchsorted(starts, rows, right=True) - 1
        inside = (index >= 0) & (rows < ends[index.clamp_min(0)])
        return torch.where(inside, index, -1)

    def seconds(self, frame_rate: float) -> Tensor:
        """``[M, 2]`` fp64, start and end of each segment in seconds from the first row of its sequence.

        A row that a mask or a row group drops takes its time.

        Args:
            frame_rate: frames a second.

        Raises:
            TypeError, ValueError: ``frame_rate`` is no number, or not positive.
        """
        check_number("frame_rate", frame_rate)
        if not frame_rate > 0:
            raise ValueError(f"frame_rate must be positive, got {frame_rate}")
        num_sequences = self.cu_segments.shape[0] - 1
        if num_sequences == 0:
            return self.starts.new_zeros((self.starts.shape[0], 2), dtype=torch.float64)
        index = torch.arange(self.starts.shape[0], device=self.starts.device, dtype=torch.int32)
        sequence = torch.searchsorted(self.cu_segments, index, right=True) - 1
        sequence = sequence.clamp(0, num_sequences - 1)  # the empty tail of a result that is not compact
        if self.padded_length is None:
            origin = self.frame_cu_seqlens[sequence].long()
        else:
            origin = sequence * self.padded_length
        start = self.starts - origin
        return torch.stack([start, start + self.lengths], dim=1).double() / frame_rate


def row_segments(starts: Tensor, lengths: Tensor, num_rows: int) -> Segments:
    """Segments of ``num_rows`` rows, in order, taken as one sequence."""
    ends = torch.arange(2, dtype=torch.int32, device=starts.device)
    return Segments(starts, lengths, ends * starts.shape[0], ends * num_rows, num_rows)


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
    if not isinstance(segments.num_rows, (int, torch.SymInt)) or segments.num_rows < 0:
        raise ValueError(f"segments.num_rows must be a whole number, got {segments.num_rows!r}")
    if segments.starts.shape != segments.lengths.shape:
        raise ValueError(
            f"segments.starts and segments.lengths must have one shape, got {list(segments.starts.shape)} "
            f"and {list(segments.lengths.shape)}"
        )


@dataclass(eq=False)
class Pooled:
    """Pooled tokens, packed, and the segments they come from.

    Attributes:
        values: ``[M, D]``, one row a segment, in the dtype of the input.
        segments: where each row of ``values`` comes from.
    """

    values: Tensor
    segments: Segments

    @property
    def cu_seqlens(self) -> Tensor:
        """``[B + 1]`` int32, tokens before each sequence: what variable-length attention takes."""
        return self.segments.cu_segments

    def to_padded(self) -> tuple[Tensor, Tensor]:
        """``values`` as ``[B, S, D]``, zeros behind each sequence, and the token counts ``[B]`` int32.

        ``S`` is the largest count, which is read from the device.
        """
        return pad_tokens(self.values, self.cu_seqlens)


def pad_tokens(values: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """Packed tokens as ``[B, S, D]``, zeros behind each sequence, and how many each has, ``[B]`` int32."""
    counts = cu_seqlens.diff()
    longest = int(counts.max()) if counts.numel() else 0
    column = torch.arange(longest, device=counts.device)
    inside = column < counts[:, None]
    # One zero row for the padding: also right when there is no token at all.
    rows = torch.cat([values, values.new_zeros((1, values.shape[1]))])
    index = torch.where(inside, cu_seqlens[:-1, None].long() + column, values.shape[0])
    return rows[index], counts


for _cls in (Segments, Pooled):
    torch.export.register_dataclass(_cls, serialized_type_name=f"fastcompress.{_cls.__name__}")

"""Distances and a rule to segments; also segments from boundaries that the caller has."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcompress.checks import check_float, check_integers, check_layout, check_layout_values, check_same_device
from fastcompress.dispatch.call import Op, call
from fastcompress.ops import scalar_rules
from fastcompress.rules import LabelChange, LocalMax, Lookback, Rule, Threshold, as_rule, max_segments
from fastcompress.segments import Segments

_op: Op[tuple[Tensor, Tensor, Tensor]] = torch.ops.fastcompress.select_boundaries.default


def frame_offsets(rows: Tensor, padded: bool, cu_seqlens: Tensor | None, lengths: Tensor | None) -> Tensor:
    """``[B + 1]`` int32: frames before each sequence.

    Raises:
        ValueError: more rows than int32 counts.
    """
    count = rows.shape[0] * rows.shape[1] if padded else rows.shape[0]
    if not torch.compiler.is_compiling() and count >= 2**31:
        raise ValueError(f"the input must have fewer than 2**31 rows, which int32 offsets count, got {count}")
    if not padded:
        if cu_seqlens is None:
            if rows.is_cuda:  # a copy from the host waits for the device, and cannot be in a CUDA graph
                return torch.arange(2, dtype=torch.int32, device=rows.device) * rows.shape[0]
            return torch.tensor([0, rows.shape[0]], dtype=torch.int32, device=rows.device)
        return cu_seqlens.int()
    if lengths is None:
        return torch.arange(rows.shape[0] + 1, dtype=torch.int32, device=rows.device) * rows.shape[1]
    return torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))


def select_boundaries(
    d: Tensor | None,
    rule: Rule | str,
    *,
    labels: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    lengths: Tensor | None = None,
    attention_mask: Tensor | None = None,
    row_group: Tensor | None = None,
    compact: bool = True,
) -> Segments:
    """Segments that a rule finds in distances. Not differentiable.

    Args:
        d: ``[N]`` packed or ``[B, T]`` padded, the distance between each frame and the next
            (:func:`adjacent_distance`); the last of each sequence is not read. ``Uniform`` reads only the shape.
            For ``Lookback`` ``[N, window]`` or ``[B, T, window]``, the distances at lags 1, 2, …; ``None`` for
            ``LabelChange``.
        rule: a rule or its text form.
        labels: integer ``[N]`` or ``[B, T]``, with ``LabelChange``.
        cu_seqlens, lengths: as in :func:`adjacent_distance`.
        attention_mask: ``[B, T]`` with padded input: frames where it is 0 are dropped.
        row_group: int32 of the shape of ``d``. Negative: the row is dropped; 0: a segment of its own; k > 0: the rule
            works inside each run of neighbouring rows of the same k, as if the run were a sequence.
        compact: size the result exactly, which reads the count from the device; else return the upper bound of
            the rule, the tail being empty segments.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a shape, device or value that does not fit, named in the message.
    """
    rule = as_rule(rule)
    if (labels is not None) != isinstance(rule, LabelChange):
        raise ValueError(f"labels go with LabelChange, which needs them, got rule {rule}")
    if rule.scalar:
        return _select_scalar(d, rule, labels, cu_seqlens, lengths, attention_mask, row_group, compact)
    check_float("d", d)
    assert d is not None
    row_group = check_layout(d, 1, cu_seqlens, lengths, attention_mask, row_group)
    if isinstance(rule, LocalMax) and rule.normalize:
        runs = scalar_rules.find_runs(d.shape, d.device, cu_seqlens, lengths, row_group)
        d = scalar_rules.normalize(d.detach().reshape(-1), runs).view(d.shape)
    shape, padded = d.shape, d.dim() == 2
    offsets = frame_offsets(d, padded, cu_seqlens, lengths)
    starts, segment_lengths, cu_segments = call(
        _op,
        (d.detach(), cu_seqlens, lengths, row_group, *rule.op_args(), compact),
        False,
        lambda: check_layout_values(shape, cu_seqlens, lengths),
    )
    return Segments(starts, segment_lengths, cu_segments, offsets, d.numel(), d.shape[1] if padded else None)


def _select_scalar(
    d: Tensor | None,
    rule: Rule,
    labels: Tensor | None,
    cu_seqlens: Tensor | None,
    lengths: Tensor | None,
    attention_mask: Tensor | None,
    row_group: Tensor | None,
    compact: bool,
) -> Segments:
    """By a rule that is no state machine: the rows that start a segment, and then ``min_len`` and ``max_len``."""
    min_len, max_len = getattr(rule, "min_len", 1), getattr(rule, "max_len", None)
    if labels is not None:
        _check_labels(labels)
        rows, flat = labels, labels.new_zeros(0)
    else:
        check_float("d", d)
        assert d is not None
        rows, flat = d.detach(), d.detach().reshape(-1)
        if isinstance(rule, Lookback):
            if d.dim() not in (2, 3) or d.shape[-1] != rule.window:
                raise ValueError(f"d must have shape [..., {rule.window}], a lag each, got {list(d.shape)}")
            rows, flat = rows[..., 0], rows.reshape(-1, rule.window).T
            min_len, max_len = 1, None  # which the rule has seen to
    row_group = check_layout(rows, 1, cu_seqlens, lengths, attention_mask, row_group)
    if isinstance(rule, LabelChange) and rule.blank is not None:
        kept = torch.ones_like(rows, dtype=torch.int32) if row_group is None else row_group
        row_group = torch.where(rows.long() == rule.blank, -1, kept)  # a blank beyond a small dtype is no label of it
    runs = scalar_rules.find_runs(rows.shape, rows.device, cu_seqlens, lengths, row_group)
    mask = scalar_rules.starts(rule, flat, None if labels is None else labels.reshape(-1), runs)
    return segments_from_mask(
        mask.view(rows.shape),
        cu_seqlens=cu_seqlens,
        lengths=lengths,
        row_group=row_group,
        min_len=min_len,
        max_len=max_len,
        compact=compact,
    )


def normalize_distance(
    d: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    lengths: Tensor | None = None,
    attention_mask: Tensor | None = None,
    row_group: Tensor | None = None,
) -> Tensor:
    """Distances scaled to [0, 1] in each sequence, as Segmental CPC and UnsupSeg take them. Not differentiable.

    NaN stays NaN and counts for nothing; where all are alike they become 0. The last of each sequence, which is no
    pair, is scaled with the others but does not decide.

    Args:
        d, cu_seqlens, lengths, attention_mask, row_group: as in :func:`select_boundaries`; a run of rows of one group
            is a sequence.

    Returns:
        A tensor of the shape and dtype of ``d``.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a shape, device or value that does not fit, named in the message.
    """
    check_float("d", d)
    row_group = check_layout(d, 1, cu_seqlens, lengths, attention_mask, row_group)
    runs = scalar_rules.find_checked_runs(d.shape, d.device, cu_seqlens, lengths, row_group)
    return scalar_rules.normalize(d.detach().reshape(-1), runs).view(d.shape)


def _check_labels(labels: Tensor) -> None:
    check_integers("labels", labels)
    _check_rank("labels", labels)


def _check_rank(name: str, tensor: Tensor) -> None:
    if tensor.dim() not in (1, 2):
        raise ValueError(f"{name} must have shape [N] or [B, T], got {list(tensor.shape)}")


def segments_from_mask(
    mask: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    lengths: Tensor | None = None,
    attention_mask: Tensor | None = None,
    row_group: Tensor | None = None,
    min_len: int = 1,
    max_len: int | None = None,
    compact: bool = True,
) -> Segments:
    """Segments from a boundary mask: a frame where ``mask`` is nonzero starts a segment; so does the first frame of
    every sequence.

    Args:
        mask: ``[N]`` packed or ``[B, T]`` padded, bool or integer.
        min_len, max_len: as in :class:`Threshold`.
        cu_seqlens, lengths, attention_mask, row_group, compact: as in :func:`select_boundaries`.

    Returns:
        The segments, as of :func:`select_boundaries`.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a shape, device or value that does not fit, named in the message.
    """
    check_integers("mask", mask, bools=True)
    _check_rank("mask", mask)
    # A boundary at t belongs to the pair (t - 1, t).
    d = torch.nn.functional.pad((mask != 0).float(), (0, 1))[..., 1:]
    return select_boundaries(
        d,
        Threshold(0.5, min_len, max_len),
        cu_seqlens=cu_seqlens,
        lengths=lengths,
        attention_mask=attention_mask,
        row_group=row_group,
        compact=compact,
    )


def segments_from_ids(
    ids: Tensor, *, cu_seqlens: Tensor | None = None, lengths: Tensor | None = None, compact: bool = True
) -> Segments:
    """Segments from an id a frame: each run of equal ids inside a sequence is one; negative ids are in none.

    The inverse of :meth:`Segments.ids` when neighbouring segments have different ids.

    Args:
        ids: ``[N]`` packed or ``[B, T]`` padded, integer.
        cu_seqlens, lengths, compact: as in :func:`select_boundaries`.

    Returns:
        The segments, as of :func:`select_boundaries`.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a shape, device or value that does not fit, named in the message.
    """
    check_integers("ids", ids)
    _check_rank("ids", ids)
    changed = ids != ids.roll(1, dims=-1)
    row_group = torch.where(ids < 0, -1, 1).int()
    return segments_from_mask(changed, cu_seqlens=cu_seqlens, lengths=lengths, row_group=row_group, compact=compact)


def segments_from_starts(
    starts: Tensor, num_rows: int, *, cu_seqlens: Tensor | None = None, compact: bool = True
) -> Segments:
    """Segments of packed input from the rows where they start; each ends where the next one, or the sequence, does.

    Args:
        starts: ``[S]`` int32 or int64 in ``[0, num_rows)``, in any order; the first row of a sequence may be left out.
        num_rows: rows of the packed input.
        cu_seqlens, compact: as in :func:`select_boundaries`.

    Returns:
        The segments, as of :func:`select_boundaries`.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a shape, device or value that does not fit, named in the message.
    """
    if not isinstance(starts, Tensor) or starts.dtype not in (torch.int32, torch.int64):
        got = starts.dtype if isinstance(starts, Tensor) else type(starts).__name__
        raise TypeError(f"starts must be an int32 or int64 tensor, got {got}")
    if starts.dim() != 1:
        raise ValueError(f"starts must have shape [S], got {list(starts.shape)}")
    if isinstance(num_rows, bool) or not isinstance(num_rows, (int, torch.SymInt)):
        raise TypeError(f"num_rows must be an integer, got {num_rows!r}")
    if num_rows < 0:
        raise ValueError(f"num_rows must not be negative, got {num_rows}")
    if not torch.compiler.is_compiling() and num_rows >= 2**31:
        raise ValueError(f"num_rows must be fewer than 2**31, which int32 offsets count, got {num_rows}")
    if cu_seqlens is not None:
        check_same_device("cu_seqlens", cu_seqlens, starts)
    if starts.device.type == "cpu" and not torch.compiler.is_compiling() and starts.numel():
        low, high = int(starts.min()), int(starts.max())
        if low < 0 or high >= num_rows:
            wrong = low if low < 0 else high
            raise ValueError(f"starts must lie in [0, {num_rows}), the rows of the input, got {wrong}")
    mask = torch.zeros(num_rows, dtype=torch.bool, device=starts.device).index_fill(0, starts.long(), True)
    return segments_from_mask(mask, cu_seqlens=cu_seqlens, compact=compact)


def fake_segments(
    like: Tensor,
    num_rows: int,
    num_sequences: int,
    has_row_group: bool,
    rule: str,
    size: int,
    min_len: int,
    max_len: int,
    compact: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Fake starts, lengths and cu_segments of an op that selects."""
    if compact:
        count: int | torch.SymInt = torch.library.get_ctx().new_dynamic_size()
    else:
        count = num_rows if has_row_group else max_segments(rule, size, min_len, max_len, num_rows, num_sequences)
    starts = like.new_empty((count,), dtype=torch.int64)
    return starts, torch.empty_like(starts), like.new_empty((num_sequences + 1,), dtype=torch.int32)


def num_sequences(shape: torch.Size, padded: bool, cu_seqlens: Tensor | None) -> int:
    """B of a batch."""
    if padded:
        return shape[0]
    return 1 if cu_seqlens is None else cu_seqlens.shape[0] - 1


@torch.library.register_fake("fastcompress::select_boundaries")
def _(
    d: Tensor,
    cu_seqlens: Tensor | None,
    lengths: Tensor | None,
    row_group: Tensor | None,
    rule: str,
    size: int,
    threshold: float,
    prominence: float,
    min_len: int,
    max_len: int,
    keep_tail: bool,
    compact: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    sequences = num_sequences(d.shape, d.dim() == 2, cu_seqlens)
    return fake_segments(d, d.numel(), sequences, row_group is not None, rule, size, min_len, max_len, compact)

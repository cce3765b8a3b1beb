"""Select segment boundaries by a rule, and make segments from given boundaries."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcompress.checks import (
    as_integer,
    check_float,
    check_integers,
    check_layout,
    check_layout_values,
    check_same_device,
    values_are_checked,
)
from fastcompress.dispatch.call import Op, call
from fastcompress.ops import scalar_rules
from fastcompress.ops.min_variance import min_variance_boundaries
from fastcompress.rules import LabelChange, LocalMax, Lookback, MinVariance, Rule, Threshold, as_rule, max_segments
from fastcompress.segments import Segments

_op: Op[tuple[Tensor, Tensor, Tensor]] = torch.ops.fastcompress.select_boundaries.default


def frame_offsets(rows: Tensor, padded: bool, cu_seqlens: Tensor | None, lengths: Tensor | None) -> Tensor:
    """Return the number of frames before each sequence, ``[B + 1]`` int32, as a new tensor.

    Args:
        rows: The input, ``[N, ...]`` packed or ``[B, T, ...]`` padded.
        padded: True for padded input.
        cu_seqlens: Offsets of packed input, ``[B + 1]``, or ``None``.
        lengths: Lengths of padded input, ``[B]``, or ``None``.

    Raises:
        ValueError: If there are 2**31 rows or more.
    """
    count = rows.shape[0] * rows.shape[1] if padded else rows.shape[0]
    if not torch.compiler.is_compiling() and count >= 2**31:
        raise ValueError(f"the input must have fewer than 2**31 rows, the limit of int32 offsets, got {count}")
    if not padded:
        if cu_seqlens is None:
            # A copy from the host would synchronize, and is not allowed in a CUDA graph.
            return torch.arange(2, dtype=torch.int32, device=rows.device) * rows.shape[0]
        return cu_seqlens.to(torch.int32, copy=True)
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
    """Select segment boundaries from distances by a rule.

    Args:
        d: Distance between each frame and the next (``adjacent_distance``), ``[N]`` packed or ``[B, T]`` padded;
            the last distance of each sequence is not read. ``Uniform`` reads only the shape. ``Lookback`` and
            ``MinVariance`` need the distances at lags 1 to ``rule.window`` ([`fastcompress.banded_distance`][]),
            ``[N, window]`` or ``[B, T, window]``. ``LabelChange`` takes ``None``.
        rule: A rule or its text form.
        labels: Labels for ``LabelChange``, integer ``[N]`` or ``[B, T]``.
        cu_seqlens: See ``adjacent_distance``.
        lengths: See ``adjacent_distance``.
        attention_mask: Mask of padded input, ``[B, T]``: 1 keeps a frame, 0 drops it; see
            [`fastcompress.segment_pool`][].
        row_group: Row groups, int32 ``[N]`` or ``[B, T]``. Negative: the frame is dropped; 0: it is a segment of its
            own; k > 0: the rule is applied to each run of neighbouring frames of the same k as if it were a sequence.
        compact: If true, size the result exactly, which reads the number of segments from the device. If false, return
            the upper bound of the rule; the trailing segments are empty.

    Returns:
        The segments. They are not differentiable.

    Raises:
        TypeError: If an argument has a wrong type or dtype.
        ValueError: If a shape, device or value is invalid; the message names it.

    Examples:
        >>> segments = select_boundaries(torch.tensor([0.1, 0.9, 0.2, 0.0]), "threshold:0.5")
        >>> segments.starts, segments.lengths
        (tensor([0, 2]), tensor([2, 2]))
    """
    rule = as_rule(rule)
    if (labels is not None) != isinstance(rule, LabelChange):
        raise ValueError(f"labels must be passed with LabelChange, and with no other rule, got rule {rule}")
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
    """Select segments by a scalar rule: find the rows that start a segment, then apply ``min_len`` and ``max_len``."""
    min_len, max_len = getattr(rule, "min_len", 1), getattr(rule, "max_len", None)
    if labels is not None:
        _check_labels(labels)
        rows, flat = labels, labels.new_zeros(0)
    else:
        check_float("d", d)
        assert d is not None
        rows, flat = d.detach(), d.detach().reshape(-1)
        if isinstance(rule, (Lookback, MinVariance)):
            if d.dim() not in (2, 3) or d.shape[-1] != rule.window:
                raise ValueError(f"d must have shape [..., {rule.window}], one distance per lag, got {list(d.shape)}")
            rows, flat = rows[..., 0], rows.reshape(-1, rule.window).T
            min_len, max_len = 1, None  # the rule has applied them itself
    row_group = check_layout(rows, 1, cu_seqlens, lengths, attention_mask, row_group)
    if isinstance(rule, LabelChange) and rule.blank is not None:
        kept = torch.ones_like(rows, dtype=torch.int32) if row_group is None else row_group
        row_group = torch.where(rows.long() == rule.blank, -1, kept)  # int64, because the blank may exceed the dtype
    if isinstance(rule, MinVariance):
        assert d is not None
        mask = min_variance_boundaries(d.detach(), rule, cu_seqlens, lengths, row_group)
    else:
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
    """Scale distances to [0, 1] in each sequence.

    Segmental CPC (arXiv 2106.02170) and UnsupSeg (arXiv 2007.13465) use this scale. NaN stays NaN and does not affect
    the scale. If all distances of a sequence are equal, they become 0. The last distance of a sequence, which has no
    partner, is scaled but does not affect the scale.

    Args:
        d: Distances, ``[N]`` packed or ``[B, T]`` padded; fp32, fp16, bf16 or fp64.
        cu_seqlens: See ``adjacent_distance``.
        lengths: See ``adjacent_distance``.
        attention_mask: See [`select_boundaries`][].
        row_group: See [`select_boundaries`][]; each run of rows of one group is scaled as a sequence.

    Returns:
        Scaled distances, of the shape and dtype of ``d``. They are not differentiable.

    Raises:
        TypeError: If an argument has a wrong type or dtype.
        ValueError: If a shape, device or value is invalid; the message names it.
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
    """Make segments from a boundary mask.

    A frame where ``mask`` is nonzero starts a segment, and so does the first frame of every sequence.

    Args:
        mask: Boundaries, ``[N]`` packed or ``[B, T]`` padded, bool or integer.
        cu_seqlens: See ``adjacent_distance``.
        lengths: See ``adjacent_distance``.
        attention_mask: See [`select_boundaries`][].
        row_group: See [`select_boundaries`][].
        min_len: See [`LocalMax`][].
        max_len: See [`LocalMax`][].
        compact: See [`select_boundaries`][].

    Returns:
        The segments.

    Raises:
        TypeError: If an argument has a wrong type or dtype.
        ValueError: If a shape, device or value is invalid; the message names it.
    """
    check_integers("mask", mask, bools=True)
    _check_rank("mask", mask)
    # A boundary at t is the distance of the pair (t - 1, t), which is stored at t - 1.
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
    """Make segments from one id per frame: each run of equal ids in a sequence is a segment.

    Frames with a negative id are in no segment. This is the inverse of [`Segments.ids`][], if neighbouring segments
    have different ids.

    Args:
        ids: Ids, ``[N]`` packed or ``[B, T]`` padded, integer.
        cu_seqlens: See ``adjacent_distance``.
        lengths: See ``adjacent_distance``.
        compact: See [`select_boundaries`][].

    Returns:
        The segments.

    Raises:
        TypeError: If an argument has a wrong type or dtype.
        ValueError: If a shape, device or value is invalid; the message names it.
    """
    check_integers("ids", ids)
    _check_rank("ids", ids)
    changed = ids != ids.roll(1, dims=-1)
    row_group = torch.where(ids < 0, -1, 1).int()
    return segments_from_mask(changed, cu_seqlens=cu_seqlens, lengths=lengths, row_group=row_group, compact=compact)


def segments_from_starts(
    starts: Tensor, num_rows: int, *, cu_seqlens: Tensor | None = None, compact: bool = True
) -> Segments:
    """Make segments of packed input from the rows where they start.

    A segment ends where the next segment starts or its sequence ends.

    Args:
        starts: First rows of segments, ``[S]`` int32 or int64 in ``[0, num_rows)``, in any order. The first row of
            every sequence starts a segment even if it is missing here.
        num_rows: Number of rows of the packed input.
        cu_seqlens: See ``adjacent_distance``.
        compact: See [`select_boundaries`][].

    Returns:
        The segments.

    Raises:
        TypeError: If an argument has a wrong type or dtype.
        ValueError: If a shape, device or value is invalid; the message names it.
    """
    if not isinstance(starts, Tensor) or starts.dtype not in (torch.int32, torch.int64):
        got = starts.dtype if isinstance(starts, Tensor) else type(starts).__name__
        raise TypeError(f"starts must be an int32 or int64 tensor, got {got}")
    if starts.dim() != 1:
        raise ValueError(f"starts must have shape [S], got {list(starts.shape)}")
    num_rows = as_integer("num_rows", num_rows)
    if num_rows < 0:
        raise ValueError(f"num_rows must not be negative, got {num_rows}")
    if not torch.compiler.is_compiling() and num_rows >= 2**31:
        raise ValueError(f"num_rows must be less than 2**31, the limit of int32 offsets, got {num_rows}")
    if cu_seqlens is not None:
        check_same_device("cu_seqlens", cu_seqlens, starts)
    if values_are_checked(starts) and starts.numel():
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
    """Return fake starts, lengths and ``cu_segments`` for an op that selects boundaries."""
    if compact:
        count: int | torch.SymInt = torch.library.get_ctx().new_dynamic_size()
    else:
        count = num_rows if has_row_group else max_segments(rule, size, min_len, max_len, num_rows, num_sequences)
    starts = like.new_empty((count,), dtype=torch.int64)
    return starts, torch.empty_like(starts), like.new_empty((num_sequences + 1,), dtype=torch.int32)


def num_sequences(shape: torch.Size, padded: bool, cu_seqlens: Tensor | None) -> int:
    """Return the number of sequences of a batch of rows of shape ``[N, ...]`` or ``[B, T, ...]``."""
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

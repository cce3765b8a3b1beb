"""Scalar rules: rules that find boundaries in given distances or labels with a few tensor operations.

All sequences of a batch are processed at once, by sorting, gathering and cumulative sums, so nothing is read from the
device. ``fastcompress/reference/scalar_rules.py`` has the definitions, one sequence at a time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastcompress.checks import check_layout_values, is_readable, values_are_checked
from fastcompress.rules import LabelChange, Lookback, PeakHeight, Rule, TopK


@dataclass(frozen=True)
class Runs:
    """Runs of rows to which a rule is applied: sequences, or consecutive rows of a sequence with the same row group.

    Attributes:
        ids: Run of each row, ``[N]`` int64, counted from 0; -1 for a row in no run.
        place: Position of each row in its run, ``[N]`` int64.
        length: Length of the run of each row, ``[N]`` int64.
    """

    ids: Tensor
    place: Tensor
    length: Tensor

    @property
    def inside(self) -> Tensor:
        """True for rows in a run, ``[N]`` bool."""
        return self.ids >= 0

    @property
    def first(self) -> Tensor:
        """True for the first row of each run, ``[N]`` bool."""
        return self.inside & (self.place == 0)

    @property
    def paired(self) -> Tensor:
        """True for rows that are followed by another row of their run, ``[N]`` bool."""
        return self.inside & (self.place + 1 < self.length)


def find_runs(
    shape: torch.Size, device: torch.device, cu_seqlens: Tensor | None, lengths: Tensor | None, row_group: Tensor | None
) -> Runs:
    """Find the runs of a batch of rows of shape ``[N]`` or ``[B, T]``."""
    count = math.prod(shape)  # Size.numel() would make a traced length a constant
    row = torch.arange(count, dtype=torch.int64, device=device)
    if len(shape) == 2:
        sequence = row // max(1, shape[1])
        inside = row >= 0 if lengths is None else row - sequence * shape[1] < lengths.long()[sequence]
    elif cu_seqlens is None:
        sequence, inside = torch.zeros_like(row), row >= 0
    else:
        sequence = torch.searchsorted(cu_seqlens[1:].long().contiguous(), row, right=True)
        inside = sequence < cu_seqlens.shape[0] - 1
    first = torch.ones_like(inside)
    first[1:] = sequence[1:] != sequence[:-1]
    if row_group is not None:
        flat = row_group.reshape(-1)
        inside = inside & (flat > 0)
        first[1:] |= flat[1:] != flat[:-1]
    first = first & inside
    ids = torch.where(inside, first.cumsum(0) - 1, -1)
    begin = torch.nn.functional.pad(torch.where(first, row, 0), (1, 0)).cummax(0).values[1:]
    sizes = torch.zeros(count + 1, dtype=torch.int64, device=device)
    sizes = sizes.index_add(0, torch.where(inside, ids, count), torch.ones_like(ids))
    return Runs(ids, row - begin, torch.where(inside, sizes[ids], 0))


def find_checked_runs(
    shape: torch.Size,
    device: torch.device,
    cu_seqlens: Tensor | None,
    lengths: Tensor | None,
    row_group: Tensor | None = None,
) -> Runs:
    """Find runs like ``find_runs``, and on the CPU check the values of the layout, for ops that call no kernel.

    Raises:
        ValueError: If ``cu_seqlens`` or ``lengths`` are invalid.
    """
    if all(t is None or values_are_checked(t) for t in (cu_seqlens, lengths)):
        check_layout_values(shape, cu_seqlens, lengths)
    return find_runs(shape, device, cu_seqlens, lengths, row_group)


def normalize(d: Tensor, runs: Runs) -> Tensor:
    """Scale distances ``[N]`` to [0, 1] in each run. Equal distances become 0; NaN stays NaN."""
    usable = runs.paired & ~d.isnan()
    count = d.shape[0]
    where = torch.where(usable, runs.ids, count)
    ends = []
    for reduce, start in (("amin", torch.inf), ("amax", -torch.inf)):
        found = torch.full((count + 1,), start, dtype=d.dtype, device=d.device)
        ends.append(found.scatter_reduce(0, where, d, reduce)[runs.ids])
    low, high = ends
    scaled = (d - low) / (high - low)
    return torch.where(d.isnan(), d, torch.where(high > low, scaled, 0.0))


def ranks(score: Tensor, kind: Tensor, runs: Runs) -> Tensor:
    """Return the rank of each row in its run, ``[N]`` int64.

    Rows are ordered by ``kind``, lowest first, then by ``score``, highest first, then by position.
    """
    count = score.shape[0]
    order = torch.sort(score, descending=True, stable=True).indices
    for key in (kind, torch.where(runs.inside, runs.ids, count)):  # stable sorts: the last key is the most significant
        order = order[torch.sort(key[order], stable=True).indices]
    rank = torch.empty_like(order).scatter_(0, order, torch.arange(count, dtype=torch.int64, device=score.device))
    # Subtract the rows of earlier runs, which precede this run in the order.
    return rank - (runs.inside.long().cumsum(0) - 1 - runs.place)


def starts(rule: Rule, d: Tensor, labels: Tensor | None, runs: Runs) -> Tensor:
    """Find the rows that start a segment by a scalar rule, before ``min_len`` and ``max_len`` are applied.

    Args:
        rule: A rule whose ``scalar`` is true.
        d: Distances to the next row, ``[N]``; for ``Lookback`` ``[window, N]``, the distances to the rows 1, 2, …
            later.
        labels: Labels, ``[N]`` integer, for ``LabelChange``.
        runs: Runs of the rows.

    Returns:
        True for rows that start a segment, ``[N]`` bool; the first row of a run always does. For ``Lookback``,
        ``min_len`` and ``max_len`` are already applied.
    """
    if runs.ids.shape[0] == 0:
        return runs.inside
    if isinstance(rule, TopK):
        return top_k_starts(rule.num_segments(runs.length), d, runs)
    if isinstance(rule, LabelChange):
        assert labels is not None
        changed = torch.ones_like(runs.inside)
        changed[1:] = labels[1:] != labels[:-1]
        return runs.inside & (changed | runs.first)
    if isinstance(rule, Lookback):
        return _lookback(rule, d, runs)
    assert isinstance(rule, PeakHeight)
    return _peak_height(rule, d, runs)


def top_k_starts(wanted: Tensor, d: Tensor, runs: Runs) -> Tensor:
    """Cut each run at its largest distances.

    Args:
        wanted: Number of segments of the run of each row, ``[N]``.
        d: Distance of each row to the next, ``[N]``.
        runs: Runs of the rows.

    Returns:
        True for rows that start a segment, ``[N]`` bool.
    """
    before = torch.cat([d.new_zeros(1), d])[: d.shape[0]]  # the distance to the row before
    nan = before.isnan()
    score = torch.where(nan, -torch.inf, before)
    kind = torch.where(runs.place == 0, 0, torch.where(nan, 2, 1))  # the first row, numbers, NaN
    return runs.inside & (ranks(score, kind, runs) < wanted)


def _lookback(rule: Lookback, d: Tensor, runs: Runs) -> Tensor:
    """Find the starts of segments by ``Lookback``, for all rows at once.

    Each row is a map from the length of the open segment before it to the length after it. Composition of maps is
    associative, so a parallel scan over the rows takes log2(N) rounds.
    """
    count, device = d.shape[1], d.device
    max_len = rule.max_len
    # `states` is the number of lengths to distinguish: 1, 2, ..., and `states` or more.
    if not is_readable(d):  # a traced program must not depend on the number of rows
        states = max(rule.window, rule.min_len, max_len or 1)
    else:  # no segment is longer than the longest run; finding that would synchronize with a GPU
        longest = int(runs.length.max()) if device.type == "cpu" else count
        if max_len is not None and max_len >= longest:
            max_len = None
        states = max(1, min(max(rule.window, rule.min_len, max_len or 1), longest))
    length = torch.arange(1, states + 1, dtype=torch.int64, device=device)
    near: list[Tensor] = []  # per row, close to one of the last 1, 2, ... rows
    threshold = torch.tensor(rule.threshold, dtype=d.dtype, device=device)
    for lag in range(1, rule.window + 1):
        shifted = torch.cat([d.new_full((min(lag, count),), torch.nan), d[lag - 1, : max(0, count - lag)]])
        close = (shifted <= threshold) & (runs.place >= lag)
        near.append(close if not near else near[-1] | close)
    joins = torch.stack([near[min(i, rule.window) - 1] for i in range(1, states + 1)], 1)  # [N, states]
    joins = joins | (length < rule.min_len)
    if max_len is not None:
        joins = joins & (length < max_len)
    joins = joins & (runs.inside & (runs.place > 0))[:, None]
    step = torch.where(joins, length.clamp_max(states - 1), 0)  # index of the next length, which is length + 1
    scan, reach = step, 1
    while reach < count:
        scan = torch.cat([scan[:reach], scan[reach:].gather(1, scan[:-reach])])
        reach *= 2
    state = torch.cat([scan.new_zeros(1), scan[:-1, 0]])  # length index before each row
    return runs.inside & ~joins.gather(1, state[:, None])[:, 0]


def _peak_height(rule: PeakHeight, d: Tensor, runs: Runs) -> Tensor:
    """Find the starts of segments by ``PeakHeight``, for all rows at once."""
    z = normalize(d, runs)
    row = torch.arange(d.shape[0], dtype=torch.int64, device=d.device)
    begin = row - runs.place
    end = begin + runs.length - 2  # the last distance of the run
    heights = []
    for reach in (1, 2):
        left, right = torch.maximum(row - reach, begin), torch.minimum(row + reach, end)
        edge = torch.minimum(z - z[left.clamp_min(0)], z - z[right.clamp_min(0)])
        heights.append(edge.clamp_min(0))
    threshold = torch.tensor(rule.threshold, dtype=d.dtype, device=d.device)
    peak = runs.paired & (heights[0] > 0) & (torch.fmax(*heights) > threshold)
    return runs.first | torch.cat([peak.new_zeros(1), peak[:-1]])

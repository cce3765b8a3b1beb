"""Rules that are a few steps over scalars: which rows start a segment, from distances or labels that are there.

Nothing is read from the device: what differs between sequences is sorted, gathered and summed in one piece. The
definitions, sequence by sequence, are in ``fastcompress/reference/scalar_rules.py``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastcompress.checks import check_layout_values
from fastcompress.rules import LabelChange, Lookback, PeakHeight, Rule, TopK


@dataclass(frozen=True)
class Runs:
    """Runs of rows that a rule works in: sequences, or the parts of them with one row group.

    Attributes:
        ids: ``[N]`` int64, the run of each row, counted from 0; -1: none.
        place: ``[N]`` int64, rows of its run before it.
        length: ``[N]`` int64, rows of its run.
    """

    ids: Tensor
    place: Tensor
    length: Tensor

    @property
    def inside(self) -> Tensor:
        """``[N]`` bool: rows in a run."""
        return self.ids >= 0

    @property
    def first(self) -> Tensor:
        """``[N]`` bool: rows that a run begins with."""
        return self.inside & (self.place == 0)

    @property
    def paired(self) -> Tensor:
        """``[N]`` bool: rows with another of their run behind them."""
        return self.inside & (self.place + 1 < self.length)


def find_runs(
    shape: torch.Size, device: torch.device, cu_seqlens: Tensor | None, lengths: Tensor | None, row_group: Tensor | None
) -> Runs:
    """Runs of rows of shape ``[N]`` or ``[B, T]``."""
    count = math.prod(shape)  # Size.numel() would make a traced length a constant
    row = torch.arange(count, device=device)
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
    """The same where no kernel looks at the layout: on the CPU, where that waits for nothing, its values are checked.

    Raises:
        ValueError: ``cu_seqlens`` or ``lengths`` that do not fit.
    """
    if device.type == "cpu" and not torch.compiler.is_compiling():
        check_layout_values(shape, cu_seqlens, lengths)
    return find_runs(shape, device, cu_seqlens, lengths, row_group)


def normalize(d: Tensor, runs: Runs) -> Tensor:
    """Distances ``[N]`` scaled to [0, 1] in each run; all alike, or none: 0. NaN stays."""
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
    """``[N]`` int64: the place of each row in its run, in the order of its kind, lowest first, and then of its score,
    highest first; ties go to the earlier row."""
    count = score.shape[0]
    order = torch.sort(score, descending=True, stable=True).indices
    for key in (kind, torch.where(runs.inside, runs.ids, count)):  # the last key of stable sorts comes first
        order = order[torch.sort(key[order], stable=True).indices]
    rank = torch.empty_like(order).scatter_(0, order, torch.arange(count, device=score.device))
    # Rows of earlier runs are ahead: as many as there are before the first row of this one.
    return rank - (runs.inside.long().cumsum(0) - 1 - runs.place)


def starts(rule: Rule, d: Tensor, labels: Tensor | None, runs: Runs) -> Tensor:
    """``[N]`` bool: rows that start a segment, before ``min_len`` and ``max_len``; of a run its first always does.

    Args:
        rule: one with ``scalar``.
        d: ``[N]``, or ``[window, N]`` for :class:`Lookback`: distances to the rows 1, 2, … behind.
        labels: ``[N]``, for :class:`LabelChange`.
        runs: of the rows.
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
    """``[N]`` bool: rows that start a segment if each run is cut into ``wanted`` of them, ``[N]``, at its largest
    distances."""
    before = torch.cat([d.new_zeros(1), d])[: d.shape[0]]  # the distance to the row before
    nan = before.isnan()
    score = torch.where(nan, -torch.inf, before)
    kind = torch.where(runs.place == 0, 0, torch.where(nan, 2, 1))  # the first row, numbers, NaN
    return runs.inside & (ranks(score, kind, runs) < wanted)


def _lookback(rule: Lookback, d: Tensor, runs: Runs) -> Tensor:
    """The scan over rows is a composition of maps from the length of the open segment to its next length, which is
    associative: log2(N) rounds for all rows at once."""
    count, device = d.shape[1], d.device
    max_len = rule.max_len
    if torch.compiler.is_compiling():  # a traced program would be for as many rows as there are
        states = max(rule.window, rule.min_len, max_len or 1)  # lengths that are told apart: 1, 2, ..., or more
    else:  # no segment is longer than the longest run, or than all rows where finding that would wait for a GPU
        longest = int(runs.length.max()) if device.type == "cpu" else count
        if max_len is not None and max_len >= longest:
            max_len = None
        states = max(1, min(max(rule.window, rule.min_len, max_len or 1), longest))
    length = torch.arange(1, states + 1, device=device)
    near: list[Tensor] = []  # close to one of the last 1, 2, ... rows
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
    state = torch.cat([scan.new_zeros(1), scan[:-1, 0]])  # before each row
    return runs.inside & ~joins.gather(1, state[:, None])[:, 0]


def _peak_height(rule: PeakHeight, d: Tensor, runs: Runs) -> Tensor:
    z = normalize(d, runs)
    row = torch.arange(d.shape[0], device=d.device)
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

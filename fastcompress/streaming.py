"""Compression of frames that arrive in chunks: each token as soon as it is final, the same bits as all at once.

State is the frames of the open segment that are not summed yet (fewer than 64: the block in which sums are taken, see
``docs/numerics.md``), one sum, and what the rule looks back and ahead at. A token is final

* with :class:`Uniform` when its last frame is there, or the first of the next segment where ``max_len`` cut it;
* with :class:`Threshold` and :class:`Lookback` one frame after its last;
* with :class:`LocalMax` ``order + 1`` frames after its last: a peak must be seen to fall;
* with integrate-and-fire in the frame that fires it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastcompress.checks import check_float
from fastcompress.ops.adjacent_distance import adjacent_distance
from fastcompress.ops.integrate_and_fire import (
    check_firing,
    fires_at_end,
    integrate_rows,
    left_over,
    opening,
    shares,
    usable,
)
from fastcompress.ops.segment_reduce import segment_reduce
from fastcompress.reference.adjacent_distance import accumulate_dtype
from fastcompress.reference.segment_reduce import BLOCK
from fastcompress.rules import LocalMax, Lookback, Rule, Threshold, Uniform, as_rule
from fastcompress.segments import row_segments


@dataclass(eq=False)
class Streamed:
    """Tokens that became final.

    Attributes:
        values: ``[M, D]``, in the dtype of the frames.
        starts, lengths: ``[M]`` int64, of their segments, in frames of the stream.
    """

    values: Tensor
    starts: Tensor
    lengths: Tensor


class StreamingSegmentPool:
    """:func:`fastcompress.segment_pool` of one stream, mean pooling.

    The tokens of all calls, and of :meth:`flush`, are those of the whole stream, bit for bit.

    Args:
        rule: ``Uniform``, ``Threshold``, ``LocalMax`` without prominence or ``normalize``, or ``Lookback``; or a text
            form. Others look at all of a sequence.

    Raises:
        NotImplementedError: another rule.
    """

    def __init__(self, rule: Rule | str = LocalMax()) -> None:  # noqa: B008  (immutable)
        self.rule: Rule = as_rule(rule)
        if not (self.rule.fused or isinstance(self.rule, Lookback)):
            raise NotImplementedError(f"rule {self.rule} looks at all of a sequence and cannot be streamed")
        self._reset()

    def _reset(self) -> None:
        self._frames: Tensor | None = None  # from `_origin` on
        self._origin = 0
        self._seen = 0  # frames of the stream
        self._decided = 0  # frames of which it is known whether they start a segment
        self._start = 0  # of the open segment
        self._sum: Tensor | None = None  # of its blocks that are summed
        self._distances: list[float] = []  # from the pair `_first_distance` on
        self._first_distance = 0
        self._recent: Tensor | None = None  # the last frames, for distances to the next

    @property
    def pending(self) -> int:
        """Frames that no token has yet."""
        return self._seen - self._start

    def __call__(self, x: Tensor) -> Streamed:
        """Takes the next frames.

        Args:
            x: ``[N, D]``, as many as there are; of the dtype, width and device of those before.

        Raises:
            TypeError, ValueError: it does not fit what was there before.
        """
        check_float("x", x)
        if x.dim() != 2:
            raise ValueError(f"x must have shape [N, D], got {list(x.shape)}")
        x = x.detach()
        if self._frames is None:
            self._frames = x[:0]
        before = self._frames
        _check_like(x, before)
        near = self._measure(x)
        self._frames = torch.cat([before, x])
        self._seen += x.shape[0]
        return self._emit(self._decide(near, last=False))

    def flush(self) -> Streamed:
        """Ends the stream: what was still open. The next call begins another one."""
        if self._frames is None:
            raise ValueError("nothing was streamed: there is nothing to flush")
        bounds = self._decide([], last=True)
        rule = self.rule
        begin = bounds[-1] if bounds else self._start
        dropped = isinstance(rule, Uniform) and rule.tail == "drop" and self._seen - begin < rule.size
        if self._seen > begin and not dropped:
            bounds.append(self._seen)
        found = self._emit(bounds)
        self._reset()
        return found

    def _measure(self, x: Tensor) -> list[bool]:
        """Appends the distances that the new frames have to those before. For ``Lookback`` returns nothing of them,
        but for each new frame whether it is near the last 1, 2, ... frames, one after the other."""
        rule, count = self.rule, x.shape[0]
        if isinstance(rule, Uniform) or not count:
            return []
        reach = rule.window if isinstance(rule, Lookback) else 1
        recent = x[:0] if self._recent is None else self._recent
        joined = torch.cat([recent, x])
        old = recent.shape[0]
        self._recent = joined[-reach:].clone()
        if not isinstance(rule, Lookback):
            # Of the pairs that end in a new frame.
            self._distances += adjacent_distance(joined)[max(0, old - 1) : len(joined) - 1].tolist()
            return []
        close = torch.zeros(count, reach, dtype=torch.bool, device=x.device)
        for lag in range(1, reach + 1):
            d = adjacent_distance(joined, lag=lag)
            first = max(0, lag - old)  # of the new frames, the first that has a frame `lag` before it
            if first < count:
                close[first:, lag - 1] = d[old + first - lag : len(joined) - lag] <= self._threshold(d.dtype)
        return close.cummax(1).values.reshape(-1).tolist()

    def _threshold(self, dtype: torch.dtype) -> float:
        """Rounded to the dtype of the distances, as torch compares."""
        threshold = getattr(self.rule, "threshold", None)
        return -math.inf if threshold is None else torch.tensor(threshold, dtype=dtype).item()

    def _decide(self, near: list[bool], last: bool) -> list[int]:
        """Frames that turn out to start a segment."""
        rule, found, begin = self.rule, [], self._start
        assert self._frames is not None
        shortest, longest = getattr(rule, "min_len", 1), getattr(rule, "max_len", None)
        wide = self._frames.dtype == torch.float64
        threshold = self._threshold(torch.float64 if wide else torch.float32)
        ahead = rule.order if isinstance(rule, LocalMax) else 0
        first_new = self._decided
        for t in range(self._decided, self._seen):
            if not last and t > 0 and t - 1 + ahead > self._seen - 2:
                break
            self._decided = t + 1
            if t == 0:
                continue
            length = t - begin
            if isinstance(rule, Uniform):
                candidate = t % rule.size == 0
            elif isinstance(rule, Lookback):
                candidate = not near[(t - first_new) * rule.window + min(rule.window, length) - 1]
            elif isinstance(rule, Threshold):
                candidate = self._distance(t - 1) > threshold
            else:
                candidate = self._distance(t - 1) > threshold and self._is_peak(t - 1)
            if (length >= shortest and candidate) or length == longest:
                found.append(t)
                begin = t
        if not isinstance(rule, (Uniform, Lookback)):
            keep = max(self._first_distance, self._decided - 1 - ahead)
            del self._distances[: keep - self._first_distance]
            self._first_distance = keep
        if isinstance(rule, Uniform) and not last and self._seen > begin and self._seen % rule.size == 0:
            found.append(self._seen)  # where the next segment will start
        return found

    def _distance(self, t: int) -> float:
        return self._distances[t - self._first_distance]

    def _is_peak(self, t: int) -> bool:
        """As ``reference.boundaries.is_peak``, where the stream ends with what there is."""
        assert isinstance(self.rule, LocalMax)
        end = self._seen - 2
        return all(
            self._distance(t) > self._distance(max(t - shift, 0))
            and self._distance(t) > self._distance(min(t + shift, end))
            for shift in range(1, min(self.rule.order, end + 1) + 1)
        )

    def _emit(self, bounds: list[int]) -> Streamed:
        """Tokens of the segments that end at ``bounds``, one after the other from the open one on."""
        assert self._frames is not None
        frames, device = self._frames, self._frames.device
        starts = [self._start, *bounds[:-1]] if bounds else []
        lengths = [end - start for start, end in zip(starts, bounds, strict=True)]
        places = torch.tensor(starts, dtype=torch.int64, device=device)
        sizes = torch.tensor(lengths, dtype=torch.int64, device=device)
        if not bounds:
            values = frames[:0]
        else:
            parts = []
            whole = 0
            if self._sum is not None:  # the first of them is summed in part already
                whole, total = 1, _add(self._sum, frames[: bounds[0] - self._origin])
                assert total is not None
                parts.append((total / lengths[0]).to(frames.dtype)[None])
            if len(bounds) > whole:
                segments = row_segments(places[whole:] - self._origin, sizes[whole:], len(frames))
                parts.append(segment_reduce(frames, segments))
            values = torch.cat(parts)
            self._sum, self._start = None, bounds[-1]
            self._decided = max(self._decided, self._start)
            self._frames, self._origin = frames[self._start - self._origin :], self._start
        self._fold()
        return Streamed(values, places, sizes)

    def _fold(self) -> None:
        """Sums the blocks of the open segment that are complete, and lets go of their frames."""
        assert self._frames is not None
        blocks = (self._decided - self._origin) // BLOCK
        if blocks > 0:
            self._sum = _add(self._sum, self._frames[: blocks * BLOCK])
            self._frames = self._frames[blocks * BLOCK :]
            self._origin += blocks * BLOCK
        self._frames = self._frames.clone()  # a view would hold on to the chunk


class StreamingIntegrateAndFire:
    """:func:`fastcompress.integrate_and_fire` of one stream, without a target.

    On the CPU, where sums are taken in order, the tokens are those of the whole stream bit for bit; on a GPU, whose
    cumulative sums depend on how much there is at once, to rounding.

    Args:
        beta, tail: as there.
    """

    def __init__(self, beta: float = 1.0, tail: float | None = 0.5) -> None:
        check_firing(beta, tail)
        self.beta: float = beta
        self.tail: float | None = tail
        self._reset()

    def _reset(self) -> None:
        self._like: Tensor | None = None  # no frames, of the stream's dtype and width
        self._seen = 0
        self._total: Tensor | None = None  # of the weights, fp64
        self._fired = 0
        self._sum: Tensor | None = None  # of the open token: blocks of weighted frames that are summed,
        self._rows: Tensor | None = None  # and those that are not

    def __call__(self, x: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
        """Takes the next frames.

        Args:
            x: ``[N, D]``, as many as there are; of the dtype, width and device of those before.
            alpha: their weights ``[N]``, not negative.

        Returns:
            the tokens that fired, ``[M, D]``, and the frame of the stream in which each did, ``[M]`` int64.

        Raises:
            TypeError, ValueError: something does not fit.
        """
        check_float("x", x)
        check_float("alpha", alpha)
        if x.dim() != 2 or alpha.shape != x.shape[:1]:
            raise ValueError(f"x must be [N, D] and alpha [N], got {list(x.shape)} and {list(alpha.shape)}")
        if x.device.type == "cpu" and not bool(((alpha >= 0) & (alpha < math.inf)).all()):
            raise ValueError(f"alpha must be finite and not negative, got {alpha.tolist()}")
        x = x.detach()
        if self._like is None:
            self._like = x.new_empty(0, x.shape[1])  # and no view, which would hold on to the chunk
            self._total = torch.zeros(1, dtype=torch.float64, device=x.device)
            self._rows = self._like.to(accumulate_dtype(x.dtype))
        like, total, rows, wide = self._like, self._total, self._rows, accumulate_dtype(x.dtype)
        assert total is not None and rows is not None
        _check_like(x, like)
        if not x.shape[0]:
            return x, torch.zeros(0, dtype=torch.int64, device=x.device)
        weight = usable(alpha.detach())
        sums = torch.cat([total, weight]).cumsum(0)
        after = sums[1:]
        _, right, share = shares(sums[:-1], after, weight, self.beta)
        share = share.to(wide)
        first, last = self._fired, int(right[-1])
        if last - first >= 2**31:
            raise ValueError(f"alpha adds up to {float(weight.sum()):g}: too many tokens of beta {self.beta:g}")
        # Those that fire, and the one that stays open.
        token = torch.arange(first, last + 1, device=x.device).double()
        ends = torch.searchsorted(right, token + 1)  # frames in which they do; of the last: none
        begins = torch.searchsorted(right, token)  # the first frame at whose end the token is open
        rest = opening(token, right[begins], after[begins], self.beta).to(wide)
        # The open token goes on with what this chunk gives it.
        given = int(ends[0]) + 1 if last > first else x.shape[0]
        rows = torch.cat([rows, x[:given].to(wide) * share[:given, None]])
        values = like
        if last > first:
            total = _add(self._sum, rows)
            assert total is not None
            others = slice(1, last - first)
            sizes = ends[others] - begins[others] + 1
            more = integrate_rows(x, share, rest[others], None, begins[others], sizes)
            values = torch.cat([total.to(x.dtype)[None], more])
            self._sum, begin = None, int(begins[-1])
            weights = torch.cat([rest[-1:], share[begin + 1 :]])
            rows = x[begin:].to(wide) * weights[:, None]
        blocks = rows.shape[0] // BLOCK * BLOCK
        if blocks:
            self._sum = _add(self._sum, rows[:blocks])
        self._rows = rows[blocks:].clone()
        seen, self._seen = self._seen, self._seen + x.shape[0]
        self._total, self._fired = sums[-1:].clone(), last
        return values, ends[:-1] + seen

    def flush(self) -> tuple[Tensor, Tensor]:
        """Ends the stream: the token of what is left, if ``tail`` says so. The next call begins another one."""
        if self._like is None:
            raise ValueError("nothing was streamed: there is nothing to flush")
        like, device = self._like, self._like.device
        assert self._total is not None and self._rows is not None
        _, remainder = left_over(self._total, self.beta)
        values, ends = like, torch.zeros(0, dtype=torch.int64, device=device)
        if self.tail is not None and bool(fires_at_end(remainder, self.beta, self.tail)):
            total = _add(self._sum, self._rows)
            assert total is not None
            divisor = (remainder / self.beta).to(self._rows.dtype)
            values = (total / divisor).to(like.dtype)[None]
            ends = torch.tensor([self._seen - 1], device=device)
        self._reset()
        return values, ends


def _check_like(x: Tensor, before: Tensor) -> None:
    if x.shape[1] != before.shape[1] or x.dtype != before.dtype or x.device != before.device:
        raise ValueError(
            f"x must be [N, {before.shape[1]}], {before.dtype}, on {before.device} like the frames before, got "
            f"{list(x.shape)}, {x.dtype}, on {x.device}"
        )


def _add(total: Tensor | None, frames: Tensor) -> Tensor | None:
    """A sum with more blocks, each in the order of its frames; the last may be short, or there is none."""
    wide = frames.to(accumulate_dtype(frames.dtype))
    starts = torch.arange(0, len(wide), BLOCK, device=wide.device)
    lengths = (len(wide) - starts).clamp_max(BLOCK)
    for block in segment_reduce(wide, row_segments(starts, lengths, len(wide)), "sum"):
        total = block if total is None else total + block
    return total

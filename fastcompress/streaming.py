"""Streaming compression: frames arrive in chunks, and each token is returned as soon as it is final.

The tokens are bit-equal to those of the whole stream in one call. The state consists of one sum, the frames of the open
segment that are not in it yet (fewer than 64, the block size of sums, see ``docs/numerics.md``), and the frames and
distances that the rule still needs. A token is final

* with ``Uniform``, when its last frame has arrived;
* with ``Threshold`` and ``Lookback``, one frame after its last frame;
* with ``MinVariance``, when the block of 1,500 frames that contains it is complete, or at the end;
* with ``LocalMax``, ``order + 1`` frames after its last frame, when the peak has been compared on both sides;
* with integrate-and-fire, at the frame in which it fires.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastcompress.checks import check_float
from fastcompress.ops.adjacent_distance import adjacent_distance
from fastcompress.ops.banded_distance import banded_distance
from fastcompress.ops.integrate_and_fire import (
    as_firing,
    fires_at_end,
    integrate_rows,
    left_over,
    opening,
    shares,
    usable,
)
from fastcompress.ops.segment_reduce import segment_reduce
from fastcompress.ops.select_boundaries import select_boundaries
from fastcompress.reference.adjacent_distance import accumulate_dtype
from fastcompress.reference.segment_reduce import BLOCK
from fastcompress.rules import (
    MIN_VARIANCE_BLOCK,
    LocalMax,
    Lookback,
    MinVariance,
    Rule,
    Threshold,
    Uniform,
    as_rule,
)
from fastcompress.segments import count_of, dtype_and_device, row_segments


@dataclass(eq=False, repr=False)
class Streamed:
    """Tokens that became final in one call.

    Attributes:
        values: Tokens, ``[M, D]`` in the dtype of the frames.
        starts: First frame of each segment, ``[M]`` int64, counted from the start of the stream.
        lengths: Number of frames of each segment, ``[M]`` int64.
    """

    values: Tensor
    starts: Tensor
    lengths: Tensor

    def __repr__(self) -> str:
        tokens, width = self.values.shape
        return f"Streamed({count_of(tokens, 'token')}, width {width}{dtype_and_device(self.values)})"


class StreamingSegmentPool:
    """Pool the frames of one stream into segments, chunk by chunk (mean pooling).

    The tokens of all calls followed by those of [`flush`][] equal [`fastcompress.segment_pool`][] of the whole
    stream, bit for bit.

    Args:
        rule: ``Uniform``, ``Threshold``, ``Lookback``, ``MinVariance``, or ``LocalMax`` without ``prominence`` and
            ``normalize``; or the text form of one. Other rules need the whole sequence.

    Raises:
        NotImplementedError: If the rule needs the whole sequence.

    Examples:
        >>> pool = StreamingSegmentPool("uniform:2")
        >>> pool(torch.tensor([[1.0], [3.0], [5.0]])).values
        tensor([[2.]])
        >>> pool.flush().values
        tensor([[5.]])
    """

    def __init__(self, rule: Rule | str = LocalMax()) -> None:  # noqa: B008  (immutable)
        self.rule: Rule = as_rule(rule)
        if not (self.rule.fused or isinstance(self.rule, (Lookback, MinVariance))):
            raise NotImplementedError(f"rule {self.rule} needs the whole sequence and cannot be streamed")
        self._reset()

    def _reset(self) -> None:
        self._frames: Tensor | None = None  # frames that are not summed yet
        self._origin = 0  # index in the stream of the first row of `_frames`
        self._seen = 0  # number of frames received
        self._decided = 0  # number of frames for which it is known whether they start a segment
        self._start = 0  # first frame of the open segment
        self._sum: Tensor | None = None  # sum of the complete blocks of the open segment
        self._distances: list[float] = []  # distances that the rule still needs
        self._first_distance = 0  # index in the stream of `_distances[0]`
        self._recent: Tensor | None = None  # last frames received, for the distances to the next ones

    @property
    def pending(self) -> int:
        """Number of frames received that are not part of a returned token yet."""
        return self._seen - self._start

    def __call__(self, x: Tensor) -> Streamed:
        """Add the next frames.

        Args:
            x: Frames, ``[N, D]`` with any ``N``; fp32, fp16, bf16 or fp64. The dtype, width and device must be those of
                the earlier frames.

        Returns:
            The tokens that became final.

        Raises:
            TypeError: If ``x`` has a wrong type or dtype.
            ValueError: If ``x`` does not match the earlier frames.
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
        """End the stream and return the tokens that were still open. The next call starts a new stream.

        Raises:
            ValueError: If no frames were added.
        """
        if self._frames is None:
            raise ValueError("flush needs at least one frame, but none was added to this stream")
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
        """Append the distances of the new frames to the frames before them.

        For ``Lookback``, return ``window`` flags per new frame instead, flattened: flag ``k`` is true if the frame is
        within the threshold of one of the ``k + 1`` frames before it.
        """
        rule, count = self.rule, x.shape[0]
        if isinstance(rule, (Uniform, MinVariance)) or not count:
            return []
        reach = rule.window if isinstance(rule, Lookback) else 1
        recent = x[:0] if self._recent is None else self._recent
        joined = torch.cat([recent, x])
        old = recent.shape[0]
        self._recent = joined[-reach:].clone()
        if not isinstance(rule, Lookback):
            # Keep only the pairs that end in a new frame.
            self._distances += adjacent_distance(joined)[max(0, old - 1) : len(joined) - 1].tolist()
            return []
        close = torch.zeros(count, reach, dtype=torch.bool, device=x.device)
        for lag in range(1, reach + 1):
            d = adjacent_distance(joined, lag=lag)
            first = max(0, lag - old)  # first new frame that has a frame `lag` before it
            if first < count:
                close[first:, lag - 1] = d[old + first - lag : len(joined) - lag] <= self._threshold(d.dtype)
        return close.cummax(1).values.reshape(-1).tolist()

    def _threshold(self, dtype: torch.dtype) -> float:
        """Return the threshold of the rule, rounded to the dtype of the distances."""
        threshold = getattr(self.rule, "threshold", None)
        return -math.inf if threshold is None else torch.tensor(threshold, dtype=dtype, device="cpu").item()

    def _decide(self, near: list[bool], last: bool) -> list[int]:
        """Return the frames that are now known to start a segment; with ``last``, decide all frames received."""
        rule, found, begin = self.rule, [], self._start
        assert self._frames is not None
        if isinstance(rule, MinVariance):
            return self._decide_blocks(rule, last)
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
            found.append(self._seen)  # the next frame starts a segment, so the open one is complete
        return found

    def _decide_blocks(self, rule: MinVariance, last: bool) -> list[int]:
        """Like ``_decide``, for complete blocks; with ``last``, also for the rest."""
        assert self._frames is not None
        found: list[int] = []
        while self._seen - self._decided >= MIN_VARIANCE_BLOCK or (last and self._seen > self._decided):
            begin, end = self._decided, min(self._decided + MIN_VARIANCE_BLOCK, self._seen)
            frames = self._frames[begin - self._origin : end - self._origin]
            starts = select_boundaries(banded_distance(frames, rule.window), rule).starts.tolist()
            found += [begin + start for start in starts[1:]]
            if end - begin == MIN_VARIANCE_BLOCK:
                found.append(end)  # the next frame starts a block
            self._decided = end
        return found

    def _distance(self, t: int) -> float:
        return self._distances[t - self._first_distance]

    def _is_peak(self, t: int) -> bool:
        """Like ``is_peak`` of ``fastcompress.reference.select_boundaries``, for the frames received so far."""
        assert isinstance(self.rule, LocalMax)
        end = self._seen - 2
        return all(
            self._distance(t) > self._distance(max(t - shift, 0))
            and self._distance(t) > self._distance(min(t + shift, end))
            for shift in range(1, min(self.rule.order, end + 1) + 1)
        )

    def _emit(self, bounds: list[int]) -> Streamed:
        """Return the tokens of the open segment and those after it, which end at ``bounds``."""
        assert self._frames is not None
        frames, device = self._frames, self._frames.device
        starts = [self._start, *bounds[:-1]] if bounds else []
        lengths = [end - start for start, end in zip(starts, bounds, strict=True)]
        places = torch.tensor(starts, dtype=torch.int64, device=device)
        sizes = torch.tensor(lengths, dtype=torch.int64, device=device)
        if not bounds:
            values = frames.new_empty(0, frames.shape[1])
        else:
            parts = []
            whole = 0
            if self._sum is not None:  # the open segment is partly summed already
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
        """Add the complete blocks of the open segment to its sum, and drop their frames."""
        assert self._frames is not None
        blocks = (self._decided - self._origin) // BLOCK
        if blocks > 0:
            self._sum = _add(self._sum, self._frames[: blocks * BLOCK])
            self._frames = self._frames[blocks * BLOCK :]
            self._origin += blocks * BLOCK
        self._frames = self._frames.clone()  # a view would keep the chunk in memory


class StreamingIntegrateAndFire:
    """Run [`fastcompress.integrate_and_fire`][] on one stream, chunk by chunk, without target lengths.

    On the CPU the tokens equal those of the whole stream bit for bit. On a GPU they are equal up to rounding, because
    the order in which a GPU adds a cumulative sum depends on its length.

    Args:
        beta: See [`fastcompress.integrate_and_fire`][].
        tail: See [`fastcompress.integrate_and_fire`][].

    Raises:
        TypeError: If an argument is not a number.
        ValueError: If ``beta`` is not positive, or ``tail`` is outside [0, 1].
    """

    def __init__(self, beta: float = 1.0, tail: float | None = 0.5) -> None:
        self.beta: float
        self.tail: float | None
        self.beta, self.tail = as_firing(beta, tail)
        self._reset()

    def _reset(self) -> None:
        self._like: Tensor | None = None  # [0, D], of the dtype and width of the stream
        self._seen = 0  # number of frames received
        self._total: Tensor | None = None  # sum of all weights, [1] fp64
        self._fired = 0  # number of tokens fired
        self._sum: Tensor | None = None  # sum of the complete blocks of the open token
        self._rows: Tensor | None = None  # weighted frames of the open token that are not summed yet

    def __call__(self, x: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
        """Add the next frames.

        Args:
            x: Frames, ``[N, D]`` with any ``N``. The dtype, width and device must be those of the earlier frames.
            alpha: Weights of the frames, ``[N]`` floating point, finite and not negative.

        Returns:
            The tokens that fired, ``[M, D]``, and the frame of the stream in which each fired, ``[M]`` int64.

        Raises:
            TypeError: If an argument has a wrong type or dtype.
            ValueError: If a shape, device or value is invalid.
        """
        check_float("x", x)
        check_float("alpha", alpha)
        if x.dim() != 2 or alpha.shape != x.shape[:1]:
            raise ValueError(f"x must have shape [N, D] and alpha [N], got {list(x.shape)} and {list(alpha.shape)}")
        if x.device.type == "cpu" and not bool(((alpha >= 0) & (alpha < math.inf)).all()):
            raise ValueError(f"alpha must be finite and not negative, got {alpha.tolist()}")
        x = x.detach()
        if self._like is None:
            self._like = x.new_empty(0, x.shape[1])  # not a view, which would keep the chunk in memory
            self._total = torch.zeros(1, dtype=torch.float64, device=x.device)
            self._rows = self._like.to(accumulate_dtype(x.dtype))
        like, total, rows, wide = self._like, self._total, self._rows, accumulate_dtype(x.dtype)
        assert total is not None and rows is not None
        _check_like(x, like)
        if not x.shape[0]:
            return like, torch.zeros(0, dtype=torch.int64, device=x.device)
        weight = usable(alpha.detach())
        sums = torch.cat([total, weight]).cumsum(0)
        after = sums[1:]
        _, right, share = shares(sums[:-1], after, weight, self.beta)
        share = share.to(wide)
        first, last = self._fired, int(right[-1])
        if last - first >= 2**31:
            got = float(weight.sum())
            raise ValueError(f"alpha must add up to fewer than 2**31 tokens of beta {self.beta:g}, got {got:g}")
        # The tokens that fire, followed by the one that stays open.
        token = torch.arange(first, last + 1, dtype=torch.float64, device=x.device)
        ends = torch.searchsorted(right, token + 1)  # frame in which each token fires; the last does not
        begins = torch.searchsorted(right, token)  # first frame after which the token is open
        rest = opening(token, right[begins], after[begins], self.beta).to(wide)
        # The token that was open before this chunk takes its share of the first frames.
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
        """End the stream. The next call starts a new stream.

        Returns:
            The token of the remaining weight, ``[1, D]``, if that is at least ``tail`` of ``beta``, else ``[0, D]``;
            and the last frame of the stream, ``[1]`` or ``[0]`` int64.

        Raises:
            ValueError: If no frames were added.
        """
        if self._like is None:
            raise ValueError("flush needs at least one frame, but none was added to this stream")
        like, device = self._like, self._like.device
        assert self._total is not None and self._rows is not None
        _, remainder = left_over(self._total, self.beta)
        values, ends = like, torch.zeros(0, dtype=torch.int64, device=device)
        if self.tail is not None and bool(fires_at_end(remainder, self.beta, self.tail)):
            total = _add(self._sum, self._rows)
            assert total is not None
            divisor = (remainder / self.beta).to(self._rows.dtype)
            values = (total / divisor).to(like.dtype)[None]
            ends = torch.tensor([self._seen - 1], dtype=torch.int64, device=device)
        self._reset()
        return values, ends


def _check_like(x: Tensor, before: Tensor) -> None:
    if x.shape[1] != before.shape[1] or x.dtype != before.dtype or x.device != before.device:
        raise ValueError(
            f"x must be [N, {before.shape[1]}], {before.dtype}, on {before.device} like the earlier frames, got "
            f"{list(x.shape)}, {x.dtype}, on {x.device}"
        )


def _add(total: Tensor | None, frames: Tensor) -> Tensor | None:
    """Add frames ``[N, D]`` to a sum, block by block as in ``segment_reduce``; without any frame return ``total``."""
    wide = frames.to(accumulate_dtype(frames.dtype))
    starts = torch.arange(0, len(wide), BLOCK, dtype=torch.int64, device=wide.device)
    lengths = (len(wide) - starts).clamp_max(BLOCK)
    for block in segment_reduce(wide, row_segments(starts, lengths, len(wide)), "sum"):
        total = block if total is None else total + block
    return total

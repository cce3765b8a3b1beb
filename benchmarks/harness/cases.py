"""The batches that are measured: their shapes and their data."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import fastcompress as fc

#: Frames that :func:`features` mixes at a time, to keep its temporaries small.
_BLOCK = 8192

#: Bytes of input in rotation: above every last-level cache on the market but the stacked ones, see ``buffer_count``.
_MIN_ROTATION = 256 << 20


@dataclass(frozen=True)
class Case:
    """A shape of batch.

    Attributes:
        name: what ``--cases`` takes.
        lengths: frames of each sequence.
        dim: width of a frame.
        default: measured when ``--cases`` is not given.
        calls: calls in a timed sample; above 1 for calls of microseconds.
        backward: measure forward + backward too.
        floors: compare with the memory floor, which says nothing about calls of microseconds.
        contenders: names of the contenders to measure, all when ``None``.
        rule: finds the segments; ``LocalMax()``, or ``Uniform(...)`` for contenders without scores.
        mean_length: frames of a segment on average, by a ``Threshold`` chosen for that instead of ``rule``.
        window: frames of a window of the contender that pools fixed windows.
    """

    name: str
    lengths: tuple[int, ...]
    dim: int
    default: bool = True
    calls: int = 1
    backward: bool = True
    floors: bool = True
    contenders: tuple[str, ...] | None = None
    rule: fc.Rule = fc.LocalMax()
    mean_length: int | None = None
    window: int = 3

    @property
    def frames(self) -> int:
        """Frames of the whole batch."""
        return sum(self.lengths)

    def input_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of the packed input."""
        return self.frames * self.dim * dtype.itemsize


def random_lengths(count: int, low: int, high: int, seed: int) -> tuple[int, ...]:
    """``count`` lengths, uniform in ``[low, high]``."""
    generator = random.Random(seed)
    return tuple(generator.randint(low, high) for _ in range(count))


def features(frames: int, dim: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """``[frames, dim]`` like the output of a speech encoder, the same for the same arguments.

    48 latent walks that forget slowly inside a "phone" and jump at its end (every 7th frame or so), mixed to ``dim``
    channels, with an offset a channel, four outlier channels and white noise. Neighbours are at a cosine distance of
    0.1 to 0.8 and the local maxima of it make segments of three frames on average.
    """
    rank, keep, noise = 48, 0.8, 0.15
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(rank, dim, generator=generator) / math.sqrt(rank)
    innovation = torch.randn(frames, rank, generator=generator)
    jump = torch.rand(frames, generator=generator) < 0.15
    memory = torch.where(jump, 0.1, keep).unsqueeze(1)
    steps, decay = (innovation * (1 - memory * memory).sqrt()).numpy(), memory.numpy()
    walk = torch.empty(frames, rank)
    state = innovation[:1].squeeze(0).numpy().copy() if frames else None
    for t, row in enumerate(walk.numpy()):
        state = decay[t] * state + steps[t]
        row[:] = state
    offset = torch.randn(dim, generator=generator) * 0.3
    offset[torch.randint(0, dim, (4,), generator=generator)] *= 20
    x = torch.empty(frames, dim, dtype=dtype)
    for start in range(0, frames, _BLOCK):
        part = walk[start : start + _BLOCK]
        white = noise * torch.randn(part.shape[0], dim, generator=generator)
        x[start : start + _BLOCK] = part @ mix + offset + white
    return x


def exact_distances(x: Tensor) -> Tensor:
    """``[N]`` fp64, 1 - cosine of each of the rows ``x`` ``[N, D]`` and the next; 0 for the last."""
    rows = x.shape[0]
    d = torch.zeros(rows, dtype=torch.float64)
    for start in range(0, rows - 1, _BLOCK):
        part = x[start : min(start + _BLOCK, rows - 1) + 1].double()
        norm = part.square().sum(1).sqrt().clamp_min(1e-8)
        d[start : start + part.shape[0] - 1] = 1 - (part[:-1] * part[1:]).sum(1) / (norm[:-1] * norm[1:])
    return d


def threshold_of(x: Tensor, cu: Tensor, mean_length: int) -> fc.Threshold:
    """The threshold that cuts frames ``x`` ``[N, D]`` of sequences ``cu`` ``[B + 1]`` into segments of a mean length.

    It lies half-way between two distances, so that rounding flips few boundaries.
    """
    if mean_length == 1:
        return fc.Threshold(-1.0)
    d = exact_distances(x)
    d[cu[1:].long() - 1] = -1.0  # what ends a sequence ends a segment, whatever the threshold
    count = max(1, round(x.shape[0] / mean_length) - (cu.shape[0] - 1))
    above, below = d.topk(count + 1).values[-2:].tolist()
    return fc.Threshold((above + below) / 2)


def cu_seqlens(lengths: Sequence[int]) -> Tensor:
    """``[B + 1]`` int32, frames before each sequence."""
    return torch.tensor([0, *lengths]).cumsum(0).int()


@dataclass(frozen=True)
class Inputs:
    """What a contender is called with.

    Attributes:
        x: ``[N, D]``, packed frames, or ``[B, T, D]`` for a contender that works on padded ones.
        cu_seqlens: ``[B + 1]`` int32.
        rule: finds the segments.
        window: of the :class:`Case`.
    """

    x: Tensor
    cu_seqlens: Tensor
    rule: fc.Rule = fc.LocalMax()
    window: int = 3

    def differentiable(self) -> Inputs:
        """The same memory as a leaf that wants a gradient."""
        return replace(self, x=self.x.detach().requires_grad_())


def buffer_count(size: int, last_level_cache: int) -> int:
    """Buffers of ``size`` bytes to rotate through so that none is in a cache when its turn comes."""
    return max(2, math.ceil(max(_MIN_ROTATION, 4 * last_level_cache) / max(size, 1)))


def packed_buffers(case: Case, dtype: torch.dtype, last_level_cache: int, seed: int = 3) -> list[Inputs]:
    """Packed inputs to rotate through: equal values in different memory, so one check serves all."""
    x = features(case.frames, case.dim, dtype, seed)
    cu = cu_seqlens(case.lengths)
    rule = case.rule if case.mean_length is None else threshold_of(x, cu, case.mean_length)
    first = Inputs(x, cu, rule, case.window)
    # A call of microseconds is timed on hot input: its cost is overhead, and thousands of buffers would hide that.
    count = buffer_count(case.input_bytes(dtype), last_level_cache) if case.calls == 1 else 1
    return [first, *(replace(first, x=x.clone()) for _ in range(count - 1))]


def padded_buffers(packed: Sequence[Inputs], lengths: Sequence[int], last_level_cache: int) -> list[Inputs]:
    """Padded ``[B, T, D]`` copies of the packed inputs, zeros behind each sequence."""
    padded = pad_sequence(list(packed[0].x.split(list(lengths))), batch_first=True)
    count = buffer_count(padded.nbytes, last_level_cache) if len(packed) > 1 else 1
    first = replace(packed[0], x=padded)
    return [first, *(replace(first, x=padded.clone()) for _ in range(count - 1))]

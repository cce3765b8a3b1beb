"""The batches that are measured: their shapes and their data."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, TypeVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import fastcompress as fc

#: Frames that ``features`` mixes at a time, to keep its temporaries small.
_BLOCK = 8192

#: Bytes of input in rotation: more than every last-level cache on the market but the stacked ones.
MIN_ROTATION = 256 << 20

B = TypeVar("B", bound="Batch")


def buffer_count(size: int, last_level_cache: int) -> int:
    """Buffers of ``size`` bytes to rotate through so that none is in a cache when its turn comes."""
    return max(2, math.ceil(max(MIN_ROTATION, 4 * last_level_cache) / max(size, 1)))


class Batch:
    """Base of the dataclasses that contenders are called with. ``LEAF`` names the field that gets a gradient."""

    LEAF: ClassVar[str] = "x"

    @property
    def leaf(self) -> Tensor:
        """The tensor that gets a gradient."""
        tensor: Tensor = getattr(self, self.LEAF)
        return tensor

    def with_leaf(self: B, tensor: Tensor) -> B:
        """The same batch with another leaf."""
        return replace(self, **{self.LEAF: tensor})  # type: ignore[type-var]  # a dataclass

    def differentiable(self: B) -> B:
        """The same memory with a leaf that requires a gradient."""
        return self.with_leaf(self.leaf.detach().requires_grad_())

    def rotation(self: B, last_level_cache: int) -> list[B]:
        """Equal values in different memory to rotate through, so that no input is in a cache when its turn comes."""
        count = buffer_count(self.leaf.nbytes, last_level_cache)
        return [self, *(self.with_leaf(self.leaf.clone()) for _ in range(count - 1))]


@dataclass(frozen=True)
class Case:
    """A shape of batch.

    Attributes:
        name: What ``--cases`` takes.
        lengths: Frames of each sequence.
        dim: Width of a frame.
        default: Whether it is measured when ``--cases`` is not given.
        calls: Calls per sample; above 1 for calls of microseconds, of which only the forward pass is timed.
        contenders: Names of the contenders to measure; all when ``None``.
        rule: Rule for the segments: ``LocalMax()``, or ``Uniform(...)`` for contenders without scores.
        mean_length: Frames per segment on average, by a ``Threshold`` chosen for that instead of ``rule``.
        window: Frames per window of the contender that pools fixed windows.
        dtypes: Short names of the dtypes to measure; those of the command when ``None``.
    """

    name: str
    lengths: tuple[int, ...]
    dim: int
    default: bool = True
    calls: int = 1
    contenders: tuple[str, ...] | None = None
    rule: fc.Rule = fc.LocalMax()
    mean_length: int | None = None
    window: int = 3
    dtypes: tuple[str, ...] | None = None

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
    """Make ``[frames, dim]`` like the output of a speech encoder, the same for the same arguments.

    48 latent walks that change slowly inside a "phone" and jump at its end (every 7th frame or so), mixed to ``dim``
    channels, with one offset per channel, four outlier channels and white noise. Neighbours have a cosine distance of
    0.1 to 0.8, whose local maxima make segments of three frames on average.
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
    """Choose the threshold that cuts frames ``[N, D]`` of sequences ``cu`` ``[B + 1]`` into segments of a mean length.

    It lies half-way between two distances, so that rounding flips few boundaries.
    """
    if mean_length == 1:
        return fc.Threshold(-1.0)
    d = exact_distances(x)
    d[cu[1:].long() - 1] = -1.0  # the end of a sequence ends a segment at any threshold
    count = max(1, round(x.shape[0] / mean_length) - (cu.shape[0] - 1))
    above, below = d.topk(count + 1).values[-2:].tolist()
    return fc.Threshold((above + below) / 2)


def cu_seqlens(lengths: Sequence[int]) -> Tensor:
    """``[B + 1]`` int32, frames before each sequence."""
    return torch.tensor([0, *lengths]).cumsum(0).int()


@dataclass(frozen=True)
class Inputs(Batch):
    """What a contender of segment pooling is called with.

    Attributes:
        x: Frames, ``[N, D]`` packed, or ``[B, T, D]`` for a contender that works on padded ones.
        cu_seqlens: ``[B + 1]`` int32.
        rule: Rule for the segments.
        window: Window of the ``Case``.
    """

    x: Tensor
    cu_seqlens: Tensor
    rule: fc.Rule = fc.LocalMax()
    window: int = 3


def inputs_of(case: Case, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 3) -> Inputs:
    """The packed inputs of a case."""
    x, cu = features(case.frames, case.dim, dtype, seed), cu_seqlens(case.lengths)
    rule = case.rule if case.mean_length is None else threshold_of(x, cu, case.mean_length)
    return Inputs(x.to(device), cu.to(device), rule, case.window)


def padded(inputs: Inputs, lengths: Sequence[int]) -> Inputs:
    """The frames as ``[B, T, D]``, with zeros after each sequence."""
    return replace(inputs, x=pad_sequence(list(inputs.x.split(list(lengths))), batch_first=True))


def gradients(numel: int, dtype: torch.dtype, count: int, device: torch.device | str = "cpu") -> list[Tensor]:
    """Flat tensors of equal values to start backward passes from, to rotate through."""
    generator = torch.Generator(device).manual_seed(1)
    first = torch.randn(numel, generator=generator, device=device).to(dtype)
    return [first, *(first.clone() for _ in range(count - 1))]

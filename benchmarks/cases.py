"""The batches that are measured: their shapes and their data."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

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
    """

    name: str
    lengths: tuple[int, ...]
    dim: int
    default: bool = True
    calls: int = 1
    backward: bool = True
    floors: bool = True
    contenders: tuple[str, ...] | None = None

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


def cu_seqlens(lengths: Sequence[int]) -> Tensor:
    """``[B + 1]`` int32, frames before each sequence."""
    return torch.tensor([0, *lengths]).cumsum(0).int()


@dataclass(frozen=True)
class Inputs:
    """What a contender is called with.

    Attributes:
        x: ``[N, D]``, packed frames, or ``[B, T, D]`` for a contender that works on padded ones.
        cu_seqlens: ``[B + 1]`` int32.
    """

    x: Tensor
    cu_seqlens: Tensor

    def differentiable(self) -> Inputs:
        """The same memory as a leaf that wants a gradient."""
        return Inputs(self.x.detach().requires_grad_(), self.cu_seqlens)


def buffer_count(size: int, last_level_cache: int) -> int:
    """Buffers of ``size`` bytes to rotate through so that none is in a cache when its turn comes."""
    return max(2, math.ceil(max(_MIN_ROTATION, 4 * last_level_cache) / max(size, 1)))


def packed_buffers(case: Case, dtype: torch.dtype, last_level_cache: int, seed: int = 3) -> list[Inputs]:
    """Packed inputs to rotate through: equal values in different memory, so one check serves all."""
    x, cu = features(case.frames, case.dim, dtype, seed), cu_seqlens(case.lengths)
    # A call of microseconds is timed on hot input: its cost is overhead, and thousands of buffers would hide that.
    count = buffer_count(case.input_bytes(dtype), last_level_cache) if case.calls == 1 else 1
    return [Inputs(x, cu), *(Inputs(x.clone(), cu) for _ in range(count - 1))]


def padded_buffers(packed: Sequence[Inputs], lengths: Sequence[int], last_level_cache: int) -> list[Inputs]:
    """Padded ``[B, T, D]`` copies of the packed inputs, zeros behind each sequence."""
    padded = pad_sequence(list(packed[0].x.split(list(lengths))), batch_first=True)
    count = buffer_count(padded.nbytes, last_level_cache) if len(packed) > 1 else 1
    cu = packed[0].cu_seqlens
    return [Inputs(padded, cu), *(Inputs(padded.clone(), cu) for _ in range(count - 1))]

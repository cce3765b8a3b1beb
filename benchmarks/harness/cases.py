"""The batches that are measured: their shapes and their data."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import fastcompress as fc

#: Frames that ``features`` mixes at a time, to keep its temporaries small.
_BLOCK = 8192
#: Bytes of input in rotation: more than every last-level cache on the market but the stacked ones.
MIN_ROTATION = 256 << 20


def rotation(x: Tensor, last_level_cache: int) -> list[Tensor]:
    """Copy an input so often that no copy is in a cache when its turn comes."""
    count = max(2, math.ceil(max(MIN_ROTATION, 4 * last_level_cache) / max(x.nbytes, 1)))
    return [x, *(x.clone() for _ in range(count - 1))]


def random_bytes(count: int, device: torch.device | str = "cpu", seed: int = 0) -> Tensor:
    """Make ``count`` random bytes. A GPU may compress zeros and other constants on their way to memory."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randint(0, 256, (count,), dtype=torch.uint8, generator=generator, device=device)


def gradients(numel: int, dtype: torch.dtype, count: int, device: torch.device | str = "cpu") -> list[Tensor]:
    """Make flat tensors of equal values to start backward passes from, to rotate through."""
    generator = torch.Generator(device).manual_seed(1)
    first = torch.randn(numel, generator=generator, device=device).to(dtype)
    return [first, *(first.clone() for _ in range(count - 1))]


def random_lengths(count: int, low: int, high: int, seed: int) -> tuple[int, ...]:
    """Draw ``count`` lengths, uniform in ``[low, high]``."""
    generator = random.Random(seed)
    return tuple(generator.randint(low, high) for _ in range(count))


def cu_seqlens(lengths: Sequence[int]) -> Tensor:
    """Return the number of frames before each sequence, ``[B + 1]`` int32."""
    return torch.tensor([0, *lengths]).cumsum(0).int()


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


@dataclass(frozen=True)
class Case:
    """A shape of batch to pool.

    Attributes:
        name: What ``--cases`` takes.
        lengths: Frames of each sequence.
        dim: Width of a frame.
        calls: Calls per sample; above 1 for calls of microseconds, of which only the forward pass is timed.
        implementations: Names of the implementations to measure; all when ``None``.
        rule: Rule for the segments: ``LocalMax()``, or ``Uniform(...)`` for implementations without scores.
        mean_length: Frames per segment on average, by a ``Threshold`` chosen for that instead of ``rule``.
        window: Frames per window of the implementation that pools fixed windows.
    """

    name: str
    lengths: tuple[int, ...]
    dim: int
    calls: int = 1
    implementations: tuple[str, ...] | None = None
    rule: fc.Rule = fc.LocalMax()
    mean_length: int | None = None
    window: int = 3

    @property
    def frames(self) -> int:
        """Frames of the whole batch."""
        return sum(self.lengths)


@dataclass(frozen=True)
class Batch:
    """What an implementation of segment pooling is called with next to the frames.

    Attributes:
        cu_seqlens: ``[B + 1]`` int32.
        rule: Rule for the segments.
        window: Window of the ``Case``.
    """

    cu_seqlens: Tensor
    rule: fc.Rule = fc.LocalMax()
    window: int = 3


def batch_of(case: Case, dtype: torch.dtype, device: torch.device | str = "cpu") -> tuple[Tensor, Batch]:
    """Make the packed frames of a case, and the rest of its batch."""
    x, cu = features(case.frames, case.dim, dtype, seed=3), cu_seqlens(case.lengths)
    rule = case.rule if case.mean_length is None else threshold_of(x, cu, case.mean_length)
    return x.to(device), Batch(cu.to(device), rule, case.window)


def threshold_of(x: Tensor, cu: Tensor, mean_length: int) -> fc.Threshold:
    """Choose the threshold that cuts frames ``[N, D]`` of sequences ``cu`` ``[B + 1]`` into segments of a mean length.

    It lies half-way between two distances, so that rounding flips few boundaries.
    """
    if mean_length == 1:
        return fc.Threshold(-1.0)
    d = fc.adjacent_distance(x, cu_seqlens=cu).double().nan_to_num(nan=-1.0)  # the end of a sequence ends a segment
    count = max(1, round(x.shape[0] / mean_length) - (cu.shape[0] - 1))
    above, below = d.topk(count + 1).values[-2:].tolist()
    return fc.Threshold((above + below) / 2)

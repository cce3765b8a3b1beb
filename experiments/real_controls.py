"""Replace the tokens of a rule in the experiment on real speech: controls, Ward's method and published merging.

A control is called with the frames of the encoder ``[B, T, D]``, the number of frames of the audio ``[B]`` and the
output of the compressed encoder, and returns that output with other tokens.
"""

from __future__ import annotations

import functools
import heapq
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.nn.utils.rnn import pad_sequence

import fastcompress as fc
from fastcompress.segments import row_segments
from fastcompress.training.sweep.whisper import Control

#: Names of the controls: lengths of the rule's segments in random order; one attention weight for all pooled tokens;
#: as many segments as the rule's, by Ward's method.
PERMUTED, CONSTANT, WARD = "lengths in random order", "equal weights", "ward"

#: Function that maps frames ``[n, D]`` and the rule's numbers of frames per token ``[k]`` to tokens ``[m, D]`` and
#: their numbers of frames ``[m]``.
Pool = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def controls(silence: str | float) -> dict[str, Control]:
    """Return the controls by name, for a treatment of the silence."""
    return {
        PERMUTED: repooled(permuted, silence),
        CONSTANT: functools.partial(constant, silence),
        WARD: repooled(ward, silence),
    }


def repooled(pool: Pool, silence: str | float) -> Control:
    """Return a control that pools the frames of each utterance by another function than the rule."""

    def control(hidden: Tensor, frames: Tensor, out: Any) -> Any:
        tokens, lengths = [], []
        for row, count, values, sizes in zip(
            hidden, frames.tolist(), out.last_hidden_state, out.token_lengths, strict=True
        ):
            pooled, used = number_pooled(sizes, count, silence), int((sizes > 0).sum())
            found, of_found = pool(row[: int(sizes[:pooled].sum())], sizes[:pooled])
            tokens.append(torch.cat([found, values[pooled:used]]))
            lengths.append(torch.cat([of_found.to(sizes.dtype), sizes[pooled:used]]))
        out.last_hidden_state = pad_sequence(tokens, batch_first=True)
        out.token_lengths = pad_sequence(lengths, batch_first=True)
        return out

    return control


def means(frames: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Average frames ``[n, D]`` over consecutive segments of the given lengths."""
    segments = row_segments(lengths.cumsum(0) - lengths, lengths, len(frames))
    return fc.segment_reduce(frames, segments), lengths


def permuted(frames: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Average over segments that have the rule's lengths in random order. The number of frames is the seed."""
    order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(len(frames)))
    return means(frames, lengths[order])


def ward(frames: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Average over as many segments as the rule's, by Ward's method (Ward, 1963)."""
    return means(frames, ward_lengths(frames, len(lengths)).to(lengths))


def ward_lengths(frames: Tensor, count: int) -> Tensor:
    """Return the lengths of ``count`` segments by bottom-up merging, ``[count]`` int64.

    From single frames, the two neighbouring segments whose merging adds the least to the sum of squared distances of
    the L2-normalized frames to the mean of their segment are merged until ``count`` are left. Of equal pairs, the first
    is merged.

    Args:
        frames: Frames, ``[n, D]``.
        count: Number of segments, from 1 to ``n``.
    """
    sums = normalize(frames.double(), dim=1).numpy()
    size, version = [1] * len(sums), [0] * len(sums)
    after, before = list(range(1, len(sums) + 1)), list(range(-1, len(sums) - 1))
    queue: list[tuple[float, int, int, int]] = []

    def push(first: int, second: int) -> None:
        apart = sums[first] / size[first] - sums[second] / size[second]
        added = size[first] * size[second] / (size[first] + size[second]) * float(apart @ apart)
        heapq.heappush(queue, (added, first, version[first], version[second]))

    for i in range(len(sums) - 1):
        push(i, i + 1)
    left = len(sums)
    while left > count:
        _, first, *versions = heapq.heappop(queue)
        second = after[first]
        if second == len(sums) or versions != [version[first], version[second]]:
            continue
        sums[first] += sums[second]
        size[first] += size[second]
        version[first] += 1
        version[second] = -1  # merged into the first
        after[first] = after[second]
        left -= 1
        if after[first] < len(sums):
            before[after[first]] = first
            push(first, after[first])
        if before[first] >= 0:
            push(before[first], first)
    return torch.tensor([size[i] for i in range(len(sums)) if version[i] >= 0])


def constant(silence: str | float, hidden: Tensor, frames: Tensor, out: Any) -> Any:
    """Weight all pooled tokens of an utterance by their mean number of frames."""
    lengths = out.token_lengths.double()
    for sizes, count in zip(lengths, frames.tolist(), strict=True):
        pooled = number_pooled(sizes, count, silence)
        sizes[:pooled] = sizes[:pooled].mean()
    out.token_lengths = lengths
    return out


def number_pooled(sizes: Tensor, count: int, silence: str | float) -> int:
    """Return the number of pooled tokens, which come first, from the number of frames of each token ``[S]``."""
    if silence == "keep":
        return int(((sizes.cumsum(0) - sizes < count) & (sizes > 0)).sum())
    return int((sizes > 0).sum())

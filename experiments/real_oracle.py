"""Measure boundaries between text tokens on real speech, as an oracle: ``python -m experiments.real_oracle FOLDER``.

The folder is that of ``python -m experiments.real``, to whose results the rows are added. Whisper writes each utterance
from every frame, and its alignment heads state when each text token starts. These starts are boundaries; the longest
segments are then divided into equal parts until there are as many as uniform pooling makes. No rule can compute them,
since they need the text. A control has segments of the same lengths in random order.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

from experiments.real import NEW_TOKENS, RESULTS, ROOT, Part, min_variance
from experiments.real_controls import Pool, means, permuted, repooled
from fastcompress.training.sweep.models import NONE, Variant

PART = ("whisper-tiny.en", "test-other", "keep")
#: Frames per token. At 4, pooling adds too few errors to compare placements.
RATE = 6
ORACLE, ORDER = f"starts of text tokens {RATE}x", f"starts of text tokens {RATE}x, lengths in random order"

_FRAME = 0.02  # seconds


@torch.inference_mode()
def token_starts(model: Any, states: Tensor, count: int) -> list[int]:
    """Return the frames at which text tokens start, sorted, without duplicates.

    Args:
        model: A ``WhisperForConditionalGeneration`` without compression, whose attention is eager.
        states: Frames of the window, ``[T, D]``.
        count: Number of frames of the audio.
    """
    encoded = BaseModelOutput(last_hidden_state=cast(torch.FloatTensor, states[None]))
    frames = torch.tensor([2 * count])
    limits = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "num_beams": 1}
    out = model.generate(encoder_outputs=encoded, return_token_timestamps=True, num_frames=frames, **limits)
    starts = (out["token_timestamps"][0] / _FRAME).round().long()
    return sorted({int(start) for start in starts if 0 <= start < count} | {0})


def divided(starts: Sequence[int], frames: int, count: int) -> Tensor:
    """Return the lengths of ``count`` segments that start at the given frames and at equal distances between them.

    Args:
        starts: First frames of segments, sorted, from 0.
        frames: Number of frames.
        count: Number of segments. If there are more starts, the shortest segments are joined to the ones before them.
    """
    lengths = [end - start for start, end in zip(starts, [*starts[1:], frames], strict=True)]
    while len(lengths) > count:
        shortest = min(range(1, len(lengths)), key=lambda i: lengths[i])
        lengths[shortest - 1] += lengths.pop(shortest)
    parts = [1] * len(lengths)
    while sum(parts) < count:
        parts[max(range(len(parts)), key=lambda i: lengths[i] / parts[i])] += 1
    found = [n // p + (i < n % p) for n, p in zip(lengths, parts, strict=True) for i in range(p)]
    return torch.tensor(found)


class Oracle:
    """Boundaries at the starts of text tokens, which are looked up by the frames of the audio.

    Args:
        audio: Frames of the audio of each utterance, ``[n, D]``.
        starts: First frames of its text tokens.
    """

    def __init__(self, audio: Sequence[Tensor], starts: Sequence[Sequence[int]]) -> None:
        self._starts = {self._key(frames): found for frames, found in zip(audio, starts, strict=True)}

    @staticmethod
    def _key(frames: Tensor) -> tuple[int, float]:
        return len(frames), float(frames[0].sum())

    def pool(self, frames: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Average frames ``[n, D]`` over as many segments as the rule's ``lengths`` ``[k]``."""
        return means(frames, divided(self._starts[self._key(frames)], len(frames), len(lengths)).to(lengths))

    def permuted(self, frames: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Average over segments of the same lengths in random order."""
        return permuted(frames, self.pool(frames, lengths)[1])


def find_starts(part: Part) -> list[list[int]]:
    """Return the starts of the text tokens of each utterance."""
    model = part.model.model
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")  # the others do not return attention
    try:
        return [token_starts(model, s["states"], int(s["frames"])) for s in part.sweep.states()]
    finally:
        model.set_attn_implementation(before)


def main() -> int:
    """Measure the oracle, its control, every frame, uniform pooling and minimum-variance segments."""
    parser = argparse.ArgumentParser(prog="python -m experiments.real_oracle", description=__doc__)
    parser.add_argument("folder", type=Path, help="folder of models and speech")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "real", help="folder of states and texts")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results (experiments/results)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    part = Part(options.folder, *PART, options.out)
    starts = find_starts(part)
    audio = part.audio()
    print(f"{sum(map(len, audio)) / sum(map(len, starts)):.1f} frames per text token", flush=True)
    oracle = Oracle(audio, starts)
    pools: dict[str, Pool] = {ORACLE: oracle.pool, ORDER: oracle.permuted}
    part.model.controls |= {name: repooled(pool, part.silence) for name, pool in pools.items()}
    uniform = f"uniform:{RATE}"
    rows = [Variant(NONE), Variant(uniform), Variant(min_variance(RATE))]
    part.run([*rows, *(Variant(uniform, control=name) for name in pools)], options.results)
    return 0


if __name__ == "__main__":
    sys.exit(main())

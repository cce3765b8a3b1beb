"""Measure published methods on real speech at 3 and 4 frames per token: ``python -m experiments.real_published``.

The folder is that of ``python -m experiments.real``, to whose results the rows are added. The methods are measured
without training, as published and with proportional attention. Thresholds are set so that the mean number of frames per
token on the data is the rate; no text is used. Methods that weight frames by a trained part (CIF, CTC, the attention
in SA-MAP and FastLongSpeech) are measured without their weights or left out.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import transformers
from torch import Tensor

import fastcompress as fc
from experiments.real import RESULTS, ROOT, Part
from experiments.real_controls import means, repooled
from fastcompress.nn import BipartiteMerge
from fastcompress.training.sweep.models import Variant
from fastcompress.training.sweep.whisper import Control

PART = ("whisper-tiny.en", "test-other", "keep")
RATES = (3, 4)
#: Merging methods, as in docs/methods.md, by the window of ``bipartite_merge``.
MERGES: dict[str, int | None] = {"A-ToMe": 0, "ToMe": None}
GREEDY = "SA-MAP's segments"

Counter = Callable[[Tensor, float], int]


def count_rule(rule: str, frames: Tensor, threshold: float) -> int:
    """Return the number of segments of frames ``[n, D]`` by a rule whose text has a place for the threshold."""
    return len(fc.segment_pool(frames, rule=rule.format(threshold)).values)


def count_greedy(frames: Tensor, threshold: float) -> int:
    """Return the number of greedy segments of frames ``[n, D]``."""
    return len(fc.greedy_segments(frames, threshold).starts)


def calibrated(utterances: Sequence[Tensor], rate: float, count: Counter) -> float:
    """Return the threshold, to 4 digits, at which the mean number of frames per token is closest to a rate.

    Args:
        utterances: Frames of each utterance, ``[n, D]``.
        rate: Frames per token.
        count: Number of tokens of an utterance at a threshold, which falls as the threshold rises.
    """
    wanted = sum(map(len, utterances)) / rate
    low, high = 0.0, 1.0
    while high - low > 1e-4:
        middle = (low + high) / 2
        if sum(count(frames, middle) for frames in utterances) > wanted:
            low = middle
        else:
            high = middle
    return round(high, 4)


def greedy(threshold: float, frames: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Average frames ``[n, D]`` over greedy segments; the rule's ``lengths`` are not used."""
    return means(frames, fc.greedy_segments(frames, threshold).lengths)


def merge(rate: float, window: int | None, frames: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Merge frames ``[n, D]``; the rule's ``lengths`` are not used."""
    merged = BipartiteMerge(rate, window)(frames)
    return merged.values, merged.sizes


def methods(utterances: Sequence[Tensor], silence: str | float) -> tuple[list[Variant], dict[str, Control]]:
    """Return the variants of all methods, and the controls that implement some of them.

    Args:
        utterances: Frames of the audio of each utterance, ``[n, D]``.
        silence: Treatment of the silence.
    """
    variants, controls = [], {}
    for rate in RATES:
        variants.append(Variant(f"top-k:rate={rate}"))
        for rule in ("threshold:{}", "lookback:3,threshold={}"):
            threshold = calibrated(utterances, rate, functools.partial(count_rule, rule))
            variants.append(Variant(rule.format(threshold)))
        uniform = f"uniform:{rate}"
        for name, window in MERGES.items():
            label = f"{name} {rate}x"
            controls[label] = repooled(functools.partial(merge, rate, window), silence)
            variants.append(Variant(uniform, control=label))
        threshold = calibrated(utterances, rate, count_greedy)
        label = f"{GREEDY}, threshold {threshold}"
        controls[label] = repooled(functools.partial(greedy, threshold), silence)
        variants.append(Variant(uniform, control=label))
    published = [dataclasses.replace(variant, proportional_attention=False) for variant in variants]
    return published + variants, controls


def main() -> int:
    """Measure all methods."""
    parser = argparse.ArgumentParser(prog="python -m experiments.real_published", description=__doc__)
    parser.add_argument("folder", type=Path, help="folder of models and speech")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "real", help="folder of states and texts")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results (experiments/results)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    part = Part(options.folder, *PART, options.out)
    variants, controls = methods(part.audio(), part.silence)
    part.model.controls |= controls
    part.run(variants, options.results)
    return 0


if __name__ == "__main__":
    sys.exit(main())

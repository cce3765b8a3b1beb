"""Compare streamed transcription with that of the whole audio: ``python -m experiments.streaming [MANIFEST]``.

Each utterance is one stream. Then all utterances, one after another, are one stream.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastcompress.lalm.streaming import StreamingTranscriber
from fastcompress.training.evaluation import transcribe
from fastcompress.training.examples import Examples
from fastcompress.training.manifest import Utterance, read_manifest
from fastcompress.training.usable import load_utterance

ROOT = Path(__file__).resolve().parents[1]
MODELS = ("digits", "digits-uniform-4")
#: Look-ahead and hop in seconds.
SETTINGS = ((0.0, 0.25), (0.25, 0.25), (0.25, 0.5), (0.5, 0.5), (1.0, 0.5))
#: Windows, in seconds, for the stream of all utterances.
WINDOWS = (2.0, 3.0, 4.0, 8.0)


def main(arguments: Sequence[str]) -> int:
    from transformers.utils import logging

    from fastcompress.lalm.loading import load_model

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    utterances = read_manifest(Path(arguments[0]) if arguments else ROOT / "assets" / "digits" / "test.jsonl")
    references = [u.target for u in utterances]
    for name in MODELS:
        model, processor = load_model(ROOT / "assets" / "models" / name)
        audio = [load_utterance(u, processor.sampling_rate) for u in utterances]
        print(f"{name}, {len(references)} utterances, {sum(len(r.split()) for r in references)} words")
        print(f"{'':28}{'wrong':>7}{'as whole':>10}{'first s':>9}{'lagging s':>11}")
        whole = _whole(model, processor, audio)
        seconds = statistics.fmean(len(a) / processor.sampling_rate for a in audio)
        _row("whole", _wrong(references, whole), len(whole), seconds, seconds)
        for look_ahead, hop in SETTINGS:
            streams = [_stream(model, processor, a, look_ahead=look_ahead, hop=hop) for a in audio]
            found = [s.latency() for s in streams]
            _row(
                f"look-ahead {look_ahead:g}, hop {hop:g}",
                _wrong(references, [s.text for s in streams]),
                sum(s.text == w for s, w in zip(streams, whole, strict=True)),
                statistics.fmean(f.first for f in found if f.first is not None),
                statistics.fmean(f.lagging for f in found if f.lagging is not None),
            )
        joined, reference = np.concatenate(audio), " ".join(references)
        print(f"all as one, {len(joined) / processor.sampling_rate:.1f} s")
        seconds = len(joined) / processor.sampling_rate
        _row("whole", _wrong([reference], _whole(model, processor, [joined])), None, seconds, seconds)
        for window in WINDOWS:
            stream = _stream(model, processor, joined, window=window)
            latency = stream.latency()
            _row(f"window {window:g}", _wrong([reference], [stream.text]), None, latency.first, latency.lagging)
        print()
    return 0


def _whole(model: Any, processor: Any, audio: list[np.ndarray]) -> list[str]:
    rate = processor.sampling_rate
    utterances = [Utterance(None, "", "", len(a) / rate, samples=(a, rate)) for a in audio]
    written, _ = transcribe(model, Examples(utterances, processor), 1, max_new_tokens=256, do_sample=False)
    return [text or "" for text in written]


def _stream(model: Any, processor: Any, audio: np.ndarray, **settings: Any) -> StreamingTranscriber:
    stream = StreamingTranscriber(model, processor, **settings)
    stream.feed(audio)
    stream.finish()
    return stream


def _wrong(references: list[str], written: list[str]) -> int:
    import jiwer

    found = jiwer.process_words(references, written)
    return found.substitutions + found.deletions + found.insertions


def _row(title: str, wrong: int, same: int | None, first: float | None, lagging: float | None) -> None:
    first_text, lagging_text = ("-" if value is None else f"{value:.2f}" for value in (first, lagging))
    print(f"{title:28}{wrong:7}{'' if same is None else same:>10}{first_text:>9}{lagging_text:>11}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Transcribe unseen speech with every frame and with a quarter of the tokens, and print all texts: ``make demo``.

"4x, as usual" pools four frames into one token and gives tokens consecutive positions. "4x, fastcompress" finds
segments of similar frames; in attention, a token weighs as much as its frames, and it keeps their place in time. The
same model, which was trained on every frame, runs both. "4x, trained for it" is a model that was trained with pooling.
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from fastcompress.training.evaluation import transcribe
from fastcompress.training.examples import Examples
from fastcompress.training.manifest import read_manifest

ROOT = Path(__file__).resolve().parents[1]
#: Title, model, and the arguments of ``load_model`` that override the saved settings.
COLUMNS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("every frame", "digits", {}),
    ("4x, as usual", "digits", {"rule": "uniform:4", "proportional_attention": False, "positions": "compact"}),
    ("4x, fastcompress", "digits", {"rule": "min-variance:rate=4"}),
    ("4x, trained for it", "digits-uniform-4", {}),
)


def main() -> int:
    import jiwer
    from tabulate import tabulate
    from transformers.utils import logging

    from fastcompress.lalm.loading import load_model

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    utterances = read_manifest(ROOT / "assets" / "digits" / "test.jsonl")
    rows: list[list[str]] = [[u.target for u in utterances]]
    scores = []
    for title, name, settings in COLUMNS:
        model, processor = load_model(ROOT / "assets" / "models" / name, **settings)
        examples = Examples(utterances, processor, cache=True)
        answers, totals = transcribe(model, examples, max_new_tokens=16, do_sample=False)
        written = [answer or "" for answer in answers]
        rows.append(written)
        seconds = sum(u.duration or 0.0 for u in utterances)
        scores.append(
            (
                title,
                totals["audio_tokens"],
                totals["audio_tokens"] / seconds,
                _prefill(model, examples),
                100 * jiwer.wer(rows[0], written),
            )
        )
    heads = ["spoken", *(title for title, _, _ in COLUMNS)]
    print(tabulate(list(zip(*rows, strict=True)), heads, "plain", disable_numparse=True))
    print()
    head = ("", "tokens", "tokens/s", "prefill ms", "WER %")
    print(tabulate(scores, head, "plain", floatfmt=("", ".0f", ".1f", ".2f", ".1f")))
    print(f"({len(utterances)} strings of digits in voices that training did not use; prefill: median per string)")
    return 0


@torch.inference_mode()
def _prefill(model: Any, examples: Examples) -> float:
    """Return the median over utterances of the time, in ms, from the encoder's frames to the decoder's first token."""
    times = []
    for index in range(len(examples)):
        batch = examples.batch([index], targets=False)
        frames, lengths = model.encode(batch["input_features"], batch["feature_attention_mask"])
        runs = []
        for _ in range(5):
            since = time.perf_counter()
            model.prefill(model.pack(batch["input_ids"], batch["attention_mask"], frames, lengths))
            runs.append(1e3 * (time.perf_counter() - since))
        times.append(min(runs))
    return statistics.median(times)


if __name__ == "__main__":
    sys.exit(main())

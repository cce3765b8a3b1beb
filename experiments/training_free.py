"""Score compression without training in the shipped audio LLM: ``python -m experiments.training_free``.

The model was trained on every frame of synthetic strings of digits. Every rule runs with each combination of
proportional attention and positions in time. The control ``min-variance, lengths in random order`` has segments of the
lengths of ``min-variance`` in random order, so that only the placement of boundaries differs.

Each run makes the data set again, which takes a minute. Rows that are in the results are not computed again.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastcompress as fc
from fastcompress.files import write_file
from fastcompress.lalm.loading import load_model
from fastcompress.ops.segment_reduce import segment_reduce
from fastcompress.segments import Pooled, Segments
from fastcompress.training.evaluation import evaluate
from fastcompress.training.examples import EncodedExamples, Examples
from fastcompress.training.manifest import read_manifest
from fastcompress.training.scores import word_errors

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "assets" / "models" / "digits"
RATES = (2, 3, 4, 6)
#: Longest segment of ``min-variance`` for each rate, in frames.
LONGEST = {2: 8, 3: 8, 4: 8, 6: 12}
#: Titles of the test sets of ``fastcompress make-data``.
SETS = {"test": "known voices", "test-voice": "new voices", "test-noise": "more noise"}
#: Combinations of proportional attention and positions.
PARTS = tuple(itertools.product((False, True), ("compact", "time")))


class RandomOrder(torch.nn.Module):
    """Pool segments that have the lengths of ``min-variance`` in random order.

    Args:
        rate: Frames per token.
        seed: Seed of the order, which is the same for all sequences with the same number of segments.
    """

    def __init__(self, rate: int, seed: int = 0) -> None:
        super().__init__()
        self.rule: fc.MinVariance = fc.MinVariance(rate, LONGEST[rate])
        self.seed: int = seed

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None, lengths: Tensor | None = None) -> Pooled:
        """Compress a batch; see [`fastcompress.segment_pool`][]."""
        found = fc.segment_pool(x, cu_seqlens=cu_seqlens, lengths=lengths, rule=self.rule).segments
        starts, sizes = found.starts.clone(), found.lengths.clone()
        for begin, end in itertools.pairwise(found.cu_segments.tolist()):
            order = torch.randperm(end - begin, generator=torch.Generator().manual_seed(self.seed))
            sizes[begin:end] = found.lengths[begin:end][order]
            starts[begin:end] = found.starts[begin] + sizes[begin:end].cumsum(0) - sizes[begin:end]
        segments = Segments(
            starts, sizes, found.cu_segments, found.frame_cu_seqlens, found.num_rows, found.padded_length
        )
        return Pooled(segment_reduce(x, segments), segments)


def compressions() -> dict[str, str | torch.nn.Module]:
    """Return the rules and the controls by title."""
    found: dict[str, str | torch.nn.Module] = {}
    for rate in RATES:
        found[f"uniform {rate}x"] = f"uniform:{rate}"
        found[f"min-variance {rate}x"] = f"min-variance:rate={rate},max_len={LONGEST[rate]}"
        found[f"min-variance {rate}x, lengths in random order"] = RandomOrder(rate)
    return found


def score(
    load: Callable[[], Any],
    name: str,
    compression: str | torch.nn.Module,
    parts: tuple[bool, str],
    sets: dict[str, Examples],
) -> dict[str, Any]:
    """Return the row of one compression with one combination of proportional attention and positions."""
    model = load()
    if isinstance(compression, str):
        model.rule = None if compression == "none" else compression
    else:
        model.use_compressor(compression)
    model.proportional_attention, model.positions = parts
    scores = {}
    for title, examples in sets.items():
        result, written = evaluate(model, examples, 32, timed=0, max_new_tokens=16)
        fields = dataclasses.asdict(result)
        kept = ("utterances", "words", "wer", "wer_low", "wer_high", "tokens_per_second", "ratio")
        counts = word_errors([u.target for u in examples.utterances], [text or "" for text in written])
        scores[title] = {field: fields[field] for field in kept} | {"errors": [c.errors for c in counts]}
    return {"compression": name, "proportional_attention": parts[0], "positions": parts[1], "scores": scores}


def measure(
    load: Callable[[], Any], sets: dict[str, Examples], record: Path, details: dict[str, Any]
) -> list[dict[str, Any]]:
    """Score every compression with every combination, and write each row; rows of the record are not computed again.

    Args:
        load: Function that loads the model, a ``FastCompressForConditionalGeneration``.
        sets: Test sets by name.
        record: File of the rows.
        details: Further content of the file.
    """
    rows: list[dict[str, Any]] = json.loads(record.read_text())["rows"] if record.exists() else []
    done = {(row["compression"], row["proportional_attention"], row["positions"]) for row in rows}
    work: list[tuple[str, Any, tuple[bool, str]]] = [("every frame", "none", (False, "compact"))]
    work += [(name, one, parts) for name, one in compressions().items() for parts in PARTS]
    for name, compression, parts in work:
        if (name, *parts) in done:
            continue
        since = time.process_time()
        rows.append(score(load, name, compression, parts, sets))
        rows[-1]["cpu_seconds"] = time.process_time() - since
        write_file(record, json.dumps(details | {"torch": torch.__version__, "rows": rows}, indent=1))
        wer = {test: round(found["wer"], 1) for test, found in rows[-1]["scores"].items()}
        print(f"{name}, {parts}: WER {wer}, {rows[-1]['cpu_seconds']:.1f} CPU s", flush=True)
    return rows


def table(rows: list[dict[str, Any]], titles: dict[str, str]) -> str:
    """Return word error rates as Markdown: one table per test set, one column per combination.

    Args:
        rows: Result of ``measure``.
        titles: Titles of the test sets by name.
    """
    from tabulate import tabulate

    heads = {parts: f"{'log' if parts[0] else 'none'}, {parts[1]}" for parts in PARTS}
    places = {(row["compression"], row["proportional_attention"], row["positions"]): row["scores"] for row in rows}
    texts = []
    for name, title in titles.items():
        first = next(row["scores"][name] for row in rows)
        texts.append(f"*{title}: {first['utterances']} strings, {first['words']} words; WER in %, 95 % interval*\n")
        lines = []
        for compression in dict.fromkeys(row["compression"] for row in rows):
            cells = [places.get((compression, *parts)) for parts in PARTS]
            rate = next(cell for cell in cells if cell)[name]["tokens_per_second"]
            shown = [
                "" if cell is None else "{wer:.1f} [{wer_low:.1f}, {wer_high:.1f}]".format(**cell[name])
                for cell in cells
            ]
            lines.append([compression, f"{rate:.1f}", *shown])
        texts.append(tabulate(lines, ["", "tokens/s", *heads.values()], "pipe", disable_numparse=True) + "\n")
    return "\n".join(texts)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m experiments.training_free", description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "training-free", help="folder of data and results")
    parser.add_argument("--utterances", type=int, default=200, help="strings per test set (default %(default)s)")
    options = parser.parse_args()
    from transformers.utils import logging

    from fastcompress.synthesis.data import make_data

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    data = options.out / "data"
    make_data(data, "digits", "recognition", train=1, dev=1, test=options.utterances, seed=0, jobs=1)
    model, processor = load_model(MODEL)
    sets: dict[str, Examples] = {
        name: EncodedExamples(Examples(read_manifest(data / f"{name}.jsonl"), processor), model) for name in SETS
    }
    details = {"model": "digits", "utterances": options.utterances}
    rows = measure(lambda: load_model(MODEL)[0], sets, options.out / "training-free.json", details)
    text = table(rows, SETS)
    write_file(options.out / "training-free.md", text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Measure compression without training on real speech: ``python -m experiments.real FOLDER``.

The folder contains two Whisper models and manifests of speech (docs/sweep.md):

    FOLDER/whisper-tiny.en/, FOLDER/whisper-base/
    FOLDER/speech/librispeech-test-other.jsonl
    FOLDER/speech/fleurs-en.jsonl, fleurs-de.jsonl, ...

The most important rows are measured first. A later run does not compute complete rows again. Results are written to
experiments/results/real-*.json after each row; ``python -m experiments.real_report`` prints their tables.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from torch import Tensor

import fastcompress as fc
from experiments import real_controls
from experiments.real_controls import CONSTANT, PERMUTED, WARD
from fastcompress.files import write_file
from fastcompress.training.manifest import Utterance
from fastcompress.training.sweep.loading import load
from fastcompress.training.sweep.measure import Row, Sweep
from fastcompress.training.sweep.models import NONE, Decoding, Variant
from fastcompress.training.sweep.scores import Scorer
from fastcompress.training.sweep.whisper import Whisper
from fastcompress.training.usable import Skipped

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "experiments" / "results"

RATES = (4, 3, 2, 6)
NEW_TOKENS = 128
#: Treatments of the silence that fills the window, by the name that is part of the results' file name.
PROTOCOLS: dict[str, str | float] = {"keep": "keep", "pool": "pool", "cut": 1.0}


@dataclass(frozen=True)
class Data:
    """A data set.

    Attributes:
        manifests: Pattern of its manifests in ``FOLDER/speech``.
        normalize: Normalization of texts.
        language: Language of lines without one.
    """

    manifests: str
    normalize: str
    language: str | None = None


DATA = {
    "test-other": Data("librispeech-test-other.jsonl", "whisper", "en"),
    "fleurs": Data("fleurs-*.jsonl", "basic"),
}


def min_variance(rate: int) -> str:
    """Return the rule ``min-variance`` with ``max_len`` 8 up to 4 frames per token, and twice the rate above."""
    return str(fc.Rule.from_string(f"min-variance:rate={rate},max_len={8 if rate <= 4 else 2 * rate}"))


def main_rows(rates: Sequence[int] = ()) -> list[Variant]:
    """Return every frame, uniform pooling and minimum-variance segments at each rate."""
    rules = [rule for rate in rates or RATES for rule in (f"uniform:{rate}", min_variance(rate))]
    return [Variant(NONE), *(Variant(rule) for rule in rules)]


def without_weights() -> list[Variant]:
    """Return the rules of ``main_rows`` without proportional attention."""
    return [dataclasses.replace(v, proportional_attention=False) for v in main_rows() if v.rule != NONE]


def controls(rates: Sequence[int] = ()) -> list[Variant]:
    """Return the controls, local maxima and uniform sampling."""
    rates = rates or RATES
    found = [Variant(min_variance(rate), control=control) for rate in rates for control in (PERMUTED, CONSTANT)]
    found += [Variant("local-max"), *(Variant(f"uniform:{rate}", reduce="first") for rate in rates)]
    off = [v for v in found if v.control == "" or (v.control == PERMUTED and v.rule == min_variance(4))]
    return found + [dataclasses.replace(v, proportional_attention=False) for v in off]


def ward(rates: Sequence[int] = ()) -> list[Variant]:
    """Return Ward's method, with as many segments as uniform pooling."""
    return [Variant(f"uniform:{rate}", control=WARD) for rate in rates or (3, 4, 6)]


def ward_of_everything() -> list[Variant]:
    """Return Ward's method at 4 and 8 frames per token, which pools silence at a higher rate."""
    return ward((4, 8))


def controls_at_four() -> list[Variant]:
    """Return the controls at 4 frames per token."""
    return controls((4,))


def main_rows_at_four() -> list[Variant]:
    """Return the main rows at 4 frames per token."""
    return main_rows((4,))


def four_frames_per_token() -> list[Variant]:
    """Return every frame, and uniform pooling and minimum-variance segments at 4x, with both attentions."""
    rules = ("uniform:4", min_variance(4))
    return [Variant(NONE), *(Variant(r) for r in rules), *(Variant(r, proportional_attention=False) for r in rules)]


def eight_frames_per_token() -> list[Variant]:
    """Return uniform pooling and minimum-variance segments at 8x."""
    return [Variant("uniform:8"), Variant(min_variance(8))]


#: Model, data, protocol and rows, in the order in which they are measured.
PLAN = (
    ("whisper-tiny.en", "test-other", "keep", main_rows),
    ("whisper-tiny.en", "test-other", "keep", without_weights),
    ("whisper-tiny.en", "test-other", "pool", main_rows),
    ("whisper-base", "test-other", "keep", four_frames_per_token),
    ("whisper-tiny.en", "test-other", "keep", controls_at_four),
    ("whisper-base", "fleurs", "keep", four_frames_per_token),
    ("whisper-tiny.en", "test-other", "cut", main_rows),
    ("whisper-base", "test-other", "pool", main_rows_at_four),
    ("whisper-base", "test-other", "keep", main_rows),
    ("whisper-tiny.en", "test-other", "keep", controls),
    ("whisper-tiny.en", "test-other", "pool", eight_frames_per_token),
    ("whisper-base", "fleurs", "keep", main_rows),
    ("whisper-tiny.en", "test-other", "pool", without_weights),
    ("whisper-base", "test-other", "keep", without_weights),
    ("whisper-base", "test-other", "pool", main_rows),
    ("whisper-base", "fleurs", "keep", without_weights),
    ("whisper-base", "fleurs", "pool", main_rows),
    ("whisper-tiny.en", "test-other", "cut", without_weights),
    ("whisper-base", "test-other", "cut", main_rows),
    ("whisper-base", "test-other", "keep", controls),
    ("whisper-tiny.en", "test-other", "keep", ward),
    ("whisper-tiny.en", "test-other", "pool", ward_of_everything),
    ("whisper-tiny.en", "test-other", "cut", ward),
    ("whisper-base", "test-other", "keep", ward),
)


def main() -> int:
    """Measure the rows of ``PLAN``."""
    parser = argparse.ArgumentParser(prog="python -m experiments.real", description=__doc__)
    parser.add_argument("folder", type=Path, help="folder of models and speech")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "real", help="folder of states and texts")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results (experiments/results)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default %(default)s)")
    parser.add_argument("--only", nargs="*", default=[], help="parts of the plan, such as whisper-base/test-other/keep")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    for name, data, protocol, rows in PLAN:
        part = f"{name}/{data}/{protocol}"
        if options.only and part not in options.only:
            continue
        if not (options.folder / name).is_dir() or not list(options.folder.glob(f"speech/{DATA[data].manifests}")):
            print(f"{part}: not in {options.folder}, skipped", flush=True)
            continue
        Part(options.folder, name, data, protocol, options.out).run(rows(), options.results)
    return 0


class Part:
    """One model on one data set with one treatment of silence.

    Args:
        folder: Folder of models and speech.
        name: Name of the model.
        data: Name of the data set.
        protocol: Name of the treatment of silence.
        out: Folder of states and rows.
    """

    def __init__(self, folder: Path, name: str, data: str, protocol: str, out: Path) -> None:
        self.name = f"{name}/{data}/{protocol}"
        self.silence = PROTOCOLS[protocol]
        self.data = DATA[data]
        utterances: list[Utterance] = []
        self.skipped = Skipped()
        for path in sorted(folder.glob(f"speech/{self.data.manifests}")):
            utterances += self.skipped.read(path)
        language = None if name.endswith(".en") else self.data.language
        model = load(str(folder / name), "cpu", Decoding(NEW_TOKENS, language))
        assert isinstance(model, Whisper)
        model.controls = real_controls.controls(self.silence)
        self.model = model
        self.sweep = Sweep(model, utterances, out, 20, self.skipped)

    def audio(self) -> list[Tensor]:
        """Return the frames of the audio of each utterance, ``[n, D]``."""
        return [states["states"][: int(states["frames"])] for states in self.sweep.states()]

    def run(self, variants: Sequence[Variant], results: Path) -> None:
        """Measure variants, and write their scores after each one."""
        path = results / f"real-{self.name.replace('/', '-')}.json"
        scorer = Scorer(self.sweep.utterances, self.data.normalize)
        for variant in variants:
            row = self.sweep.row(dataclasses.replace(variant, silence=self.silence))
            self._write(path, scorer, row)

    def _write(self, path: Path, scorer: Scorer, row: Row) -> None:
        """Add the scores of a row to the results, or replace them."""
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"rows": []}
        score = scorer.scores([row])[0]
        kept = [r for r in found["rows"] if r["label"] != score.label]
        values = {name: value for name, value in score.to_dict().items() if not name.startswith("vs_")}
        facts = {
            "name": self.name,
            "normalize": self.data.normalize,
            "speakers": [u.more.get("speaker") for u in self.sweep.utterances],
            "words": scorer.words,
            "skipped": len(self.skipped),
            "encoding_cpu_seconds": round(self.sweep.encoding_seconds, 1),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "machine": platform.machine(),
        }
        write_file(path, json.dumps(facts | {"rows": [*kept, values]}) + "\n")
        print(f"{self.name}: {score.label}: {score.keys:.0f} keys, {score.wer.value:.2f} % WER", flush=True)


if __name__ == "__main__":
    sys.exit(main())

"""Print the tables of the experiment on real speech from its results: ``python -m experiments.real_report``.

``--write`` writes them to experiments/results/real.md, and plots to real-*.png.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tabulate import tabulate

from experiments.real import NEW_TOKENS, RESULTS, min_variance
from experiments.real_controls import CONSTANT, PERMUTED, WARD
from fastcompress.files import write_file
from fastcompress.training.sweep.models import NONE, Variant
from fastcompress.training.sweep.report import plot
from fastcompress.training.sweep.scores import Comparer, Comparison, Score, is_uniform

RATES = (2, 3, 4, 6, 8)
#: A row has "no cost" if the upper end of its difference to every frame is below this number of points.
MARGIN = 1.0
TITLES = {"keep": "silence kept", "pool": "everything pooled", "cut": "cut to the audio and one second"}
_HEAD = (
    "rule", "weights", "frames/token", "keys", "WER %", "95 %", "S", "D", "I", "cut", "vs none", "95 %", "no cost",
    "vs uniform", "95 %",
)  # fmt: skip


@dataclass(frozen=True)
class Part:
    """Results of one model on one data set with one treatment of silence.

    Attributes:
        name: Model, data set and treatment, separated by slashes.
        scores: Scores of the rows.
        comparer: Comparison of the rows.
        speakers: Speaker of each utterance, or ``None``.
        encoding: Processor time of the encoder, in seconds.
        skipped: Number of utterances that could not be used.
    """

    name: str
    scores: list[Score]
    comparer: Comparer
    speakers: list[str | None]
    encoding: float
    skipped: int = 0

    @property
    def title(self) -> str:
        """Title of the table."""
        model, data, protocol = self.name.split("/")
        same = " (another model, same clips)" if (model, data) == ("whisper-base", "test-other") else ""
        return f"{model}, {data}, {TITLES[protocol]}{same}"

    def half(self, first: bool) -> Part:
        """Return the results on the first or second half of the speakers, in the order of their names."""
        names = sorted({speaker for speaker in self.speakers if speaker is not None})
        chosen = set(names[: len(names) // 2] if first else names[len(names) // 2 :])
        places = [i for i, speaker in enumerate(self.speakers) if speaker in chosen]
        words = [self.comparer.words[i] for i in places]
        speakers = [self.speakers[i] for i in places]
        comparer = Comparer(words, speakers)
        scores = []
        for score in self.scores:
            errors = tuple(score.errors[i] for i in places)
            scores.append(replace(score, errors=errors, words=sum(words), wer=comparer.bootstrap.rate(errors, words)))
        return Part(self.name, scores, comparer, speakers, self.encoding)


def load(folder: Path) -> list[Part]:
    """Return the results in a folder."""
    parts = []
    for path in sorted(folder.glob("real-*.json")):
        values = json.loads(path.read_text(encoding="utf-8"))
        scores = sorted((Score.from_dict(row) for row in values["rows"]), key=_place)
        comparer = Comparer(values["words"], values["speakers"])
        encoding, skipped = values["encoding_cpu_seconds"], values["skipped"]
        parts.append(Part(values["name"], scores, comparer, values["speakers"], encoding, skipped))
    return parts


def _place(score: Score) -> tuple[object, ...]:
    variant = score.variant
    kinds = ("none", "uniform", "min-variance", "local-max", "top-k", "threshold", "lookback")
    return (
        variant.control not in ("", PERMUTED, CONSTANT, WARD),
        bool(variant.control) or variant.reduce != "mean",
        kinds.index(variant.rule.partition(":")[0]),
        variant.control,
        variant.reduce,
        round(score.frames_per_token),
        variant.proportional_attention is not None,
    )


def table(part: Part) -> str:
    """Return the rows of a part as a Markdown table."""
    rows = []
    head = list(_HEAD)
    in_audio = not part.name.endswith("keep")
    if in_audio:
        head.insert(3, "in audio")
    for score in part.scores:
        none, uniform = part.comparer.against_none(score, part.scores), against_uniform(part, score)
        free = "" if none is None else "yes" if none.interval.high < MARGIN else "no"
        rows.append(
            [
                rule_name(score.variant), weights(score.variant), f"{score.frames_per_token:.2f}", f"{score.keys:.0f}",
                f"{score.wer.value:.2f}", f"{score.wer.low:.1f} to {score.wer.high:.1f}", str(score.substitutions),
                str(score.deletions), str(score.insertions), str(score.clipped), *_cells(none), free, *_cells(uniform),
            ]
        )  # fmt: skip
        if in_audio:
            rows[-1].insert(3, f"{score.audio_frames_per_token:.2f}")
    align = ("left", "left", *["right"] * (len(head) - 2))
    return tabulate(rows, head, "pipe", disable_numparse=True, colalign=align)


def against_uniform(part: Part, score: Score) -> Comparison | None:
    """Compare a row, or a control, with uniform pooling at the same rate and with the same attention weights."""
    plain = replace(score, variant=replace(score.variant, control="", reduce="mean"))
    if is_uniform(plain.variant):
        alike = (s for s in part.scores if s.variant == plain.variant)
        other = next(alike, None) if score.variant != plain.variant else None
        return None if other is None else part.comparer.compare(score, other)
    return part.comparer.against_uniform(plain, part.scores)


def rule_name(variant: Variant) -> str:
    """Return the name of a rule in tables."""
    name = "min-variance:rate=4" if variant.rule == "min-variance" else variant.rule
    if variant.reduce == "first":
        return f"{name.replace('uniform', 'uniform sampling')}"
    if variant.control == WARD:
        return f"Ward, {variant.rule.partition(':')[2]}x"
    if variant.control == PERMUTED:
        return f"{name}, {PERMUTED}"
    return name if variant.control in ("", CONSTANT) else variant.control


def weights(variant: Variant) -> str:
    """Return the name of the weights of tokens in the attention."""
    if variant.rule == NONE:
        return ""
    if variant.control == CONSTANT:
        return "log(mean length)"
    return "log(length)" if variant.proportional_attention is None else "equal"


def _cells(found: Comparison | None) -> list[str]:
    if found is None:
        return ["", ""]
    mark = "~" if found.against.startswith("between ") else ""
    return [f"{mark}{found.interval.value:+.2f}", f"{found.interval.low:+.2f} to {found.interval.high:+.2f}"]


def choice(part: Part) -> str:
    """Return a table of the best row of each rate on one half of the speakers, with its result on the other half."""
    chosen, reported = part.half(True), part.half(False)
    rows = []
    for rate in RATES:
        same = [s for s in chosen.scores if abs(s.frames_per_token / rate - 1) < 0.05 and s.variant.rule != NONE]
        if not same:
            continue
        best = min(same, key=lambda s: s.wer.value)
        score = next(s for s in reported.scores if s.label == best.label)
        none = reported.comparer.against_none(score, reported.scores)
        uniform = against_uniform(reported, score)
        row = [f"{rate}x", rule_name(best.variant), weights(best.variant), str(len(same)), f"{best.wer.value:.2f}"]
        rows.append([*row, f"{score.wer.value:.2f}", *_cells(none), *_cells(uniform)])
    head = ("", "best rule", "weights", "of", "WER % (chosen on)", "WER % (other half)", "vs none", "95 %",
            "vs uniform", "95 %")  # fmt: skip
    align = ("left", "left", "left", *["right"] * 7)
    return tabulate(rows, head, "pipe", disable_numparse=True, colalign=align)


def parts_effect(part: Part) -> str:
    """Return a table of the effects of proportional attention and of the placement of segments, one at a time."""
    rows = []
    by_variant = {s.variant: s for s in part.scores}
    for score in part.scores:
        variant = score.variant
        if (
            variant.control
            or variant.reduce != "mean"
            or variant.rule == NONE
            or variant.proportional_attention is False
        ):
            continue
        off = by_variant.get(replace(variant, proportional_attention=False))
        permuted = by_variant.get(replace(variant, control=PERMUTED))
        equal = by_variant.get(replace(variant, control=CONSTANT))
        if off or permuted or equal:
            found = (part.comparer.compare(score, other) if other else None for other in (off, equal, permuted))
            rows.append([rule_name(variant), *(cell for comparison in found for cell in _cells(comparison))])
    if not rows:
        return ""
    head = ("rule with log(length)", "vs equal weights", "95 %", "vs log(mean length)", "95 %",
            "vs lengths in random order", "95 %")  # fmt: skip
    return tabulate(rows, head, "pipe", disable_numparse=True, colalign=("left", *["right"] * 6))


def summary(parts: Sequence[Part]) -> str:
    """Return a table of the word error rates of all parts: every frame, uniform pooling, minimum-variance segments."""
    rows = []
    for part in parts:
        by_variant = {replace(s.variant, silence=None): s for s in part.scores}
        for rate in RATES:
            best = by_variant.get(Variant(min_variance(rate)))
            if best is None:
                continue
            usual = Variant(f"uniform:{rate}", proportional_attention=False)
            found = [by_variant.get(v) for v in (Variant(NONE), usual, Variant(f"uniform:{rate}"))]
            cells = ["" if s is None else f"{s.wer.value:.2f}" for s in (*found, best)]
            none = part.comparer.against_none(best, part.scores)
            rows.append([part.title, f"{rate}x", f"{best.keys:.0f}", *cells, *_cells(none)])
    head = ("model, data, silence", "rate", "keys", "none", "uniform", "uniform, weights", "min-variance, weights",
            "the latter vs none", "95 %")  # fmt: skip
    return tabulate(rows, head, "pipe", disable_numparse=True, colalign=("left", *["right"] * 8))


def report(parts: Sequence[Part]) -> str:
    """Return all tables as Markdown."""
    variants = {replace(s.variant, silence=None) for part in parts for s in part.scores}
    rows = sum(len(part.scores) for part in parts)
    encoding = {part.name.rpartition("/")[0]: part.encoding for part in parts}
    seconds = sum(s.cpu_seconds for part in parts for s in part.scores) + sum(encoding.values())
    lines = [
        f"{rows} rows, {len(variants)} variants of rule, weights and control, {seconds / 3600:.1f} hours of one core.",
        "",
        "* *keys*: encoder states to which each layer of the decoder attends, mean per utterance; every frame: 1500.",
        "* *in audio*: frames per token of the audio alone, where silence is pooled, too.",
        "* *weights*: what is added to the attention scores of a pooled token. *log(mean length)* adds the same number "
        "to all pooled tokens of an utterance.",
        "* *Ward*: bottom-up merging of neighbouring segments, as many as uniform pooling makes.",
        f"* *cut*: texts that reached the limit of {NEW_TOKENS} new tokens. Such a text repeats itself and adds up to "
        "7 points on test-other and 10 on FLEURS.",
        "* *vs none*, *vs uniform*: difference of the word error rates in points; the latter against uniform pooling "
        "with the same weights at the same frames per token, interpolated between two rates where marked by ~.",
        f"* *no cost*: whether the upper end of the 95 % interval against every frame is below +{MARGIN} point.",
        "* Intervals: paired bootstrap, 10,000 resamples.",
        "",
        "### Word error rates in %, without training",
        "",
        "*uniform*: the usual way, with equal weights. *weights*: with log(length).",
        "",
        summary(parts),
        "",
    ]
    for part in parts:
        unit = part.comparer.bootstrap
        count, words = len(part.comparer.words), sum(part.comparer.words)
        left_out = f" ({part.skipped} longer than Whisper's window left out)" if part.skipped else ""
        lines += [
            f"### {part.title}", "",
            f"{count} utterances{left_out}, {words} words; resampled by {unit.unit} ({unit.units}).", "",
            table(part), "",
        ]  # fmt: skip
        if effect := parts_effect(part):
            lines += ["What the parts change, one at a time:", "", effect, ""]
        if unit.unit == "speaker":
            lines += ["Best row of each rate on half of the speakers, and its result on the others:", ""]
            lines += [choice(part), ""]
    return "\n".join(lines)


def main() -> int:
    """Print or write the report."""
    parser = argparse.ArgumentParser(prog="python -m experiments.real_report", description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results (experiments/results)")
    parser.add_argument("--write", action="store_true", help="write real.md and real-*.png there")
    options = parser.parse_args()
    parts = load(options.results)
    if not parts:
        print(f"{options.results}: no real-*.json; run python -m experiments.real first", file=sys.stderr)
        return 2
    text = report(parts)
    print(text)
    if options.write:
        write_file(options.results / "real.md", text)
        for part in parts:
            if part.name.endswith("keep"):
                picture = options.results / f"real-{part.name.replace('/', '-')}.png"
                shown = [s for s in part.scores if not s.variant.control and s.variant.reduce == "mean"]
                plot(shown, picture, part.title)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Print the tables of LoRA on real speech from its results: ``python -m experiments.distill_report``.

Results without training are those of ``experiments/real.py`` on the same utterances, with the silence kept. ``--write``
writes the tables to experiments/results/distill.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tabulate import tabulate

from experiments.distill import RULES, SETTINGS, TUNING_RULE
from experiments.real import RESULTS
from experiments.real_report import rule_name
from fastcompress.files import write_file
from fastcompress.training.sweep.bootstrap import Bootstrap, Interval
from fastcompress.training.sweep.models import NONE, Variant
from fastcompress.training.sweep.scores import Score

_Errors = dict[int, tuple[int, ...]]


@dataclass(frozen=True)
class Results:
    """Results of one model.

    Attributes:
        name: Name of the model.
        values: Content of the file.
        scores: Scores by rule and seed.
        untrained: Scores by rule, without training.
    """

    name: str
    values: dict[str, Any]
    scores: dict[str, dict[int, Score]]
    untrained: dict[str, Score]

    @property
    def seeds(self) -> list[int]:
        """Seeds of all runs."""
        return sorted({seed for found in self.scores.values() for seed in found})

    def errors(self, rule: str) -> _Errors:
        """Return the errors of each utterance by seed."""
        return {seed: score.errors for seed, score in self.scores.get(rule, {}).items()}

    def difference(self, errors: _Errors, baseline: _Errors) -> Interval | None:
        """Return the difference of two error rates over the seeds of both, in points.

        The runs of all seeds on one utterance are resampled together with all other utterances of its speaker.
        """
        seeds = sorted(errors.keys() & baseline.keys())
        if not seeds:
            return None
        bootstrap = Bootstrap(self.values["speakers"] * len(seeds))
        pooled, others = ([e for seed in seeds for e in found[seed]] for found in (errors, baseline))
        return bootstrap.difference(pooled, others, self.values["words"] * len(seeds))


def load(folder: Path) -> list[Results]:
    """Return the results in a folder."""
    found = []
    for path in sorted(folder.glob("distill-whisper-*.json"), reverse=True):
        values = json.loads(path.read_text(encoding="utf-8"))
        scores: dict[str, dict[int, Score]] = {}
        for row in values["rows"]:
            scores.setdefault(row["rule"], {})[row["seed"]] = Score.from_dict(row["score"])
        found.append(Results(values["name"], values, scores, _untrained(folder, values)))
    return found


def _untrained(folder: Path, values: dict[str, Any]) -> dict[str, Score]:
    """Return the results without training on the same utterances, by rule."""
    path = folder / f"real-{values['name']}-test-other-keep.json"
    if not path.exists():
        return {}
    real = json.loads(path.read_text(encoding="utf-8"))
    if (real["words"], real["speakers"]) != (values["words"], values["speakers"]):
        raise ValueError(f"{path}: has other utterances than distill-{values['name']}.json; measure both again")
    scores = [Score.from_dict(row) for row in real["rows"]]
    return {s.variant.rule: s for s in scores if s.variant == Variant(s.variant.rule, silence="keep")}


def _uniform(rule: str) -> str | None:
    """Return the rule of uniform pooling at the same rate as a minimum-variance rule; ``None`` for other rules."""
    if not rule.startswith("min-variance"):
        return None
    return next(r for r in RULES if r.startswith("uniform") and _rate(r) == _rate(rule))


def _rate(rule: str) -> int:
    name, _, settings = rule.partition(":")
    if name == "uniform":
        return int(settings)
    return next((int(s.removeprefix("rate=")) for s in settings.split(",") if s.startswith("rate=")), 4)


def table(results: Results) -> str:
    """Return the word error rates of a model as Markdown."""
    lines = []
    control = results.errors(NONE)
    for rule in sorted(results.scores, key=lambda r: (r != NONE, 0 if r == NONE else _rate(r), r.startswith("min"))):
        scores, free = results.scores[rule], results.untrained.get(rule)
        some = next(iter(scores.values()))
        mean = sum(s.wer.value for s in scores.values()) / len(scores)
        uniform = _uniform(rule)
        against = None if rule == NONE else results.difference(results.errors(rule), control)
        every = results.untrained.get(NONE)
        plain = None if every is None else {seed: every.errors for seed in scores}
        lines.append(
            [
                rule_name(some.variant),
                f"{some.frames_per_token:.2f}",
                f"{some.keys:.0f}",
                "" if free is None else f"{free.wer.value:.2f}",
                *(f"{scores[seed].wer.value:.2f}" if seed in scores else "" for seed in results.seeds),
                f"{mean:.2f}",
                _cell(against),
                _cell(None if plain is None else results.difference(results.errors(rule), plain)),
                _cell(None if uniform is None else results.difference(results.errors(rule), results.errors(uniform))),
            ]
        )
    head = ["rule", "frames/token", "keys", "no training", *(f"seed {seed}" for seed in results.seeds), "mean",
            "vs control", "vs every frame, no training", "vs uniform"]  # fmt: skip
    return tabulate(lines, head, "pipe", disable_numparse=True, colalign=("left", *["right"] * (len(head) - 1)))


def _cell(found: Interval | None) -> str:
    return "" if found is None else f"{found.value:+.2f} [{found.low:+.2f}, {found.high:+.2f}]"


def tuning(path: Path) -> str:
    """Return the settings that were compared on the held-out utterances as Markdown."""
    lines = []
    for row in json.loads(path.read_text(encoding="utf-8"))["rows"]:
        settings = row["settings"]
        names = ("learning_rate", "steps", "kl")
        cells = ["no training", "", ""] if settings is None else [f"{settings[name]:g}" for name in names]
        lines.append([*cells, f"{row['loss']:.3f}", f"{row['disagreement']:.2f}"])
    head = ["learning rate", "steps", "share of KL", "loss", "disagreement %"]
    return tabulate(lines, head, "pipe", disable_numparse=True, colalign=["right"] * len(head))


def report(folder: Path) -> str:
    """Return all tables as Markdown."""
    lines = [
        f"LoRA of rank {SETTINGS.rank} on the projections of the decoder's attention, {SETTINGS.steps} steps of "
        f"{SETTINGS.batch_size} utterances, learning rate {SETTINGS.learning_rate:g}, share of KL {SETTINGS.kl:g}.",
        "",
        "* Targets: the texts that the same model writes from every frame. No transcript is used.",
        "* *no training*: the same rule without LoRA (`experiments/results/real.md`).",
        "* *vs control*: against LoRA with every frame and the same seed. *vs uniform*: against uniform pooling at the "
        "same frames per token and with the same seed. Over all seeds that both rows have, in points, with the 95 % "
        "interval of a paired bootstrap over speakers.",
        "* All rows: proportional attention, silence kept, WER in %.",
        "",
    ]
    for results in load(folder):
        values = results.values
        seconds = sum(row["training_cpu_seconds"] + row["score"]["cpu_seconds"] for row in values["rows"])
        more = values["encoding_cpu_seconds"] + values["target_cpu_seconds"]
        lines += [
            f"### {results.name}", "",
            f"{len(values['rows'])} runs; {values['trained']} utterances of training, {values['held_out']} held out; "
            f"test: {len(values['words'])} utterances, {sum(values['words'])} words, "
            f"{len(set(values['speakers']))} speakers. {seconds / 3600:.2f} hours of one core, and {more / 3600:.2f} "
            "for states and targets.",
            "", table(results), "",
        ]  # fmt: skip
    for path in sorted(folder.glob("distill-tuning-*.json")):
        values = json.loads(path.read_text(encoding="utf-8"))
        spent = sum(row["cpu_seconds"] for row in values["rows"]) / 3600
        lines += [
            f"### Settings, {values['name']}", "",
            f"Compared on the held-out utterances with `{rule_name(Variant(TUNING_RULE))}` and one seed, in "
            f"{spent:.2f} hours of one core. *loss*: cross-entropy of the targets. *disagreement*: word error rate "
            "against the targets.",
            "", tuning(path), "",
        ]  # fmt: skip
    return "\n".join(lines)


def main() -> int:
    """Print or write the report."""
    parser = argparse.ArgumentParser(prog="python -m experiments.distill_report", description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results (experiments/results)")
    parser.add_argument("--write", action="store_true", help="write distill.md there")
    options = parser.parse_args()
    if not list(options.results.glob("distill-*.json")):
        print(f"{options.results}: no distill-*.json; run python -m experiments.distill first", file=sys.stderr)
        return 2
    text = report(options.results)
    print(text)
    if options.write:
        write_file(options.results / "distill.md", text)
    return 0


if __name__ == "__main__":
    sys.exit(main())

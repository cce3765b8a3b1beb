"""``fastcompress sweep``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastcompress.cli.errors import EXIT_OK, UserError
from fastcompress.cli.models import MANIFEST_HELP, check_model_options, device_name, positive, quiet_transformers
from fastcompress.cli.settings import spell_flags

if TYPE_CHECKING:
    from fastcompress.training.sweep.measure import Row, Sweep
    from fastcompress.training.sweep.scores import Scorer

#: Copy of ``fastcompress.training.normalization.NORMALIZERS``, so that ``--help`` needs no import.
_NORMALIZERS = ("none", "basic", "whisper")
#: Rules to compare if ``--rule`` is not given.
_RULES = ("none", "uniform:2", "uniform:3", "uniform:4", "min-variance:rate=2", "min-variance:rate=3", "min-variance")


def add_command(commands: Any) -> None:
    """Declare the command and its options."""
    parser = commands.add_parser(
        "sweep",
        help="compare compression rules on your own model and data, without training",
        description="Transcribe a manifest with each rule and compare error rates, tokens per second and times, with "
        "intervals by a paired bootstrap. The model is a Whisper model or an audio LLM of transformers "
        "(`fastcompress info --models`), or a run of train. Encoder states are computed once. The folder gets "
        "sweep.md, sweep.json, sweep.png and hypotheses/. The same command continues an interrupted sweep after its "
        f"last complete row. {MANIFEST_HELP} Utterances with the key speaker are resampled by speaker; the key "
        "language sets Whisper's language; the key task with the value translation adds BLEU.",
    )
    parser.add_argument("--model", required=True, metavar="MODEL", help="folder or name of a model, or folder of a run")
    parser.add_argument("--data", required=True, type=Path, metavar="MANIFEST", help="utterances to transcribe")
    parser.add_argument(
        "--out", required=True, type=Path, metavar="FOLDER", help="folder of results and encoder states"
    )
    parser.add_argument(
        "--rule",
        dest="rules",
        action="append",
        metavar="RULE",
        help=f"rule to compare; can be repeated; none, every frame, is always there (default: {', '.join(_RULES)})",
    )
    parser.add_argument(
        "--ablate",
        action="store_true",
        help="run each rule also without each of its other parts: proportional attention and, in audio LLMs, positions "
        "in time",
    )
    parser.add_argument(
        "--normalize",
        choices=_NORMALIZERS,
        default="none",
        help="normalization of references and transcripts before they are compared, as in evaluate (default: none)",
    )
    parser.add_argument(
        "--silence",
        type=_silence,
        metavar="keep|pool|SECONDS",
        help="Whisper's frames of silence after the audio: keep each one, pool them too, or pool this many seconds of "
        "them and drop the rest (default: that of apply_to)",
    )
    parser.add_argument("--language", help="language of the audio, such as en, for multilingual Whisper models")
    parser.add_argument("--prompt", default="", help="instruction of utterances without one, for audio LLMs")
    parser.add_argument(
        "--batch-size", type=positive, default=16, metavar="N", help="utterances per batch (default: 16)"
    )
    parser.add_argument(
        "--new-tokens", type=positive, default=128, metavar="N", help="longest text, in tokens (default: 128)"
    )
    parser.add_argument(
        "--device",
        default="cpu",
        type=device_name,
        help="cpu, cuda, or one of several GPUs, such as cuda:1 (default: cpu)",
    )
    parser.add_argument("--threads", type=positive, metavar="N", help="threads of torch (default: one per core)")
    parser.set_defaults(run=_run_sweep)


def _silence(text: str) -> str | float:
    if text in ("keep", "pool"):
        return text
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be keep, pool or a number of seconds, got {text!r}")
    return value


def _run_sweep(options: argparse.Namespace) -> int:
    import matplotlib  # noqa: F401  (fail now if it is missing)
    import tabulate  # noqa: F401
    import torch

    from fastcompress import Rule
    from fastcompress.audio import AudioError
    from fastcompress.files import check_folder, reason
    from fastcompress.training.manifest import ManifestError
    from fastcompress.training.normalization import normalizer
    from fastcompress.training.settings import SettingsError
    from fastcompress.training.sweep.loading import load
    from fastcompress.training.sweep.measure import Sweep
    from fastcompress.training.sweep.models import Decoding
    from fastcompress.training.sweep.scores import Scorer, is_translation
    from fastcompress.training.usable import Skipped

    if options.threads:
        torch.set_num_threads(options.threads)
    quiet_transformers()
    normalizer(options.normalize)  # fail now if its package is missing
    for rule in options.rules or _RULES:
        options.rule = rule
        check_model_options(options)
    rules = ["none" if rule == "none" else str(Rule.from_string(rule)) for rule in options.rules or _RULES]
    skipped = Skipped()
    try:
        check_folder(options.out)  # before gigabytes are loaded
        utterances = skipped.read(options.data)
        task = "translate" if is_translation(utterances) else "transcribe"
        model = load(
            options.model, options.device, Decoding(options.new_tokens, options.language, task, options.prompt)
        )
        bars = _Bars()
        try:
            sweep = Sweep(model, utterances, options.out, options.batch_size, skipped, bars)
            variants = sweep.variants(rules, options.ablate, options.silence)
            sweep.check(variants)
            _notes(sweep, options)
            scorer = Scorer(sweep.utterances, options.normalize)
            rows = []
            for variant in variants:
                rows.append(sweep.row(variant))
                bars.close()
                _report(sweep, scorer, rows, options, is_last=variant is variants[-1])
        except KeyboardInterrupt:
            bars.close()
            print("fastcompress: interrupted; the same command continues after the last complete row", file=sys.stderr)
            raise
        finally:
            bars.close()
    except OSError as error:
        raise UserError(f"--out {options.out}: {reason(error)}") from error
    except (ManifestError, AudioError) as error:
        raise UserError(error) from error
    except SettingsError as error:
        raise UserError(spell_flags(str(error))) from error
    return EXIT_OK


def _notes(sweep: Sweep, options: argparse.Namespace) -> None:
    """Print notes about the sweep before the first row."""
    model = sweep.model
    if model.why_not_cached:
        print(f"encoder states are computed again for each rule: {model.why_not_cached}", file=sys.stderr)
    if options.ablate and not model.switches:
        print("--ablate adds no rows: the parts of this run are those that it was trained with", file=sys.stderr)


def _report(sweep: Sweep, scorer: Scorer, rows: list[Row], options: argparse.Namespace, is_last: bool) -> None:
    """Write the files for the complete rows; print the table after the last row."""
    from fastcompress.training.sweep import report

    scores = scorer.scores(rows)
    facts = {
        "model": options.model,
        "data": str(options.data),
        "normalize": options.normalize,
        "silence": options.silence,
        "resampled": scorer.bootstrap.unit,
        "skipped": len(sweep.skipped),
        "skipped_lines": [*sweep.skipped.lines],
    }
    title = f"{Path(options.model).name} on {options.data.stem}"
    if options.silence is not None:
        title += f", silence {options.silence}"
    lines = report.notes(scores, scorer.bootstrap.unit, scorer.bootstrap.units, len(sweep.skipped))
    counts = [scorer.counts(row) for row in rows]
    report.write(options.out, title, facts, scores, rows, counts, sweep.utterances, lines)
    if is_last:
        print(title)
        print(report.table(scores))
        for line in lines:
            print(line)
        print(f"{options.out}: sweep.md, sweep.json, sweep.png, hypotheses/")
    elif not sys.stderr.isatty():
        print(f"{scores[-1].label}: {scores[-1].wer.value:.2f} % WER", file=sys.stderr, flush=True)


class _Bars:
    """Show a tqdm bar on stderr for each row, if stderr is a terminal."""

    def __init__(self) -> None:
        self._what = ""
        self._bar: Any = None

    def __call__(self, what: str, done: int, total: int) -> None:
        from tqdm import tqdm

        if what != self._what:
            self.close()
            self._what = what
            self._bar = tqdm(total=total, desc=what, file=sys.stderr, disable=not sys.stderr.isatty())
        if self._bar is not None:
            self._bar.update(done - self._bar.n)

    def close(self) -> None:
        """End the bar of the current row."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

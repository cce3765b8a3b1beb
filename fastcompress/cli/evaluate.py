"""``fastcompress evaluate``."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastcompress.cli.errors import EXIT_OK, UserError, check_writable
from fastcompress.cli.models import (
    MANIFEST_HELP,
    add_model_options,
    check_model_options,
    clipped,
    load_model_and_processor,
    positive,
)

if TYPE_CHECKING:
    from fastcompress.training.manifest import Utterance

#: ``fastcompress.training.normalization.NORMALIZERS``, which needs no import for ``--help``.
_NORMALIZERS = ("none", "basic", "whisper")


def add_command(commands: Any) -> None:
    """Declare the command and its options."""
    parser = commands.add_parser(
        "evaluate",
        help="error rates, tokens per second and times of a model on manifests",
        description="Transcribe the utterances of manifests and score them: word error rate with a 95 % interval, "
        "character error rate, exact matches, BLEU; tokens per second of audio, ratio (frames per token), median times "
        f"of encoder and prefill. {MANIFEST_HELP}",
    )
    parser.add_argument("model", metavar="MODEL", help="folder of a model or of a run")
    parser.add_argument("manifests", nargs="+", type=Path, metavar="MANIFEST", help="manifest to score")
    add_model_options(parser, batch_size=16, max_new_tokens=128)
    parser.add_argument(
        "--normalize",
        choices=_NORMALIZERS,
        default="none",
        help="normalization of references and transcripts before they are compared: none compares them unchanged, "
        "with case and punctuation; basic removes both, for any language; whisper is Whisper's for English "
        "(default: none)",
    )
    parser.add_argument(
        "--timed",
        type=_count,
        default=10,
        metavar="N",
        help="utterances on which encoder and prefill are timed, three times each; 0 skips the times (default: 10)",
    )
    parser.add_argument("--threads", type=positive, metavar="N", help="threads of torch (default: one per core)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the scores and every transcript")
    parser.set_defaults(run=_run_evaluate)


def _count(text: str) -> int:
    value = int(text) if text.isdecimal() else -1
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be a whole number from 0 on, got {text!r}")
    return value


def _run_evaluate(options: argparse.Namespace) -> int:
    import torch

    from fastcompress.decoder.generation import unwrap
    from fastcompress.training.normalization import normalizer

    if options.threads:
        torch.set_num_threads(options.threads)
    normalizer(options.normalize)  # fail now if its package is missing
    if options.json:
        check_writable(f"--json {options.json}", options.json)
    check_model_options(options)
    manifests = {path: _read(path) for path in options.manifests}  # before scoring, which can take hours
    model, processor = load_model_and_processor(options)
    found: dict[str, Any] = {
        "model": options.model,
        "rule": unwrap(model).compression,
        "proportional_attention": unwrap(model).proportional_attention,
        "positions": unwrap(model).positions,
        "num_beams": options.num_beams,
        "normalize": options.normalize,
        "manifests": {},
    }
    rows: list[list[str]] = []
    try:
        for path, read in manifests.items():
            found["manifests"][str(path)], row = _score(model, processor, path, *read, options)
            rows.append(row)
    finally:  # scores are kept if another manifest fails or the user interrupts
        if rows:
            _show(found, rows, options)
    return EXIT_OK


def _read(path: Path) -> tuple[list[Utterance], Any]:
    from fastcompress.training.manifest import ManifestError
    from fastcompress.training.usable import Skipped

    skipped = Skipped()
    try:
        return skipped.read(path), skipped
    except ManifestError as error:
        raise UserError(error) from error


def _score(
    model: Any, processor: Any, path: Path, utterances: list[Utterance], skipped: Any, options: argparse.Namespace
) -> tuple[dict[str, Any], list[str]]:
    from tqdm import tqdm

    from fastcompress.audio import AudioError
    from fastcompress.training.evaluation import evaluate
    from fastcompress.training.examples import Examples

    with tqdm(total=len(utterances), desc=path.stem, file=sys.stderr, disable=not sys.stderr.isatty()) as bar:
        try:
            result, written = evaluate(
                model,
                Examples(utterances, processor, report=skipped),
                options.batch_size,
                options.timed,
                progress=lambda done: bar.update(done - bar.n),
                normalize=options.normalize,
                num_beams=options.num_beams,
                max_new_tokens=options.max_new_tokens,
            )
        except AudioError as error:
            raise UserError(f"{path}: {error}") from error
    skipped.finish()
    if result.clipped:
        print(f"{path}: {clipped(result.clipped, result.utterances, options)}", file=sys.stderr)
    lines = [{"reference": u.target, "written": w} for u, w in zip(utterances, written, strict=True)]
    scores = dataclasses.asdict(result) | {"lines": lines, "skipped": len(skipped), "skipped_lines": [*skipped.lines]}
    return scores, _row(path.stem, result)


def _show(found: dict[str, Any], rows: list[list[str]], options: argparse.Namespace) -> None:
    """Print the table, and write the JSON file."""
    from tabulate import tabulate

    from fastcompress.files import reason

    normalized = "" if options.normalize == "none" else f", normalized: {options.normalize}"
    parts = ", proportional attention" * found["proportional_attention"]
    parts += ", positions in time" * (found["positions"] == "time")
    print(f"{options.model}, rule {found['rule']}{parts}{normalized}")
    alignment = ("left", *["right"] * len(_HEAD[1:]))
    print(tabulate(rows, _HEAD, tablefmt="plain", disable_numparse=True, colalign=alignment))
    if options.json:
        try:
            options.json.write_text(json.dumps(found, indent=1, ensure_ascii=False), encoding="utf-8")
        except OSError as error:
            raise UserError(f"--json {options.json}: {reason(error)}") from error


_HEAD = (
    "", "utterances", "WER %", "95 %", "CER %", "exact %", "BLEU", "tokens/s", "ratio", "encode ms", "prefill ms",
    "peak MB",
)  # fmt: skip


def _row(name: str, r: Any) -> list[str]:
    return [
        name, str(r.utterances), f"{r.wer:.1f}", f"{r.wer_low:.1f}-{r.wer_high:.1f}", f"{r.cer:.1f}", f"{r.exact:.1f}",
        f"{r.bleu:.1f}", f"{r.tokens_per_second:.1f}", f"{r.ratio:.2f}", f"{r.encode_ms:.1f}", f"{r.prefill_ms:.1f}",
        f"{r.peak_bytes / 1e6:.0f}",
    ]  # fmt: skip

"""``fastcompress evaluate``."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from fastcompress.cli.errors import EXIT_OK, UserError, check_writable
from fastcompress.cli.models import add_model_options, load_model_and_processor, positive


def add_command(commands: Any) -> None:
    """Declare the command and its options."""
    parser = commands.add_parser(
        "evaluate",
        help="error rates, tokens per second and times of a model on manifests",
        description="Transcribe the utterances of manifests and score them: word error rate with a 95 % interval, "
        "character error rate, exact matches, BLEU; tokens per second of audio, ratio (frames per token), median times "
        "of encoder and prefill.",
    )
    parser.add_argument("model", metavar="MODEL", help="folder of a model or of a run")
    parser.add_argument("manifests", nargs="+", type=Path, metavar="MANIFEST", help="manifest to score")
    add_model_options(parser, batch_size=16, max_new_tokens=128)
    parser.add_argument("--threads", type=positive, metavar="N", help="threads of torch (default: one per core)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the scores and every transcript")
    parser.set_defaults(run=_run_evaluate)


def _run_evaluate(options: argparse.Namespace) -> int:
    import torch
    from tabulate import tabulate
    from tqdm import tqdm

    from fastcompress.audio import AudioError
    from fastcompress.decoder.generation import unwrap
    from fastcompress.training.evaluation import evaluate
    from fastcompress.training.examples import Examples
    from fastcompress.training.manifest import ManifestError, check_audio, format_skipped, read_manifest

    if options.threads:
        torch.set_num_threads(options.threads)
    if options.json:
        check_writable(f"--json {options.json}", options.json)
    model, processor = load_model_and_processor(options)
    rule = unwrap(model).compression
    found: dict[str, Any] = {"model": options.model, "rule": rule, "num_beams": options.num_beams, "manifests": {}}
    rows = []
    for path in options.manifests:
        try:
            utterances, skipped = check_audio(read_manifest(path))
            if skipped:
                print(f"{path}: {format_skipped(skipped)}", file=sys.stderr)
            if not utterances:
                raise UserError(f"{path}: has no usable utterance")
            with tqdm(total=len(utterances), desc=path.stem, file=sys.stderr, disable=not sys.stderr.isatty()) as bar:
                result, written = evaluate(
                    model,
                    Examples(utterances, processor),
                    options.batch_size,
                    progress=lambda done: bar.update(done - bar.n),  # noqa: B023
                    num_beams=options.num_beams,
                    max_new_tokens=options.max_new_tokens,
                )
        except (ManifestError, AudioError) as error:
            raise UserError(error) from error
        lines = [{"reference": u.target, "written": w} for u, w in zip(utterances, written, strict=True)]
        found["manifests"][str(path)] = dataclasses.asdict(result) | {"lines": lines}
        found["manifests"][str(path)]["skipped"] += len(skipped)
        rows.append(_row(path.stem, result))
    print(f"{options.model}, rule {rule}")
    alignment = ("left", *["right"] * len(_HEAD[1:]))
    print(tabulate(rows, _HEAD, tablefmt="plain", disable_numparse=True, colalign=alignment))
    if options.json:
        try:
            options.json.write_text(json.dumps(found, indent=1, ensure_ascii=False), encoding="utf-8")
        except OSError as error:
            raise UserError(f"--json {options.json}: {(error.strerror or str(error)).lower()}") from error
    return EXIT_OK


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

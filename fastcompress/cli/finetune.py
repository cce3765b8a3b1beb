"""``fastcompress finetune``."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastcompress.cli.errors import EXIT_OK, UserError
from fastcompress.cli.models import MANIFEST_HELP
from fastcompress.cli.settings import Given, make_settings_parser, resume_hint
from fastcompress.training.settings import FinetuneSettings, SettingsError

if TYPE_CHECKING:
    from fastcompress.training.parsing import SettingsParser


def add_command(commands: Any) -> None:
    """Declare the command; its options are built when it runs."""
    parser = commands.add_parser(
        "finetune", help="adapt a stock audio LLM (Qwen2-Audio, Voxtral, ...) to compressed audio with LoRA"
    )
    parser.build = _make_parser
    parser.set_defaults(run=_run_finetune)


def _make_parser() -> SettingsParser:
    return make_settings_parser(
        FinetuneSettings,
        "finetune",
        "--model MODEL --output-dir FOLDER --data MANIFEST",
        "Compress the audio of a stock audio LLM of transformers and train LoRA on its decoder, and its projector, to "
        "recover the quality. `fastcompress info --models` lists the models. The folder gets run.yaml, skipped.txt, "
        f"adapter/ and finetune.json. {MANIFEST_HELP} For several GPUs: accelerate launch -m fastcompress finetune ...",
        lambda parser: parser.add_argument(
            "--dry-run", action="store_true", help="Print parameters and memory, and load nothing"
        ),
    )


def _run_finetune(options: argparse.Namespace) -> int:
    from transformers.utils import logging

    from fastcompress.audio import AudioError
    from fastcompress.training import finetuning
    from fastcompress.training.manifest import ManifestError

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    given = Given.of(FinetuneSettings, options)
    settings = None
    try:
        settings = given.make(options.resume)
        if options.dry_run:
            found = finetuning.memory(settings)
            print(f"{found['parameters'] / 1e9:.2f} billion parameters, {found['trained'] / 1e6:.1f} million trained")
            print(f"{found['weights_bytes'] / 2**30:.1f} GiB of weights")
            print(f"{found['training_bytes'] / 2**30:.2f} GiB of gradients and AdamW's moments")
            print("plus activations")
            return EXIT_OK
        finetuning.finetune(settings, options.resume, lambda text: print(text, flush=True))
    except KeyboardInterrupt:
        if settings is not None and os.environ.get("RANK", "0") == "0":
            _print_how_to_resume(Path(settings.output_dir))
        raise
    except SettingsError as error:
        raise UserError(given.explain(error)) from error
    except (finetuning.FinetuningError, ManifestError, AudioError, NotImplementedError, ValueError) as error:
        raise UserError(error) from error
    print(f"adapter: {settings.output_dir}/{finetuning.ADAPTER}")
    return EXIT_OK


def _print_how_to_resume(folder: Path) -> None:
    from fastcompress.training.finetuning import newest_checkpoint
    from fastcompress.training.parsing import RECORD

    if (folder / RECORD).is_file():
        last = newest_checkpoint(folder)
        begin = f"after {last.name}" if last is not None else "from the start, since there is no checkpoint yet"
        print(f"fastcompress: interrupted; {resume_hint('finetune', folder)} continues {begin}", file=sys.stderr)

"""The command that adapts other people's audio LLMs: ``finetune``.

Arguments are declared here; what does the work is imported when the command runs.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from fastcompress.cli.errors import EXIT_OK, UserError
from fastcompress.cli.settings import Settings, add_settings

#: Settings of a run (fastcompress.training.finetuning), their types and what they are.
_SETTINGS: Settings = (
    ("model", str, "folder of a stock audio LLM"),
    ("data", str, "manifest to train on"),
    ("out", str, "folder of the run"),
    ("rule", str, "compression (default uniform:3)"),
    ("mode", str, "dynamic (default) or budget"),
    ("before_projector", bool, "pool the encoder's frames, before the projector"),
    ("dev", str, "manifest that is scored at the end"),
    ("prompt", str, "what is asked for, where the manifest does not say (default: Transcribe the audio.)"),
    ("steps", int, "updates (default 1000)"),
    ("batch_size", int, "utterances of a device in a batch (default 4)"),
    ("accumulate", int, "batches in an update (default 4)"),
    ("learning_rate", float, "at its highest (default 1e-4)"),
    ("warmup_steps", int, "default 50"),
    ("lora_rank", int, "of LoRA on the decoder (default 16)"),
    ("lora_alpha", float, "default 32"),
    ("lora_dropout", float, "default 0"),
    ("train_projector", bool, "train the projector in full (default yes)"),
    ("precision", str, "of the weights: bf16 (default) or fp32"),
    ("gradient_checkpointing", bool, "save memory (default yes)"),
    ("max_seconds", float, "skip longer audio (default 30)"),
    ("max_new_tokens", int, "of an answer, where dev is scored (default 128)"),
    ("save_every", int, "steps between checkpoints (default 200)"),
    ("log_every", int, "steps between lines of the log (default 10)"),
    ("seed", int, "default 0"),
)
_REQUIRED = ("model", "data", "out")


def add_command(commands: Any) -> None:
    """Declares the command."""
    parser = commands.add_parser(
        "finetune",
        help="adapt a stock audio LLM (Qwen2-Audio, Voxtral, ...) to compressed audio with LoRA",
        description="Compresses the audio of a stock audio LLM of transformers and trains LoRA on its decoder, and its "
        "projector, to make up for it. `fastcompress info --models` says which models. The folder gets the adapter and "
        "finetune.json. Several GPUs: accelerate launch -m fastcompress finetune ...",
    )
    add_settings(parser, _SETTINGS, _REQUIRED)
    parser.add_argument("--resume", action="store_true", help="go on after the last whole checkpoint of the folder")
    parser.add_argument("--dry-run", action="store_true", help="print parameters and memory; nothing is loaded")
    parser.set_defaults(run=_run_finetune)


def _run_finetune(options: argparse.Namespace) -> int:
    from transformers.utils import logging

    from fastcompress.audio import AudioError
    from fastcompress.training import finetuning
    from fastcompress.training.manifest import ManifestError

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    given = {name: getattr(options, name) for name, _, _ in _SETTINGS}
    try:
        settings = finetuning.Finetuning(**{name: value for name, value in given.items() if value is not None})
        if options.dry_run:
            found = finetuning.memory(settings)
            print(f"{found['parameters'] / 1e9:.2f} billion parameters, {found['trained'] / 1e6:.1f} million trained")
            print(f"{found['weights_bytes'] / 2**30:.1f} GiB of weights")
            print(f"{found['training_bytes'] / 2**30:.2f} GiB of gradients and AdamW's moments")
            print("activations come on top")
            return EXIT_OK
        finetuning.finetune(settings, options.resume, lambda text: print(text, flush=True))
    except (finetuning.FinetuningError, ManifestError, AudioError, NotImplementedError, ValueError) as error:
        raise UserError(error) from error
    print(f"adapter: {settings.out}/{finetuning.ADAPTER}")
    return EXIT_OK

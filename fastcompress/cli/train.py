"""``fastcompress train``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from fastcompress.cli.errors import EXIT_OK, UserError
from fastcompress.cli.settings import Settings, add_settings, quiet_transformers


def add_command(commands: Any) -> None:
    parser = commands.add_parser(
        "train",
        help="train the reference audio LLM, from nothing or with LoRA, and go on after a kill",
        description="Trains in a folder that then says all that is needed to repeat it. Settings come from a YAML file "
        "(--config) and from flags, which win. Without a model to go on from, a small one for the data is made. "
        "Several processes: accelerate launch -m fastcompress train ...",
    )
    parser.add_argument("folder", type=Path, metavar="RUN", help="folder of the run")
    parser.add_argument("--config", type=Path, metavar="FILE", help="settings, as YAML")
    parser.add_argument("--resume", action="store_true", help="go on with the run after its last checkpoint")
    parser.add_argument("--threads", type=int, metavar="N", help="threads of torch")
    add_settings(parser, _SETTINGS)
    parser.set_defaults(run=_run_train)


#: Settings of a run (fastcompress.training.runs), their types and what they are.
_SETTINGS: Settings = (
    ("train", str, "manifest to train on"),
    ("dev", str, "manifest whose loss is logged"),
    ("model", str, "folder of a model to go on from"),
    ("audio_model", str, "pretrained encoder, with --text-model"),
    ("text_model", str, "pretrained decoder, with --audio-model"),
    ("rule", str, "compression: none, uniform:3, local-max, ...; default: the model's"),
    ("reduce", str, "what a segment becomes: mean, first, max, ...; default: the model's"),
    ("keys", str, "what distances are taken between: frames, or ctc; default: the model's"),
    ("boundary_ratio", float, "frames a token that learned boundaries aim at, in place of a rule"),
    ("boundary_kind", str, "how they are learned: h-net (default), or cif"),
    ("lora_rank", int, "of LoRA on the decoder; 0: train all of it (default)"),
    ("lora_alpha", float, "of LoRA (default 32)"),
    ("lora_dropout", float, "of LoRA (default 0)"),
    ("train_encoder", bool, "train the encoder; default: without LoRA"),
    ("merge", bool, "write the final model with LoRA merged into it"),
    ("max_seconds", float, "skip longer audio (default 60)"),
    ("cache", bool, "keep features in memory (default yes)"),
    ("encode_once", bool, "run a frozen encoder once an utterance; needs --no-augment"),
    ("steps", int, "updates (default 1000)"),
    ("batch_size", int, "utterances of a process in a batch (default 8)"),
    ("accumulate", int, "batches in an update (default 1)"),
    ("learning_rate", float, "at its highest (default 1e-3)"),
    ("projector_learning_rate", float, "default: the same"),
    ("warmup_steps", int, "default 100"),
    ("final_rate", float, "share of the highest rate at the end (default 0.03)"),
    ("weight_decay", float, "default 0.02"),
    ("max_grad_norm", float, "default 1"),
    ("augment", bool, "SpecAugment (default yes)"),
    ("seed", int, "default 0"),
    ("precision", str, "fp32 or bf16 (default fp32)"),
    ("gradient_checkpointing", bool, "save memory"),
    ("save_every", int, "steps between checkpoints (default 500)"),
    ("keep", int, "checkpoints to keep (default 2)"),
    ("log_every", int, "steps between lines of log.csv (default 10)"),
    ("evaluate_every", int, "steps between losses on dev; 0: at the end (default)"),
)


def _run_train(options: argparse.Namespace) -> int:
    import torch
    from tqdm import tqdm

    from fastcompress.audio import AudioError
    from fastcompress.lalm.loading import RunError
    from fastcompress.training.checkpoints import CheckpointError
    from fastcompress.training.manifest import ManifestError
    from fastcompress.training.runs import Run
    from fastcompress.training.settings import RunSettings, read_settings
    from fastcompress.training.trainer import TrainingStopped

    if options.threads is not None:
        if options.threads < 1:
            raise UserError(f"--threads must be at least 1, got {options.threads}")
        torch.set_num_threads(options.threads)
    quiet_transformers()
    try:
        values = read_settings(options.config) if options.config else {}
        flags = {name: getattr(options, name) for name, _, _ in _SETTINGS}
        values |= {name: value for name, value in flags.items() if value is not None}
        settings = RunSettings.from_flat(values) if values or not options.resume else None
        run = Run(options.folder, settings, options.resume, lambda text: print(text, flush=True))
        steps = run.settings.training.steps
        main = run.accelerator.is_main_process
        terminal = sys.stderr.isatty()
        bar = tqdm(
            total=steps,
            initial=run.training.step,
            unit="step",
            file=sys.stderr,
            disable=not main,
            mininterval=0.5 if terminal else 30.0,
        )

        def progress(step: int, row: dict[str, float]) -> None:
            bar.set_postfix(loss=f"{row['loss']:.3f}", tokens_per_s=f"{row['tokens_per_second']:.0f}", refresh=False)
            bar.update(step - bar.n)

        with bar:
            final = run.train(progress)
    except (RunError, ManifestError, CheckpointError, TrainingStopped, AudioError) as error:
        raise UserError(error) from error
    if main:
        print(f"trained: {final}")
    return EXIT_OK

"""``fastcompress train``."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from fastcompress.cli.errors import EXIT_OK, UserError
from fastcompress.cli.models import MANIFEST_HELP, positive, quiet_transformers
from fastcompress.cli.settings import Given, make_settings_parser, resume_hint
from fastcompress.training.settings import SettingsError, TrainSettings

if TYPE_CHECKING:
    from fastcompress.training.parsing import SettingsParser


def add_command(commands: Any) -> None:
    """Declare the command; its options are built when it runs."""
    parser = commands.add_parser("train", help="train the reference audio LLM, from scratch or with LoRA")
    parser.build = _make_parser
    parser.set_defaults(run=_run_train)


def _make_parser() -> SettingsParser:
    return make_settings_parser(
        TrainSettings,
        "train",
        "--output-dir FOLDER --data MANIFEST",
        "Train the reference audio LLM. Without a model to start from, make a small one for the data. The folder gets "
        "run.yaml, log.csv, skipped.txt, checkpoints/ and final/, which evaluate and transcribe load. "
        f"{MANIFEST_HELP} For several processes: accelerate launch -m fastcompress train ...",
        lambda parser: parser.add_argument(
            "--threads", type=positive, metavar="N", help="Threads of torch (default: one per core)"
        ),
    )


def _run_train(options: argparse.Namespace) -> int:
    import torch
    from tqdm import tqdm

    from fastcompress.audio import AudioError
    from fastcompress.lalm.loading import RunError
    from fastcompress.training.checkpoints import CheckpointError
    from fastcompress.training.manifest import ManifestError
    from fastcompress.training.runs import Run
    from fastcompress.training.trainer import TrainingStopped

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    quiet_transformers()
    given = Given.of(TrainSettings, options)
    run = None
    try:
        run = Run(given.make(options.resume), options.resume, lambda text: print(text, flush=True))
        main = run.accelerator.is_main_process
        terminal = sys.stderr.isatty()
        bar = tqdm(
            total=run.settings.max_steps,
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
    except KeyboardInterrupt:
        if run is not None and run.accelerator.is_main_process:
            print(f"fastcompress: {_interrupted(run)}", file=sys.stderr)
        raise
    except SettingsError as error:
        raise UserError(given.explain(error)) from error
    except (RunError, ManifestError, CheckpointError, TrainingStopped, AudioError) as error:
        raise UserError(error) from error
    if main:
        print(f"trained: {final}")
    return EXIT_OK


def _interrupted(run: Any) -> str:
    """Return how to resume a run that was interrupted."""
    from fastcompress.training import checkpoints

    found = checkpoints.found(run.folder / "checkpoints")
    begin = f"after {found[-1].name}" if found else "from the start, since there is no checkpoint yet"
    return f"interrupted after step {run.training.step}; {resume_hint('train', run.folder)} continues {begin}"

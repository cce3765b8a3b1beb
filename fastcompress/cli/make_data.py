"""``fastcompress make-data``."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from fastcompress.cli.errors import EXIT_OK, UserError
from fastcompress.files import reason

_TASKS, _DIRECTIONS = ("digits", "numbers", "commands"), ("recognition", "translation")


def add_command(commands: Any) -> None:
    """Declare the command and its options."""
    parser = commands.add_parser(
        "make-data",
        help="synthetic speech with manifests, for recognition and translation",
        description="Synthesize speech with espeak-ng in many voices, speeds and pitches, and write manifests: train, "
        "dev, test, test-voice (voices that train lacks), test-noise (more noise than in train) and, if flite is "
        "installed, test-engine. The same seed gives the same files. An interrupted run continues where it stopped.",
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="output folder")
    parser.add_argument("--task", choices=_TASKS, default="digits", help="texts to speak (default: digits)")
    parser.add_argument(
        "--direction",
        choices=_DIRECTIONS,
        default="recognition",
        help="targets: the spoken words, or their German translation (default: recognition)",
    )
    parser.add_argument("--train", type=int, default=4000, metavar="N", help="utterances to train on (default: 4000)")
    parser.add_argument("--dev", type=int, default=200, metavar="N", help="development utterances (default: 200)")
    parser.add_argument("--test", type=int, default=200, metavar="N", help="utterances of each test set (default: 200)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of voices, texts and noise (default: 0)")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, metavar="N", help="processes (default: one per core)"
    )
    parser.set_defaults(run=_run_make_data)


def _run_make_data(options: argparse.Namespace) -> int:
    from tqdm import tqdm

    from fastcompress.synthesis.data import make_data
    from fastcompress.synthesis.espeak import SynthesisError

    bar: Any = None
    shown = ""

    def progress(name: str, done: int, total: int) -> None:
        nonlocal bar, shown
        if name != shown:
            if bar is not None:
                bar.close()
            shown = name
            bar = tqdm(total=total, desc=name, unit="utt", file=sys.stderr, disable=not sys.stderr.isatty())
        bar.update(done - bar.n)

    try:
        counts = make_data(
            options.folder,
            options.task,
            options.direction,
            train=options.train,
            dev=options.dev,
            test=options.test,
            seed=options.seed,
            jobs=options.jobs,
            progress=progress,
        )
    except (ValueError, SynthesisError) as error:
        raise UserError(error) from error
    except OSError as error:
        raise UserError(f"{error.filename or options.folder}: {reason(error)}") from error
    finally:
        if bar is not None:
            bar.close()
    hours = json.loads((options.folder / "data.json").read_text(encoding="utf-8"))["hours"]
    for name, count in counts.items():
        print(f"{options.folder / name}.jsonl: {count} utterances, {hours[name]:.2f} h")
    if "test-engine" not in counts:
        print("no test-engine: flite is not installed")
    return EXIT_OK

"""``fastcompress export``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fastcompress.cli.errors import EXIT_OK, UserError
from fastcompress.cli.models import quiet_transformers
from fastcompress.cli.settings import spell_flags


def add_command(commands: Any) -> None:
    """Declare the command and its options."""
    parser = commands.add_parser(
        "export",
        help="write a trained model as a plain checkpoint, which transformers and serving engines load",
        description="Merge LoRA and projector of a run into its base model, and write weights, processor and rule. "
        "The rule is in config.json, where apply_to finds it.",
    )
    parser.add_argument(
        "model", metavar="RUN", help="folder of a run of finetune or train, of its adapter, or of a model"
    )
    parser.add_argument("--out", required=True, type=Path, metavar="FOLDER", help="folder to write; new or empty")
    parser.set_defaults(run=_run_export)


def _run_export(options: argparse.Namespace) -> int:
    from fastcompress.training.export import export
    from fastcompress.training.settings import SettingsError

    quiet_transformers()
    try:
        export(options.model, options.out)
    except SettingsError as error:
        raise UserError(spell_flags(str(error).replace("`model`", "RUN"))) from error
    print(f"written: {options.out}")
    return EXIT_OK

"""What several commands share: flags of settings, loading a model, a table."""

from __future__ import annotations

import argparse
from typing import Any

from fastcompress.cli.errors import UserError

#: Names, types and descriptions.
Settings = tuple[tuple[str, type, str], ...]


def add_settings(parser: argparse.ArgumentParser, settings: Settings, required: tuple[str, ...] = ()) -> None:
    """Declares a flag for each; what is not given is ``None``."""
    for name, kind, text in settings:
        flag = f"--{name.replace('_', '-')}"
        if kind is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=text)
        else:
            metavar = kind.__name__.upper()
            parser.add_argument(flag, type=kind, default=None, metavar=metavar, help=text, required=name in required)


def load_model_and_processor(options: argparse.Namespace) -> tuple[Any, Any]:
    import torch

    from fastcompress import Rule
    from fastcompress.files import one_line
    from fastcompress.lalm.loading import RunError, load_model

    quiet_transformers()
    if options.rule not in (None, "none"):
        try:
            Rule.from_string(options.rule)
        except ValueError as error:
            raise UserError(f"--rule: {error}") from error
    try:
        torch.empty(0, device=options.device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch without CUDA
        raise UserError(f"--device {options.device}: {one_line(error)}") from error
    try:
        return load_model(options.model, options.rule, options.device)
    except (RunError, RuntimeError) as error:
        raise UserError(error) from error


def quiet_transformers() -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()  # of loading weights
    logging.set_verbosity_error()


def positive(text: str) -> int:
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 on, got {text!r}")
    return value


def print_table(head: list[str], rows: list[list[str]]) -> None:
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    for row in [head, *rows]:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        print("  ".join(cells).rstrip())

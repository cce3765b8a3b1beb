"""What ``evaluate`` and ``transcribe`` share: loading a model, and its options."""

from __future__ import annotations

import argparse
from typing import Any

from fastcompress.cli.errors import UserError


def add_model_options(parser: argparse.ArgumentParser, batch_size: int, max_new_tokens: int) -> None:
    """Add the options of compression, decoding and device, with the defaults that differ."""
    parser.add_argument("--rule", help="compression rule instead of the model's; none keeps every frame")
    parser.add_argument(
        "--batch-size", type=positive, default=batch_size, metavar="N", help=f"audios per batch (default: {batch_size})"
    )
    parser.add_argument(
        "--num-beams", type=positive, default=1, metavar="N", help="beams; 1 is greedy search (default: 1)"
    )
    parser.add_argument(
        "--max-new-tokens",
        type=positive,
        default=max_new_tokens,
        metavar="N",
        help=f"longest text, in tokens (default: {max_new_tokens})",
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")


def load_model_and_processor(options: argparse.Namespace) -> tuple[Any, Any]:
    """Load ``options.model`` with ``options.rule`` on ``options.device``.

    Raises:
        UserError: One of them cannot be used.
    """
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
    """Switch off the progress bars and warnings of transformers."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def positive(text: str | int) -> int:
    """Parse a whole number from 1 on."""
    value = int(text) if str(text).isdecimal() else 0  # jsonargparse parses defaults too, which are ints
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 on, got {text!r}")
    return value

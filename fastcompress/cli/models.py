"""Code that several commands share: loading a model, its options, and texts about manifests and limits."""

from __future__ import annotations

import argparse
from typing import Any

from fastcompress.cli.errors import UserError, did_you_mean

#: Description of a manifest; ``fastcompress.training.manifest`` reads it.
MANIFEST_HELP = (
    'A manifest has one line of JSON per utterance, such as {"audio_filepath": "audio/1.wav", "duration": 2.31, '
    '"text": "two hundred"}. Paths are relative to its folder; offset, target and prompt are optional.'
)


def add_model_options(parser: argparse.ArgumentParser, batch_size: int, max_new_tokens: int) -> None:
    """Add the options of compression, decoding and device. The defaults that differ between commands are arguments."""
    parser.add_argument("--rule", help="compression rule that replaces the model's; none keeps every frame")
    parser.add_argument(
        "--proportional-attention",
        action=argparse.BooleanOptionalAction,
        help="whether a token weighs as much as its frames in the decoder's attention (default: as the model was "
        "trained; yes, if it was trained without compression)",
    )
    parser.add_argument(
        "--positions",
        choices=("time", "compact"),
        help="whether a token has the position of its middle frame, or tokens are numbered (default: as the model was "
        "trained; time, if it was trained without compression)",
    )
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
    parser.add_argument(
        "--device",
        default="cpu",
        type=device_name,
        help="cpu, cuda, or one of several GPUs, such as cuda:1 (default: cpu)",
    )


def device_name(text: str) -> str:
    """Check the name of a device."""
    kind, colon, index = text.partition(":")
    if kind not in ("cpu", "cuda") or (colon and not index.isdecimal()):
        hint = "; did you mean cuda?" if kind == "gpu" else did_you_mean(kind, ("cpu", "cuda"))
        raise argparse.ArgumentTypeError(f"must be cpu, cuda or cuda:N, got {text!r}{hint}")
    return text


def clipped(count: int, total: int, options: argparse.Namespace) -> str:
    """Return a warning about texts that were cut at the limit of new tokens."""
    return f"warning: {count} of {total} texts were cut at --max-new-tokens {options.max_new_tokens}"


def check_model_options(options: argparse.Namespace) -> None:
    """Check the rule and the device, which is fast.

    Raises:
        UserError: The rule or the device cannot be used.
    """
    import torch

    from fastcompress import Rule
    from fastcompress.files import reason

    if options.rule not in (None, "none"):
        try:
            Rule.from_string(options.rule)
        except ValueError as error:
            raise UserError(f"--rule: {error}") from error
    try:
        torch.empty(0, device=options.device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch without CUDA
        raise UserError(f"--device {options.device}: {reason(error)}") from error


def load_model_and_processor(options: argparse.Namespace) -> tuple[Any, Any]:
    """Load ``options.model`` with the options of ``add_model_options``.

    Raises:
        UserError: The model, the rule or the device cannot be used.
    """
    from fastcompress.lalm.loading import RunError, load_model

    quiet_transformers()
    check_model_options(options)
    try:
        return load_model(
            options.model,
            options.rule,
            options.device,
            proportional_attention=options.proportional_attention,
            positions=options.positions,
        )
    except (RunError, RuntimeError) as error:
        raise UserError(error) from error


def quiet_transformers() -> None:
    """Switch off the progress bars and warnings of transformers."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def positive(text: str | int) -> int:
    """Parse a whole number of at least 1."""
    value = int(text) if str(text).isdecimal() else 0  # jsonargparse parses defaults too, which are ints
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 on, got {text!r}")
    return value

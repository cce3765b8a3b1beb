"""Warnings about limits that cut or degrade a result: the maximum number of new tokens, and of positions."""

from __future__ import annotations

import contextlib
import contextvars
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastcompress.decoder.generation import setting
from fastcompress.ops.packed_inputs import PackedInputs


@dataclass
class Answers:
    """Counts of answers of ``generate``.

    Attributes:
        cut: Answers that the limit of new tokens cut.
        total: All answers.
    """

    cut: int = 0
    total: int = 0


_counting: contextvars.ContextVar[Answers | None] = contextvars.ContextVar("fastcompress_answers", default=None)


@contextlib.contextmanager
def counting_answers() -> Iterator[Answers]:
    """Count answers that are cut, instead of a warning per call of ``generate``."""
    found = Answers()
    token = _counting.set(found)
    try:
        yield found
    finally:
        _counting.reset(token)


def warn_of_limits(model: Any, arguments: Mapping[str, Any], output: Any, prompt: int, packed: PackedInputs) -> None:
    """Warn if ``generate`` reached a limit.

    Args:
        model: Model that generated.
        arguments: Arguments of its ``generate``.
        output: Its result, with ids ``[R, prompt + N]`` int64.
        prompt: Number of ids of the prompt.
        packed: The compressed prompt.
    """
    tokens = (output if isinstance(output, Tensor) else output.sequences)[:, prompt:]
    _warn_of_cut_answers(model, arguments, tokens)
    warn_of_positions(model.config, packed, tokens.shape[1])


def _warn_of_cut_answers(model: Any, arguments: Mapping[str, Any], tokens: Tensor) -> None:
    """Warn if the limit of new tokens cut answers: they have no end token, and as many tokens as the limit allows.

    A model without an end token, and a call that asks for exactly as many tokens (``min_new_tokens``), have no such
    answers.
    """
    ends = setting(model, arguments, "eos_token_id")
    limit, least = (setting(model, arguments, f"{name}_new_tokens") for name in ("max", "min"))
    new = tokens.shape[1]
    if ends is None or new < (limit or 1) or new == least:
        return
    if limit is None and any(arguments.get(name) for name in ("stopping_criteria", "stop_strings", "max_time")):
        return  # it is not known what ended the answers
    ended = torch.isin(tokens, torch.as_tensor(ends, device=tokens.device)).any(1)
    found = Answers(int((~ended).sum()), tokens.shape[0])
    counting = _counting.get()
    if counting is not None:
        counting.cut += found.cut
        counting.total += found.total
    elif found.cut:
        name = f"max_new_tokens={limit}" if limit else f"the default limit of {new} new tokens"
        warnings.warn(f"{found.cut} of {found.total} answers were cut at {name}: pass a larger one", stacklevel=4)


def warn_of_positions(config: Any, packed: PackedInputs, new: int = 0) -> None:
    """Warn if samples are longer than the decoder's largest position.

    Args:
        config: Configuration of the decoder, or of the model that it is in.
        packed: The samples. Without positions in time, they are read only if ``max_seqlen``, an upper bound, exceeds
            the limit.
        new: Number of tokens that were generated after each sample.
    """
    limit = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    if not isinstance(limit, int) or (not packed.in_time and packed.max_seqlen + new <= limit):
        return
    rows = packed.next_positions + new
    longer = int((rows > limit).sum())
    if longer:
        unit, remedy = "rows", "a rule with fewer tokens"
        if packed.in_time:
            unit, remedy = "positions", "compact positions"
        warnings.warn(
            f"{longer} of {len(rows)} samples are longer than the decoder's max_position_embeddings={limit} (the "
            f"longest has {int(rows.max())} {unit}), for which it was not trained: use shorter audio, or {remedy}",
            stacklevel=4,
        )

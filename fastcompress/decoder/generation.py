"""Helpers for transformers' ``generate`` with a compressed prompt, whose rows are fewer than the ids of the caller."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def unwrap(model: Any) -> Any:
    """Return the model inside a ``PeftModel``, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def setting(model: Any, arguments: Mapping[str, Any], name: str) -> Any:
    """Return an argument of ``generate``: from the call, its ``generation_config``, or the model's, in this order."""
    for source in (arguments, vars(arguments.get("generation_config") or object), vars(model.generation_config)):
        if source.get(name) is not None:
            return source[name]
    return None


def new_token_limits(model: Any, arguments: Mapping[str, Any], asked: int) -> dict[str, Any]:
    """Translate ``max_length`` and ``min_length``, which count the ids of the prompt, to numbers of new tokens.

    Args:
        model: Model that generates.
        arguments: Arguments of ``generate``.
        asked: Number of ids of the prompt.

    Returns:
        Arguments that override those of the call.

    Raises:
        ValueError: ``max_length`` is not more than the ids of the prompt.
    """
    found: dict[str, Any] = {}
    for total, new in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
        value = setting(model, arguments, total)
        if not value or setting(model, arguments, new) is not None:
            continue
        if total == "max_length" and value <= asked:
            raise ValueError(f"max_length must be > {asked}, the number of ids of the prompt, got {value}")
        found[new] = max(0, value - asked)
        if total in arguments:
            found[total] = None
    config = arguments.get("generation_config")
    if config is not None and found:
        config = copy.deepcopy(config)
        config.max_length = config.min_length = None
        found["generation_config"] = config
    return found


def prepend_prompt(output: Any, input_ids: Tensor, skip: int = 0) -> Any:
    """Put the ids of the prompt before those that ``generate`` returned.

    Args:
        output: Ids ``[R, S]`` int64, or the output of ``return_dict_in_generate`` with such ``sequences``; ``R`` is a
            multiple of ``B``.
        input_ids: Ids of the prompt as the caller passed them, ``[B, L]`` int64.
        skip: Number of leading columns of ``output`` that represent the compressed prompt.

    Returns:
        ``output`` with ``[R, L + S - skip]`` ids.
    """
    tokens = output if isinstance(output, Tensor) else output.sequences
    answers = tokens[:, skip:]
    prompt = input_ids.repeat_interleave(answers.shape[0] // input_ids.shape[0], 0).to(answers.device)
    tokens = torch.cat([prompt, answers], 1)
    if isinstance(output, Tensor):
        return tokens
    output.sequences = tokens
    return output

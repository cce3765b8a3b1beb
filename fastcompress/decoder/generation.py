"""Arguments of transformers' ``generate``, whose prompt is packed rows, and so not as long as the ids asked with."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any


def setting(model: Any, arguments: Mapping[str, Any], name: str) -> Any:
    """Of an argument of ``generate``: as it is passed, or in the configuration passed, or in the model's."""
    for source in (arguments, vars(arguments.get("generation_config") or object), vars(model.generation_config)):
        if source.get(name) is not None:
            return source[name]
    return None


def new_token_limits(model: Any, arguments: Mapping[str, Any], asked: int) -> dict[str, Any]:
    """``max_length`` and ``min_length``, which count the ids of the prompt, as numbers of new tokens."""
    found: dict[str, Any] = {}
    for total, new in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
        value = setting(model, arguments, total)
        if not value or setting(model, arguments, new) is not None:
            continue
        if total == "max_length" and value <= asked:
            raise ValueError(f"max_length must be more than the {asked} ids of the prompt, got {value}")
        found[new] = max(0, value - asked)
        if total in arguments:
            found[total] = None
    config = arguments.get("generation_config")
    if config is not None and found:
        config = copy.deepcopy(config)
        config.max_length = config.min_length = None
        found["generation_config"] = config
    return found

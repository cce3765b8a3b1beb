"""How long ``generate`` writes: its prompt is packed, and so not as long as the ids that were asked with."""

from __future__ import annotations

import copy
from typing import Any


def new_tokens(decoder: Any, arguments: dict[str, Any], asked: int) -> dict[str, Any]:
    """``max_length`` and ``min_length``, which the decoder would count in packed rows, as numbers of new tokens."""
    given = arguments.get("generation_config")
    sources = [arguments, *(vars(config) for config in (given, decoder.generation_config) if config is not None)]
    found: dict[str, Any] = {}
    for total, new in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
        length, told = (next((s[n] for s in sources if s.get(n) is not None), None) for n in (total, new))
        if not length or told is not None:
            continue
        if total == "max_length" and length <= asked:
            raise ValueError(f"max_length must be more than the {asked} ids of the prompt, got {length}")
        found[new] = max(0, length - asked)
        if total in arguments:
            found[total] = None
    if given is not None and found:
        found["generation_config"] = given = copy.deepcopy(given)
        given.max_length = given.min_length = None
    return found

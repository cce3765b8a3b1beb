"""Thresholds that compress audio by a given ratio, and the quantiles of the distances that they are compared with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastcompress import LocalMax, Rule, Threshold, select_boundaries

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
#: The rules whose threshold is searched; each compresses more with a larger value.
FAMILIES: tuple[Callable[[float], Rule], ...] = (
    Threshold,
    lambda value: LocalMax(threshold=value),
    lambda value: LocalMax(prominence=value),
)
_STEPS = 40  # halvings of the interval of the largest distance
_CLOSE = 0.05  # relative error of the ratio up to which a rule is proposed


@dataclass(frozen=True)
class Search:
    """Result of a search.

    Attributes:
        ratio: Requested frames per token.
        frames: Number of frames.
        seconds: Seconds of audio.
        quantiles: Distances at the quantiles ``QUANTILES``.
        rules: Rules and their numbers of tokens, for all audio together.
    """

    ratio: float
    frames: int
    seconds: float
    quantiles: dict[float, float]
    rules: list[tuple[Rule, int]]


def distance_quantiles(distances: Sequence[Tensor]) -> dict[float, float]:
    """Return the distances at the quantiles ``QUANTILES``; empty without finite distances.

    Args:
        distances: ``fastcompress.adjacent_distance`` of each audio, ``[T]``.
    """
    known = torch.cat(list(distances)).double()
    known = known[known.isfinite()].sort().values
    if not len(known):
        return {}
    return {q: float(known[min(len(known) - 1, int(q * len(known)))]) for q in QUANTILES}


def search(distances: Sequence[Tensor], ratio: float, seconds: float) -> Search:
    """Search the thresholds of rules for a ratio.

    Args:
        distances: ``fastcompress.adjacent_distance`` of each audio, ``[T]``.
        ratio: Frames per token, more than 1.
        seconds: Seconds of all audio.
    """
    d = torch.cat(list(distances))
    bounds = torch.tensor([0, *(len(part) for part in distances)], device="cpu").cumsum(0).int()

    def tokens(rule: Rule) -> int:
        return len(select_boundaries(d, rule, cu_seqlens=bounds).starts)

    found = [(rule, tokens(rule)) for family in FAMILIES for rule in [_nearest(family, tokens, len(d) / ratio, d)]]
    return Search(ratio, len(d), seconds, distance_quantiles(distances), found)


def _nearest(family: Callable[[float], Rule], tokens: Callable[[Rule], int], wanted: float, d: Tensor) -> Rule:
    """Return the rule of a family whose number of tokens is nearest to the requested one."""
    finite = d[d.isfinite()]
    low, high = 0.0, float(finite.max()) if len(finite) else 0.0
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if tokens(family(middle)) > wanted else (low, middle)
    candidates = [family(float(f"{value:.4g}")) for value in (low, high)]
    return min(candidates, key=lambda rule: abs(tokens(rule) - wanted))


def format_search(found: Search) -> str:
    """Return a search as text: the quantiles, and a table of rules. No trailing newline."""
    from tabulate import tabulate

    lines = [f"distances between neighbours, of {found.frames} frames:"]
    lines += [f"  {q:.0%} are at most {value:.4g}" for q, value in found.quantiles.items()]
    close = [(rule, count) for rule, count in found.rules if _is_close(found, count)]
    rows = [
        (str(rule), f"{count}", f"{found.frames / count:.2f}", f"{count / found.seconds:.1f}") for rule, count in close
    ]
    lines += [f"rules with {found.ratio:g} frames per token:"]
    if rows:
        header = ("rule", "tokens", "ratio", "tokens/s")
        table = tabulate(rows, header, "plain", colalign=("left", *["right"] * 3), disable_numparse=True)
        lines += [f"  {line}" for line in table.splitlines()]
    for rule, count in found.rules:
        if not _is_close(found, count):
            lines.append(f"note: {rule} is the nearest of its kind, with {found.frames / count:.2f} frames per token.")
    return "\n".join(lines)


def _is_close(found: Search, count: int) -> bool:
    return abs(found.frames / count / found.ratio - 1) <= _CLOSE


def to_dict(found: Search) -> dict[str, Any]:
    """Return a search as plain data for JSON."""
    return {
        "ratio": found.ratio,
        "frames": found.frames,
        "seconds": found.seconds,
        "distance_quantiles": {f"{q:g}": value for q, value in found.quantiles.items()},
        "rules": [{"rule": str(rule), "tokens": n, "ratio": found.frames / n} for rule, n in found.rules],
    }

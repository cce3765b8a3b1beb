"""Definition of the rules that are no state machine over distances: a loop over the rows of one run, on the host."""

from __future__ import annotations

import math

from fastcompress.rules import LabelChange, Lookback, PeakHeight, Rule, TopK


def minmax(d: list[float]) -> list[float]:
    """Scaled to [0, 1]; all alike: 0. NaN stays, and counts for nothing."""
    numbers = [v for v in d if not math.isnan(v)]
    low, high = min(numbers, default=0.0), max(numbers, default=0.0)
    return [v if math.isnan(v) else (v - low) / (high - low) if high > low else 0.0 for v in d]


def run_starts(rule: Rule, frames: int, d: list[list[float]], labels: list[int]) -> list[int]:
    """Rows of a run of ``frames`` rows that start a segment, the first among them.

    Args:
        rule: one with ``scalar``.
        frames: at least 1.
        d: distances to the rows 1, 2, ... behind: ``d[lag - 1][t]`` between ``t`` and ``t + lag``.
        labels: of the rows.
    """
    if isinstance(rule, TopK):
        keep = rule.num_segments(frames) - 1
        order = sorted(range(frames - 1), key=lambda t: (math.isnan(d[0][t]), -d[0][t] if d[0][t] == d[0][t] else 0, t))
        return sorted([0, *(t + 1 for t in order[:keep])])
    if isinstance(rule, Lookback):
        found = [0]
        for t in range(1, frames):
            length = t - found[-1]
            near = any(d[lag - 1][t - lag] <= rule.threshold for lag in range(1, min(rule.window, length) + 1))
            if length == rule.max_len or not (near or length < rule.min_len):
                found.append(t)
        return found
    if isinstance(rule, LabelChange):
        candidates = {t for t in range(1, frames) if labels[t] != labels[t - 1]}
    else:
        assert isinstance(rule, PeakHeight)
        z = minmax(d[0][: frames - 1])

        def height(t: int, reach: int) -> float:
            left, right = z[max(t - reach, 0)], z[min(t + reach, len(z) - 1)]
            edges = [z[t] - left, z[t] - right]
            return math.nan if any(map(math.isnan, edges)) else max(0.0, min(edges))

        candidates = set()
        for t in range(len(z)):
            h1, h2 = height(t, 1), height(t, 2)
            if h1 > 0 and (h1 > rule.threshold or h2 > rule.threshold):
                candidates.add(t + 1)
    found = [0]
    for t in range(1, frames):
        length = t - found[-1]
        if (length >= rule.min_len and t in candidates) or length == rule.max_len:
            found.append(t)
    return found

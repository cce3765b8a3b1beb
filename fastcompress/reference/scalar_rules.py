"""Definition of the scalar rules: a loop over the rows of one run, on the host."""

from __future__ import annotations

import math

from fastcompress.rules import LabelChange, Lookback, PeakHeight, Rule, TopK


def minmax(d: list[float]) -> list[float]:
    """Scale distances to [0, 1]. Equal distances become 0; NaN stays NaN and does not affect the scale."""
    numbers = [v for v in d if not math.isnan(v)]
    low, high = min(numbers, default=0.0), max(numbers, default=0.0)
    return [v if math.isnan(v) else (v - low) / (high - low) if high > low else 0.0 for v in d]


def run_starts(rule: Rule, frames: int, d: list[list[float]], labels: list[int]) -> list[int]:
    """Return the rows of one run that start a segment, including the first row.

    Args:
        rule: A rule whose ``scalar`` is true.
        frames: Number of rows of the run, at least 1.
        d: Distances by lag: ``d[lag - 1][t]`` is the distance between rows ``t`` and ``t + lag``.
        labels: Labels of the rows.
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

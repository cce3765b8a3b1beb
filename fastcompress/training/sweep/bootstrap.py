"""Bootstrap intervals of error rates, and of their differences on the same utterances.

Errors of one speaker are not independent. Therefore, speakers are resampled if they are known, and else utterances.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

#: Number of resamples.
RESAMPLES = 10_000

_ENTRIES = 4_000_000  # largest number of multiplicities (resamples x units) in memory


@dataclass(frozen=True)
class Interval:
    """A value in %, or a difference in points, with its 95 % interval.

    Attributes:
        value: The value of all utterances together.
        low: Lower end of the interval, the 2.5th percentile of the resamples.
        high: Upper end, the 97.5th percentile.
    """

    value: float
    low: float
    high: float


class Bootstrap:
    """Resamples of the utterances of one manifest. All rates and differences use the same resamples.

    Args:
        speakers: Speaker of each utterance, or ``None``. Speakers are resampled if each utterance has one, and there
            are at least two; else utterances.
        resamples: Number of resamples.
        seed: Seed of the resamples.

    Attributes:
        unit: Unit of the resamples, ``"speaker"`` or ``"utterance"``.
        units: Number of different speakers, or of utterances.
    """

    def __init__(self, speakers: Sequence[object], resamples: int = RESAMPLES, seed: int = 0) -> None:
        known = all(speaker is not None for speaker in speakers) and len(set(map(str, speakers))) > 1
        names = list(map(str, speakers)) if known else list(map(str, range(len(speakers))))
        self.unit: str = "speaker" if known else "utterance"
        self._unit_of = np.unique(names, return_inverse=True)[1]
        self.units: int = len(set(names))
        self._resamples = resamples
        self._seed = seed
        self._known: dict[bytes, np.ndarray] = {}

    def rate(self, errors: Sequence[float], words: Sequence[float]) -> Interval:
        """Return the error rate in %.

        Args:
            errors: Errors of each utterance.
            words: Words of its reference.
        """
        return self._interval(self._sums(errors), words)

    def difference(self, errors: Sequence[float], baseline: Sequence[float], words: Sequence[float]) -> Interval:
        """Return the difference between two error rates on the same utterances, in points.

        Args:
            errors: Errors of each utterance.
            baseline: Errors of the baseline.
            words: Words of each reference.
        """
        return self._interval(self._sums(errors) - self._sums(baseline), words)

    def _interval(self, errors: np.ndarray, words: Sequence[float]) -> Interval:
        rates = 100 * errors / np.maximum(self._sums(words), 1)
        low, high = np.percentile(rates[1:], (2.5, 97.5))
        return Interval(float(rates[0]), float(low), float(high))

    def _sums(self, values: Sequence[float]) -> np.ndarray:
        """Return the sum of the values of all utterances, followed by the sum of each resample, fp64."""
        key = np.asarray(values, np.float64)
        if (found := self._known.get(key.tobytes())) is not None:
            return found
        of_unit = np.bincount(self._unit_of, key, self.units)
        generator = np.random.default_rng(self._seed)
        chance = np.full(self.units, 1 / self.units)
        parts = [of_unit.sum(keepdims=True)]
        left = self._resamples
        while left:
            count = min(left, max(1, _ENTRIES // self.units))
            parts.append(generator.multinomial(self.units, chance, count) @ of_unit)
            left -= count
        found = self._known[key.tobytes()] = np.concatenate(parts)
        return found

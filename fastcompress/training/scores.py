"""Word and character error rates, from counts of errors per utterance."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

#: Resamples of the bootstrap of 95 % confidence intervals.
RESAMPLES = 1000


@dataclass(frozen=True)
class ErrorCounts:
    """Errors in the words or characters of one utterance, or of several.

    Attributes:
        substitutions: Words (or characters) of the reference that were replaced.
        deletions: Words of the reference that are missing.
        insertions: Additional words of the hypothesis.
        hits: Correct words.
    """

    substitutions: int
    deletions: int
    insertions: int
    hits: int

    @property
    def errors(self) -> int:
        """Substitutions, deletions and insertions."""
        return self.substitutions + self.deletions + self.insertions

    @property
    def length(self) -> int:
        """Words of the reference."""
        return self.hits + self.substitutions + self.deletions

    @property
    def rate(self) -> float:
        """Errors per word of the reference, in %. An empty reference counts as one word."""
        return 100 * self.errors / max(1, self.length)


def word_errors(references: Sequence[str], hypotheses: Sequence[str]) -> list[ErrorCounts]:
    """Count the errors in the words of each utterance. ``total`` adds them up.

    Raises:
        ValueError: There are not as many hypotheses as references.
    """
    import jiwer

    return [_counts(jiwer.process_words(r, h)) for r, h in zip(references, hypotheses, strict=True)]


def character_errors(references: Sequence[str], hypotheses: Sequence[str]) -> list[ErrorCounts]:
    """Count the errors in the characters of each utterance, spaces included.

    Raises:
        ValueError: There are not as many hypotheses as references.
    """
    import jiwer

    return [_counts(jiwer.process_characters(r, h)) for r, h in zip(references, hypotheses, strict=True)]


def total(counts: Iterable[ErrorCounts]) -> ErrorCounts:
    """Return the counts of all utterances together; its ``rate`` is that of the corpus."""
    counts = list(counts)
    return ErrorCounts(
        substitutions=sum(c.substitutions for c in counts),
        deletions=sum(c.deletions for c in counts),
        insertions=sum(c.insertions for c in counts),
        hits=sum(c.hits for c in counts),
    )


def confidence_interval(counts: Sequence[ErrorCounts]) -> tuple[float, float]:
    """Return the 95 % confidence interval of the rate of ``total(counts)``, by a bootstrap over utterances."""
    g = random.Random(0)
    pairs = [(c.errors, c.length) for c in counts]
    rates = []
    for _ in range(RESAMPLES):
        sample = g.choices(pairs, k=len(pairs))
        rates.append(100 * sum(e for e, _ in sample) / max(1, sum(n for _, n in sample)))
    rates.sort()
    return rates[round(0.025 * RESAMPLES)], rates[round(0.975 * RESAMPLES) - 1]


def _counts(found: object) -> ErrorCounts:
    return ErrorCounts(*(getattr(found, name) for name in ("substitutions", "deletions", "insertions", "hits")))

"""Error rates: counts of errors, their totals, and the interval by a bootstrap."""

from __future__ import annotations

import jiwer
import pytest

from fastcompress.training.scores import (
    ErrorCounts,
    character_errors,
    confidence_interval,
    total,
    word_errors,
)

REFERENCES = ["one two three", "four", "five six", "", "sieben ö acht"]
HYPOTHESES = ["one too three and", "", "six", "word", "sieben  oe acht"]


def test_word_errors():
    assert word_errors(REFERENCES, HYPOTHESES) == [
        ErrorCounts(substitutions=1, deletions=0, insertions=1, hits=2),
        ErrorCounts(substitutions=0, deletions=1, insertions=0, hits=0),
        ErrorCounts(substitutions=0, deletions=1, insertions=0, hits=1),
        ErrorCounts(substitutions=0, deletions=0, insertions=1, hits=0),
        ErrorCounts(substitutions=1, deletions=0, insertions=0, hits=2),
    ]
    assert total(word_errors(REFERENCES, HYPOTHESES)) == ErrorCounts(2, 2, 2, 5)
    assert total([]) == ErrorCounts(0, 0, 0, 0)


def test_character_errors():
    assert character_errors(["ab c", "d"], ["abc", "dé"]) == [ErrorCounts(0, 1, 0, 3), ErrorCounts(0, 0, 1, 1)]


def test_rates_are_those_of_the_corpus():
    words, characters = total(word_errors(REFERENCES, HYPOTHESES)), total(character_errors(REFERENCES, HYPOTHESES))
    assert words.errors == 6 and words.length == 9
    assert words.rate == pytest.approx(100 * 6 / 9)
    assert words.rate == pytest.approx(100 * jiwer.wer(REFERENCES, HYPOTHESES))
    assert characters.rate == pytest.approx(100 * jiwer.cer(REFERENCES, HYPOTHESES))
    assert ErrorCounts(0, 0, 3, 0).rate == 300  # an empty reference counts as one word


def test_confidence_interval():
    low, high = confidence_interval([ErrorCounts(1, 0, 0, 1), ErrorCounts(0, 0, 0, 2)] * 50)
    assert 15 < low < 25 < high < 35  # the standard error is 100 * 0.25 / 10
    assert confidence_interval([ErrorCounts(1, 0, 0, 3)] * 9) == (25, 25)


@pytest.mark.parametrize("count", (word_errors, character_errors))
def test_unequal_lengths(count):
    with pytest.raises(ValueError, match="longer|shorter"):
        count(["a", "b"], ["a"])

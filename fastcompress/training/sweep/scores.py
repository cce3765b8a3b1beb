"""Scores of the rows of a sweep, and their comparison with every frame and with uniform pooling at the same rate."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastcompress.rules import Rule, Uniform
from fastcompress.training.manifest import Utterance
from fastcompress.training.normalization import normalizer
from fastcompress.training.scores import ErrorCounts, character_errors, total, word_errors
from fastcompress.training.sweep.bootstrap import Bootstrap, Interval
from fastcompress.training.sweep.measure import Row
from fastcompress.training.sweep.models import NONE, Variant

#: Two rows have the same rate if their tokens per second differ by at most this fraction.
SAME_RATE = 0.02


@dataclass(frozen=True)
class Comparison:
    """Word error rate of a row minus that of another, in points.

    Attributes:
        against: Name of the other row, or of the two rows between which it was interpolated.
        interval: The difference.
    """

    against: str
    interval: Interval


@dataclass(frozen=True)
class Score:
    """Scores of a row.

    Attributes:
        variant: The row's variant.
        label: Its name in tables.
        utterances: Number of utterances.
        words: Words of their references.
        wer: Word error rate, in %.
        substitutions, deletions, insertions: Numbers of wrong, missing and additional words.
        cer: Character error rate, in %.
        bleu: BLEU, 0 to 100; ``None`` if the task is not translation, or sacrebleu is not installed.
        keys: Rows to which the decoder attends before the first new token, mean per utterance.
        tokens_per_second: Tokens per second of pooled audio, and of silence if it is pooled.
        frames_per_token: Encoder frames per token, of audio and of silence that is pooled.
        audio_frames_per_token: Encoder frames per token, of the audio alone.
        prefill_ms: Mean time per utterance from the encoder states to the first new token, in batches.
        decoding_ms: Mean time per utterance from the first new token to the last.
        clipped: Number of texts that the limit of new tokens cut.
        cpu_seconds: Processor time of the row.
        vs_none: Comparison with every frame; ``None`` for that row itself.
        vs_uniform: Comparison with uniform pooling at the same rate and with the same parts; ``None`` for uniform
            pooling itself, and if the rate is not between those of two rows to interpolate.
        errors: Errors of each utterance.
    """

    variant: Variant
    label: str
    utterances: int
    words: int
    wer: Interval
    substitutions: int
    deletions: int
    insertions: int
    cer: float
    bleu: float | None
    keys: float
    tokens_per_second: float
    frames_per_token: float
    audio_frames_per_token: float
    prefill_ms: float
    decoding_ms: float
    clipped: int
    cpu_seconds: float
    vs_none: Comparison | None = None
    vs_uniform: Comparison | None = None
    errors: tuple[int, ...] = ()

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Score:
        """Make scores from what ``to_dict`` returned, without the comparisons."""
        known = {name: value for name, value in values.items() if not name.startswith("vs_")}
        wer = Interval(**values["wer"])
        return cls(**known | {"variant": Variant(**values["variant"]), "wer": wer, "errors": tuple(values["errors"])})

    def to_dict(self) -> dict[str, Any]:
        """Return the scores as plain data."""
        return dataclasses.asdict(self)


def is_translation(utterances: Sequence[Utterance]) -> bool:
    """Return whether a line of a manifest has the task translation."""
    return any(u.more.get("task") in ("translation", "translate") for u in utterances)


class Comparer:
    """Compare scores of the same utterances with each other.

    Args:
        words: Words of each reference.
        speakers: Speaker of each utterance, or ``None``.

    Attributes:
        bootstrap: Resamples of the utterances.
        words: Words of each reference.
    """

    def __init__(self, words: Sequence[int], speakers: Sequence[object]) -> None:
        self.words: list[int] = list(words)
        self.bootstrap = Bootstrap(speakers)

    def compared(self, scores: Sequence[Score]) -> list[Score]:
        """Return scores with their comparisons."""
        return [
            dataclasses.replace(s, vs_none=self.against_none(s, scores), vs_uniform=self.against_uniform(s, scores))
            for s in scores
        ]

    def compare(self, score: Score, other: Score) -> Comparison:
        """Return the difference between the word error rates of two rows."""
        return Comparison(other.label, self.bootstrap.difference(score.errors, other.errors, self.words))

    def against_none(self, score: Score, scores: Sequence[Score]) -> Comparison | None:
        """Compare a row with every frame."""
        other = next((s for s in scores if _is_none(s, score.variant)), None)
        return None if other is None or score.variant.rule == NONE else self.compare(score, other)

    def against_uniform(self, score: Score, scores: Sequence[Score]) -> Comparison | None:
        """Compare a row with uniform pooling at the same tokens per second and with the same parts.

        If no row of uniform pooling has the same rate, the errors of the two rows with the nearest rates are
        interpolated linearly in tokens per second. One of the two can be the row of every frame.
        """
        if score.variant.rule == NONE or is_uniform(score.variant):
            return None
        alike = [s for s in scores if is_uniform(s.variant) and _parts(s.variant) == _parts(score.variant)]
        if not alike:
            return None
        rate = _rate(score)
        nearest = min(alike, key=lambda s: abs(_rate(s) - rate))
        if abs(_rate(nearest) - rate) <= SAME_RATE * rate:
            return self.compare(score, nearest)
        alike += [s for s in scores if _is_none(s, score.variant)]
        below = max((s for s in alike if _rate(s) < rate), key=_rate, default=None)
        above = min((s for s in alike if _rate(s) > rate), key=_rate, default=None)
        if below is None or above is None:
            return None
        share = (rate - _rate(below)) / (_rate(above) - _rate(below))
        between = (1 - share) * np.array(below.errors) + share * np.array(above.errors)
        interval = self.bootstrap.difference(score.errors, between.tolist(), self.words)
        return Comparison(f"between {below.label} and {above.label}", interval)


class Scorer(Comparer):
    """Score rows of one sweep.

    Args:
        utterances: Its utterances, whose targets are the references. Their key ``speaker`` groups the resamples.
        normalize: Normalization of references and texts (``fastcompress.training.normalization``).
    """

    def __init__(self, utterances: Sequence[Utterance], normalize: str = "none") -> None:
        self._normalized = normalizer(normalize)
        self._references = [self._normalized(u.target) for u in utterances]
        self._has_bleu = is_translation(utterances) and importlib.util.find_spec("sacrebleu") is not None
        self._counts: dict[Variant, list[ErrorCounts]] = {}
        self._scores: dict[Variant, Score] = {}
        words = [c.length for c in word_errors(self._references, self._references)]
        super().__init__(words, [u.more.get("speaker") for u in utterances])

    def counts(self, row: Row) -> list[ErrorCounts]:
        """Return the word errors of each utterance."""
        if row.variant not in self._counts:
            self._counts[row.variant] = word_errors(self._references, self._texts(row))
        return self._counts[row.variant]

    def scores(self, rows: Sequence[Row]) -> list[Score]:
        """Return the scores of rows with their comparisons. The scores of a variant are computed once."""
        for row in rows:
            if row.variant not in self._scores:
                self._scores[row.variant] = self._score(row)
        return self.compared([self._scores[row.variant] for row in rows])

    def _texts(self, row: Row) -> list[str]:
        return [self._normalized(answer.text) for answer in row.answers]

    def _score(self, row: Row) -> Score:
        texts, answers = self._texts(row), row.answers
        counts = self.counts(row)
        errors, all_words = tuple(c.errors for c in counts), total(counts)
        tokens, seconds = sum(a.tokens for a in answers), sum(a.seconds for a in answers)
        audio_tokens = sum(a.audio_tokens for a in answers)
        return Score(
            variant=row.variant,
            label=row.variant.label,
            utterances=len(answers),
            words=all_words.length,
            wer=self.bootstrap.rate(errors, self.words),
            substitutions=all_words.substitutions,
            deletions=all_words.deletions,
            insertions=all_words.insertions,
            cer=total(character_errors(self._references, texts)).rate,
            bleu=self._bleu(texts),
            keys=sum(a.keys for a in answers) / len(answers),
            tokens_per_second=tokens / seconds if seconds else 0.0,
            frames_per_token=sum(a.frames for a in answers) / max(1, tokens),
            audio_frames_per_token=sum(a.audio_frames for a in answers) / max(1, audio_tokens),
            prefill_ms=row.prefill_ms,
            decoding_ms=row.decoding_ms,
            clipped=sum(a.clipped for a in answers),
            cpu_seconds=row.cpu_seconds,
            errors=errors,
        )

    def _bleu(self, texts: Sequence[str]) -> float | None:
        if not self._has_bleu:
            return None
        import sacrebleu

        return float(sacrebleu.corpus_bleu(list(texts), [self._references], force=True).score)


def _rate(score: Score) -> float:
    return score.tokens_per_second


def _is_none(score: Score, like: Variant) -> bool:
    variant = score.variant
    return variant.rule == NONE and not variant.control and variant.silence == like.silence


def is_uniform(variant: Variant) -> bool:
    """Return whether a variant is uniform pooling."""
    if variant.rule == NONE or variant.control or variant.reduce != "mean":
        return False
    return isinstance(Rule.from_string(variant.rule), Uniform)


def _parts(variant: Variant) -> tuple[object, ...]:
    return variant.proportional_attention, variant.positions, variant.silence

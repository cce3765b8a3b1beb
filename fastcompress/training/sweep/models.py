"""Models of a sweep: one interface for Whisper, the audio LLMs of ``apply_to`` and the reference model."""

from __future__ import annotations

import contextlib
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import StoppingCriteria

from fastcompress.decoder.saved_rule import KEY
from fastcompress.integrations.transformers import apply_to, revert
from fastcompress.nn import SegmentPool
from fastcompress.ops.segment_reduce import Reduce
from fastcompress.training.manifest import Utterance

#: Text of a rule that keeps every frame.
NONE = "none"


@dataclass(frozen=True)
class Variant:
    """A rule with its settings, which one row of a sweep measures.

    Attributes:
        rule: Text form of the rule; ``"none"`` keeps every frame.
        reduce: Reduction of the frames of a segment (``fastcompress.segment_reduce``).
        proportional_attention: Whether a token of L frames weighs as much as L frames; ``None``: the default.
        positions: ``"time"`` or ``"compact"``; ``None``: the default.
        silence: Treatment of the silence after the audio, for Whisper only (``apply_to``); ``None``: the default.
        control: Name of a control that changes the tokens, for experiments; empty: no control.
    """

    rule: str
    reduce: str = "mean"
    proportional_attention: bool | None = None
    positions: str | None = None
    silence: str | float | None = None
    control: str = ""

    @property
    def label(self) -> str:
        """The row's name in tables."""
        notes = [] if self.reduce == "mean" else [f"reduce {self.reduce}"]
        if self.proportional_attention is not None:
            notes.append(f"proportional attention {'on' if self.proportional_attention else 'off'}")
        if self.positions is not None:
            notes.append(f"positions {self.positions}")
        if self.control:
            notes.append(self.control)
        return ", ".join([self.rule, *notes])


@dataclass(frozen=True)
class Decoding:
    """Settings of decoding, which is greedy.

    Attributes:
        max_new_tokens: Longest text, in tokens.
        language: Language of utterances whose manifest line has no ``language``, for multilingual Whisper models.
        task: ``"transcribe"`` or ``"translate"``, for multilingual Whisper models.
        prompt: Instruction of utterances without one, for audio LLMs.
    """

    max_new_tokens: int = 128
    language: str | None = None
    task: str = "transcribe"
    prompt: str = ""


@dataclass
class Answer:
    """The text of an utterance, and the numbers of tokens and frames that it needed.

    Attributes:
        text: The text.
        keys: Number of rows to which the decoder attends before the first new token: tokens, in Whisper kept silence,
            in audio LLMs the prompt.
        tokens: Number of tokens into which the rule pools frames.
        frames: Number of these frames.
        seconds: Duration of these frames.
        audio_tokens: Number of the tokens that start before the end of the audio.
        audio_frames: Number of frames of the audio, without the silence that fills a window.
        new_tokens: Number of tokens of the text.
        clipped: Whether the limit of new tokens cut the text.
    """

    text: str
    keys: int
    tokens: int
    frames: int
    seconds: float
    audio_tokens: int
    audio_frames: int
    new_tokens: int
    clipped: bool


@dataclass
class Batch:
    """Answers of a batch, the seconds until the first new token, and the seconds from there to the last one."""

    answers: list[Answer]
    prefill: float
    decoding: float


class Clock(StoppingCriteria):
    """Record the times of the first and of the last new token, and the ids, during ``generate``."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.begin: float = self._now()
        self.first: float | None = None
        self.last: float = self.begin
        self._prompt = 0
        self._ids: Tensor = torch.empty(0)

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Record a step; never stop."""
        self.last = self._now()
        if self.first is None:
            self.first, self._prompt = self.last, input_ids.shape[1] - 1
        self._ids = input_ids
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    @property
    def new(self) -> Tensor:
        """The new ids, ``[B, N]``."""
        return self._ids[:, self._prompt :]

    def times(self) -> tuple[float, float]:
        """Return the seconds until the first new token, and the seconds from there to the last one."""
        first = self.begin if self.first is None else self.first
        return first - self.begin, self.last - first


def written(ids: Tensor, ends: Sequence[int]) -> list[tuple[list[int], bool]]:
    """Return the new ids of each row up to its end token, and whether the limit cut the row: it has no end token."""
    found = []
    for row in ids.tolist():
        stop = next((i for i, token in enumerate(row) if token in ends), None)
        found.append((row if stop is None else row[:stop], stop is None))
    return found


class SweepModel(ABC):
    """A model with interchangeable compression.

    Attributes:
        model: The model of transformers.
        kind: ``model_type`` of its configuration.
        sampling_rate: Sampling rate of the audio that ``encode`` takes, in Hz.
        why_not_cached: Reason why encoder states are computed for each rule; empty: they are computed once.
        switches: Parts of a rule that can be switched off: fields of ``Variant``, and their values when off.
        decoding: Settings of decoding.
    """

    model: Any
    kind: str
    sampling_rate: int
    why_not_cached: str = ""
    switches: dict[str, Any]
    decoding: Decoding

    @abstractmethod
    def encode(self, samples: np.ndarray) -> dict[str, Tensor]:
        """Return the encoder states to save for the samples ``[S]`` of an utterance.

        Raises:
            AudioError: The audio cannot be used.
        """

    @abstractmethod
    def compressed(self, variant: Variant) -> contextlib.AbstractContextManager[None]:
        """Return a context in which the model compresses as a variant states.

        Raises:
            NotImplementedError, TypeError, ValueError: The model does not support the variant.
        """

    @abstractmethod
    def answer(self, utterances: Sequence[Utterance], states: Sequence[dict[str, Tensor]]) -> Batch:
        """Transcribe a batch, within the context of ``compressed``.

        Args:
            utterances: Utterances with audio.
            states: Result of ``encode`` for each of them; ignored if ``why_not_cached``.
        """

    def ablations(self, rule: str) -> list[Variant]:
        """Return the variants of a rule with each of its parts off, and with all of them off."""
        if rule == NONE:
            return []
        found = [Variant(rule, **{name: value}) for name, value in self.switches.items()]
        return [*found, Variant(rule, **self.switches)] if len(found) > 1 else found


@contextlib.contextmanager
def applied(model: Any, rule: str, reduce: str, **settings: Any) -> Iterator[None]:
    """Compress a stock model in a context, and keep the rule that was saved with the weights in its configuration.

    Args:
        model: The model.
        rule: Text form of the rule, or ``"none"``.
        reduce: Reduction of the frames of a segment.
        settings: Further arguments of ``apply_to``.
    """
    saved = vars(model.config).get(KEY)
    compressor = SegmentPool("uniform:1" if rule == NONE else rule, cast(Reduce, reduce))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".* was trained with")  # other rules are run on purpose
        apply_to(model, compressor, **settings)
    try:
        yield
    finally:
        revert(model)
        if saved is not None:
            setattr(model.config, KEY, saved)


@dataclass
class Captured(Exception):  # noqa: N818  (it is not an error)
    """Exception that ends a forward pass, and has the arguments of the decoder."""

    arguments: dict[str, Any] = field(default_factory=dict)

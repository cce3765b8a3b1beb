"""Streaming transcription with a model whose encoder and decoder were trained on whole utterances.

Every ``hop`` seconds the current utterance is encoded again from its start, because the encoder attends to all of its
input. A frame is final once ``look_ahead`` seconds of audio follow it. ``fastcompress.StreamingSegmentPool`` pools
final frames, and the decoder continues from the final text. Text becomes final where two
consecutive hypotheses agree (LocalAgreement-2; Liu et al., Interspeech 2020; Machacek et al., 2023) and is never
changed afterwards.

The encoder takes ``window`` seconds of audio. A longer stream is cut into utterances that are transcribed separately.
Each cut is at the quietest point of the last part of the window; no text is decoded from that part before the cut.
"""

from __future__ import annotations

import math
import os
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastcompress.decoder.generation import unwrap
from fastcompress.decoder.limits import Answers, counting_answers
from fastcompress.lalm.encoders import window_length
from fastcompress.segments import Pooled, row_segments
from fastcompress.streaming import Streamed, StreamingSegmentPool

#: Length in seconds of the last part of a window, in which an utterance may be cut; at most a quarter of the window.
CUT_SECONDS = 1.0
#: Default window in seconds for encoders that take audio of any length.
LONGEST_SECONDS = 30.0
#: Seconds over which the level is measured to find the quietest point.
LEVEL_SECONDS = 0.1
#: Defaults in seconds: the lowest latency that costs almost no words in noise (``experiments/streaming.py``,
#: docs/speech.md).
LOOK_AHEAD, HOP = 0.5, 0.5


@dataclass(frozen=True)
class Latency:
    """Latency of a stream, in seconds of audio; computing time is not included.

    Attributes:
        seconds: Length of the stream.
        first: Time at which the first text became final; ``None``: no text.
        lagging: Average lagging (Ma et al., 2019), averaged over the utterances: the mean delay of an utterance's
            words after the time they would have if they were evenly spaced, up to the first word that became final at
            its end. ``None``: no text.
    """

    seconds: float
    first: float | None
    lagging: float | None


class StreamingTranscriber:
    """Transcribe one stream of audio.

    The text does not depend on how the samples are divided among the calls. If ``look_ahead`` is as long as the audio
    and the audio fits in one window, the text equals that of the whole audio, token for token. Otherwise text may
    become final that later audio would have changed.

    Args:
        model: ``FastCompressForConditionalGeneration``, with or without LoRA, whose rule is ``None`` or supported by
            [`fastcompress.StreamingSegmentPool`][].
        processor: Processor of the model.
        window: Longest audio that is encoded in one call, and therefore the longest utterance, in seconds; ``None``:
            the encoder's window, or 30.
        look_ahead: Seconds of audio after a frame until it is final.
        hop: Seconds of audio between two hypotheses.
        prompt: Text of the request.
        max_new_tokens: Largest number of tokens per utterance.
        generation: Further arguments of ``generate``; the default is greedy search.

    Raises:
        NotImplementedError: The model's compression cannot be streamed.
        ValueError: An argument is out of range.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        *,
        window: float | None = None,
        look_ahead: float = LOOK_AHEAD,
        hop: float = HOP,
        prompt: str = "",
        max_new_tokens: int = 256,
        **generation: Any,
    ) -> None:
        self.model: Any = model.eval()
        self.processor: Any = processor
        self.rate: int = processor.sampling_rate
        self._base = unwrap(model)
        _check_compression(self._base)
        self._rule = self._base.rule or "uniform:1"
        StreamingSegmentPool(self._rule)  # raises for a rule that cannot be streamed
        for name, seconds in (("window", window), ("look_ahead", look_ahead), ("hop", hop)):
            if seconds is not None and not 0 <= seconds < math.inf:
                raise ValueError(f"{name} must be finite and at least 0 seconds, got {seconds}")
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        length = window_length(self._base.config.audio_config)
        most = None if length is None else length * processor.feature_extractor.hop_length
        self._window = round(window * self.rate) if window is not None else most or round(LONGEST_SECONDS * self.rate)
        self._look_ahead, self._hop = round(look_ahead * self.rate), round(hop * self.rate)
        if self._hop < processor.shortest:
            raise ValueError(f"hop must be at least {processor.shortest / self.rate:g} s (one frame), got {hop:g}")
        if self._window < 2 * self._hop:
            raise ValueError(f"window must be at least {2 * hop:g} s (two hops), got {self._window / self.rate:g}")
        if most is not None and self._window > most:
            raise ValueError(f"window must be at most {most / self.rate:g} s, the encoder's window, got {window:g}")
        self._uncut = self._window - min(round(CUT_SECONDS * self.rate), self._window // 4)
        self._prompt = processor.prompt_ids(prompt, has_audio=True)
        self._max_new_tokens, self._generation = max_new_tokens, {"do_sample": False} | generation
        ends = self._base.language_model.generation_config.eos_token_id
        self._ends = {processor.tokenizer.eos_token_id, processor.tokenizer.pad_token_id}
        self._ends |= set(ends if isinstance(ends, list) else [ends])
        self._buffer = np.empty(self._window, np.float32)  # samples of the current utterance
        self._over = False
        self._heard = 0  # number of samples of the stream so far
        self._past = ""  # text of the completed utterances
        self._first: int | None = None
        self._laggings: list[float] = []
        self._answers = Answers()
        self._begin(np.empty(0, np.float32))

    def _begin(self, samples: np.ndarray) -> None:
        """Start an utterance with samples ``[S]``."""
        self._filled = len(samples)
        self._buffer[: self._filled] = samples
        self._origin = self._heard - self._filled
        self._pool = StreamingSegmentPool(self._rule)
        self._frames = 0  # number of final frames
        self._tokens: list[Streamed] = []
        self._final: list[int] = []  # ids of the final text
        self._hypothesis: list[int] | None = None
        self._written = ""
        self._delays: list[int] = []  # per word, samples from the start of the utterance until the word was final

    @property
    def text(self) -> str:
        """Final text of the stream so far."""
        return " ".join(filter(None, (self._past, self._written)))

    @torch.inference_mode()
    def feed(self, samples: np.ndarray | Tensor) -> str:
        """Process the next samples.

        Args:
            samples: ``[S]``, floating point, at the processor's sampling rate, full scale at 1.

        Returns:
            The text that became final, which is appended to [`text`][].

        Raises:
            TypeError: The samples are not floating point.
            ValueError: The samples are not ``[S]`` or not finite, or [`finish`][] was called.
        """
        if self._over:
            raise ValueError("the stream has ended; create a new StreamingTranscriber for another stream")
        if isinstance(samples, Tensor):
            samples = samples.detach().cpu().to(torch.float32 if samples.is_floating_point() else samples.dtype).numpy()
        if not isinstance(samples, np.ndarray) or samples.dtype.kind != "f":
            got = getattr(samples, "dtype", type(samples).__name__)
            raise TypeError(f"samples must be floating point with full scale at 1, got {got}")
        samples = samples.astype(np.float32)
        if samples.ndim != 1 or not np.isfinite(samples).all():
            raise ValueError(f"samples must be [S] and finite, got shape {list(samples.shape)}")
        before = self.text
        while len(samples):
            if self._filled == self._window:
                self._cut()
            stop = min((self._filled // self._hop + 1) * self._hop, self._window)
            part, samples = samples[: stop - self._filled], samples[stop - self._filled :]
            self._buffer[self._filled : self._filled + len(part)] = part
            self._filled += len(part)
            self._heard += len(part)
            if self._filled == stop and stop <= self._uncut:
                self._step()
        return self.text[len(before) :]

    @torch.inference_mode()
    def finish(self) -> str:
        """End the stream.

        Returns:
            The remaining text. A warning counts the utterances that ``max_new_tokens`` cut.

        Raises:
            ValueError: The stream is shorter than one frame.
        """
        before = self.text
        if not self._over and (self._filled >= self.processor.shortest or not self._origin):
            self._end(self._filled)
        if self._answers.cut and not self._over:
            warnings.warn(
                f"{self._answers.cut} of {self._answers.total} utterances were cut at max_new_tokens="
                f"{self._max_new_tokens}: pass a larger one",
                stacklevel=2,
            )
        self._over = True
        return self.text[len(before) :]

    def _cut(self) -> None:
        """End the utterance at its quietest point and start the next one there."""
        place = self._uncut + quietest(self._buffer[self._uncut :], round(LEVEL_SECONDS * self.rate))
        rest = self._buffer[place:].copy()
        self._end(place)
        self._begin(rest)

    def _step(self) -> None:
        """Decode a hypothesis from the final frames; text on which it agrees with the previous one becomes final."""
        count = self._filled
        if count <= self._look_ahead:
            return
        frames = self._encode(count)
        final = len(frames) * (count - self._look_ahead) // count
        tokens = self._pool(frames[self._frames : final])
        self._frames = max(self._frames, final)
        if not len(tokens.values):  # without new tokens the same hypothesis would agree with itself
            return
        self._tokens.append(tokens)
        hypothesis = self._decode()
        if self._hypothesis is not None:
            self._final = _agreed(self._hypothesis, hypothesis, self._base.config.audio_token_id)
            self._write(over=False)
        self._hypothesis = hypothesis

    def _end(self, count: int) -> None:
        """Make the text of the whole utterance final; ``count`` is its length in samples."""
        self._tokens.append(self._pool(self._encode(count)[self._frames :]))
        self._tokens.append(self._pool.flush())
        self._final = self._decode()
        self._answers.total += 1
        self._answers.cut += len(self._final) >= self._max_new_tokens
        self._write(over=True)
        if self._delays:
            self._laggings.append(average_lagging(self._delays, count) / self.rate)
        self._past, self._written = self.text, ""

    def _encode(self, count: int) -> Tensor:
        """Return the frames ``[F, D]`` of the first ``count`` samples of the utterance."""
        features = self.processor.pad_features([self.processor.features(self._buffer[:count], self.rate)])
        frames, lengths = self._base.encode(*(t.to(self._base.device) for t in features.values()))
        return frames[0, : int(lengths)]

    def _decode(self) -> list[int]:
        """Decode all audio tokens, and return the ids of the final text followed by the new ones."""
        left = self._max_new_tokens - len(self._final)
        if left < 1:
            return self._final
        values = torch.cat([tokens.values for tokens in self._tokens])
        lengths = torch.cat([tokens.lengths for tokens in self._tokens])
        pooled = Pooled(values, row_segments(lengths.cumsum(0) - lengths, lengths, int(lengths.sum())))
        ids = torch.tensor([self._prompt + self._final], device=values.device)
        arguments = {"attention_mask": torch.ones_like(ids), "pooled": pooled, "max_new_tokens": left}
        with counting_answers():  # no warning per hypothesis; `finish` warns
            out = self.model.generate(input_ids=ids, **arguments, **self._generation)
        found = out[0, ids.shape[1] :].tolist()
        end = next((i for i, token in enumerate(found) if token in self._ends), len(found))
        return self._final + found[:end]

    def _write(self, over: bool) -> None:
        """Append the text of the final ids; ``over`` is true at the end of the utterance."""
        text = self.processor.tokenizer.decode(self._final, skip_special_tokens=True).strip()
        if not over:
            text = text.rstrip("\ufffd")  # the next token may have the missing bytes of the last character
            if not text.startswith(self._written):  # some tokenizers render a token differently when others follow
                return
        new = text[len(os.path.commonprefix([text, self._written])) :]
        if not new:
            return
        if self._first is None:
            self._first = self._heard
        if self._delays and not new[0].isspace():
            self._delays.pop()  # the new text continues the last word, whose delay is set below
        self._written += new
        self._delays += [self._heard - self._origin] * (len(self._written.split()) - len(self._delays))

    def latency(self) -> Latency:
        """Return the latency of the stream so far."""
        first = None if self._first is None else self._first / self.rate
        lagging = sum(self._laggings) / len(self._laggings) if self._laggings else None
        return Latency(self._heard / self.rate, first, lagging)


def average_lagging(delays: list[int], length: int) -> float:
    """Return the average lagging (Ma et al., 2019) of an utterance's words, in the unit of the arguments.

    Args:
        delays: Time at which each word became final, in ascending order; at least one.
        length: Length of the utterance.
    """
    last = next((i for i, delay in enumerate(delays) if delay >= length), len(delays) - 1)
    return sum(delay - i * length / len(delays) for i, delay in enumerate(delays[: last + 1])) / (last + 1)


def quietest(samples: np.ndarray, width: int) -> int:
    """Return the middle of the first run of ``width`` samples, out of ``[S]``, that has the least energy."""
    energy = np.concatenate([[0.0], np.cumsum(samples.astype(np.float64) ** 2)])
    width = min(width, len(samples))
    return int((energy[width:] - energy[: len(energy) - width]).argmin()) + width // 2


def _check_compression(model: Any) -> None:
    """Raise if streaming would compress differently from the model."""
    if model.compressor is not None:
        name = type(model.compressor).__name__
        raise NotImplementedError(f"compressor {name} cannot be streamed; streaming needs a rule")
    if model.rule is None:
        return
    if model.config.keys != "frames":
        raise NotImplementedError(f"keys must be 'frames' to stream rule {model.rule}, got {model.config.keys!r}")
    if model.config.reduce != "mean":
        raise NotImplementedError(f"reduce must be 'mean' to stream rule {model.rule}, got {model.config.reduce!r}")


def _agreed(a: list[int], b: list[int], audio: int) -> list[int]:
    """Return the longest common prefix of two lists of ids, cut before an audio token: a prompt may have one only."""
    count = 0
    while count < min(len(a), len(b)) and a[count] == b[count] != audio:
        count += 1
    return b[:count]

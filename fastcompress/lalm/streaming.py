"""Text of audio that is still coming, by a model whose encoder and decoder were trained on whole utterances.

Every ``hop`` seconds the utterance so far is encoded again, since an encoder that attends to all of its input is not
causal. Frames are final once ``look_ahead`` seconds of audio have come after them; they go through
:class:`fastcompress.StreamingSegmentPool`, and the decoder writes on from the text that is final. More of it is final
where two consecutive hypotheses agree: LocalAgreement-2 (Liu et al., Interspeech 2020; Machacek et al., 2023). It is
never taken back.

The encoder takes ``window`` seconds at once. A longer stream is cut into utterances, each transcribed alone, at the
quietest place of the window's last part, of which no text is written before it is known on which side of the cut it is.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastcompress.decoder.generation import unwrap
from fastcompress.lalm.encoders import window_length
from fastcompress.segments import Pooled, row_segments
from fastcompress.streaming import StreamingSegmentPool

#: Seconds of the end of a window, at most a quarter of it, in which an utterance is cut.
CUT_SECONDS = 1.0
#: Seconds: the window of encoders that take audio of any length.
LONGEST_SECONDS = 30.0
#: Seconds over which a level is taken.
LEVEL_SECONDS = 0.1
#: Seconds: the earliest setting that costs almost no words in noise (``experiments/streaming.py``, docs/speech.md).
LOOK_AHEAD, HOP = 0.5, 0.5


@dataclass(frozen=True)
class Latency:
    """Of a stream, in seconds of audio; what computing takes is not in it.

    Attributes:
        seconds: of the stream.
        first: after how many the first text was final; ``None``: there is none.
        lagging: average lagging (Ma et al., 2019): how far the words of an utterance are behind speech that has its
            words at even distances, up to the first that came at its end; the mean of the utterances, ``None`` without
            text.
    """

    seconds: float
    first: float | None
    lagging: float | None


class StreamingTranscriber:
    """Transcribes one stream of audio.

    The text does not depend on how the samples are divided among the calls. With a ``look_ahead`` as long as the audio,
    in one window, it is that of the whole audio, token for token; else each hop may fix what more audio would change.

    Args:
        model: a ``FastCompressForConditionalGeneration``, with or without LoRA. Its rule must be one that
            ``StreamingSegmentPool`` takes, or none.
        processor: its processor.
        window: seconds that are encoded at once, and of an utterance at most; ``None``: the encoder's window, or 30.
        look_ahead: seconds of audio after a frame until it is final.
        hop: seconds between two hypotheses.
        prompt: what to ask of the model.
        max_new_tokens: of an utterance.
        generation: more for ``generate``; greedy search if nothing else is said.

    Raises:
        NotImplementedError: the model's compression looks at all of a sequence.
        ValueError: an argument out of range.
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
        StreamingSegmentPool(self._rule)  # or it says that it cannot
        for name, seconds in (("window", window), ("look_ahead", look_ahead), ("hop", hop)):
            if seconds is not None and not 0 <= seconds < math.inf:
                raise ValueError(f"{name} must be a number of seconds, got {seconds}")
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        length = window_length(self._base.config.audio_config)
        most = None if length is None else length * processor.feature_extractor.hop_length
        self._window = round(window * self.rate) if window is not None else most or round(LONGEST_SECONDS * self.rate)
        self._look_ahead, self._hop = round(look_ahead * self.rate), round(hop * self.rate)
        if self._hop < processor.shortest:
            raise ValueError(f"hop must be at least a frame, {processor.shortest / self.rate:g} s, got {hop:g}")
        if self._window < 2 * self._hop:
            raise ValueError(f"window must be at least two hops of {hop:g} s, got {self._window / self.rate:g}")
        if most is not None and self._window > most:
            raise ValueError(f"window must be at most the encoder's, {most / self.rate:g} s, got {window:g}")
        self._uncut = self._window - min(round(CUT_SECONDS * self.rate), self._window // 4)
        self._prompt = processor.prompt_ids(prompt, has_audio=True)
        self._max_new_tokens, self._generation = max_new_tokens, {"do_sample": False} | generation
        ends = self._base.language_model.generation_config.eos_token_id
        self._ends = {processor.tokenizer.eos_token_id, processor.tokenizer.pad_token_id}
        self._ends |= set(ends if isinstance(ends, list) else [ends])
        self._buffer = np.empty(self._window, np.float32)  # the utterance
        self._over = False
        self._heard = 0  # samples of the stream
        self._past = ""  # text of the utterances that are over
        self._first: int | None = None
        self._laggings: list[float] = []
        self._begin(np.empty(0, np.float32))

    def _begin(self, samples: np.ndarray) -> None:
        """An utterance, of which this much is there."""
        self._filled = len(samples)
        self._buffer[: self._filled] = samples
        self._origin = self._heard - self._filled
        self._pool = StreamingSegmentPool(self._rule)
        self._frames = 0  # that are final
        self._tokens: list[Tensor] = []
        self._final: list[int] = []  # ids of text
        self._hypothesis: list[int] | None = None
        self._written = ""
        self._delays: list[int] = []  # samples of the utterance, or after it, until each word was final

    @property
    def text(self) -> str:
        """All that is final."""
        return " ".join(filter(None, (self._past, self._written)))

    @torch.inference_mode()
    def feed(self, samples: np.ndarray | Tensor) -> str:
        """Takes the next samples.

        Args:
            samples: ``[S]`` floating, at the processor's sampling rate, full scale at 1.

        Returns:
            the text that became final; with what was before it, it makes up :attr:`text`.

        Raises:
            TypeError: samples that are not floating.
            ValueError: samples of another shape or not finite, or the stream has ended.
        """
        if self._over:
            raise ValueError("the stream has ended: another one takes another transcriber")
        if isinstance(samples, Tensor):
            samples = samples.detach().cpu().to(torch.float32 if samples.is_floating_point() else samples.dtype).numpy()
        if not isinstance(samples, np.ndarray) or samples.dtype.kind != "f":
            got = getattr(samples, "dtype", type(samples).__name__)
            raise TypeError(f"samples must be floating, full scale at 1, got {got}")
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
        """Ends the stream: the rest of its text.

        Raises:
            ValueError: all of the stream is shorter than a frame.
        """
        before = self.text
        if not self._over and (self._filled >= self.processor.shortest or not self._origin):
            self._end(self._filled)
        self._over = True
        return self.text[len(before) :]

    def _cut(self) -> None:
        """Ends the utterance at its quietest place, and begins the next one there."""
        place = self._uncut + quietest(self._buffer[self._uncut :], round(LEVEL_SECONDS * self.rate))
        rest = self._buffer[place:].copy()
        self._end(place)
        self._begin(rest)

    def _step(self) -> None:
        """A hypothesis from the frames that are final by now."""
        count = self._filled
        if count <= self._look_ahead:
            return
        frames = self._encode(count)
        final = len(frames) * (count - self._look_ahead) // count
        tokens = self._pool(frames[self._frames : final]).values
        self._frames = max(self._frames, final)
        if not len(tokens):  # the same hypothesis again would agree with itself
            return
        self._tokens.append(tokens)
        hypothesis = self._decode()
        if self._hypothesis is not None:
            self._final = _agreed(self._hypothesis, hypothesis, self._base.config.audio_token_id)
            self._write(over=False)
        self._hypothesis = hypothesis

    def _end(self, count: int) -> None:
        """All of the utterance, of so many samples, is final."""
        self._tokens.append(self._pool(self._encode(count)[self._frames :]).values)
        self._tokens.append(self._pool.flush().values)
        self._final = self._decode()
        self._write(over=True)
        if self._delays:
            self._laggings.append(average_lagging(self._delays, count) / self.rate)
        self._past, self._written = self.text, ""

    def _encode(self, count: int) -> Tensor:
        """Frames ``[F, D]`` of the first samples of the utterance."""
        features = self.processor.pad_features([self.processor.features(self._buffer[:count], self.rate)])
        frames, lengths = self._base.encode(*(t.to(self._base.device) for t in features.values()))
        return frames[0, : int(lengths)]

    def _decode(self) -> list[int]:
        """Ids of the text of all tokens, what is final first."""
        left = self._max_new_tokens - len(self._final)
        if left < 1:
            return self._final
        values = torch.cat(self._tokens)
        rows = torch.arange(len(values), device=values.device)
        pooled = Pooled(values, row_segments(rows, torch.ones_like(rows), len(values)))
        ids = torch.tensor([self._prompt + self._final], device=values.device)
        out = self.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), pooled=pooled, max_new_tokens=left, **self._generation
        )
        found = out[0, ids.shape[1] :].tolist()
        end = next((i for i, token in enumerate(found) if token in self._ends), len(found))
        return self._final + found[:end]

    def _write(self, over: bool) -> None:
        text = self.processor.tokenizer.decode(self._final, skip_special_tokens=True).strip()
        if not over:
            text = text.rstrip("\ufffd")  # a character of which bytes are missing
            if not text.startswith(self._written):  # a tokenizer that joins tokens otherwise when more follow
                return
        new = text[len(os.path.commonprefix([text, self._written])) :]
        if not new:
            return
        if self._first is None:
            self._first = self._heard
        if self._delays and not new[0].isspace():
            self._delays.pop()  # its last word goes on
        self._written += new
        self._delays += [self._heard - self._origin] * (len(self._written.split()) - len(self._delays))

    def latency(self) -> Latency:
        """Of what was streamed so far."""
        first = None if self._first is None else self._first / self.rate
        lagging = sum(self._laggings) / len(self._laggings) if self._laggings else None
        return Latency(self._heard / self.rate, first, lagging)


def average_lagging(delays: list[int], length: int) -> float:
    """Average lagging (Ma et al., 2019) of the words of an utterance of this length, in the unit of both.

    Args:
        delays: until each word was written, not decreasing, at least one.
        length: of the utterance.
    """
    last = next((i for i, delay in enumerate(delays) if delay >= length), len(delays) - 1)
    return sum(delay - i * length / len(delays) for i, delay in enumerate(delays[: last + 1])) / (last + 1)


def quietest(samples: np.ndarray, width: int) -> int:
    """The middle of the ``width`` consecutive samples, of ``[S]``, that have the least energy; of several the first."""
    energy = np.concatenate([[0.0], np.cumsum(samples.astype(np.float64) ** 2)])
    width = min(width, len(samples))
    return int((energy[width:] - energy[: len(energy) - width]).argmin()) + width // 2


def _check_compression(model: Any) -> None:
    """Raises where pooling frame by frame would be another compression than the model's."""
    if model.compressor is not None:
        name = type(model.compressor).__name__
        raise NotImplementedError(f"{name}, which compresses in place of a rule, cannot be streamed")
    if model.rule is None:
        return
    if model.config.keys != "frames":
        raise NotImplementedError(f"rule {model.rule} streams with keys 'frames' only, not {model.config.keys!r}")
    if model.config.reduce != "mean":
        raise NotImplementedError(f"rule {model.rule} streams with reduce 'mean' only, not {model.config.reduce!r}")


def _agreed(a: list[int], b: list[int], audio: int) -> list[int]:
    """The longest common prefix of ids, up to one that would stand for an audio, which a prompt cannot repeat."""
    count = 0
    while count < min(len(a), len(b)) and a[count] == b[count] != audio:
        count += 1
    return b[:count]

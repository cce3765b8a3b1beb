"""What each compression rule makes of an audio file: tokens, ratio, time, and where the segments lie.

:func:`inspect_audio` does the work of ``fastcompress inspect``. The frames that are compressed come from a
:class:`LogMel` or an :class:`Encoder`. Every rule also runs on white noise of the same length: local maxima compress
even noise about threefold, so a ratio says something about the audio only next to that of noise.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fastcompress import LocalMax, Rule, Segments, adjacent_distance, segment_pool
from fastcompress.audio import FRAME_RATE, SAMPLE_RATE, AudioError, Progress, load_audio, log_mel

# 0.15 and 0.4 were chosen on log-mel of 20 synthesised sentences (5 English voices, 140 to 200 words a minute) whose
# phone onsets are known. A prominence of 0.15 gives about a token a phone (12.9 a second for 12.3 phones); 80 % of its
# boundaries lie within 25 ms of an onset and 84 % of the onsets have one (plain local-max: 48 % and 94 %). A threshold
# of 0.4 gives as many tokens, for comparison, and reaches 69 % and 70 %: all frames of a transition exceed it.
LOG_MEL_RULES = (
    "uniform:2",
    "uniform:3",
    "uniform:4",
    "local-max",
    "local-max:prominence=0.15",
    "threshold:0.4",
)
# Distances of encoder output lie elsewhere and depend on the encoder. 0.15 is AdaTS's (merge at a cosine of 0.85).
ENCODER_RULES = ("uniform:2", "uniform:3", "uniform:4", "local-max", "local-max:threshold=0.15", "threshold:0.15")

_NOISE_LEVEL = 0.1  # RMS; log-mel distances do not depend on it
_NOISE_SEED = 0
_TIMED_CALLS = 5
_TIMED_SECONDS = 1.0  # no further timed call once a rule has used this much

StageProgress = Callable[[str, float, float], None]
"""Called with (what is being done, seconds of audio done, seconds of audio in all)."""


class EncoderError(ValueError):
    """An encoder that cannot be loaded or run; the message is one line and names the path and the cause."""


class FrameSource(Protocol):
    """Turns samples into the frames that the rules compress."""

    name: str
    sample_rate: int
    default_rules: tuple[str, ...]

    def frames(self, samples: np.ndarray, progress: Progress | None = None) -> tuple[Tensor, float]:
        """Frames ``[T, D]`` fp32 of samples ``[S]`` at `sample_rate`, and how many of them make a second."""


class LogMel:
    """Whisper's log-mel spectrogram with the mean of each band over the audio removed, 100 frames of 80 a second.

    The mean has to go because the cosine compares directions from an origin, and that of ``(log10(power) + 4) / 4`` is
    arbitrary: the same speech 20 dB louder has 0.5 added to every value, which moves the boundaries. With the mean
    removed, the distances depend neither on the level nor on the microphone's frequency response, and a prominence of
    0.15 finds 84 % of the phone onsets instead of 73 % (how measured: at `LOG_MEL_RULES`). Dividing by the standard
    deviation of each band as well made no difference.
    """

    name = "log-mel"
    sample_rate = SAMPLE_RATE
    default_rules: tuple[str, ...] = LOG_MEL_RULES

    def frames(self, samples: np.ndarray, progress: Progress | None = None) -> tuple[Tensor, float]:
        """Frames ``[S // 160, 80]`` fp32, and 100.0. Raises ValueError for less than 25 ms."""
        values = log_mel(samples, progress=progress)
        return values.sub_(values.mean(0)), FRAME_RATE


class Encoder:
    """Frames of a transformers audio encoder in a local folder (configuration, weights, feature extractor).

    The encoders are those of the reference model (:mod:`fastcompress.lalm.encoders`). Audio is encoded in pieces: the
    encoder's own window, or at most 30 s where it has none. The frames of padding after the last piece are dropped.

    Args:
        path: Folder that ``save_pretrained`` wrote, or a hub snapshot. Nothing is downloaded.

    Raises:
        EncoderError: The folder is missing, or holds no known audio encoder and its feature extractor.
        ModuleNotFoundError: transformers is not installed.
    """

    default_rules: tuple[str, ...] = ENCODER_RULES

    def __init__(self, path: str | os.PathLike[str]) -> None:
        from transformers import AutoFeatureExtractor

        from fastcompress.lalm.encoders import load_encoder

        self.path: str = os.fspath(path)
        if not os.path.isdir(self.path):
            raise EncoderError(f"{self.path}: no such folder; --encoder takes a local folder with a transformers model")
        try:
            self._extractor = AutoFeatureExtractor.from_pretrained(self.path, local_files_only=True)
            model: Any = load_encoder(self.path)
            self._model = model.float().eval()
        except Exception as error:  # transformers, safetensors and json have a dozen types for a bad folder
            raise EncoderError(f"{self.path}: not a transformers audio model ({_first_line(error)})") from error
        self.sample_rate: int = self._extractor.sampling_rate
        #: Samples of the encoder's fixed window; ``None``: it takes any length.
        self.window: int | None = getattr(self._extractor, "n_samples", None)
        self.name: str = f"{self._model.config.model_type} encoder {Path(self.path).resolve().name}"

    @torch.no_grad()
    def frames(self, samples: np.ndarray, progress: Progress | None = None) -> tuple[Tensor, float]:
        """Return the last hidden states ``[T, D]`` fp32 and their rate in frames per second.

        Raises:
            EncoderError: There are no samples, or the encoder refuses them.
        """
        count = len(samples)
        if count == 0:  # of a file that is shorter than a sample at this rate
            raise EncoderError("there is no audio: 0 samples")
        size = self.window
        if size is None:  # equal pieces: a short last one could be too short for the encoder
            size = math.ceil(count / math.ceil(count / (30 * self.sample_rate)))
        pieces = []
        encoded_seconds = 0.0
        for start in range(0, count, size):
            piece = samples[start : start + size]
            hidden = self._encode(piece)  # [n, D]
            window = size if self.window else len(piece)
            encoded_seconds += window / self.sample_rate
            rate = len(hidden) / (window / self.sample_rate)
            pieces.append(hidden[: max(1, round(len(piece) / self.sample_rate * rate))].clone())
            if progress:
                progress((start + len(piece)) / self.sample_rate, count / self.sample_rate)
        if self.window is None:
            rate = sum(map(len, pieces)) / encoded_seconds
        return torch.cat(pieces), rate

    def _encode(self, piece: np.ndarray) -> Tensor:
        from fastcompress.lalm.encoders import MASKED, encode

        try:
            inputs = self._extractor(piece, sampling_rate=self.sample_rate, return_tensors="pt")
            features = inputs[self._extractor.model_input_names[0]]
            if self._model.config.model_type in MASKED:  # their extractors give [1, T, bins]
                features = features.transpose(1, 2)
            frames, lengths = encode(self._model, features, None)
        except (ValueError, TypeError, RuntimeError, AttributeError) as error:
            seconds = len(piece) / self.sample_rate
            raise EncoderError(f"{self.path}: cannot encode {seconds:.2f} s of audio ({_first_line(error)})") from error
        return frames[0, : int(lengths[0])]


@dataclass(frozen=True)
class RuleResult:
    """One row of the table: a rule on one input. `milliseconds` is `segment_pool` itself, the median of a few calls."""

    rule: Rule
    on_noise: bool
    frames: int
    tokens: int
    seconds: float
    milliseconds: float
    segments: Segments

    @property
    def ratio(self) -> float:
        """Frames a token."""
        return self.frames / self.tokens if self.tokens else math.inf

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


@dataclass(frozen=True)
class Inspection:
    """All that is known of one audio file.

    Attributes:
        path: the file.
        seconds: its duration.
        source: name of the frames' source.
        frames: ``[T, D]`` fp32, what was compressed.
        frame_rate: frames a second.
        distance: ``[T]`` fp32, :func:`fastcompress.adjacent_distance` of the frames.
        peaks: ``[P]`` int64, rows that start a segment under ``LocalMax()``, the first row not among them.
        spectrogram: ``[S // 160, 80]`` fp32 log-mel at 100 frames a second, for the picture.
        results: two for each rule, audio and white noise; one without noise.
        notes: what the reader should know of this audio, a sentence each.
    """

    path: str
    seconds: float
    source: str
    frames: Tensor
    frame_rate: float
    distance: Tensor
    peaks: Tensor
    spectrogram: Tensor
    results: list[RuleResult]
    notes: list[str] = field(default_factory=list)


def inspect_audio(
    path: str | os.PathLike[str],
    rules: Iterable[Rule] | None = None,
    source: FrameSource | None = None,
    noise: bool = True,
    progress: StageProgress | None = None,
) -> Inspection:
    """Runs rules over one audio file, and over white noise of the same length.

    Args:
        path: an audio file.
        rules: default: ``source.default_rules``.
        source: where the frames come from; default :class:`LogMel`.
        noise: whether to run each rule on noise too.
        progress: called as reading and encoding go on.

    Raises:
        AudioError: the file cannot be read, or is shorter than a frame.
        EncoderError: the encoder cannot encode it.
    """
    path = os.fspath(path)
    source = source or LogMel()
    rules = [Rule.from_string(text) for text in source.default_rules] if rules is None else list(rules)

    def stage(name: str) -> Progress | None:
        return partial(progress, name) if progress else None

    samples = load_audio(path, source.sample_rate, stage("reading"))
    seconds = len(samples) / source.sample_rate
    notes = []
    if not samples.any():
        notes.append("silent: every sample is 0, so all frames are alike and distances show no boundary.")
    try:
        frames, frame_rate = source.frames(samples, stage("encoding"))
        # The picture shows log-mel whatever was compressed. The encoder's samples serve if they are at 16 kHz.
        if source.sample_rate != SAMPLE_RATE:
            samples = load_audio(path, SAMPLE_RATE)
        spectrogram = log_mel(samples)
    except EncoderError as error:
        raise EncoderError(f"{path}: {error}") from error
    except ValueError as error:
        raise AudioError(f"{path}: {error}") from error
    del samples
    results = [_run(rule, frames, seconds, on_noise=False) for rule in rules]
    if noise:
        noise_frames, _ = source.frames(white_noise(round(seconds * source.sample_rate)), stage("encoding white noise"))
        on_noise = [_run(rule, noise_frames, seconds, on_noise=True) for rule in rules]
        results = [result for pair in zip(results, on_noise, strict=True) for result in pair]
    return Inspection(
        path=path,
        seconds=seconds,
        source=source.name,
        frames=frames,
        frame_rate=frame_rate,
        distance=adjacent_distance(frames),
        peaks=segment_pool(frames, rule=LocalMax()).segments.starts[1:],
        spectrogram=spectrogram,
        results=results,
        notes=notes,
    )


def white_noise(count: int) -> np.ndarray:
    """Gaussian white noise, float32 ``[count]``, the same on every call."""
    samples = np.random.default_rng(_NOISE_SEED).standard_normal(count, dtype=np.float32)
    samples *= _NOISE_LEVEL  # in place: an hour is 230 MB
    return samples


def _run(rule: Rule, frames: Tensor, seconds: float, on_noise: bool) -> RuleResult:
    pooled = segment_pool(frames, rule=rule)  # also the warm-up of the timed calls
    times: list[float] = []
    while not times or (len(times) < _TIMED_CALLS and sum(times) < _TIMED_SECONDS):
        begin = time.perf_counter()
        segment_pool(frames, rule=rule)
        times.append(time.perf_counter() - begin)
    return RuleResult(
        rule=rule,
        on_noise=on_noise,
        frames=len(frames),
        tokens=len(pooled.values),
        seconds=seconds,
        milliseconds=1000 * float(np.median(times)),
        segments=pooled.segments,
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


NOISE_LABEL = "  on white noise"


def format_table(inspection: Inspection) -> str:
    """The inspection as plain text: a heading, one aligned row a result, notes. No trailing newline."""
    from tabulate import tabulate

    header = ("rule", "frames", "tokens", "ratio", "tokens/s", "ms")
    rows = [
        (
            NOISE_LABEL if result.on_noise else str(result.rule),
            f"{result.frames}",
            f"{result.tokens}",
            f"{result.ratio:.2f}",
            f"{result.tokens_per_second:.1f}",
            f"{result.milliseconds:.2f}",
        )
        for result in inspection.results
    ]
    table = tabulate(
        rows, header, "plain", colalign=("left", *["right"] * 5), disable_numparse=True, preserve_whitespace=True
    )
    return "\n".join([heading(inspection), table, *(f"note: {note}" for note in inspection.notes)])


def heading(inspection: Inspection) -> str:
    """One line: file, duration, what the frames are."""
    count, width = inspection.frames.shape
    return (
        f"{inspection.path}: {inspection.seconds:.2f} s, {inspection.source}, "
        f"{count} frames of {width} at {inspection.frame_rate:.4g} a second"
    )


def to_dict(inspection: Inspection) -> dict[str, Any]:
    """The inspection as plain data for JSON: the table, and for the audio's own rows the segments in seconds."""
    rows = []
    for result in inspection.results:
        row: dict[str, Any] = {
            "rule": str(result.rule),
            "input": "white noise" if result.on_noise else "audio",
            "frames": result.frames,
            "tokens": result.tokens,
            "ratio": result.frames / result.tokens if result.tokens else None,
            "tokens_per_second": result.tokens_per_second,
            "milliseconds": result.milliseconds,
        }
        if not result.on_noise:
            row["segments_seconds"] = result.segments.seconds(inspection.frame_rate).tolist()
        rows.append(row)
    return {
        "path": inspection.path,
        "seconds": inspection.seconds,
        "source": inspection.source,
        "frame_rate": inspection.frame_rate,
        "frame_width": inspection.frames.shape[1],
        "notes": inspection.notes,
        "results": rows,
    }

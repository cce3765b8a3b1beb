"""Measure compression rules on an audio file: tokens, ratio, time and segments.

``inspect_audio`` implements ``fastcompress inspect``. The frames come from a ``LogMel`` or an
``Encoder``. Every rule also runs on white noise of the same length as a baseline, because local maxima compress
even noise about 3x.
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

# The values 0.15 and 0.4 were tuned on log-mel frames of 20 synthesized sentences with known phone onsets (5 English
# voices, 140 to 200 words per minute). Matches are within 25 ms:
#
#     rule                       tokens/s   boundaries near an onset   onsets near a boundary
#     local-max                                      48 %                      94 %
#     local-max:prominence=0.15    12.9              80 %                      84 %
#     threshold:0.4                as many           69 %                      70 %
#
# The sentences have 12.3 phones per second. The threshold is worse because all frames of a transition exceed it.
LOG_MEL_RULES = (
    "uniform:2",
    "uniform:3",
    "uniform:4",
    "local-max",
    "local-max:prominence=0.15",
    "threshold:0.4",
)
# Distances of encoder frames have another range, which depends on the encoder. AdaTS merges at a cosine of 0.85, which
# is a distance of 0.15.
ENCODER_RULES = ("uniform:2", "uniform:3", "uniform:4", "local-max", "local-max:threshold=0.15", "threshold:0.15")

_NOISE_LEVEL = 0.1  # RMS; log-mel distances do not depend on the level
_NOISE_SEED = 0
_TIMED_CALLS = 5
_TIMED_SECONDS = 1.0  # no further timed call once a rule has used this much

StageProgress = Callable[[str, float, float], None]
"""Function called with the name of the stage, the seconds of audio processed and the seconds of audio in total."""


class EncoderError(ValueError):
    """An encoder cannot be loaded or run. The message is one line with the path and the cause."""


class FrameSource(Protocol):
    """Compute the frames that the rules compress."""

    name: str
    sample_rate: int
    default_rules: tuple[str, ...]

    def frames(self, samples: np.ndarray, progress: Progress | None = None) -> tuple[Tensor, float]:
        """Return the frames ``[T, D]`` fp32 of samples ``[S]`` at ``sample_rate``, and their rate per second."""


class LogMel:
    """Compute Whisper's log-mel spectrogram, 100 frames per second of 80 bands, and subtract each band's mean.

    Cosine distance depends on the origin, which is arbitrary for ``(log10(power) + 4) / 4``: speech that is 20 dB
    louder has 0.5 added to every value, which moves boundaries. Without the mean, distances depend neither on the level
    nor on the microphone's frequency response, and a prominence of 0.15 finds 84 % of the phone onsets instead of 73 %
    (measured as at ``LOG_MEL_RULES``). Dividing by each band's standard deviation as well made no difference.
    """

    name = "log-mel"
    sample_rate = SAMPLE_RATE
    default_rules: tuple[str, ...] = LOG_MEL_RULES

    def frames(self, samples: np.ndarray, progress: Progress | None = None) -> tuple[Tensor, float]:
        """Return frames ``[S // 160, 80]`` fp32 and their rate, 100 per second.

        Raises:
            ValueError: The samples are shorter than 25 ms.
        """
        values = log_mel(samples, progress=progress)
        return values.sub_(values.mean(0)), FRAME_RATE


class Encoder:
    """Compute frames with a transformers audio encoder from a local folder.

    The folder has the configuration, the weights and the feature extractor of an encoder that
    ``fastcompress.lalm.encoders`` supports. Audio is encoded in pieces of the encoder's window, or of at most 30 s
    if it has none. The frames of padding after the last piece are dropped.

    Args:
        path: Folder that ``save_pretrained`` wrote, or a hub snapshot. Nothing is downloaded.

    Raises:
        EncoderError: The folder does not exist, or has no supported encoder with its feature extractor.
        ModuleNotFoundError: transformers is not installed.
    """

    default_rules: tuple[str, ...] = ENCODER_RULES

    def __init__(self, path: str | os.PathLike[str]) -> None:
        from transformers import AutoFeatureExtractor

        from fastcompress.lalm.encoders import load_encoder

        self.path: str = os.fspath(path)
        if not os.path.isdir(self.path):
            raise EncoderError(f"{self.path}: no such folder; --encoder needs a local folder with a transformers model")
        try:
            self._extractor = AutoFeatureExtractor.from_pretrained(self.path, local_files_only=True)
            model: Any = load_encoder(self.path)
            self._model = model.float().eval()
        except Exception as error:  # for a bad folder, transformers, safetensors and json raise errors of many types
            raise EncoderError(f"{self.path}: cannot load a transformers encoder ({first_line(error)})") from error
        self.sample_rate: int = self._extractor.sampling_rate
        #: Length of the encoder's window in samples; ``None``: the encoder takes any length.
        self.window: int | None = getattr(self._extractor, "n_samples", None)
        self.name: str = f"{self._model.config.model_type} encoder {Path(self.path).resolve().name}"

    @torch.no_grad()
    def frames(self, samples: np.ndarray, progress: Progress | None = None) -> tuple[Tensor, float]:
        """Return the last hidden states ``[T, D]`` fp32 and their rate in frames per second.

        Raises:
            EncoderError: There are no samples, or the encoder cannot encode them.
        """
        count = len(samples)
        if count == 0:  # resampling can leave no sample of a very short file
            raise EncoderError("the audio is empty: 0 samples")
        size = self.window
        if size is None:  # pieces of equal length, because a short last piece could be too short for the encoder
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
            if self._model.config.model_type in MASKED:  # extractors of these return [1, T, bins]
                features = features.transpose(1, 2)
            frames, lengths = encode(self._model, features, None)
        except (ValueError, TypeError, RuntimeError, AttributeError) as error:
            seconds = len(piece) / self.sample_rate
            raise EncoderError(f"{self.path}: cannot encode {seconds:.2f} s of audio ({first_line(error)})") from error
        return frames[0, : int(lengths[0])]


@dataclass(frozen=True)
class RuleResult:
    """One row of the table: the result of a rule on the audio or on white noise.

    Attributes:
        rule: The rule.
        on_noise: Whether the input is white noise.
        frames: Number of frames.
        tokens: Number of tokens.
        seconds: Duration of the input.
        milliseconds: Time of ``fastcompress.segment_pool``, the median of a few calls.
        segments: The segments.
    """

    rule: Rule
    on_noise: bool
    frames: int
    tokens: int
    seconds: float
    milliseconds: float
    segments: Segments

    @property
    def ratio(self) -> float:
        """Frames per token."""
        return self.frames / self.tokens if self.tokens else math.inf

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second of audio."""
        return self.tokens / self.seconds


@dataclass(frozen=True)
class Inspection:
    """Inspection of one audio file.

    Attributes:
        path: Path of the file.
        seconds: Duration of the audio.
        source: Name of the source of the frames.
        frames: Frames that were compressed, ``[T, D]`` fp32.
        frame_rate: Frames per second.
        distance: ``fastcompress.adjacent_distance`` of the frames, ``[T]`` fp32.
        peaks: Frames that start a segment under ``LocalMax()``, except frame 0, ``[P]`` int64.
        spectrogram: Log-mel spectrogram for the picture, ``[S // 160, 80]`` fp32, 100 frames per second.
        results: Results of each rule on the audio and, unless disabled, on white noise.
        notes: Remarks about the audio, one sentence each.
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
    """Run rules on an audio file and on white noise of the same length.

    Args:
        path: Audio file.
        rules: Rules to run; ``None``: ``source.default_rules``.
        source: Source of the frames; ``None``: ``LogMel``.
        noise: Whether to run each rule on white noise, too.
        progress: Function that is called during reading and encoding.

    Returns:
        The inspection.

    Raises:
        AudioError: The file cannot be read, or is shorter than one frame.
        EncoderError: The encoder cannot encode the audio.
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
        notes.append("silent: every sample is 0, so all frames are equal and rules on distances find no boundary.")
    try:
        frames, frame_rate = source.frames(samples, stage("encoding"))
        # The picture always shows log-mel, which needs samples at 16 kHz.
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
    """Return Gaussian white noise, ``[count]`` fp32, which is the same in every call."""
    samples = np.random.default_rng(_NOISE_SEED).standard_normal(count, dtype=np.float32)
    samples *= _NOISE_LEVEL  # in place, because an hour takes 230 MB
    return samples


def _run(rule: Rule, frames: Tensor, seconds: float, on_noise: bool) -> RuleResult:
    pooled = segment_pool(frames, rule=rule)  # also warms up for the timed calls
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


def first_line(error: Exception) -> str:
    """Return the first line of an error's message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


NOISE_LABEL = "  on white noise"


def format_table(inspection: Inspection) -> str:
    """Return the inspection as text: a heading, a table with one row per result, and notes. No trailing newline."""
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
    """Return one line with the file, its duration and the kind of frames."""
    count, width = inspection.frames.shape
    return (
        f"{inspection.path}: {inspection.seconds:.2f} s, {inspection.source}, "
        f"{count} frames of width {width} at {inspection.frame_rate:.4g} per second"
    )


def to_dict(inspection: Inspection) -> dict[str, Any]:
    """Return the inspection as plain data for JSON; rows on the audio also have their segments in seconds."""
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

"""Manifests: one utterance per line, as JSON.

A line has ``audio_filepath`` (relative to the manifest's folder), ``duration`` in seconds and ``text``, the words that
are said. Optional are ``target`` (the answer, if it is not the text, such as a translation), ``prompt``, ``phones``
(units of an auxiliary loss) and ``offset`` (seconds into the file, where ``duration`` starts). Other keys are kept. A
line without ``audio_filepath`` is text alone: a prompt and a target.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fastcompress.audio import AudioError, audio_seconds, load_audio
from fastcompress.files import write_file

#: Shortest audio in seconds that gives an encoder a frame.
SHORTEST = 0.025
_ROUNDING = 0.1  # a duration that is shorter than its file by less than this, in seconds, does not cut it
_TOO_LONG = 1e9  # seconds: longer than any audio, and the samples can still be counted


class ManifestError(ValueError):
    """A manifest that cannot be used. The message is one line, ``file:line: reason``."""


@dataclass(frozen=True)
class Utterance:
    """A line of a manifest.

    Attributes:
        audio_filepath: Path of the audio. ``None``: text alone.
        text: Words that are said.
        target: Text that the model learns to write.
        duration: Seconds. ``None``: unknown.
        offset: Start in the file, in seconds. ``None``: unknown, and a duration of about the file's does not cut it.
        prompt: Instruction.
        phones: Phones, separated by spaces. ``None``: unknown.
        samples: Samples and their sampling rate in Hz, in place of a file.
        more: Other keys of the line.
    """

    audio_filepath: Path | None
    text: str
    target: str
    duration: float | None = None
    offset: float | None = None
    prompt: str | None = None
    phones: str | None = None
    samples: tuple[np.ndarray, int] | None = None
    more: dict[str, Any] = field(default_factory=dict)

    @property
    def has_audio(self) -> bool:
        """True if there is audio beside the text."""
        return self.audio_filepath is not None or self.samples is not None

    @property
    def name(self) -> str:
        """Name of the utterance in messages."""
        return str(self.audio_filepath) if self.audio_filepath is not None else f"the utterance {self.text!r}"


_TYPES: dict[str, tuple[type, ...]] = {
    "audio_filepath": (str,),
    "text": (str,),
    "target": (str,),
    "prompt": (str,),
    "phones": (str,),
    "duration": (int, float),
    "offset": (int, float),
}


def read_manifest(path: str | Path) -> list[Utterance]:
    """Read the utterances of a manifest. ``check_audio`` checks their audio.

    Raises:
        ManifestError: It cannot be read or is empty, or a line is not a JSON object, lacks a key or has a wrong value.
    """
    path = Path(path)
    try:
        # Not splitlines: it also splits at characters such as U+2028, which JSON strings can have.
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a path with a 0
        reason = error.strerror.lower() if isinstance(error, OSError) and error.strerror else str(error)
        raise ManifestError(f"{path}: {reason}") from error
    utterances = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            utterances.append(_parse(line, path.parent))
        except ValueError as error:
            raise ManifestError(f"{path}:{number}: {error}") from error
    if not utterances:
        raise ManifestError(f"{path}: has no utterance")
    return utterances


def _parse(line: str, folder: Path) -> Utterance:
    try:
        values = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at column {error.colno})") from error
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if "\\u" in line:  # half of a surrogate pair cannot be encoded
        try:
            json.dumps(values, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(f"holds {error.object[error.start : error.end]!r}, which is not a character") from error
    if not isinstance(values, dict):
        raise ValueError(f"must be an object, got {type(values).__name__}")
    values = {key: value for key, value in values.items() if value is not None}
    for key, types in _TYPES.items():
        if key in values and (not isinstance(values[key], types) or isinstance(values[key], bool)):
            raise ValueError(f"{key} must be {types[-1].__name__}, got {values[key]!r}")
    for key in ("duration", "offset"):
        if not 0 <= values.get(key, 0) < _TOO_LONG:
            raise ValueError(f"{key} must be a number of seconds, got {values[key]!r}")
    if "\0" in values.get("audio_filepath", ""):
        raise ValueError(f"audio_filepath must be a path, got {values['audio_filepath']!r}")
    if not values.get("target", values.get("text")):
        raise ValueError("has neither text nor target")
    known = {key: values.pop(key) for key in list(_TYPES) if key in values}
    audio = known.pop("audio_filepath", None)
    text = known.pop("text", known.get("target"))
    return Utterance(
        audio_filepath=None if audio is None else folder / audio,
        text=text,
        target=known.pop("target", text),
        more=values,
        **known,
    )


def write_manifest(path: Path, utterances: Iterable[Utterance]) -> None:
    """Write a manifest, whole or not at all. Paths below its folder become relative, others absolute.

    Raises:
        ManifestError: An utterance has samples, which a manifest cannot hold.
    """
    folder = path.parent.absolute()  # not abspath, which follows .. past links
    lines = []
    for u in utterances:
        if u.samples is not None:
            raise ManifestError(f"{path}: {u.name} has samples, which a manifest cannot hold; set `audio_filepath`")
        values: dict[str, Any] = {}
        if u.audio_filepath is not None:
            audio = u.audio_filepath.absolute()
            below = audio.is_relative_to(folder)
            values["audio_filepath"] = (audio.relative_to(folder) if below else audio).as_posix()
        values |= {"duration": u.duration, "offset": u.offset, "text": u.text}
        values |= {"target": None if u.target == u.text else u.target, "prompt": u.prompt, "phones": u.phones, **u.more}
        lines.append(json.dumps({k: v for k, v in values.items() if v is not None}, ensure_ascii=False))
    write_file(path, "".join(f"{line}\n" for line in lines))


def load_utterance(utterance: Utterance, sample_rate: int) -> np.ndarray:
    """Load the samples from ``offset`` to ``offset + duration``, float32 ``[S]``. No others are decoded.

    Raises:
        AudioError: The audio cannot be used, or is shorter than a frame.
    """
    offset, duration = utterance.offset or 0.0, utterance.duration
    if utterance.samples is not None:
        samples, rate = utterance.samples
        samples = np.asarray(samples, np.float32)
        if samples.ndim != 1 or not np.isfinite(samples).all():
            raise AudioError(f"{utterance.name}: samples must be [S] and finite, got shape {list(samples.shape)}")
        if rate != sample_rate:
            import soxr

            samples = soxr.resample(samples, rate, sample_rate, quality="HQ")
        samples = samples[round(offset * sample_rate) :]
    else:
        assert utterance.audio_filepath is not None
        more = None if duration is None else duration + 2 * _ROUNDING  # enough to see whether the file is longer
        samples = load_audio(utterance.audio_filepath, sample_rate, offset=offset, duration=more)
    if duration is not None and _cuts(utterance, len(samples) / sample_rate):
        samples = samples[: round(duration * sample_rate)]
    if len(samples) < SHORTEST * sample_rate:
        raise AudioError(
            f"{utterance.name}: has {len(samples) / sample_rate:.3f} s of audio after {offset:g} s, less than one "
            f"frame of {SHORTEST} s"
        )
    return samples


def _cuts(utterance: Utterance, left: float) -> bool:
    """Return True if the duration cuts the audio, which has ``left`` seconds after the offset."""
    if utterance.duration is None:
        return False
    return utterance.offset is not None or left > utterance.duration + _ROUNDING


def check_audio(
    utterances: Sequence[Utterance], max_seconds: float = math.inf
) -> tuple[list[Utterance], list[tuple[Utterance, str]]]:
    """Split utterances into those with usable audio, with their durations, and the others, with the reason.

    Only headers are read: damage inside a file shows when it is decoded.
    """
    lengths: dict[Path, float] = {}  # many segments may lie in one long recording
    good: list[Utterance] = []
    skipped: list[tuple[Utterance, str]] = []
    for u in utterances:
        try:
            left = None
            if u.samples is not None:
                left = len(u.samples[0]) / u.samples[1] - (u.offset or 0.0)
            elif u.audio_filepath is not None:
                if not u.audio_filepath.is_file():
                    raise AudioError("no such file")
                if u.audio_filepath not in lengths:
                    lengths[u.audio_filepath] = audio_seconds(u.audio_filepath)
                left = lengths[u.audio_filepath] - (u.offset or 0.0)
            if left is not None:
                seconds = min(u.duration, left) if u.duration is not None and _cuts(u, left) else left
                if not SHORTEST <= seconds <= max_seconds:
                    raise AudioError(f"{seconds:.3f} s, not between {SHORTEST:g} and {max_seconds:g}")
                u = Utterance(**(vars(u) | {"duration": seconds}))
            good.append(u)
        except AudioError as error:
            skipped.append((u, str(error).removeprefix(f"{u.audio_filepath}: ")))
        except OSError as error:  # a name that is too long, a folder without permission
            skipped.append((u, (error.strerror or str(error)).lower()))
    return good, skipped


def format_skipped(skipped: Sequence[tuple[Utterance, str]], most: int = 5) -> str:
    """Format a line with the number of skipped utterances, and one for each of the first."""
    lines = [f"skipped {len(skipped)} utterances:"]
    lines += [f"  {u.name}: {reason}" for u, reason in skipped[:most]]
    if len(skipped) > most:
        lines.append(f"  ... and {len(skipped) - most} more")
    return "\n".join(lines)


def from_hf_dataset(
    dataset: Any,
    audio_column: str = "audio",
    text_column: str = "text",
    target_column: str | None = None,
    prompt: str | None = None,
) -> list[Utterance]:
    """Make utterances of a Hugging Face dataset, which must be indexable (``datasets.load_dataset`` without streaming).

    Args:
        dataset: Rows with an audio ``{"array": [S], "sampling_rate": Hz}`` or ``{"path": file}``.
        audio_column: Name of the column of the audio.
        text_column: Name of the column of the text.
        target_column: Name of the column of the target. ``None``: the text.
        prompt: Instruction of all utterances.

    Raises:
        ManifestError: A row lacks a column, or its audio has neither array nor path.
    """
    utterances = []
    for number in range(len(dataset)):
        row = dataset[number]
        for column in filter(None, (audio_column, text_column, target_column)):
            if column not in row:
                raise ManifestError(f"row {number} has no column {column!r}, only {', '.join(map(repr, row))}")
        audio, text = row[audio_column], row[text_column]
        target = row[target_column] if target_column else text
        samples = _samples_of(audio, f"row {number}: {audio_column}")
        path = audio.get("path") if isinstance(audio, Mapping) else audio
        if samples is not None:
            seconds = len(samples[0]) / samples[1]
            utterances.append(Utterance(None, text, target, seconds, prompt=prompt, samples=samples))
        elif isinstance(path, (str, Path)):
            utterances.append(Utterance(Path(path), text, target, prompt=prompt))
        else:
            raise ManifestError(f"row {number}: {audio_column} has neither array nor path")
    return utterances


def _samples_of(audio: Any, name: str) -> tuple[np.ndarray, int] | None:
    """Return ``"array"`` and ``"sampling_rate"`` of an object that has them, which need not be a mapping."""
    if isinstance(audio, (str, Path)):
        return None
    try:
        array = audio["array"]
    except (KeyError, TypeError, IndexError):
        return None
    if array is None:  # there can be a path
        return None
    try:
        samples, rate = np.asarray(array, np.float32), audio["sampling_rate"]
    except (KeyError, TypeError, ValueError) as error:
        raise ManifestError(f"{name} needs an array of numbers and a sampling_rate: {error!r}") from None
    # A column of integers with missing values is a column of floats.
    whole = isinstance(rate, (int, float, np.integer)) and not isinstance(rate, bool) and rate > 0 and rate % 1 == 0
    if samples.ndim != 1 or not whole:
        shape = list(samples.shape)
        raise ManifestError(f"{name} must be an array [S] at a positive sampling_rate, got {shape} at {rate!r}")
    return samples, int(rate)

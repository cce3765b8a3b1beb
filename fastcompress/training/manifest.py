"""Manifests: one utterance per line, as JSON, or a JSON array of them.

An utterance has ``audio_filepath`` (relative to the manifest's folder), ``duration`` in seconds and ``text``, the
spoken words. Optional keys are ``target`` (the answer, if it is not the text, such as a translation), ``prompt``,
``phones`` (units of an auxiliary loss) and ``offset`` (seconds into the file, where ``duration`` starts). Other keys
are kept. Other common names of the audio and the text are read, too (``AUDIO_KEYS``, ``TEXT_KEYS``). An utterance
without audio has only text: a prompt and a target.
"""

from __future__ import annotations

import codecs
import difflib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fastcompress.audio import float_samples
from fastcompress.files import reason

#: Names of the audio's path: ours, and those of datasets, NeMo, ms-swift, the audio folders of Hugging Face, ...
AUDIO_KEYS = (
    "audio_filepath", "audio", "audio_file", "audio_filename", "audio_path", "audios", "file", "file_name", "file_path",
    "filename", "filepath", "path", "sound", "wav", "wav_file", "wav_filename", "wav_path",
)  # fmt: skip
#: Names of the spoken words: ours, and those of Common Voice and others.
TEXT_KEYS = ("text", "sentence", "transcript", "transcription")

_AUDIO_SUFFIXES = (".aac", ".aif", ".aiff", ".flac", ".m4a", ".mp3", ".mp4", ".oga", ".ogg", ".opus", ".wav", ".webm")
_SEGMENT_KEYS = ("start", "end", "start_time", "end_time", "begin", "start_offset")  # of manifests that cut otherwise
_TOO_LONG = 1e9  # seconds: longer than any audio, and the samples can still be counted
_BYTE_ORDER_MARKS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))


class ManifestError(ValueError):
    """A manifest cannot be used. The message is one line, ``file:line: reason``."""


@dataclass(frozen=True)
class Utterance:
    """An utterance of a manifest.

    Attributes:
        audio_filepath: Path of the audio. ``None``: there is only text, or ``samples`` or ``encoded``.
        text: Spoken words.
        target: Text that the model learns to write.
        duration: Seconds. ``None``: unknown.
        offset: Start in the file, in seconds. ``None``: unknown, and a duration of about the file's does not cut it.
        prompt: Instruction.
        phones: Phones, separated by spaces. ``None``: unknown.
        samples: Samples and their sampling rate in Hz, in place of a file.
        encoded: Content of an audio file, in place of a file.
        more: Other keys.
        source: Source of the utterance for messages, such as ``m.jsonl:3``.
    """

    audio_filepath: Path | None
    text: str
    target: str
    duration: float | None = None
    offset: float | None = None
    prompt: str | None = None
    phones: str | None = None
    samples: tuple[np.ndarray, int] | None = None
    encoded: bytes | None = field(default=None, repr=False)
    more: dict[str, Any] = field(default_factory=dict)
    source: str = field(default="", compare=False)

    @property
    def has_audio(self) -> bool:
        """Whether there is audio in addition to the text."""
        return self.audio_filepath is not None or self.samples is not None or self.encoded is not None

    @property
    def name(self) -> str:
        """Name of the utterance in messages."""
        if self.audio_filepath is not None:
            return str(self.audio_filepath)
        return self.source or f"the utterance {self.text!r}"


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
    """Read the utterances of a manifest. ``fastcompress.training.usable`` checks their audio.

    Raises:
        ManifestError: It cannot be read or is empty, or an utterance is not a JSON object, lacks a key, names its audio
            or text twice, or has a wrong value.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
        encoding = next((name for mark, name in _BYTE_ORDER_MARKS if content.startswith(mark)), "utf-8")
        text = content.decode(encoding)
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a path with a 0
        raise ManifestError(f"{path}: {reason(error)}") from error
    utterances = []
    for source, values in _items(path, text):
        try:
            utterances.append(_parse(values, path.parent, source))
        except ValueError as error:
            raise ManifestError(f"{source}: {error}") from error
    if not utterances:
        raise ManifestError(f"{path}: has no utterance")
    return utterances


def _items(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    """Yield the items of an array, or of lines, and their places in the file."""
    if text.lstrip()[:1] == "[":
        for number, item in enumerate(_json(text, str(path)), start=1):
            yield f"{path}: item {number}", item
        return
    # Not splitlines: it also splits at characters such as U+2028, which JSON strings can have.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield f"{path}:{number}", _json(line, f"{path}:{number}")


def _json(text: str, source: str) -> Any:
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise ManifestError(f"{source}: not JSON ({error.msg} at {line}column {error.colno})") from error
    except (RecursionError, ValueError) as error:  # ValueError: a number of too many digits
        why = "nested too deeply" if isinstance(error, RecursionError) else reason(error)
        raise ManifestError(f"{source}: {why}") from error
    if "\\u" in text:  # half of a surrogate pair cannot be encoded
        try:
            json.dumps(values, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError as error:
            wrong = error.object[error.start : error.end]
            raise ManifestError(f"{source}: contains {wrong!r}, which is not a character") from error
    return values


def _parse(item: Any, folder: Path, source: str) -> Utterance:
    if not isinstance(item, dict):
        raise ValueError(f"must be an object, got {type(item).__name__}")
    values = {key: value for key, value in item.items() if value is not None}
    for key in AUDIO_KEYS:
        if key in values:
            values[key] = _path_of(values[key], key)
    for keys in (AUDIO_KEYS, TEXT_KEYS):
        _rename(values, keys)
    for key, types in _TYPES.items():
        if key in values and (not isinstance(values[key], types) or isinstance(values[key], bool)):
            raise ValueError(f"{key} must be {types[-1].__name__}, got {values[key]!r}")
    for key in ("duration", "offset"):
        if not 0 <= values.get(key, 0) < _TOO_LONG:
            raise ValueError(f"{key} must be a number of seconds, got {values[key]!r}")
    if "\0" in values.get("audio_filepath", ""):
        raise ValueError(f"audio_filepath must be a path, got {values['audio_filepath']!r}")
    if "text" not in values and "target" not in values:
        raise ValueError(f"has neither text nor target{_others(item)}")
    known = {key: values.pop(key) for key in list(_TYPES) if key in values}
    audio = known.pop("audio_filepath", None)
    if audio is None:
        _refuse_audio_under_other_keys(values)
    text = known.pop("text", known.get("target"))
    return Utterance(
        audio_filepath=None if audio is None else folder / audio,
        text=text,
        target=known.pop("target", text),
        more=values,
        source=source,
        **known,
    )


def _rename(values: dict[str, Any], keys: Sequence[str]) -> None:
    """Rename a value with one of the names ``keys`` to the first of them."""
    found = [key for key in keys if key in values]
    for key in found[1:]:
        if values[key] != values[found[0]]:
            raise ValueError(f"{found[0]} and {key} differ: keep the one to be read")
    if found:
        values[keys[0]] = [values.pop(key) for key in found][0]


def _path_of(value: Any, key: str) -> str:
    """Return the path in a value, which may also be a list of one path or an object of ``datasets`` with a path."""
    audio = value[0] if isinstance(value, list) and len(value) == 1 else value
    if isinstance(audio, dict) and isinstance(audio.get("path"), str):
        audio = audio["path"]
    if not isinstance(audio, str):
        raise ValueError(f"{key} must be str, got {value!r}")
    return audio


def _refuse_audio_under_other_keys(more: Mapping[str, Any]) -> None:
    for key, value in more.items():
        if isinstance(value, str) and value.lower().endswith(_AUDIO_SUFFIXES):
            raise ValueError(f"has no audio_filepath, but {key} is {value!r}: rename the key, or remove it")


def _others(values: Mapping[str, Any]) -> str:
    """Return the existing keys, and the most similar one, for messages."""
    if not values:
        return ""
    near = [(key, name) for name in ("text", "target") for key in difflib.get_close_matches(name, values, n=1)]
    return f", only {', '.join(values)}" + (f"; rename {near[0][0]} to {near[0][1]}" if near else "")


def warnings_of(utterances: Sequence[Utterance]) -> list[str]:
    """Return what is unusual about a manifest as a whole, one line each: audio or segments may be under other keys."""
    found = []
    if not any(u.has_audio for u in utterances):
        found.append(f"none of the {len(utterances)} utterances has audio: audio_filepath is missing")
    cut = {key: None for u in utterances if u.has_audio and u.offset is None for key in _SEGMENT_KEYS if key in u.more}
    if cut:
        found.append(f"{', '.join(cut)} are not read: a segment has offset and duration, in seconds")
    return found


def from_hf_dataset(
    dataset: Any,
    audio_column: str = "audio",
    text_column: str = "text",
    target_column: str | None = None,
    prompt: str | None = None,
) -> list[Utterance]:
    """Make utterances of a Hugging Face dataset, which must be indexable (``datasets.load_dataset`` without streaming).

    Args:
        dataset: Rows with an audio: ``{"array": [S], "sampling_rate": Hz}``, ``{"path": file}``, or, as
            ``datasets.Audio(decode=False)`` returns it, ``{"bytes": content of a file, "path": its name}``. Integer
            samples are scaled (``fastcompress.audio.float_samples``).
        audio_column: Name of the column of the audio.
        text_column: Name of the column of the text.
        target_column: Name of the column of the target. ``None``: the text.
        prompt: Instruction of all utterances.

    Raises:
        ManifestError: A row lacks a column or its text, or its audio has neither array, bytes nor path.
    """
    utterances = []
    for number in range(len(dataset)):
        row, source = dataset[number], f"row {number}"
        for column in filter(None, (audio_column, text_column, target_column)):
            if column not in row:
                raise ManifestError(f"{source} has no column {column!r}, only {', '.join(map(repr, row))}")
        audio, text = row[audio_column], row[text_column]
        target = row[target_column] if target_column else text
        for name, value in ((text_column, text), (target_column, target)):
            if not isinstance(value, str):
                raise ManifestError(f"{source}: {name} must be text, got {value!r}")
        samples = _samples_of(audio, f"{source}: {audio_column}")
        found = audio if isinstance(audio, Mapping) else {"path": audio}
        encoded, path = found.get("bytes"), found.get("path")
        kept: dict[str, Any] = {"prompt": prompt, "source": source}
        if samples is not None:
            seconds = len(samples[0]) / samples[1]
            utterances.append(Utterance(None, text, target, seconds, samples=samples, **kept))
        elif isinstance(encoded, bytes):
            kept["source"] = f"{source} ({path})" if path else source
            utterances.append(Utterance(None, text, target, encoded=encoded, **kept))
        elif isinstance(path, (str, Path)):
            utterances.append(Utterance(Path(path), text, target, **kept))
        else:
            raise ManifestError(f"{source}: {audio_column} has neither array, bytes nor path")
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
        values, rate = np.asarray(array), audio["sampling_rate"]
        samples = float_samples(values)
    except (KeyError, TypeError, ValueError) as error:
        raise ManifestError(f"{name} needs an array of numbers and a sampling_rate: {error!r}") from None
    # A column of integers with missing values is a column of floats.
    whole = isinstance(rate, (int, float, np.integer)) and not isinstance(rate, bool) and rate > 0 and rate % 1 == 0
    if samples.ndim != 1 or not whole or not math.isfinite(rate):
        shape = list(samples.shape)
        raise ManifestError(f"{name} must be an array [S] at a positive sampling_rate, got {shape} at {rate!r}")
    return samples, int(rate)

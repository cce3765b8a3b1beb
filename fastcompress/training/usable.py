"""Find the usable utterances of a manifest, and load the audio of an utterance.

All commands that read manifests or audio share ``Skipped``, which counts the other utterances, and lists them on stderr
and in ``skipped.txt``.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from fastcompress.audio import AudioError, audio_seconds, float_samples, load_audio
from fastcompress.files import reason, write_file
from fastcompress.training.manifest import ManifestError, Utterance, read_manifest, warnings_of

#: File in the folder of a run, with a line for each skipped utterance.
SKIPPED = "skipped.txt"
#: Shortest audio in seconds that gives an encoder a frame.
SHORTEST = 0.025

_ROUNDING = 0.1  # seconds by which a duration may differ from its file: it does not cut it, and none is missing
_PADDING = 0.3  # seconds that encoders of lossy formats add, and decoders drop: 2112 samples of AAC at 8 kHz


def check_audio(
    utterances: Sequence[Utterance], max_seconds: float = math.inf
) -> tuple[list[Utterance], list[tuple[Utterance, str]]]:
    """Split utterances into those with usable audio, with their durations, and the others, with the reason.

    Only headers are read. Damage inside a file is found when the file is decoded.
    """
    lengths: dict[Path, float] = {}  # one long recording may have many segments
    good: list[Utterance] = []
    skipped: list[tuple[Utterance, str]] = []
    for u in utterances:
        try:
            seconds = _seconds(u, lengths)
            if seconds is not None:
                if seconds < SHORTEST:
                    raise AudioError(f"{seconds:.3f} s, less than one frame of {SHORTEST} s")
                if seconds > max_seconds:
                    raise AudioError(f"{seconds:.3f} s, more than the {max_seconds:g} s that are allowed")
                u = replace(u, duration=seconds)
            good.append(u)
        except (AudioError, OSError) as error:  # OSError: a name that is too long, a folder without permission
            skipped.append((u, _reason(u, error)))
    return good, skipped


def _seconds(u: Utterance, lengths: dict[Path, float]) -> float | None:
    """Return the seconds of an utterance's audio, from the header; ``None`` without audio."""
    if u.samples is not None:
        length = len(u.samples[0]) / u.samples[1]
    elif u.encoded is not None:
        length = audio_seconds(u.encoded, u.name)
    elif u.audio_filepath is not None:
        if not u.audio_filepath.is_file():
            raise AudioError("is a directory" if u.audio_filepath.is_dir() else "no such file")
        if u.audio_filepath not in lengths:
            lengths[u.audio_filepath] = audio_seconds(u.audio_filepath)
        length = lengths[u.audio_filepath]
    else:
        return None
    left = length - (u.offset or 0.0)
    _check_length(u, length, _ROUNDING)
    return min(u.duration, left) if u.duration is not None and _cuts(u, left) else left


def _check_length(u: Utterance, length: float, tolerance: float) -> None:
    """Check that an utterance is inside its audio, which is ``length`` seconds long.

    Raises:
        AudioError: The utterance starts or ends after the audio.
    """
    offset = u.offset or 0.0
    if offset and offset >= length:
        raise AudioError(f"offset {offset:g} s is after the end of the audio, which is {length:.3f} s long")
    if u.duration is None or offset + u.duration <= length + tolerance:
        return
    if offset:
        end = offset + u.duration
        raise AudioError(f"the segment from {offset:g} to {end:g} s ends after the audio, which is {length:.3f} s long")
    raise AudioError(f"the audio is {length:.3f} s long, but the manifest says {u.duration:g} s")


def load_utterance(utterance: Utterance, sample_rate: int) -> np.ndarray:
    """Load the samples from ``offset`` to ``offset + duration``, float32 ``[S]``. No other samples are decoded.

    Raises:
        AudioError: The audio cannot be used, is shorter than a frame or than the duration in the manifest, or the
            segment ends after it.
    """
    u = utterance
    offset = u.offset or 0.0
    if u.samples is not None:
        given, rate = u.samples
        try:
            samples = float_samples(given)
        except TypeError as error:
            raise AudioError(f"{u.name}: {error}") from error
        if samples.ndim != 1 or not np.isfinite(samples).all():
            raise AudioError(f"{u.name}: samples must be [S] and finite, got shape {list(samples.shape)}")
        if rate != sample_rate:
            import soxr

            samples = soxr.resample(samples, rate, sample_rate, quality="HQ")
        samples = samples[round(offset * sample_rate) :]
    else:
        source = u.audio_filepath if u.encoded is None else u.encoded
        assert source is not None, "the utterance has no audio"
        more = None if u.duration is None else u.duration + 2 * _ROUNDING  # enough to see whether the file is longer
        samples = load_audio(source, sample_rate, offset=offset, duration=more, name=u.name)
    seconds = len(samples) / sample_rate
    try:
        _check_length(u, offset + seconds, _ROUNDING + _PADDING)
    except AudioError as error:
        raise AudioError(f"{u.name}: {error}") from error
    if u.duration is not None and _cuts(u, seconds):
        samples = samples[: round(u.duration * sample_rate)]
    if len(samples) < SHORTEST * sample_rate:
        raise AudioError(
            f"{u.name}: has {len(samples) / sample_rate:.3f} s of audio after {offset:g} s, less than one frame of "
            f"{SHORTEST} s"
        )
    return samples


def _cuts(utterance: Utterance, left: float) -> bool:
    """Return True if the duration cuts the audio, which has ``left`` seconds after the offset."""
    if utterance.duration is None:
        return False
    return utterance.offset is not None or left > utterance.duration + _ROUNDING


def _reason(u: Utterance, error: Exception) -> str:
    """Return the message of an error without the name of the utterance."""
    return reason(error).removeprefix(f"{u.name}: ")


def print_line(text: str) -> None:
    """Print on stderr, above a progress bar if there is one."""
    from tqdm import tqdm

    tqdm.write(text, file=sys.stderr)


class Skipped:
    """The utterances that cannot be used, with reasons: counted, and listed on stderr and in a file.

    Args:
        file: The file, ``skipped.txt`` of a run. It is first written by ``write``. ``None``: no file.
        report: Function called with each line to print; by default lines are printed on stderr. ``None``: no lines, as
            in all processes except the first.
        label: Beginning of the line of an utterance that could not be decoded.
        listed: Maximum number of utterances that are listed per manifest, and of those that could not be decoded.

    Attributes:
        lines: A line for each utterance, without duplicates.
    """

    def __init__(
        self,
        file: Path | None = None,
        report: Callable[[str], object] | None = print_line,
        label: str = "skipped ",
        listed: int = 5,
    ) -> None:
        self.lines: dict[str, None] = {}
        self._file = file
        self._is_written = False
        self._report = report or (lambda text: None)
        self._label = label
        self._listed = listed
        self._damaged = 0

    def __len__(self) -> int:
        return len(self.lines)

    def read(self, path: str | Path, max_seconds: float = math.inf, training: bool = False) -> list[Utterance]:
        """Return the utterances of a manifest that are usable according to the headers of their audio.

        Args:
            path: The manifest.
            max_seconds: Longest audio.
            training: Whether to skip utterances with an empty target; evaluation scores them.

        Raises:
            ManifestError: As ``read_manifest``; or no utterance is usable.
        """
        utterances = read_manifest(path)
        for line in warnings_of(utterances):
            self._report(f"{path}: warning: {line}")
        good, bad = check_audio(utterances, max_seconds)
        if training:
            bad += [(u, "the target is empty") for u in good if not u.target.strip()]
            good = [u for u in good if u.target.strip()]
        return self._usable(path, good, bad)

    def decode(self, path: str | Path, utterances: Sequence[Utterance], sample_rate: int) -> list[Utterance]:
        """Decode all utterances of a manifest, and return those that can be, with the seconds that were decoded.

        Raises:
            ManifestError: No utterance can be decoded.
        """
        good: list[Utterance] = []
        bad: list[tuple[Utterance, str]] = []
        for u in utterances:
            try:
                good.append(
                    replace(u, duration=len(load_utterance(u, sample_rate)) / sample_rate) if u.has_audio else u
                )
            except AudioError as error:
                bad.append((u, _reason(u, error)))
        return self._usable(path, good, bad)

    def add(self, utterance: Utterance, error: Exception) -> None:
        """Add an utterance that could not be decoded."""
        line = _line(utterance, _reason(utterance, error))
        if self._keep([line]):
            self._damaged += 1
            if self._damaged <= self._listed:
                self._report(f"{self._label}{line}")
            elif self._damaged == self._listed + 1:
                self._report(f"skipped more utterances{self._where()}; the last line has their number")

    def merge(self, lines: Iterable[str]) -> None:
        """Add the lines of another process."""
        self._damaged += self._keep(lines)

    def write(self) -> None:
        """Write the file, and append to it from now on. Lines of an earlier part of a resumed run are kept."""
        assert self._file is not None, "there is no file to write"
        known = self._file.read_text(encoding="utf-8").splitlines() if self._file.is_file() else []
        write_file(self._file, "".join(f"{line}\n" for line in dict.fromkeys([*known, *self.lines])))
        self.lines = dict.fromkeys([*known, *self.lines])
        self._is_written = True

    def finish(self) -> None:
        """Report the number of utterances that could not be decoded."""
        if self._damaged:
            self._report(f"skipped {self._damaged} utterances that could not be decoded{self._where()}")

    def _usable(self, path: str | Path, good: list[Utterance], bad: list[tuple[Utterance, str]]) -> list[Utterance]:
        lines = [_line(u, why) for u, why in bad]
        self._keep(lines)
        if lines:
            shown = [f"skipped {len(lines)} of {len(good) + len(lines)} utterances:", *lines[: self._listed]]
            if len(lines) > self._listed:
                shown.append(f"... and {len(lines) - self._listed} more{self._where()}")
            self._report(f"{path}: " + "\n  ".join(shown))
        if not good:
            raise ManifestError(f"{path}: has no usable utterance")
        return good

    def _keep(self, lines: Iterable[str]) -> int:
        """Add lines, also to the file, and return how many are new."""
        new = [line for line in dict.fromkeys(lines) if line not in self.lines]
        self.lines |= dict.fromkeys(new)
        if new and self._is_written and self._file is not None:
            with self._file.open("a", encoding="utf-8") as file:
                file.write("".join(f"{line}\n" for line in new))
        return len(new)

    def _where(self) -> str:
        return f", listed in {self._file}" if self._file is not None else ""


def _line(u: Utterance, why: str) -> str:
    text = ": ".join(filter(None, (u.source if u.source != u.name else "", u.name, why)))
    return text.encode("utf-8", "backslashreplace").decode("utf-8")  # names of files may be invalid UTF-8

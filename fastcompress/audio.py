"""Audio files to samples, samples to log-mel frames, both in blocks: memory is bounded by the result.

Needs ``soundfile`` and ``soxr`` (``pip install 'fastcompress[audio]'``).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any, BinaryIO

import numpy as np
import soundfile
import soxr
import torch

from fastcompress.wave_pipe import WavePipe

SAMPLE_RATE = 16_000  # Hz, of everything after `load_audio`
WINDOW = 400  # samples: 25 ms
HOP = 160  # samples: 10 ms
FRAME_RATE = SAMPLE_RATE / HOP  # log-mel frames a second
MEL_BINS = 80

_BLOCK_FRAMES = 1 << 16  # 4 s at 16 kHz: the Python call is lost in the noise, the block is 256 KiB a channel
_CHUNK_FRAMES = 3000  # 30 s of log-mel frames: 10 MB of windows and spectra
_LEAD_IN = 0.1  # seconds before a part that is resampled: longer than the filter reaches

Progress = Callable[[float, float], None]
"""Called after each block with (seconds done, seconds in all)."""


class AudioError(ValueError):
    """An audio file that cannot be used; the message is one line and names the file and the cause."""


def load_audio(
    path: str | os.PathLike[str],
    sample_rate: int = SAMPLE_RATE,
    progress: Progress | None = None,
    offset: float = 0.0,
    duration: float | None = None,
) -> np.ndarray:
    """Read any file that libsndfile reads (WAV, FLAC, MP3, Ogg Vorbis and Opus, ...) as mono samples.

    Memory holds the result and one block (:func:`audio_blocks`): 230 MB an hour at 16 kHz, whatever the file's own rate
    and channels.

    Args:
        path: the file.
        sample_rate: of the result, Hz.
        progress: called after each block with (seconds read, seconds the file's header promises).
        offset, duration: seconds, of a part; of Ogg what is before it is decoded, too, else it alone.

    Returns:
        float32 ``[S]``, full scale at 1.0, ``S = seconds * sample_rate`` to within a sample. A silent file gives zeros.
        A WAV or MP3 that was cut short gives what it still holds, as players do.

    Raises:
        AudioError: as :func:`audio_blocks`.
    """
    # A bytearray grows in place (its reserve is never touched) and becomes an array without a copy. The header's length
    # is not used for this: it is an estimate for some formats, missing in others.
    samples = bytearray()
    for block in audio_blocks(path, sample_rate, progress=progress, offset=offset, duration=duration):
        samples += block.tobytes()
    return np.frombuffer(samples, dtype=np.float32)


def audio_blocks(
    source: str | os.PathLike[str] | BinaryIO,
    sample_rate: int = SAMPLE_RATE,
    seconds: float | None = None,
    progress: Progress | None = None,
    offset: float = 0.0,
    duration: float | None = None,
) -> Iterator[np.ndarray]:
    """Mono samples of a file, or of a stream, block by block as they are read.

    Channels are averaged, and resampled (soxr, high quality, no delay) across the blocks: joined, they are the same
    samples whatever the blocks.

    Args:
        source: a file that libsndfile reads, or a binary stream of WAV, which need not seek (:class:`WavePipe`).
        sample_rate: of the result, Hz.
        seconds: of a block before resampling; ``None``: 65,536 samples.
        progress: called after each block with (seconds read, seconds the header promises).
        offset, duration: seconds, of a part of a file: joined, those samples of the whole, to within the filter's
            rounding.

    Yields:
        float32 ``[S]``, full scale at 1.0; may be empty.

    Raises:
        AudioError: no such file, a directory, no permission, not audio, damaged, 0 seconds, or NaN or infinite samples.
    """
    opened: AbstractContextManager[Any]
    options: dict[str, Any] = {}
    if isinstance(source, str | os.PathLike):
        name = os.fspath(source)
        opened, options = _open(name), {"dtype": "float32", "always_2d": True}
    else:
        name = getattr(source, "name", "stream")
        opened = nullcontext(_open_pipe(source, name))
    with opened as file:
        size = _BLOCK_FRAMES if seconds is None else max(1, round(seconds * file.samplerate))
        resampler = None
        if file.samplerate != sample_rate:
            try:
                resampler = soxr.ResampleStream(file.samplerate, sample_rate, 1, dtype="float32", quality="HQ")
            except (RuntimeError, ValueError) as error:
                rates = f"{file.samplerate} Hz to {sample_rate} Hz"
                raise AudioError(f"{name}: cannot resample {rates} ({error})") from error
        begin = round(offset * sample_rate)
        frames_read = first_frame = _seek(file, name, begin, sample_rate) if begin else 0
        # Of the samples that come: how many are before the part, and where it ends.
        skipped = begin - first_frame * sample_rate // file.samplerate
        left = math.inf if duration is None else skipped + round(duration * sample_rate)
        given = 0

        def of_part(samples: np.ndarray) -> np.ndarray:
            nonlocal given
            before, given = given, given + len(samples)
            if skipped <= before and given <= left:
                return samples
            return samples[max(0, skipped - before) : max(0, int(min(left, given)) - before)]

        while True:
            try:
                block = file.read(size, **options)  # [frames, channels]
            except soundfile.SoundFileError as error:
                second = frames_read / file.samplerate
                raise AudioError(f"{name}: damaged after {second:.1f} s ({_cause(error)})") from error
            if not len(block):
                break
            frames_read += len(block)
            with np.errstate(over="ignore", invalid="ignore"):  # what becomes infinite or NaN is refused
                mono = block.mean(axis=1) if block.shape[1] > 1 else block[:, 0]
            if not np.isfinite(mono).all():
                raise AudioError(f"{name}: holds NaN or infinite samples before {frames_read / file.samplerate:.1f} s")
            yield of_part(resampler.resample_chunk(mono) if resampler else mono)
            if progress:
                progress(frames_read / file.samplerate, max(file.frames, frames_read) / file.samplerate)
            if given >= left:
                return
        if frames_read == 0:
            raise AudioError(f"{name}: holds no audio (0 seconds)")
        if resampler:
            yield of_part(resampler.resample_chunk(np.zeros(0, np.float32), last=True))


def _seek(file: Any, name: str, begin: int, sample_rate: int) -> int:
    """Goes to before sample ``begin`` of the result, where samples of both rates coincide; returns the file's frame."""
    # libsndfile 1.2 misses the frame in Vorbis, by up to a block of it.
    if not file.seekable() or file.format == "OGG":
        return 0
    common = math.gcd(file.samplerate, sample_rate)
    lead_in = 0 if file.samplerate == sample_rate else round(_LEAD_IN * sample_rate)
    steps = max(0, begin - lead_in) * common // sample_rate
    frame: int = min(steps * (file.samplerate // common), file.frames)
    try:
        file.seek(frame)
    except (soundfile.SoundFileError, ValueError) as error:
        raise AudioError(f"{name}: damaged before {frame / file.samplerate:.1f} s ({_cause(error)})") from error
    return frame


def log_mel(
    samples: np.ndarray | torch.Tensor,
    mel_bins: int = MEL_BINS,
    chunk_frames: int = _CHUNK_FRAMES,
    progress: Progress | None = None,
) -> torch.Tensor:
    """Whisper's log-mel spectrogram: what its feature extractor gives, without the padding to 30 s.

    Hann window of 25 ms, hop 10 ms, frame t centred on sample 160 t (the ends are mirrored), power, mel bands on the
    Slaney scale with Slaney's equal-area normalisation from 0 to 8 kHz, log10, floor at 8 below the loudest value of
    the whole audio, then ``(x + 4) / 4``.

    Args:
        samples: ``[S]`` float at 16 kHz, S at least one window (400).
        mel_bins: number of bands.
        chunk_frames: frames computed at a time; bounds memory, changes the result by no more than its last bit.
        progress: called after each chunk with (seconds done, seconds in all).

    Returns:
        float32 ``[S // 160, mel_bins]``, 100 frames a second.

    Raises:
        ValueError: samples of another shape, or shorter than a window.
    """
    samples = torch.as_tensor(samples)
    if samples.ndim != 1:
        raise ValueError(f"samples must be [S], got shape {tuple(samples.shape)}")
    count = samples.shape[0]
    if count < WINDOW:
        raise ValueError(
            f"the audio is {1000 * count / SAMPLE_RATE:.1f} ms long; the least is one window of "
            f"{1000 * WINDOW / SAMPLE_RATE:.0f} ms ({WINDOW} samples)"
        )
    if chunk_frames < 1:
        raise ValueError(f"chunk_frames must be at least 1, got {chunk_frames}")
    window = torch.hann_window(WINDOW)
    filters = mel_filters(mel_bins)  # [WINDOW // 2 + 1, mel_bins]
    frames = count // HOP
    result = torch.empty(frames, mel_bins)
    for first in range(0, frames, chunk_frames):
        last = min(first + chunk_frames, frames)
        piece = _mirrored(samples, first * HOP - WINDOW // 2, (last - 1) * HOP + WINDOW // 2)
        spectrum = torch.fft.rfft(piece.unfold(0, WINDOW, HOP) * window)  # [last - first, WINDOW // 2 + 1]
        power = spectrum.real.square() + spectrum.imag.square()
        torch.matmul(power, filters, out=result[first:last])
        if progress:
            progress(last / FRAME_RATE, frames / FRAME_RATE)
    result.clamp_(min=1e-10).log10_()
    return result.clamp_(min=result.max().item() - 8).add_(4).div_(4)


@lru_cache(maxsize=4)
def mel_filters(mel_bins: int = MEL_BINS) -> torch.Tensor:
    """Triangular mel bands, float32 ``[201, mel_bins]``: Slaney scale, 0 to 8 kHz, each of area 1 over its width in Hz.

    Equal to ``librosa.filters.mel(sr=16000, n_fft=400)``, transposed.
    """
    edges = _mel_edges(mel_bins)
    left, centre, right = edges[:-2], edges[1:-1], edges[2:]
    hz = torch.linspace(0, SAMPLE_RATE / 2, WINDOW // 2 + 1, dtype=torch.float64)[:, None]
    triangle = torch.minimum((hz - left) / (centre - left), (right - hz) / (right - centre)).clamp(min=0)
    return (triangle * (2 / (right - left))).float()


def mel_centres(mel_bins: int = MEL_BINS) -> torch.Tensor:
    """Centre of each band in Hz, float64 ``[mel_bins]``."""
    return _mel_edges(mel_bins)[1:-1]


def _mel_edges(mel_bins: int) -> torch.Tensor:
    """Hz, float64 ``[mel_bins + 2]``, evenly spaced on Slaney's scale: linear below 1 kHz, logarithmic above."""
    linear_hz, linear_mel, log_step = 1000.0, 15.0, math.log(6.4) / 27
    top_mel = linear_mel + math.log(SAMPLE_RATE / 2 / linear_hz) / log_step
    mel = torch.linspace(0, top_mel, mel_bins + 2, dtype=torch.float64)
    logarithmic = linear_hz * torch.exp((mel - linear_mel) * log_step)
    return torch.where(mel < linear_mel, mel * linear_hz / linear_mel, logarithmic)


def _open(path: str) -> soundfile.SoundFile:
    try:
        with open(path, "rb") as file:  # first, because libsndfile calls all of these "System error"
            empty = not file.read(1)
    except (OSError, ValueError) as error:  # ValueError: a name that none can have
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise AudioError(f"{path}: {reason.lower()}") from error
    if empty:
        raise AudioError(f"{path}: the file is empty (0 bytes)")
    try:
        return soundfile.SoundFile(os.fsencode(path))  # a name need not be UTF-8
    except (soundfile.SoundFileError, TypeError) as error:  # TypeError: headerless formats (.raw)
        raise AudioError(f"{path}: not an audio file that can be read ({_cause(error)})") from error


def _open_pipe(stream: BinaryIO, name: str) -> WavePipe:
    try:
        return WavePipe(stream)
    except ValueError as error:
        raise AudioError(f"{name}: {error}") from error


def _cause(error: Exception) -> str:
    return getattr(error, "error_string", str(error)).strip().rstrip(".")


def _mirrored(samples: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """samples[start:stop] as float32, positions beyond either end read mirrored about the end sample."""
    count = samples.shape[0]
    if start >= 0 and stop <= count:
        return samples[start:stop].float()
    position = torch.arange(start, stop).abs()
    return samples[torch.where(position < count, position, 2 * (count - 1) - position)].float()

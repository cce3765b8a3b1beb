"""Read audio as samples, and samples as log-mel frames, both in blocks so that memory is bounded by the result.

Needs ``av`` and ``soxr`` (``pip install 'fastcompress[audio]'``).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, BinaryIO

import numpy as np
import soxr
import torch

from fastcompress.audio_file import AudioFile, audio_seconds
from fastcompress.audio_source import AudioError, AudioWarning

__all__ = [
    "AudioError",
    "AudioWarning",
    "audio_blocks",
    "audio_seconds",
    "float_samples",
    "load_audio",
    "log_mel",
    "mel_centres",
    "mel_filters",
]

SAMPLE_RATE = 16_000  # Hz, of everything after `load_audio`
WINDOW = 400  # samples: 25 ms
HOP = 160  # samples: 10 ms
FRAME_RATE = SAMPLE_RATE / HOP  # log-mel frames per second
MEL_BINS = 80

_BLOCK_FRAMES = 1 << 16  # 4 s at 16 kHz: calls from Python cost nothing, and a block is 256 KiB
_CHUNK_FRAMES = 3000  # 30 s of log-mel frames: 10 MB of windows and spectra
_LEAD_IN = 0.1  # seconds before a part that is resampled, longer than the filter

Progress = Callable[[float, float], None]
"""Called after each block with the seconds done and the seconds in all."""


def load_audio(
    path: str | os.PathLike[str] | bytes,
    sample_rate: int = SAMPLE_RATE,
    progress: Progress | None = None,
    offset: float = 0.0,
    duration: float | None = None,
    name: str | None = None,
) -> np.ndarray:
    """Read any file that ffmpeg reads (WAV, FLAC, MP3, M4A, Ogg, Opus, video, ...) as mono samples.

    It needs memory for the result and one block (``audio_blocks``): 230 MB per hour at 16 kHz, whatever the file's
    own rate and channels.

    Args:
        path: The file, or its content.
        sample_rate: Rate of the result in Hz.
        progress: Function called after each block with the seconds read and the seconds that the header declares.
        offset: Seconds of the file to skip (``AudioFile.skip_to`` lists the formats in which they are not decoded).
        duration: Seconds to read; ``None``: to the end.
        name: Name in messages; ``None``: the file's.

    Returns:
        float32 ``[S]``, full scale at 1.0, ``S = seconds * sample_rate`` to within a sample. A silent file gives zeros.
        The length is that of ffmpeg: in MP3, AAC and Opus, samples that the encoder added and marked are removed.

    Raises:
        AudioError: As ``audio_blocks``.

    Warns:
        AudioWarning: As ``audio_blocks``.
    """
    # A bytearray grows in place (its reserve is never touched) and becomes an array without a copy. The header's length
    # is not used for this, because it is an estimate in some formats and missing in others.
    samples = bytearray()
    for block in audio_blocks(path, sample_rate, progress=progress, offset=offset, duration=duration, name=name):
        samples += block.tobytes()
    return np.frombuffer(samples, dtype=np.float32)


def audio_blocks(
    source: str | os.PathLike[str] | bytes | BinaryIO,
    sample_rate: int = SAMPLE_RATE,
    seconds: float | None = None,
    progress: Progress | None = None,
    offset: float = 0.0,
    duration: float | None = None,
    name: str | None = None,
) -> Iterator[np.ndarray]:
    """Yield mono samples of a file or stream, block by block as they are read.

    Channels are averaged, and resampled (soxr, high quality, no delay) across the blocks: joined, they are the same
    samples whatever the size of the blocks.

    A file is never shortened silently. If the length in the header is unknown (0, or the large values that recorders
    write to a pipe), everything up to the end is read. From a stream, ffmpeg can read neither CAF nor MP4 whose index
    is at the end, and it keeps the encoder's padding at the end of MP3.

    Args:
        source: File that ffmpeg reads, its content as bytes, or a binary stream at its first byte, which need not seek.
        sample_rate: Rate of the result in Hz.
        seconds: Length of a block before resampling; ``None``: 65,536 samples.
        progress: Function called after each block with the seconds read and the seconds that the header declares.
        offset: Seconds to skip. The result is that part of the whole, to within rounding of the filter and of lossy
            decoders.
        duration: Seconds to read; ``None``: to the end.
        name: Name in messages; ``None``: that of the file or stream.

    Yields:
        float32 ``[S]``, full scale at 1.0; may be empty.

    Raises:
        AudioError: The file is missing, a directory, not readable or not audio; it has no samples, or NaN or infinite
            ones; the decoder fails; or WAV, FLAC, AIFF, AU, CAF, WavPack or TTA has fewer samples than its header
            declares.

    Warns:
        AudioWarning: Several channels cancel when they are averaged, as stereo with one channel inverted.
    """
    with AudioFile(source, name) as file:
        size = _BLOCK_FRAMES if seconds is None else max(1, round(seconds * file.rate))
        resampler = None
        if file.rate != sample_rate:
            try:
                resampler = soxr.ResampleStream(file.rate, sample_rate, 1, dtype="float32", quality="HQ")
            except (RuntimeError, ValueError) as error:
                raise AudioError(
                    f"{file.name}: cannot resample {file.rate} Hz to {sample_rate} Hz ({error})"
                ) from error
        begin = round(offset * sample_rate)
        frames_read = first_frame = _first_frame(file.rate, sample_rate, begin)
        if first_frame:
            file.skip_to(first_frame)
        # Of the samples that follow: how many are before the part, and where it ends.
        skipped = begin - first_frame * sample_rate // file.rate
        left = math.inf if duration is None else skipped + round(duration * sample_rate)
        given = 0

        def of_part(samples: np.ndarray) -> np.ndarray:
            nonlocal given
            before, given = given, given + len(samples)
            if skipped <= before and given <= left:
                return samples
            return samples[max(0, skipped - before) : max(0, int(min(left, given)) - before)]

        def wanted() -> int:  # no more than the part needs
            needed = math.inf if duration is None else math.ceil((left - given) * file.rate / sample_rate)
            return int(min(size, needed + (round(_LEAD_IN * file.rate) if resampler else 0)))

        while len(block := file.read(max(1, wanted()))):
            frames_read += len(block)
            if not np.isfinite(block).all():
                raise AudioError(
                    f"{file.name}: contains NaN or infinite samples before {frames_read / file.rate:.1f} s"
                )
            yield of_part(resampler.resample_chunk(block) if resampler else block)
            if progress:
                progress(frames_read / file.rate, max(file.expected, frames_read) / file.rate)
            if given >= left:
                break
        else:
            if resampler:
                yield of_part(resampler.resample_chunk(np.zeros(0, np.float32), last=True))
        file.warn_if_channels_cancel()


def float_samples(samples: Any) -> np.ndarray:
    """Return samples as float32 with full scale at 1.0; integers are divided by the full scale of their dtype.

    Args:
        samples: Array or tensor of any shape.

    Raises:
        TypeError: The dtype has no full scale: only uint8, int8, int16, int32 and floating point have.
    """
    if isinstance(samples, torch.Tensor):
        samples = samples.detach().cpu()
        samples = (samples.float() if samples.is_floating_point() else samples).numpy()
    values: np.ndarray = np.asarray(samples)
    floats: np.ndarray = values.astype(np.float32, copy=False) if values.dtype.kind in "fiu" else values
    if values.dtype.kind == "f":
        return floats
    if values.dtype in (np.int8, np.int16, np.int32):
        floats *= np.float32(2.0 ** (1 - 8 * values.dtype.itemsize))
        return floats
    if values.dtype == np.uint8:
        floats -= 128
        floats *= np.float32(1 / 128)
        return floats
    raise TypeError(
        f"samples must be floating point with full scale at 1, or uint8, int8, int16 or int32, got {values.dtype}"
    )


def _first_frame(rate: int, sample_rate: int, begin: int) -> int:
    """Return a frame of the file before sample ``begin`` of the result, where samples of both rates coincide."""
    common = math.gcd(rate, sample_rate)
    lead_in = 0 if rate == sample_rate else round(_LEAD_IN * sample_rate)
    return max(0, begin - lead_in) * common // sample_rate * (rate // common)


def log_mel(
    samples: np.ndarray | torch.Tensor,
    mel_bins: int = MEL_BINS,
    chunk_frames: int = _CHUNK_FRAMES,
    progress: Progress | None = None,
) -> torch.Tensor:
    """Compute Whisper's log-mel spectrogram, as its feature extractor does, without the padding to 30 s.

    Hann window of 25 ms, hop 10 ms, frame t centred on sample 160 t (the ends are mirrored), power, mel bands on the
    Slaney scale with Slaney's equal-area normalization from 0 to 8 kHz, log10, floor at 8 below the loudest value of
    the whole audio, then ``(x + 4) / 4``.

    Args:
        samples: ``[S]`` at 16 kHz, S at least one window (400); see ``float_samples`` for their dtype.
        mel_bins: Number of bands.
        chunk_frames: Number of frames to compute at a time; it bounds memory and changes at most the last bit of the
            result.
        progress: Function called after each chunk with the seconds done and the seconds in all.

    Returns:
        float32 ``[S // 160, mel_bins]``, 100 frames per second.

    Raises:
        TypeError: samples of another dtype.
        ValueError: The samples have another shape, or are shorter than a window.
    """
    samples = torch.from_numpy(float_samples(samples))
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
    window = torch.hann_window(WINDOW, dtype=torch.float32, device="cpu")
    filters = mel_filters(mel_bins)  # [WINDOW // 2 + 1, mel_bins]
    frames = count // HOP
    result = torch.empty(frames, mel_bins, dtype=torch.float32, device="cpu")
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
    """Return triangular mel bands, float32 ``[201, mel_bins]``: Slaney scale, 0 to 8 kHz, each with area 1.

    Equal to ``librosa.filters.mel(sr=16000, n_fft=400)``, transposed.
    """
    edges = _mel_edges(mel_bins)
    left, centre, right = edges[:-2], edges[1:-1], edges[2:]
    hz = torch.linspace(0, SAMPLE_RATE / 2, WINDOW // 2 + 1, dtype=torch.float64, device="cpu")[:, None]
    triangle = torch.minimum((hz - left) / (centre - left), (right - hz) / (right - centre)).clamp(min=0)
    return (triangle * (2 / (right - left))).float()


def mel_centres(mel_bins: int = MEL_BINS) -> torch.Tensor:
    """Return the centre of each band in Hz, float64 ``[mel_bins]``."""
    return _mel_edges(mel_bins)[1:-1]


def _mel_edges(mel_bins: int) -> torch.Tensor:
    """Return frequencies in Hz, float64 ``[mel_bins + 2]``, evenly spaced on Slaney's scale.

    The scale is linear below 1 kHz and logarithmic above.
    """
    linear_hz, linear_mel, log_step = 1000.0, 15.0, math.log(6.4) / 27
    top_mel = linear_mel + math.log(SAMPLE_RATE / 2 / linear_hz) / log_step
    mel = torch.linspace(0, top_mel, mel_bins + 2, dtype=torch.float64, device="cpu")
    logarithmic = linear_hz * torch.exp((mel - linear_mel) * log_step)
    return torch.where(mel < linear_mel, mel * linear_hz / linear_mel, logarithmic)


def _mirrored(samples: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """Return samples[start:stop] as float32, with the samples mirrored about the end samples."""
    count = samples.shape[0]
    if start >= 0 and stop <= count:
        return samples[start:stop].float()
    position = torch.arange(start, stop, device="cpu").abs()
    return samples[torch.where(position < count, position, 2 * (count - 1) - position)].float()

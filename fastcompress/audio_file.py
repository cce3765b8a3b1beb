"""Samples of audio files and streams, decoded by PyAV (ffmpeg): files and pipes take the same path.

Needs ``av`` (``pip install 'fastcompress[audio]'``).
"""

from __future__ import annotations

import math
import os
import re
import warnings
from collections.abc import Iterator
from typing import Any, BinaryIO, cast

import av
import numpy as np
from av.audio.frame import AudioFrame
from av.container.input import InputContainer
from av.error import FFmpegError

from fastcompress.audio_source import FLOAT, PCM, AudioError, AudioWarning, Source, open_bytes, open_file

#: Formats whose header has the exact number of samples. ``audio_source.py`` reads WAV.
_EXACT = ("flac", "aiff", "au", "caf", "tta", "wv", "nistsphere")
#: Formats in which ffmpeg seeks to an exact sample: those of the first line if they hold PCM.
_SEEKS_PCM = ("wav", "w64", "aiff", "au", "caf")
_SEEKS = ("flac", "mov,mp4,m4a,3gp,3g2,mj2")
#: Formats and codecs whose packets have exact times, so that those before a part need no decoding.
_SKIPS = (("mp3", "mp3float"), ("mp3", "mp3"), ("ogg", "flac"), ("ogg", "opus"), ("ogg", "libopus"))
#: Least power of the mean of several channels, in powers of a channel; independent channels have 1 / channels.
_CANCELLED = 0.01
#: Seconds that a lossy codec decodes before a part, so that its state is that of the whole.
_LEAD_IN = 1.0
#: Seconds by which the clock of Ogg may jump. ffmpeg drops pages that fail their checksum without an error.
_JUMP = 0.2

_BUFFER = 1 << 16
_PACKET = 1 << 17  # bytes of WAV per packet from a file; pipes keep ffmpeg's default of less than 0.1 s

_TYPES = {"u8": np.uint8, "s16": np.int16, "s32": np.int32, "s64": np.int64, "flt": np.float32, "dbl": np.float64}


class AudioFile:
    """Mono samples of an audio file or of a stream that need not seek.

    Args:
        source: File that ffmpeg reads, the content of one as bytes, or a binary stream at its first byte. Of several
            audio streams in a file, the one that ffmpeg considers best.
        name: Name in messages. ``None``: that of the file or stream.

    Attributes:
        name: Name in messages.
        rate: Samples per second.
        length: Number of samples that the header declares, ``None`` if it is unknown or only an estimate.
        expected: Number of samples to expect, 0 if there is no estimate.

    Raises:
        AudioError: The file cannot be opened or contains no audio.
    """

    name: str
    rate: int
    length: int | None
    expected: int
    _container: InputContainer
    _frames: Iterator[AudioFrame]  # not read yet
    _end: int  # samples decoded, counted from the first of the file
    _first: int  # time of the first sample
    _parts: list[np.ndarray]  # decoded and not read yet
    _ready: int  # samples in them
    _drop: int  # samples to be dropped from the following frames

    def __init__(self, source: str | os.PathLike[str] | bytes | BinaryIO, name: str | None = None) -> None:
        self._is_file = isinstance(source, str | os.PathLike | bytes)
        self._stream: Any = None
        self._power = self._mono_power = 0.0  # sums of squares: mean of the channels, and of their mean
        if isinstance(source, bytes):
            self.name = name or "audio"
            stream: Any = open_bytes(source, self.name)
        elif isinstance(source, str | os.PathLike):
            self.name = name or os.fspath(source)
            stream = self._stream = open_file(os.fspath(source), self.name)
        else:
            self.name, stream = name or str(getattr(source, "name", "stream")), source
        try:
            self._source = Source(stream, self.name, self._is_file)
            self._start()
        except OSError as error:
            self.close()
            raise AudioError(f"{self.name}: {(error.strerror or str(error)).lower()}") from error
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> AudioFile:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the decoder, and the file if it was opened here."""
        if hasattr(self, "_container"):
            self._container.close()
        if self._stream is not None:
            self._stream.close()

    def read(self, count: int) -> np.ndarray:
        """Return the next samples, float32 ``[count]``, full scale at 1.0; fewer at the end, and then none.

        Raises:
            AudioError: The decoder fails, or the file is shorter than its header declares.
        """
        while self._ready < count and (frame := next(self._frames, None)) is not None:
            self._add(frame)
        samples = np.concatenate(self._parts) if len(self._parts) > 1 else self._parts[0]
        self._parts = [samples[count:]]
        self._ready = len(self._parts[0])
        return samples[:count]

    def skip_to(self, sample: int) -> None:
        """Continue to read at a sample, counted from the first one; must be called before ``read``.

        Earlier samples are not decoded in WAV, FLAC, AIFF, AU, MP3, MP4, Ogg FLAC and Opus.
        """
        codec, name = self._audio.codec_context, self._container.format.name
        is_pcm = codec.name.startswith("pcm_")
        before = max(0, sample - (0 if is_pcm else round(_LEAD_IN * self.rate)))
        seeks = name in _SEEKS or (is_pcm and name in _SEEKS_PCM)
        if before > self._end and self._is_file and (seeks or (name, codec.name) in _SKIPS):
            time = self._first + round(before / self.rate / self._audio.time_base)
            found: AudioFrame | None = None
            try:
                if seeks:
                    self._container.seek(time, stream=self._audio)
                codec.flush_buffers()
                self._frames = self._decoded(None if seeks else time)
                found = next(self._frames, None)
            except (AudioError, FFmpegError):
                pass  # read from the start, which raises the error
            if found is not None and found.pts is not None and self._index(found.pts) <= sample:
                self._end = self._index(found.pts) + found.samples
                self._parts, self._ready, self._drop = [], 0, sample - self._index(found.pts)
                self._add(found)
                return
            self._start()
        first = self._parts.pop()
        self._drop = max(0, sample - len(first))
        self._parts = [first[sample:]]
        self._ready = len(self._parts[0])

    def count(self) -> int:
        """Return the number of samples, without decoding if possible; nothing can be read afterwards."""
        if self.length is not None:
            if self._source.wav is not None and self._is_file:
                self._check_end()  # cheap, because it compares the size of the file
            return self.length
        end = None
        for packet in self._packets():
            if packet.size and (packet.pts is None or not packet.duration):
                self._start()
                end = None
                break
            if packet.size:
                end = packet.pts + packet.duration
        if end is not None:
            return self._index(end)
        while len(self.read(_BUFFER)):
            pass
        return self._end

    def _start(self) -> None:
        """Open the decoder at the first sample."""
        source, wav = self._source, self._source.wav
        source.rewind()
        options, form = {"protocol_whitelist": ""}, None  # playlists may not open other files
        if wav is not None and wav.kind in (PCM, FLOAT):  # the header has everything that probing could find
            form = "wav"
            options |= {"probesize": "32"} | ({"max_size": str(_PACKET)} if self._is_file else {})
        try:
            self._container = av.open(
                cast(Any, source), format=form, options=options, buffer_size=_BUFFER, metadata_errors="replace"
            )
        except (FFmpegError, ValueError) as error:
            source.check()
            raise AudioError(f"{self.name}: not an audio file that can be read ({_cause(error)})") from error
        source.check()
        source.pauses = False
        audio = self._container.streams.best("audio")
        if audio is None:
            raise AudioError(f"{self.name}: has no audio stream")
        if audio.codec_context is None:
            raise AudioError(f"{self.name}: ffmpeg has no decoder for its audio")
        self._audio = cast(Any, audio)
        self._audio.codec_context.thread_count = 1
        if not self._audio.codec_context.name.startswith("pcm_"):  # it would refuse a last packet of PCM that is short
            self._audio.codec_context.options = {"err_detect": "crccheck+bitstream+buffer+explode"}
        self.length, self._end, self._first = None, 0, 0
        self.rate = self._audio.sample_rate
        self.length = self._promised()
        self._frames = self._decoded()
        first = None if wav is not None and wav.is_empty else next(self._frames, None)
        if first is None:
            raise AudioError(f"{self.name}: contains no audio (0 seconds)")
        self._first = first.pts or 0
        self._parts, self._ready, self._drop = [], 0, 0
        self._add(first)
        self.rate = first.sample_rate
        self.length = self._promised()
        guess = self._audio.duration
        self.expected = self.length or (round(guess * self._audio.time_base * self.rate) if guess else 0)

    def warn_if_channels_cancel(self) -> None:
        """Warn if the channels that were read so far cancel when they are averaged."""
        if self._mono_power < _CANCELLED * self._power < math.inf:
            loss = 10 * math.log10(self._power / max(self._mono_power, 1e-30))
            channels = self._audio.codec_context.channels
            warnings.warn(
                f"{self.name}: the {channels} channels cancel when averaged to mono, which is "
                f"{f'{loss:.0f} dB quieter' if loss < 200 else 'silent'}; if one channel is inverted, write a file "
                "with one channel alone",
                AudioWarning,
                stacklevel=4,
            )

    def _add(self, frame: AudioFrame) -> None:
        part, power = _mono(frame)
        if power is not None:
            self._power += power
            with np.errstate(over="ignore", invalid="ignore"):
                self._mono_power += float(np.dot(part, part))
        dropped = min(self._drop, len(part))
        self._drop -= dropped
        if not self._ready:
            self._parts.clear()
        self._parts.append(part[dropped:])
        self._ready += len(part) - dropped

    def _index(self, time: int) -> int:
        return int(round((time - self._first) * self._audio.time_base * self.rate))

    def _promised(self) -> int | None:
        """Return the number of samples that the header declares, ``None`` if it is unknown or an estimate."""
        name, is_pcm = self._container.format.name, self._audio.codec_context.name.startswith("pcm_")
        if name == "wav" and self._source.wav is not None:
            wav = self._source.wav
            return wav.size // wav.block if is_pcm and wav.size and wav.block else None
        if name == "w64":
            return self._source.w64_samples if is_pcm else None
        if name not in _EXACT:
            return None
        duration = self._audio.duration
        if duration:
            return int(round(duration * self._audio.time_base * self.rate))
        return cast(int, self._audio.frames) or None if is_pcm else None

    def _packets(self, begin: int | None = None) -> Iterator[Any]:
        """Yield the packets from a time on, and an empty one at the end, which flushes the decoder."""
        packets = self._container.demux(self._audio)
        while True:
            try:
                packet = next(packets, None)
            except (FFmpegError, ValueError) as error:
                self._fail(error)
                return
            self._source.check()
            if packet is None:
                return
            if begin is not None and packet.size:
                if packet.pts is not None and packet.pts + (packet.duration or 0) <= begin:
                    continue
                begin = None
            yield packet

    def _decoded(self, begin: int | None = None) -> Iterator[AudioFrame]:
        """Yield frames with samples, and check that no sample is missing."""
        codec = self._audio.codec_context
        bits = re.search(r"\d+", codec.name)  # none in pcm_mulaw and pcm_alaw
        sample_size = codec.channels * (int(bits[0]) // 8 if bits else 1) if codec.name.startswith("pcm_") else 0
        next_time = None
        for packet in self._packets(begin):
            if 0 < packet.size < sample_size:  # the writer was stopped within a sample
                continue
            try:
                frames = codec.decode(_whole(packet, sample_size))
            except (FFmpegError, ValueError) as error:
                if self._container.format.name == "mp3" and _is_no_audio(bytes(packet)):
                    continue
                self._fail(error)
                return
            for frame in frames:
                if not frame.samples:
                    continue
                if self._end and frame.sample_rate != self.rate:
                    rates = f"from {self.rate} Hz to {frame.sample_rate} Hz"
                    raise AudioError(f"{self.name}: the sample rate changes {rates} after {self._seconds():.1f} s")
                if self._container.format.name == "ogg" and frame.pts is not None:
                    if next_time is not None and (frame.pts - next_time) * frame.time_base > _JUMP:
                        raise AudioError(f"{self.name}: damaged, samples are missing after {self._seconds():.1f} s")
                    next_time = frame.pts + round(frame.samples / frame.sample_rate / frame.time_base)
                self.rate = frame.sample_rate
                self._end += frame.samples
                yield frame
        self._check_end()

    def _fail(self, error: Exception) -> None:
        """Raise an error of the decoder, unless all samples have been read and it concerns what follows them."""
        self._source.check()
        if self.length is None or self._end < self.length:
            raise AudioError(f"{self.name}: decoding failed after {self._seconds():.1f} s ({_cause(error)})") from error

    def _check_end(self) -> None:
        wav, source = self._source.wav, self._source
        promised, held, unit = self.length or 0, self._end, "samples"
        if wav is not None and wav.size:
            promised, held, unit = wav.size, source.held - wav.begin, "bytes"
            if self.length:
                promised, held, unit = self.length, held // wav.block, "samples"
        elif wav is not None and not source.ended:
            raise AudioError(f"{self.name}: decoding stopped before the end, after {self._seconds():.1f} s")
        if held < promised:
            raise AudioError(f"{self.name}: cut short: the header declares {promised} {unit}, but the file has {held}")

    def _seconds(self) -> float:
        return self._end / self.rate if self.rate else 0.0


def audio_seconds(path: str | os.PathLike[str] | bytes, name: str | None = None) -> float:
    """Return the length of a file in seconds, from its header where that is exact, and else from all of its packets.

    MP3, AAC and Opus can be up to 0.1 s shorter when decoded, because encoders add samples at the ends.

    Args:
        path: The file, or its content.
        name: Name in messages. ``None``: the file's.

    Raises:
        AudioError: The file cannot be read or contains no audio.
    """
    with AudioFile(path, name) as file:
        return file.count() / file.rate


def _is_no_audio(packet: bytes) -> bool:
    """Return True for what is between or after the frames of MP3: tags, as where files were joined, and zeros."""
    return packet.startswith((b"ID3", b"TAG", b"APETAGEX")) or (bool(packet) and not any(packet))


def _whole(packet: Any, sample_size: int) -> Any:
    """Return a packet of PCM without the part of a sample at its end, which PyAV before 18 raises an error for."""
    rest = packet.size % sample_size if sample_size else 0
    if not rest:
        return packet
    whole: Any = av.Packet(bytes(packet)[: packet.size - rest])
    whole.pts, whole.dts, whole.time_base = packet.pts, packet.dts, packet.time_base
    return whole


def _mono(frame: AudioFrame) -> tuple[np.ndarray, float | None]:
    """Return the mean of a frame's channels, float32 ``[S]``, full scale at 1.0.

    Returns:
        The mean, and, of several channels, the mean of their sums of squares.
    """
    kind, channels, count = frame.format.name, frame.layout.nb_channels, frame.samples
    dtype = np.dtype(_TYPES[kind.removesuffix("p")])
    planes = cast(Any, frame.planes)
    if frame.format.is_planar:
        samples = [np.frombuffer(plane, dtype, count) for plane in planes]
    else:
        samples = list(np.frombuffer(planes[0], dtype, count * channels).reshape(count, channels).T)
    full, middle = 1.0, 0.0
    if dtype.kind != "f":
        full = 256**dtype.itemsize / 2
        middle = full if dtype.kind == "u" else 0.0
    with np.errstate(over="ignore", invalid="ignore"):  # what becomes infinite or NaN is reported by the caller
        mono = samples[0].astype(np.float32)
        if len(samples) == 1:
            return _scaled(mono, middle, full), None
        power = _power(mono, middle)
        for channel in samples[1:]:
            values = channel.astype(np.float32)
            power += _power(values, middle)
            mono += values
        mono = _scaled(mono, middle * len(samples), full)
        mono /= np.float32(len(samples))
    return mono, power / len(samples) / full**2


def _scaled(samples: np.ndarray, middle: float, full: float) -> np.ndarray:
    """Subtract ``middle`` and divide by ``full``, in place."""
    if middle:
        samples -= np.float32(middle)
    if full != 1:
        samples *= np.float32(1 / full)
    return samples


def _power(samples: np.ndarray, middle: float) -> float:
    values = samples - np.float32(middle) if middle else samples
    return float(np.dot(values, values))


def _cause(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error).splitlines()[0].strip().rstrip(".")

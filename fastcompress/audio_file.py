"""Samples of audio files and streams, decoded by PyAV (ffmpeg): files and pipes take the same path.

Needs ``av`` (``pip install 'fastcompress[audio]'``).
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

import av
import numpy as np
from av.audio.frame import AudioFrame
from av.error import FFmpegError

#: Formats whose header holds the exact number of samples. WAV is read by :func:`_wav_header`.
_EXACT = ("flac", "aiff", "au", "caf", "tta", "wv", "nistsphere")
#: How their files begin, but for FLAC. ffmpeg gets no size of such a file, or it would estimate the length of one whose
#: header leaves it open. (In FLAC it does not, and seeks by the size.)
_EXACT_MAGIC = (b"RIFF", b"RIFX", b"RF64", b"BW64", b"FORM", b".snd", b"caff", b"TTA1", b"wvpk", b"NIST")
#: Formats in which ffmpeg seeks to an exact sample: those of the first line if they hold PCM.
_SEEKS_PCM = ("wav", "w64", "aiff", "au", "caf")
_SEEKS = ("flac", "mov,mp4,m4a,3gp,3g2,mj2")
#: Formats and codecs whose packets have exact times, so that those before a part need no decoding.
_SKIPS = (("mp3", "mp3float"), ("mp3", "mp3"), ("ogg", "flac"), ("ogg", "opus"), ("ogg", "libopus"))
#: Seconds that a lossy codec decodes before a part, so that its state is that of the whole.
_LEAD_IN = 1.0
#: Seconds by which the clock of Ogg may jump. ffmpeg drops pages that fail their checksum without an error.
_JUMP = 0.2

_PCM, _FLOAT, _EXTENSIBLE = 1, 3, 0xFFFE
#: A program that writes WAV to a pipe does not know the length: sox, ffmpeg and arecord write at least this, or 0.
_UNKNOWN = 0x7FFFF000
#: Bytes before the samples that are searched for the WAV header.
_MOST_HEADER = 1 << 24
_BUFFER = 1 << 16
_PACKET = 1 << 17  # bytes of WAV per packet from a file; pipes keep ffmpeg's default of less than 0.1 s

_TYPES = {"u8": np.uint8, "s16": np.int16, "s32": np.int32, "s64": np.int64, "flt": np.float32, "dbl": np.float64}


class AudioError(ValueError):
    """An audio file that cannot be used. The message is one line that names the file and the reason."""


@dataclass(frozen=True)
class _WavHeader:
    """What a WAV header says of the samples.

    Attributes:
        kind: Format code, of the subformat for extensible headers.
        block: Bytes of one sample of every channel, or of one block of a compressed codec.
        begin: Position of the first sample in the file, in bytes.
        size: Bytes of samples; 0 if the header does not know.
        is_empty: True if there are no samples, rather than an unknown number of them.
    """

    kind: int
    block: int
    begin: int
    size: int
    is_empty: bool


class _Source:
    """The bytes of a file or stream, in the form that PyAV reads.

    PyAV calls from C code, where an exception could get lost: :meth:`check` raises it afterwards.
    """

    def __init__(self, stream: Any, name: str, is_file: bool) -> None:
        self.name = name  # PyAV takes a hint from the extension
        self._stream = stream
        # A BufferedReader waits until it has all bytes that `read` asks for; `read1` returns those that have arrived.
        self._read = getattr(stream, "read1", stream.read)
        self._is_file = is_file
        self._error: BaseException | None = None
        self._ahead = b""
        self._place = 0
        self.ended = False
        self.wav = _wav_header(self)
        hides_size = self._peek(4) in _EXACT_MAGIC
        self._size = os.fstat(stream.fileno()).st_size if is_file else 0
        self._whences = (os.SEEK_SET, os.SEEK_CUR) if hides_size else (os.SEEK_SET, os.SEEK_CUR, os.SEEK_END)
        self.rewind()

    def rewind(self) -> None:
        """Go to the start of a file."""
        if self._is_file:
            self._stream.seek(0)
            self._ahead, self._place = b"", 0
        # ffmpeg looks for S/PDIF in the first 64 KiB of PCM, which take seconds to arrive from a microphone. At the
        # end of a file it looks at less, and then goes back to the first sample and reads on.
        is_pcm = self.wav is not None and self.wav.kind == _PCM
        self.pauses = is_pcm and not self._is_file

    @property
    def held(self) -> int:
        """Bytes of the whole file, or those that a stream has delivered."""
        return self._size if self._is_file else self._place

    def check(self) -> None:
        """Raise the exception of a call that came from C code."""
        if self._error is not None:
            error, self._error = self._error, None
            if isinstance(error, OSError):
                raise AudioError(f"{self.name}: {(error.strerror or str(error)).lower()}") from error
            raise error

    def read(self, count: int) -> bytes:
        try:
            if self.pauses and self.wav is not None and self._place < self.wav.begin:
                count = min(count, self.wav.begin - self._place)
            elif self.pauses:
                self.pauses = False
                return b""
            part = self._ahead[:count] or self._read(count)
            self._ahead = self._ahead[count:]
        except BaseException as error:  # KeyboardInterrupt too
            self._error = error
            return b""
        self.ended = not part
        self._place += len(part)
        return bytes(part)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        try:
            return cast(int, self._stream.seek(offset, whence)) if whence in self._whences else -1
        except (OSError, ValueError, OverflowError):  # ffmpeg tries places that headers name
            return -1
        except BaseException as error:
            self._error = error
            return -1

    def tell(self) -> int:
        return cast(int, self._stream.tell())

    def seekable(self) -> bool:
        return self._is_file

    def peek(self, begin: int, count: int) -> bytes:
        """Return bytes of the head, which stay to be read; fewer at the end."""
        return self._peek(begin + count)[begin:]

    def _peek(self, end: int) -> bytes:
        parts, missing = [self._ahead], end - len(self._ahead)
        while missing > 0 and (part := self._read(min(missing, _BUFFER))):
            parts.append(part)
            missing -= len(part)
        self._ahead = b"".join(parts)
        return self._ahead[:end]


def _wav_header(source: _Source) -> _WavHeader | None:
    """Read the header of WAV, which PyAV does not expose; ``None`` for anything else."""
    head = source.peek(0, 12)
    if head[:4] not in (b"RIFF", b"RIFX", b"RF64", b"BW64") or head[8:] != b"WAVE":
        return None
    order = ">" if head[:4] == b"RIFX" else "<"
    end = 8 + struct.unpack(order + "I", head[4:8])[0]
    kind, block, place, long_size = 0, 0, 12, 0
    while len(head := source.peek(place, 8)) == 8:
        name, size = struct.unpack(order + "4sI", head)
        place += 8
        if name == b"data":
            if size == 0xFFFFFFFF and 0 < long_size < 1 << 62:
                return _WavHeader(kind, block, place, long_size, False)
            # A length of 0 is unknown, unless another chunk follows at once, within the length of the whole.
            is_empty = size == 0 and place < end < _UNKNOWN and _is_chunk(source.peek(place, 8), order, end - place)
            return _WavHeader(kind, block, place, size if size < _UNKNOWN else 0, is_empty)
        if place + size > _MOST_HEADER:
            return None
        content = source.peek(place, min(size, 40))
        if name == b"fmt " and len(content) >= 14:
            kind, block = struct.unpack(order + "H10xH", content[:14])
            if kind == _EXTENSIBLE and len(content) >= 26:
                kind = struct.unpack(order + "H", content[24:26])[0]
        elif name == b"ds64" and len(content) >= 16:
            long_size = struct.unpack("<Q", content[8:16])[0]
        place += size + size % 2
    return None


def _is_chunk(head: bytes, order: str, most: int) -> bool:
    """Whether bytes are the name and the size of a chunk of at most so many bytes, and not samples."""
    name, size = head[:4], head[4:]
    if len(size) < 4 or not name.isascii() or not name.decode().isprintable():
        return False
    return 8 + cast(int, struct.unpack(order + "I", size)[0]) <= most


class AudioFile:
    """Mono samples of an audio file or of a stream that need not seek.

    Args:
        source: File that ffmpeg reads, or binary stream at its first byte. Of several audio streams in a file, the one
            that ffmpeg considers best.

    Attributes:
        name: Name in messages.
        rate: Samples per second.
        length: Number of samples that the header promises, ``None`` if it is unknown or only an estimate.
        expected: Number of samples to expect, 0 if there is no estimate.

    Raises:
        AudioError: The file cannot be opened or holds no audio.
    """

    def __init__(self, source: str | os.PathLike[str] | BinaryIO) -> None:
        self._is_file = isinstance(source, str | os.PathLike)
        self._stream: Any = None
        if isinstance(source, str | os.PathLike):
            self.name = os.fspath(source)
            stream: Any = _open(self.name)
            self._stream = stream
        else:
            self.name, stream = str(getattr(source, "name", "stream")), source
        try:
            self._source = _Source(stream, self.name, self._is_file)
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
            AudioError: The decoder fails, or the file ends before its header says so.
        """
        while self._ready < count and (frame := next(self._frames, None)) is not None:
            self._add(frame)
        samples = self._parts[0] if len(self._parts) == 1 else np.concatenate([np.zeros(0, np.float32), *self._parts])
        self._parts = [samples[count:]]
        self._ready = len(self._parts[0])
        return samples[:count]

    def skip_to(self, sample: int) -> None:
        """Continue to read at a sample, counted from the first one; must be called before :meth:`read`.

        What is before it is not decoded in WAV, FLAC, AIFF, AU, MP3, MP4, Ogg FLAC and Opus.
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
                pass  # read from the start, which raises what is wrong
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
        if wav is not None and wav.kind in (_PCM, _FLOAT):  # the header says all that probing could find
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
        self._audio.codec_context.options = {"err_detect": "crccheck+bitstream+buffer+explode"}
        self.length, self._end, self._first = None, 0, 0
        self.rate = self._audio.sample_rate
        self.length = self._promised()
        self._frames = self._decoded()
        first = None if wav is not None and wav.is_empty else next(self._frames, None)
        if first is None:
            raise AudioError(f"{self.name}: holds no audio (0 seconds)")
        self._first = first.pts or 0
        self._parts, self._ready, self._drop = [], 0, 0
        self._add(first)
        self.rate = first.sample_rate
        self.length = self._promised()
        guess = self._audio.duration
        self.expected = self.length or (round(guess * self._audio.time_base * self.rate) if guess else 0)

    def _add(self, frame: AudioFrame) -> None:
        part = _mono(frame)
        dropped = min(self._drop, len(part))
        self._drop -= dropped
        self._parts.append(part[dropped:])
        self._ready += len(part) - dropped

    def _index(self, time: int) -> int:
        return int(round((time - self._first) * self._audio.time_base * self.rate))

    def _promised(self) -> int | None:
        """Return the number of samples that the header promises, ``None`` if it is unknown or an estimate."""
        name, is_pcm = self._container.format.name, self._audio.codec_context.name.startswith("pcm_")
        if name == "wav" and self._source.wav is not None:
            wav = self._source.wav
            return wav.size // wav.block if is_pcm and wav.size and wav.block else None
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
        """Yield frames that hold samples, and check that they are all there."""
        codec = self._audio.codec_context
        bits = re.search(r"\d+", codec.name)  # none in pcm_mulaw and pcm_alaw
        sample_size = codec.channels * (int(bits[0]) // 8 if bits else 1) if codec.name.startswith("pcm_") else 0
        next_time = None
        for packet in self._packets(begin):
            if 0 < packet.size < sample_size:  # the writer was stopped within a sample
                continue
            try:
                frames = packet.decode()
            except (FFmpegError, ValueError) as error:
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
            raise AudioError(
                f"{self.name}: cut short: the header promises {promised} {unit}, but the file holds {held}"
            )

    def _seconds(self) -> float:
        return float(self._end / self.rate) if self.rate else 0.0


def audio_seconds(path: str | os.PathLike[str]) -> float:
    """Return the length of a file in seconds, from its header where that is exact, and else from all of its packets.

    MP3, AAC and Opus can be up to 0.1 s shorter when decoded, because encoders add samples at the ends.

    Raises:
        AudioError: The file cannot be read or holds no audio.
    """
    with AudioFile(path) as file:
        return file.count() / file.rate


def _open(path: str) -> BinaryIO:
    try:
        file = open(path, "rb")
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise AudioError(f"{path}: {reason.lower()}") from error
    if not file.peek(1):
        file.close()
        raise AudioError(f"{path}: the file is empty (0 bytes)")
    return file


def _mono(frame: AudioFrame) -> np.ndarray:
    """Return the mean of a frame's channels, float32 ``[S]``, full scale at 1.0."""
    kind, channels, count = frame.format.name, frame.layout.nb_channels, frame.samples
    dtype = np.dtype(_TYPES[kind.removesuffix("p")])
    planes = cast(Any, frame.planes)
    if frame.format.is_planar:
        samples = [np.frombuffer(plane, dtype, count) for plane in planes]
    else:
        samples = list(np.frombuffer(planes[0], dtype, count * channels).reshape(count, channels).T)
    middle, scale = 0.0, 1.0
    if dtype.kind != "f":
        scale = 2.0 / 256**dtype.itemsize
        middle = 128.0 if dtype.kind == "u" else 0.0
    mono = np.zeros(count, np.float32)
    with np.errstate(over="ignore", invalid="ignore"):  # what becomes infinite or NaN is reported by the caller
        for channel in samples:
            mono += channel.astype(np.float32)
        if middle:
            mono -= np.float32(middle * len(samples))
        if scale != 1:
            mono *= np.float32(scale)
        if len(samples) > 1:
            mono /= np.float32(len(samples))
    return mono


def _cause(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error).splitlines()[0].strip().rstrip(".")

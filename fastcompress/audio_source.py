"""The bytes of audio files and streams, in the form that PyAV reads.

The header of WAV is read here, because PyAV does not expose the length that it declares.
"""

from __future__ import annotations

import io
import os
import struct
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

PCM, FLOAT, _EXTENSIBLE = 1, 3, 0xFFFE
#: A program that writes WAV to a pipe does not know the length: sox, ffmpeg and arecord write at least this, or 0.
_UNKNOWN = 0x7FFFF000
#: Bytes before the samples that are searched for the WAV header.
_MOST_HEADER = 1 << 24
_PIECE = 1 << 16
#: First bytes of files whose header may have an exact length. ffmpeg does not get the size of such a file, because it
#: would estimate the length if the header does not declare one. FLAC is not included: ffmpeg does not estimate its
#: length, and needs the size to seek.
_EXACT_MAGIC = (b"RIFF", b"RIFX", b"RF64", b"BW64", b"FORM", b".snd", b"caff", b"TTA1", b"wvpk", b"NIST")


#: Ends of the names of the chunks of W64, after four letters; that of the file itself has another.
_W64_RIFF = b"riff" + bytes.fromhex("2e91cf11a5d628db04c10000")
_W64_CHUNK = bytes.fromhex("f3acd3118cd100c04f8edb8a")


class AudioError(ValueError):
    """An audio file that cannot be used. The message is one line that names the file and the reason."""


class AudioWarning(UserWarning):
    """Audio that was read, and may not be what the user expects. The message is one line that names the file."""


@dataclass(frozen=True)
class WavHeader:
    """Description of the samples in a WAV header.

    Attributes:
        kind: Format code, of the subformat for extensible headers.
        block: Bytes of one sample of every channel, or of one block of a compressed codec.
        begin: Position of the first sample in the file, in bytes.
        size: Bytes of samples; 0 if the number is unknown or there are none.
        is_empty: Whether there are no samples.
    """

    kind: int
    block: int
    begin: int
    size: int
    is_empty: bool


class Source:
    """The bytes of a file or stream, in the form that PyAV reads.

    PyAV calls the methods from C code, where an exception could get lost; ``check`` raises it afterwards.
    """

    def __init__(self, stream: Any, name: str, is_file: bool) -> None:
        self.name = name  # PyAV uses the extension to detect the format
        self._stream = stream
        # `read` of a BufferedReader waits for all requested bytes; `read1` returns those that have arrived.
        self._read = getattr(stream, "read1", stream.read)
        self._is_file = is_file
        self._error: BaseException | None = None
        self._ahead = b""
        self._place = 0
        self.ended = False
        self.wav = _wav_header(self)
        self.w64_samples = _w64_samples(self)
        hides_size = self._peek(4) in _EXACT_MAGIC
        self._size = stream.seek(0, os.SEEK_END) if is_file else 0
        self._whences = (os.SEEK_SET, os.SEEK_CUR) if hides_size else (os.SEEK_SET, os.SEEK_CUR, os.SEEK_END)
        self.rewind()

    def rewind(self) -> None:
        """Go to the start of a file."""
        if self._is_file:
            self._stream.seek(0)
            self._ahead, self._place = b"", 0
        # ffmpeg searches the first 64 KiB of PCM for S/PDIF, and they take seconds to arrive from a microphone. At the
        # end of a file it searches fewer bytes, and then seeks back to the first sample.
        is_pcm = self.wav is not None and self.wav.kind == PCM
        self.pauses = is_pcm and not self._is_file

    @property
    def held(self) -> int:
        """Number of bytes of the file, or of those that a stream has returned so far."""
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
        except (OSError, ValueError, OverflowError):  # ffmpeg seeks to positions that a damaged header may contain
            return -1
        except BaseException as error:
            self._error = error
            return -1

    def tell(self) -> int:
        return cast(int, self._stream.tell())

    def seekable(self) -> bool:
        return self._is_file

    def peek(self, begin: int, count: int) -> bytes:
        """Return the next bytes without consuming them; fewer at the end."""
        return self._peek(begin + count)[begin:]

    def _peek(self, end: int) -> bytes:
        parts, missing = [self._ahead], end - len(self._ahead)
        while missing > 0 and (part := self._read(min(missing, _PIECE))):
            parts.append(part)
            missing -= len(part)
        self._ahead = b"".join(parts)
        return self._ahead[:end]


def _wav_header(source: Source) -> WavHeader | None:
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
                return WavHeader(kind, block, place, long_size, False)
            # A length of 0 means unknown, unless another chunk follows immediately, within the length of the file.
            is_empty = size == 0 and place < end < _UNKNOWN and _is_chunk(source.peek(place, 8), order, end - place)
            return WavHeader(kind, block, place, size if size < _UNKNOWN else 0, is_empty)
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


def _w64_samples(source: Source) -> int | None:
    """Return the samples per channel that the header of an uncompressed W64 file promises; ``None``: unknown."""
    if source.peek(0, 16) != _W64_RIFF:
        return None
    block, place = 0, 40
    while len(head := source.peek(place, 24)) == 24 and place < _MOST_HEADER:
        size = struct.unpack("<Q", head[16:])[0]  # counts these 24 bytes
        if head[:16] == b"data" + _W64_CHUNK:
            return (size - 24) // block if block and 24 < size < 1 << 62 else None
        if head[:16] == b"fmt " + _W64_CHUNK:
            content = source.peek(place + 24, 14)
            block = struct.unpack("<12xH", content)[0] if len(content) == 14 else 0
        if size < 24:
            return None
        place += (size + 7) // 8 * 8
    return None


def _is_chunk(head: bytes, order: str, most: int) -> bool:
    """Return whether bytes are the name and size of a chunk of at most ``most`` bytes, and not samples."""
    name, size = head[:4], head[4:]
    if len(size) < 4 or not name.isascii() or not name.decode().isprintable():
        return False
    return 8 + cast(int, struct.unpack(order + "I", size)[0]) <= most


def open_file(path: str, name: str) -> BinaryIO:
    """Open a file that is not empty.

    Raises:
        AudioError: It cannot be opened, or has 0 bytes. The message begins with ``name``.
    """
    try:
        file = open(path, "rb")
    except (OSError, ValueError) as error:  # ValueError: the name contains a zero byte
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise AudioError(f"{name}: {reason.lower()}") from error
    if not file.peek(1):
        file.close()
        raise AudioError(f"{name}: the file is empty (0 bytes)")
    return file


def open_bytes(content: bytes, name: str) -> BinaryIO:
    """Return the content of a file, which must not be empty, as a file.

    Raises:
        AudioError: It has 0 bytes. The message begins with ``name``.
    """
    if not content:
        raise AudioError(f"{name}: the file is empty (0 bytes)")
    return io.BytesIO(content)

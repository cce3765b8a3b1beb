"""WAV from a stream that cannot seek, such as a pipe, which libsndfile does not read."""

from __future__ import annotations

import struct
from typing import BinaryIO

import numpy as np

_PCM, _FLOAT, _EXTENSIBLE = 1, 3, 0xFFFE
#: Who writes to a pipe does not know the length: sox, ffmpeg and arecord promise at least this much, or nothing.
_UNKNOWN = 0x7FFFF000
#: Bytes that are asked for at once: a stream may take memory for all of them, and a header may lie.
_PIECE = 1 << 20


class WavePipe:
    """Samples of a WAV stream: PCM of 8, 16, 24 or 32 bits, or floating of 32 or 64.

    Where the header does not know the length, or promises 2 GiB and more, the stream's end is the end. A length of 0 is
    one that is not known, unless another chunk follows at once, within the length of the whole.

    Args:
        stream: binary, at the first byte.

    Attributes:
        samplerate: Hz.
        channels: how many.
        frames: samples of a channel that the header promises; 0: not known, or none.

    Raises:
        ValueError: no WAV, or an encoding that is not known here.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._ahead = b""  # read from it already
        head = self._exactly(12)
        if head[:4] != b"RIFF" or head[8:] != b"WAVE":
            raise ValueError(f"must be WAV with its header, but begins with {head[:4]!r}")
        form, place, end = b"", 12, 8 + struct.unpack("<I", head[4:8])[0]
        while True:
            name, size = struct.unpack("<4sI", self._exactly(8))
            place += 8
            if name == b"data":
                break
            content = self._exactly(size + size % 2)
            place += len(content)
            if name == b"fmt ":
                form = content
        if len(form) < 16:
            raise ValueError("has no format before its samples")
        self.channels: int
        self.samplerate: int
        kind, self.channels, self.samplerate, _, self._size, bits = struct.unpack("<HHIIHH", form[:16])
        if kind == _EXTENSIBLE and len(form) >= 26:
            kind = struct.unpack("<H", form[24:26])[0]
        self._is_float = kind == _FLOAT
        known = (32, 64) if self._is_float else (8, 16, 24, 32) if kind == _PCM else ()
        if bits not in known or not self.channels or not self.samplerate or self._size != self.channels * bits // 8:
            raise ValueError(
                f"must be WAV in PCM or floating point, got format {kind} of {bits} bits, {self.channels} channels at "
                f"{self.samplerate} Hz"
            )
        self._width = bits // 8
        self.frames: int = 0 if size >= _UNKNOWN else size // self._size
        is_known = self._is_chunk(end - place) if size == 0 and place < end < _UNKNOWN else 0 < size < _UNKNOWN
        self._left = self.frames if is_known else None

    def read(self, frames: int) -> np.ndarray:
        """The next samples, float32 ``[frames, channels]``, full scale at 1; fewer at the end, and then none."""
        wanted = frames if self._left is None else min(frames, self._left)
        data = self._some(wanted * self._size)
        data = data[: len(data) - len(data) % self._size]
        if self._left is not None:
            self._left -= len(data) // self._size
        if self._is_float:
            with np.errstate(over="ignore", invalid="ignore"):  # what fp32 cannot hold becomes infinite
                samples = np.frombuffer(data, f"<f{self._width}").astype(np.float32)
        elif self._width == 1:
            samples = (np.frombuffer(data, np.uint8).astype(np.float32) - 128) / np.float32(128)
        else:
            wide = np.zeros((len(data) // self._width, 4), np.uint8)
            wide[:, 4 - self._width :] = np.frombuffer(data, np.uint8).reshape(-1, self._width)
            samples = wide.view("<i4")[:, 0].astype(np.float32) / np.float32(2**31)
        return samples.reshape(-1, self.channels)

    def _is_chunk(self, most: int) -> bool:
        """Whether what comes next is a name and the size of a chunk of so many bytes at most, and no samples."""
        self._ahead = self._some(8)
        if len(self._ahead) < 8:
            return False
        name, size = self._ahead[:4], int.from_bytes(self._ahead[4:], "little")
        return name.isascii() and name.decode().isprintable() and 8 + size <= most

    def _some(self, count: int) -> bytes:
        """So many bytes, or those up to the end."""
        parts = [self._ahead[:count]]
        self._ahead = self._ahead[count:]
        count -= len(parts[0])
        while count and (part := self._stream.read(min(count, _PIECE))):
            parts.append(part)
            count -= len(part)
        return b"".join(parts)

    def _exactly(self, count: int) -> bytes:
        data = self._some(count)
        if len(data) < count:
            raise ValueError("ends before its samples begin: must be WAV with its header")
        return data

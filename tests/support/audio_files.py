"""Write audio with PyAV in formats that soundfile does not write, and read streams that cannot seek."""

from __future__ import annotations

import io
import shutil
import struct
import subprocess
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest


class Pipe(io.RawIOBase):
    """A stream that cannot seek and returns at most ``most`` bytes per call."""

    name = "<stdin>"

    def __init__(self, content: bytes, most: int = 1 << 20) -> None:
        self._left, self._most = content, most
        self.asked = 0

    def readable(self) -> bool:
        return True

    def read(self, count: int = -1) -> bytes:
        self.asked = max(self.asked, count)
        part = self._left[: min(count, self._most)]
        self._left = self._left[len(part) :]
        return part


def signal(frames: int, channels: int = 1) -> np.ndarray:
    """Return noise below full scale, float64 ``[frames, channels]``."""
    return np.random.default_rng(frames).uniform(-0.5, 0.5, (frames, channels))


def encode(
    path: Path, codec: str, samples: np.ndarray, rate: int = 16_000, streams: int = 1, video: bool = False, **mux: str
) -> Path:
    """Write samples ``[S]`` with PyAV. If there are several streams, all but the first contain silence.

    Args:
        path: File; its extension determines the format.
        codec: Encoder of ffmpeg.
        samples: Samples below full scale.
        rate: Samples per second.
        streams: Number of audio streams.
        video: Whether to add a video stream before them.
        mux: Options of the format.
    """
    with av.open(str(path), "w", options=mux) as container:
        if video:
            pictures: Any = container.add_stream("mpeg4", rate=25)
            pictures.width = pictures.height = 32
            pictures.pix_fmt = "yuv420p"
        outs: list[Any] = [container.add_stream(codec, rate=rate, layout="mono") for _ in range(streams)]
        if video:
            for _ in range(10):
                picture = av.VideoFrame.from_ndarray(np.zeros((48, 32), np.uint8), format="yuv420p")
                container.mux(pictures.encode(picture))
            container.mux(pictures.encode(None))
        for number, out in enumerate(outs):
            out.bit_rate = 12_200 if codec == "libopencore_amrnb" else 64_000
            values = samples if number == 0 else np.zeros_like(samples)
            content = (values * 32767).astype(np.int16)[None]
            frame = av.AudioFrame.from_ndarray(content, format="s16", layout="mono")
            frame.sample_rate = rate
            frame.pts = 0
            container.mux(out.encode(frame))
            container.mux(out.encode(None))
    return path


def with_cover(content: bytes) -> bytes:
    """Add a picture to FLAC (a PICTURE block) or MP3 (an ID3v2 tag)."""
    picture = b"\x89PNG\r\n\x1a\n" + bytes(3000)
    if content[:4] == b"fLaC":
        size = 4 + int.from_bytes(content[5:8], "big")
        head = content[:4] + bytes([content[4] & 0x7F]) + content[5 : 4 + size]
        block = struct.pack(">II", 3, 9) + b"image/png" + struct.pack(">IIIIII", 0, 1, 1, 24, 0, len(picture)) + picture
        last = 0x80 if content[4] & 0x80 else 0
        return head + bytes([6 | last]) + len(block).to_bytes(3, "big") + block + content[4 + size :]
    body = b"\0image/png\0\3\0" + picture
    frame = b"APIC" + struct.pack(">IH", len(body), 0) + body
    size = len(frame)
    return b"ID3\3\0\0" + bytes([size >> 21 & 127, size >> 14 & 127, size >> 7 & 127, size & 127]) + frame + content


def ffmpeg_samples(path: Path) -> int:
    """Return the number of samples that the ffmpeg program decodes; skip the test if it is not installed."""
    program = shutil.which("ffmpeg")
    if program is None:
        pytest.skip("needs the ffmpeg program")
    command = [program, "-v", "quiet", "-i", str(path), "-map", "0:a:0", "-f", "s16le", "-ac", "1", "-"]
    return len(subprocess.run(command, capture_output=True, check=True).stdout) // 2

"""WAV from streams that cannot seek, held to what libsndfile reads from the same file."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import numpy as np
import pytest
import soundfile

from fastcompress.audio import AudioError, audio_blocks, load_audio
from fastcompress.wave_pipe import WavePipe


class Pipe(io.RawIOBase):
    """Cannot seek, and gives what it likes."""

    name = "<stdin>"

    def __init__(self, content: bytes, most: int = 1 << 20) -> None:
        self._left, self._most = content, most

    def read(self, count: int = -1) -> bytes:
        part = self._left[: min(count, self._most)]
        self._left = self._left[len(part) :]
        return part


def signal(frames: int, channels: int) -> np.ndarray:
    return np.random.default_rng(frames).uniform(-1, 1, (frames, channels))


def written(path: Path, frames: int = 100, channels: int = 2, rate: int = 16_000, **kind: str) -> bytes:
    soundfile.write(path, signal(frames, channels), rate, **kind)
    return path.read_bytes()


def with_size(content: bytes, size: int) -> bytes:
    """The header promises as much."""
    place = content.index(b"data") + 4
    return content[:place] + struct.pack("<I", size) + content[place + 4 :]


def test_a_length_that_lies_takes_no_memory(tmp_path: Path):
    class Recorded(Pipe):
        asked = 0

        def read(self, count: int = -1) -> bytes:
            self.asked = max(self.asked, count)
            return super().read(count)

    content = written(tmp_path / "a.wav")
    pipe = Recorded(content[:12] + b"LIST" + struct.pack("<I", 2**32 - 2) + content[12:])
    with pytest.raises(ValueError, match="ends before its samples begin"):
        WavePipe(pipe)
    assert pipe.asked <= 1 << 20


@pytest.mark.parametrize("kind", ["WAV", "WAVEX"])
@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE"])
@pytest.mark.parametrize("channels, most", [(1, 1 << 20), (3, 5)])
def test_every_encoding(tmp_path: Path, kind: str, subtype: str, channels: int, most: int):
    content = written(tmp_path / "a.wav", 101, channels, 8_000, format=kind, subtype=subtype)
    wanted, rate = soundfile.read(tmp_path / "a.wav", dtype="float32", always_2d=True)
    pipe = WavePipe(Pipe(content, most))
    assert (pipe.samplerate, pipe.channels, pipe.frames) == (rate, channels, 101)
    blocks = [pipe.read(40) for _ in range(4)]
    assert [len(b) for b in blocks] == [40, 40, 21, 0]
    found = np.concatenate(blocks)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("size", [0, 0x7FFFF000, 0x80000000, 0xFFFFFFFF])
def test_lengths_that_the_writer_did_not_know(tmp_path: Path, size: int):
    content = written(tmp_path / "a.wav", subtype="PCM_16")
    pipe = WavePipe(Pipe(with_size(content, size) + b"\0\0\1"))  # a frame is four bytes: this is none
    assert pipe.frames == 0 and len(pipe.read(1000)) == 100


def test_other_chunks(tmp_path: Path):
    content = written(tmp_path / "a.wav", subtype="PCM_16")
    place = content.index(b"fmt ")
    more = content[:place] + b"LIST" + struct.pack("<I", 5) + b"abcde\0" + content[place:] + b"LIST\4\0\0\0more"
    np.testing.assert_array_equal(WavePipe(Pipe(more)).read(1000), WavePipe(Pipe(content)).read(1000))


LIST = b"LIST" + struct.pack("<I", 26) + b"INFOISFT" + struct.pack("<I", 14) + b"Lavf60.16.100\0"


def as_riff(content: bytes, size: int) -> bytes:
    """All of it promises as much."""
    return content[:4] + struct.pack("<I", size) + content[8:]


@pytest.mark.parametrize("riff", [0, 36, 36 + len(LIST), 236 + len(LIST), 0x7FFFF024, 0xFFFFFFFF])
@pytest.mark.parametrize("size", [0, 0x7FFFF000, 0xFFFFFFFF])
def test_as_ffmpeg_writes_to_a_pipe(tmp_path: Path, riff: int, size: int):
    """What wrote it stands between format and samples, and no length is known; or a header that nobody came back to."""
    content = written(tmp_path / "a.wav", channels=1, subtype="PCM_16")
    place = content.index(b"data")
    piped = as_riff(content[:place] + LIST + with_size(content, size)[place:], riff)
    wanted = soundfile.read(tmp_path / "a.wav", dtype="float32", always_2d=True)[0]
    for most in (1 << 20, 7):
        pipe = WavePipe(Pipe(piped, most))
        assert pipe.frames == 0
        np.testing.assert_array_equal(pipe.read(1000), wanted)
    np.testing.assert_array_equal(np.concatenate(list(audio_blocks(Pipe(piped)))), wanted[:, 0])


@pytest.mark.parametrize("size, heard", [(0, 0), (1, 0), (3, 0), (4, 1), (400, 100)])
def test_chunks_behind_the_samples_are_not_heard(tmp_path: Path, size: int, heard: int):
    content = written(tmp_path / "a.wav", subtype="PCM_16")  # a frame is four bytes
    begin = content.index(b"data") + 8
    whole = with_size(content, size)[: begin + size] + b"\0" * (size % 2) + LIST
    pipe = WavePipe(Pipe(as_riff(whole, len(whole) - 8)))
    assert pipe.frames == heard and len(pipe.read(1000)) == heard and not len(pipe.read(1000))
    if not heard:
        with pytest.raises(AudioError, match=r"<stdin>: holds no audio \(0 seconds\)"):
            list(audio_blocks(Pipe(as_riff(whole, len(whole) - 8))))


def test_a_stream_that_breaks_off_gives_what_it_held(tmp_path: Path):
    content = written(tmp_path / "a.wav", subtype="PCM_16")
    assert len(WavePipe(Pipe(content[:-6])).read(1000)) == 98


@pytest.mark.parametrize("channels, rate", [(1, 16_000), (2, 44_100), (2, 8_000)])
def test_blocks_are_the_whole(tmp_path: Path, channels: int, rate: int):
    content = written(tmp_path / "a.wav", 3_011, channels, rate, subtype="PCM_16")
    wanted = load_audio(tmp_path / "a.wav")
    for seconds in (0.001, 0.01, None):
        for source in (tmp_path / "a.wav", Pipe(content)):
            blocks = list(audio_blocks(source, seconds=seconds))
            np.testing.assert_array_equal(np.concatenate(blocks), wanted)
            assert seconds is None or len(blocks) > 3


def test_streams_that_are_none(tmp_path: Path):
    good = written(tmp_path / "a.wav", subtype="PCM_16")
    law = written(tmp_path / "b.wav", subtype="ULAW")
    place = good.index(b"fmt ")
    for content, message in (
        (b"", "<stdin>: ends before its samples begin"),
        (good[:30], "<stdin>: ends before its samples begin"),
        (good[:12], "<stdin>: ends before its samples begin"),
        (b"fLaC" + good, "<stdin>: must be WAV with its header, but begins with b'fLaC'"),
        (law, "<stdin>: must be WAV in PCM or floating point, got format 7 of 8 bits"),
        (good[:place] + good[good.index(b"data") :], "<stdin>: has no format before its samples"),
        (good[: good.index(b"data") + 8], r"<stdin>: holds no audio \(0 seconds\)"),
        (good[: place + 22] + b"\0\0" + good[place + 24 :], "<stdin>: must be WAV in PCM"),
    ):
        with pytest.raises(AudioError, match=message):
            list(audio_blocks(Pipe(content)))
    nan = np.full(100, np.nan, "<f4")
    soundfile.write(tmp_path / "c.wav", nan, 16_000, subtype="FLOAT")
    with pytest.raises(AudioError, match="<stdin>: holds NaN"):
        list(audio_blocks(Pipe((tmp_path / "c.wav").read_bytes())))

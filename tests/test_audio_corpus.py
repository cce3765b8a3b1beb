"""Odd files that programs write, made by the ffmpeg program: each is as long as ffmpeg says, in samples."""

from __future__ import annotations

import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fastcompress.audio import audio_seconds, load_audio
from tests.support.audio_files import ffmpeg_samples

FFMPEG = shutil.which("ffmpeg")
pytestmark = pytest.mark.skipif(FFMPEG is None, reason="needs the ffmpeg program")

#: Name: options of ffmpeg. "pipe" instead of a name of a file lets it write what it cannot seek in.
CORPUS: dict[str, str] = {
    "pipe.wav": "-f wav",
    "pipe-extensible.wav": "-f wav -ac 3",
    "pipe.flac": "-f flac",
    "pipe.mp3": "-f mp3",
    "pipe.oga": "-f ogg -c:a flac",
    "pipe.aac": "-f adts",
    "pipe.au": "-f au",
    "pipe-fragments.mp4": "-f mp4 -movflags frag_keyframe+empty_moov",
    "no-xing.mp3": "-q:a 5 -write_xing 0",
    "tags.mp3": "-metadata title=a -id3v2_version 3 -write_id3v1 1",
    "low-rate.mp3": "-ar 8000",
    "voice.m4a": "-c:a aac",
    "faststart.m4a": "-c:a aac -movflags +faststart",
    "low-rate.m4a": "-c:a aac -ar 8000",
    "lossless.m4a": "-c:a alac -ac 2",
    "flac.ogg": "-c:a flac",
    "flac.mka": "-c:a flac",
    "vorbis.ogg": "-c:a libvorbis",
    "low-rate.opus": "-c:a libopus -ar 8000",
    "opus.webm": "-c:a libopus -ar 48000",  # at 16 kHz, ffmpeg 8 skips 104 samples at the start and not 312
    "adpcm.wav": "-c:a adpcm_ms",
    "ima.wav": "-c:a adpcm_ima_wav",
    "mulaw.wav": "-c:a pcm_mulaw -ar 8000",
    "bits-24.wav": "-c:a pcm_s24le -ac 2",
    "double.wav": "-c:a pcm_f64le",
    "rf64.wav": "-rf64 always",
    "bits-24.aiff": "-c:a pcm_s24be",
    "a.caf": "-c:a pcm_s16be",
    "a.wv": "-c:a wavpack",
    "a.tta": "-c:a tta",
    "a.ac3": "-c:a ac3 -ar 32000",
    "a.mp2": "-c:a mp2",
    "a.ts": "-c:a mp2 -ar 48000",
    "a.wma": "-c:a wmav2",
    "a.mov": "-c:a pcm_s16le",
}


def killed(path: Path) -> None:
    """Set the sizes of WAV to 0, as a recorder leaves them that was killed."""
    content = path.read_bytes()
    place = content.index(b"data") + 4
    path.write_bytes(content[:4] + bytes(4) + content[8:place] + bytes(4) + content[place + 4 :])


def joined(path: Path) -> None:
    """Join a file with itself, as `cat` does."""
    path.write_bytes(2 * path.read_bytes())


def with_rubbish(path: Path) -> None:
    """Add bytes that are no audio to the end."""
    path.write_bytes(path.read_bytes() + b"\0" * 1000)


def with_odd_chunk(path: Path) -> None:
    """Put a chunk of odd length before the samples, with the byte of padding that the standard asks for."""
    content = path.read_bytes()
    place = content.index(b"data")
    path.write_bytes(content[:place] + b"junk" + struct.pack("<I", 3) + b"abc\0" + content[place:])


CHANGED: dict[str, tuple[str, Callable[[Path], None]]] = {
    "killed.wav": ("", killed),
    "killed-float.wav": ("-c:a pcm_f32le", killed),
    "joined.mp3": ("", joined),
    "joined.aac": ("", joined),
    "rubbish.flac": ("", with_rubbish),
    "rubbish.mp3": ("", with_rubbish),
    "odd-chunk.wav": ("", with_odd_chunk),
}


def make(path: Path, options: str) -> Path:
    """Write 1.7 s of a chirp: no multiple of a frame of any codec."""
    chirp = "aevalsrc=0.4*sin(2*PI*(200+400*t)*t):s=16000:d=1.7"
    target = "-" if path.name.startswith("pipe") else str(path)
    command = [str(FFMPEG), "-v", "error", "-y", "-f", "lavfi", "-i", chirp, *options.split(), target]
    done = subprocess.run(command, capture_output=True)
    if b"Unknown encoder" in done.stderr:
        pytest.skip("this ffmpeg lacks the encoder")
    assert done.returncode == 0, done.stderr.decode()
    if target == "-":
        path.write_bytes(done.stdout)
    return path


def own_rate(path: Path) -> int:
    command = [
        "ffprobe",
        "-v",
        "error",
        "-select_streams",
        "a:0",
        "-show_entries",
        "stream=sample_rate",
        "-of",
        "csv=p=0",
    ]
    found = subprocess.run([*command, str(path)], capture_output=True, text=True, check=True).stdout
    return int(found.split()[0].strip(","))


@pytest.mark.parametrize("name", [*CORPUS, *CHANGED])
def test_odd_files_have_the_length_of_ffmpeg(name: str, tmp_path: Path):
    options, change = CHANGED.get(name, (CORPUS.get(name, ""), None))
    path = make(tmp_path / name, options)
    if change is not None:
        change(path)
    rate = own_rate(path)
    samples = load_audio(path, rate)
    assert len(samples) == ffmpeg_samples(path)
    assert len(samples) / rate == pytest.approx(3.4 if name.startswith("joined") else 1.7, abs=0.25)
    assert np.abs(samples).max() > 0.15
    assert audio_seconds(path) == pytest.approx(len(samples) / rate, abs=0.3)
    np.testing.assert_array_equal(load_audio(path.read_bytes(), rate), samples)

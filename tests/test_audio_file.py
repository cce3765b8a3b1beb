"""Files and streams in every format, compared with the samples of libsndfile or with the encoded samples."""

from __future__ import annotations

import concurrent.futures
import io
import os
import struct
import threading
from pathlib import Path

import numpy as np
import pytest
import soundfile

from fastcompress import audio_file
from fastcompress.audio import AudioError, audio_blocks, audio_seconds, load_audio
from tests.support.audio_files import Pipe, encode, ffmpeg_samples, signal, with_cover
from tests.support.forking import in_fork

RATE = 16_000


def written(path: Path, frames: int = 100, channels: int = 2, rate: int = RATE, **kind: str) -> bytes:
    soundfile.write(path, signal(frames, channels), rate, **kind)
    return path.read_bytes()


def piped(content: bytes, rate: int = RATE, most: int = 1 << 20) -> np.ndarray:
    return np.concatenate(list(audio_blocks(Pipe(content, most), rate)))


def tone(seconds: float = 1.5, rate: int = RATE) -> np.ndarray:
    return 0.4 * np.sin(2 * np.pi * 440 * np.arange(round(seconds * rate)) / rate)


LOSSLESS = [
    *[(kind, subtype) for kind in ("WAV", "WAVEX", "RF64") for subtype in ("PCM_U8", "PCM_16", "PCM_24", "PCM_32")],
    *[(kind, subtype) for kind in ("WAV", "AIFF", "AU", "W64", "CAF") for subtype in ("FLOAT", "DOUBLE", "ULAW")],
    *[(kind, subtype) for kind in ("AIFF", "AU", "CAF") for subtype in ("PCM_16", "PCM_24", "PCM_32", "ALAW")],
    *[("FLAC", subtype) for subtype in ("PCM_S8", "PCM_16", "PCM_24")],
    ("WAV", "ALAW"),
    ("AIFF", "PCM_S8"),
    ("W64", "PCM_24"),
    ("NIST", "PCM_16"),
]


# 1 and 2 channels are common, 3 have no name, and 8 are the maximum of FLAC. Reads of 7 bytes split every header.
@pytest.mark.parametrize("kind, subtype", LOSSLESS)
@pytest.mark.parametrize(
    "channels, rate, most", [(1, 8_000, 7), (2, 44_100, 1 << 20), (3, 16_000, 999), (8, 192_000, 5000)]
)
def test_every_encoding(tmp_path: Path, kind: str, subtype: str, channels: int, rate: int, most: int):
    content = written(tmp_path / "a", 3_001, channels, rate, format=kind, subtype=subtype)
    wanted = soundfile.read(tmp_path / "a", dtype="float32", always_2d=True)[0].mean(1)
    found = load_audio(tmp_path / "a", rate)
    assert found.dtype == np.float32
    # With 8 or more channels, numpy adds in another order.
    np.testing.assert_allclose(found, wanted, rtol=0, atol=0 if channels < 8 else 1e-7)
    if kind != "CAF":  # ffmpeg seeks in it
        np.testing.assert_array_equal(piped(content, rate, most), found)
    assert audio_seconds(tmp_path / "a") == len(wanted) / rate


def with_size(content: bytes, size: int) -> bytes:
    """Return content whose header declares this number of bytes of samples."""
    place = content.index(b"data") + 4
    return content[:place] + struct.pack("<I", size) + content[place + 4 :]


def as_riff(content: bytes, size: int) -> bytes:
    """Return content whose header declares this number of bytes of the whole file."""
    return content[:4] + struct.pack("<I", size) + content[8:]


def read_both(path: Path, content: bytes) -> np.ndarray:
    """Read content as a file and as a stream, assert equal samples, and return them."""
    path.write_bytes(content)
    found = load_audio(path)
    for most in (1 << 20, 7):
        np.testing.assert_array_equal(piped(content, most=most), found)
    return found


def refused(path: Path, content: bytes, message: str) -> None:
    """Assert that both a file and a stream with this content raise an error that matches."""
    path.write_bytes(content)
    with pytest.raises(AudioError, match=message) as caught:
        load_audio(path)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)
    with pytest.raises(AudioError, match=message) as caught:
        piped(content)
    assert str(caught.value).startswith("<stdin>: ") and "\n" not in str(caught.value)


def test_a_wrong_length_takes_no_memory(tmp_path: Path):
    content = written(tmp_path / "a.wav")
    pipe = Pipe(content[:12] + b"LIST" + struct.pack("<I", 2**32 - 2) + content[12:])
    with pytest.raises(AudioError):
        list(audio_blocks(pipe))
    assert pipe.asked <= 1 << 20


# 0 is written by a recorder that was killed; the others by sox, arecord (signed and unsigned) and ffmpeg.
@pytest.mark.parametrize("size", [0, 0x7FFFF000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF])
@pytest.mark.parametrize("subtype", ["PCM_16", "FLOAT", "PCM_24"])
def test_wav_of_unknown_length_is_read_to_the_end(tmp_path: Path, size: int, subtype: str):
    content = written(tmp_path / "a.wav", 1_234, subtype=subtype)
    wanted = load_audio(tmp_path / "a.wav")
    found = read_both(tmp_path / "a.wav", with_size(content, size) + b"\0\0\1")  # less than one sample of two channels
    np.testing.assert_array_equal(found, wanted)
    assert audio_seconds(tmp_path / "a.wav") == 1_234 / RATE


def test_other_chunks(tmp_path: Path):
    content = written(tmp_path / "a.wav", subtype="PCM_16")
    wanted = load_audio(tmp_path / "a.wav")
    place = content.index(b"fmt ")
    more = content[:place] + b"LIST" + struct.pack("<I", 5) + b"abcde\0" + content[place:] + b"LIST\4\0\0\0more"
    np.testing.assert_array_equal(read_both(tmp_path / "b.wav", more), wanted)
    large = content[:place] + b"JUNK" + struct.pack("<I", 300_000) + bytes(300_000) + content[place:]
    np.testing.assert_array_equal(read_both(tmp_path / "b.wav", large), wanted)


LIST = b"LIST" + struct.pack("<I", 26) + b"INFOISFT" + struct.pack("<I", 14) + b"Lavf60.16.100\0"


@pytest.mark.parametrize("riff", [0, 36, 36 + len(LIST), 236 + len(LIST), 0x7FFFF024, 0xFFFFFFFF])
@pytest.mark.parametrize("size", [0, 0x7FFFF000, 0xFFFFFFFF])
def test_as_ffmpeg_writes_to_a_pipe(tmp_path: Path, riff: int, size: int):
    """The name of the program is between format and samples, and the length is unknown."""
    content = written(tmp_path / "a.wav", channels=1, subtype="PCM_16")
    wanted = load_audio(tmp_path / "a.wav")
    place = content.index(b"data")
    found = read_both(tmp_path / "b.wav", as_riff(content[:place] + LIST + with_size(content, size)[place:], riff))
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("size, heard", [(0, 0), (1, 0), (3, 0), (4, 1), (400, 100)])
def test_chunks_after_the_samples_are_ignored(tmp_path: Path, size: int, heard: int):
    content = written(tmp_path / "a.wav", subtype="PCM_16")  # a sample of two channels has four bytes
    begin = content.index(b"data") + 8
    whole = with_size(content, size)[: begin + size] + b"\0" * (size % 2) + LIST
    whole = as_riff(whole, len(whole) - 8)
    if heard:
        assert len(read_both(tmp_path / "a.wav", whole)) == heard
    else:
        refused(tmp_path / "a.wav", whole, r"contains no audio \(0 seconds\)")


# CAF can be read from files only.
@pytest.mark.parametrize("kind", ["WAV", "RF64", "W64", "AIFF", "AU", "CAF", "NIST"])
def test_fewer_samples_than_promised_are_an_error(tmp_path: Path, kind: str):
    content = written(tmp_path / "a", 60_000, format=kind, subtype="PCM_16")
    content = content[: len(content) * 2 // 3]
    message = r"cut short: the header declares 60000 samples, but the file has (39|40)\d{3}$"
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(AudioError, match=message):
        load_audio(tmp_path / "a")
    if kind != "CAF":
        with pytest.raises(AudioError, match=f"^<stdin>: {message}"):
            piped(content)
    assert len(load_audio(tmp_path / "a", duration=1.0)) == RATE  # existing samples can be read as a part
    if kind in ("WAV", "RF64"):
        with pytest.raises(AudioError, match=message):
            audio_seconds(tmp_path / "a")


@pytest.mark.parametrize("codec", ["adpcm_ms", "adpcm_ima_wav"])
def test_a_compressed_wav_that_is_cut_short_is_an_error(tmp_path: Path, codec: str):
    content = encode(tmp_path / "a.wav", codec, tone()).read_bytes()
    assert len(read_both(tmp_path / "a.wav", content)) >= 24_000
    refused(tmp_path / "a.wav", content[:-3000], r"cut short: the header declares \d+ bytes, but the file has \d+$")


def test_flac_that_is_cut_short_is_an_error(tmp_path: Path):
    content = written(tmp_path / "a.flac", 60_000, 1)
    refused(
        tmp_path / "a.flac", content[: len(content) // 2], r"decoding failed after \d\.\d s \(Invalid data|cut short"
    )


def without_length(flac: bytes) -> bytes:
    """Set the number of samples in STREAMINFO to 0, which means unknown."""
    return flac[:21] + bytes([flac[21] & 0xF0, 0, 0, 0, 0]) + flac[26:]


def test_flac_of_unknown_length_is_read_to_the_end(tmp_path: Path):
    content = written(tmp_path / "a.flac", 60_000, 1)
    wanted = load_audio(tmp_path / "a.flac")
    found = read_both(tmp_path / "a.flac", without_length(content))
    np.testing.assert_array_equal(found, wanted)
    assert audio_seconds(tmp_path / "a.flac") == 60_000 / RATE


@pytest.mark.parametrize(
    "kind, codec", [("flac", "flac"), ("oga", "flac"), ("opus", "libopus"), ("m4a", "aac"), ("mp3", "libmp3lame")]
)
def test_damage_in_the_middle_is_an_error(tmp_path: Path, kind: str, codec: str):
    rate = 48_000 if codec == "libopus" else RATE
    path = encode(tmp_path / f"a.{kind}", codec, np.tile(signal(rate)[:, 0], 5), rate)
    content = bytearray(path.read_bytes())
    assert 4.9 < len(load_audio(path)) / RATE < 5.1
    middle = len(content) // 2
    for place in range(middle, middle + 300):
        content[place] ^= 0x5A
    refused(
        path, bytes(content), r"decoding failed after [1234]\.|damaged, samples are missing after [1234]\.|cut short"
    )


def mp3_without_xing(path: Path, seconds: float) -> Path:
    """Write MP3 with a variable bit rate, and remove the frame that contains its length."""
    quiet_then_loud = np.concatenate([1e-4 * signal(round(seconds * RATE) // 2), signal(round(seconds * RATE) // 2)])
    soundfile.write(path, quiet_then_loud, RATE, format="MP3", bitrate_mode="VARIABLE")
    content = path.read_bytes()
    kbps = (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)[content[2] >> 4]
    frame = 72 * kbps * 1000 // RATE + (content[2] >> 1 & 1)
    assert b"Xing" in content[:frame]
    path.write_bytes(content[frame:])
    return path


def test_mp3_of_variable_rate_without_a_length_is_read_to_the_end(tmp_path: Path):
    path = mp3_without_xing(tmp_path / "a.mp3", 6.0)
    found = read_both(path, path.read_bytes())
    assert 6.0 <= len(found) / RATE < 6.2  # the encoder adds padding
    assert np.abs(found[4 * RATE :]).max() > 0.3
    assert audio_seconds(path) == pytest.approx(len(found) / RATE, abs=0.1)


ENCODED = [
    ("m4a", "aac", 16_000),
    ("m4a", "alac", 44_100),
    ("mp4", "aac", 48_000),
    ("oga", "flac", 16_000),
    ("opus", "libopus", 48_000),
    ("webm", "libopus", 48_000),
    ("mka", "flac", 16_000),
    ("mp3", "libmp3lame", 16_000),
    ("mp3", "libmp3lame", 44_100),
    ("aac", "aac", 16_000),
    ("wma", "wmav2", 16_000),
    ("ts", "mp2", 32_000),
    ("wv", "wavpack", 16_000),
    ("tta", "tta", 16_000),
    ("amr", "libopencore_amrnb", 8_000),
]


@pytest.mark.parametrize("kind, codec, rate", ENCODED)
def test_other_formats(tmp_path: Path, kind: str, codec: str, rate: int):
    path = encode(tmp_path / f"a.{kind}", codec, tone(1.5, rate), rate)
    found = load_audio(path, rate)
    assert -0.03 <= len(found) / rate - 1.5 <= 0.13
    middle = found[rate // 4 : rate // 4 + rate]
    assert np.abs(np.fft.rfft(middle)).argmax() == 440
    assert np.sqrt(2 * np.mean(middle**2)) == pytest.approx(0.4, rel=0.2)  # AMR has the largest error
    assert audio_seconds(path) == pytest.approx(len(found) / rate, abs=0.1)


@pytest.mark.parametrize("kind, codec, rate", ENCODED)
def test_lengths_are_those_of_ffmpeg(tmp_path: Path, kind: str, codec: str, rate: int):
    path = encode(tmp_path / f"a.{kind}", codec, tone(1.5, rate), rate)
    assert len(load_audio(path, rate)) == ffmpeg_samples(path)


@pytest.mark.parametrize("kind", ["a.ogg", "a.opus", "a.mp3", "no-xing.mp3", "unknown.flac", "zero.wav"])
def test_lengths_of_odd_files_are_those_of_ffmpeg(tmp_path: Path, kind: str):
    path = tmp_path / kind
    if kind == "no-xing.mp3":
        mp3_without_xing(path, 2.0)
    elif kind == "unknown.flac":
        path.write_bytes(without_length(written(path, 20_000)))
    elif kind == "zero.wav":
        path.write_bytes(with_size(written(path, 20_000), 0))
    elif kind == "a.opus":
        written(path, 30_000, format="OGG", subtype="OPUS")
    else:
        written(path, 30_000)
    rate = 48_000 if kind == "a.opus" else RATE  # the rate of its decoder
    assert len(load_audio(path, rate)) == ffmpeg_samples(path)


@pytest.mark.parametrize(
    "kind, codec, rate",
    [*ENCODED, ("aiff", "pcm_s16be", 8_000), ("caf", "pcm_s16be", 44_100), ("au", "pcm_mulaw", 8_000)],
)
def test_a_part_is_that_of_the_whole(tmp_path: Path, kind: str, codec: str, rate: int):
    # The signal has no noise, which AAC would replace by random numbers.
    path = encode(tmp_path / f"a.{kind}", codec, 0.4 * np.sin(np.linspace(0, 400, 6 * rate) ** 2), rate)
    whole = load_audio(path)
    for offset, duration in ((0.0313, 0.5), (2.34567, 1.0), (5.5, 9.0), (3.0, 0.0), (8.0, None)):
        part = load_audio(path, offset=offset, duration=duration)
        begin = round(offset * RATE)
        np.testing.assert_allclose(
            part,
            whole[begin:][: None if duration is None else round(duration * RATE)],
            atol=5e-3 if codec == "aac" else 1e-6,
        )


@pytest.mark.parametrize(
    "kind, codec", [("wav", "pcm_s16le"), ("flac", "flac"), ("mp3", "libmp3lame"), ("m4a", "aac"), ("oga", "flac")]
)
def test_a_part_is_all_that_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, codec: str):
    path = encode(tmp_path / f"a.{kind}", codec, np.tile(signal(RATE)[:, 0], 60))
    decoded, mono = [], audio_file._mono
    monkeypatch.setattr(audio_file, "_mono", lambda frame: (decoded.append(frame.samples), mono(frame))[1])
    audio_seconds(path)
    assert sum(decoded) <= 65_536  # the first packet, from which the rate is read
    decoded.clear()
    assert len(load_audio(path, offset=50.0, duration=1.0)) == RATE
    assert sum(decoded) < 2 * 65_536 + 3 * RATE  # the part, a lead-in and one block


@pytest.mark.parametrize("kind", ["flac", "mp3"])
def test_cover_art(tmp_path: Path, kind: str):
    content = written(tmp_path / f"a.{kind}", 30_000, 1)
    wanted = load_audio(tmp_path / f"a.{kind}")
    (tmp_path / f"b.{kind}").write_bytes(with_cover(content))
    np.testing.assert_array_equal(load_audio(tmp_path / f"b.{kind}"), wanted)
    found = piped(with_cover(content))  # MP3 has the encoder's padding at the end
    np.testing.assert_array_equal(found[: len(wanted)], wanted)
    assert len(found) == len(wanted) or (kind == "mp3" and len(found) < len(wanted) + 1_200)


def test_video_and_several_streams(tmp_path: Path):
    path = encode(tmp_path / "a.mp4", "aac", tone(), video=True)
    assert 24_000 <= len(load_audio(path)) <= 26_000
    path = encode(tmp_path / "a.mka", "flac", tone(), streams=2)
    np.testing.assert_allclose(load_audio(path), tone(), atol=1e-4)  # the first of two equal streams
    path = encode(tmp_path / "b.mp4", "aac", tone(), video=True, streams=0)
    with pytest.raises(AudioError, match="b.mp4: has no audio stream"):
        load_audio(path)


def test_m4a_that_is_cut_short_is_an_error(tmp_path: Path):
    path = encode(tmp_path / "a.m4a", "aac", np.tile(tone(), 4), movflags="+faststart")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(AudioError, match=r"a\.m4a: decoding failed after [123]\."):
        load_audio(path)


def test_a_rate_that_changes_is_an_error(tmp_path: Path):
    parts = [encode(tmp_path / f"{rate}.aac", "aac", tone(1.0, rate), rate).read_bytes() for rate in (16_000, 24_000)]
    refused(tmp_path / "a.aac", b"".join(parts), r"the sample rate changes from 16000 Hz to 24000 Hz after 1\.\d s")


def test_playlists_open_no_other_file(tmp_path: Path):
    """ffmpeg would open the files and addresses that a playlist names."""
    written(tmp_path / "a.wav")
    for content in (
        b"ffconcat version 1.0\nfile a.wav\n",
        b"#EXTM3U\n#EXT-X-TARGETDURATION:4\n#EXTINF:4,\na.wav\n#EXT-X-ENDLIST\n",
    ):
        refused(tmp_path / "list", content, "not an audio file that can be read")


def test_names_are_not_addresses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a:b.wav", "pipe:0", "file:c.wav", "-", os.fsdecode(b"\xff.wav"), "100%d.wav"):
        Path("x.wav").write_bytes(written(Path("x.wav"), 50))
        Path("x.wav").rename(name)
        assert len(load_audio(name)) == 50


def test_tags_need_not_be_utf8(tmp_path: Path):
    content = written(tmp_path / "a.wav", subtype="PCM_16")
    place = content.index(b"data")
    tag = b"LIST" + struct.pack("<I", 16) + b"INFOINAM" + struct.pack("<I", 4) + b"M\xfc\xdf\0"
    assert len(read_both(tmp_path / "a.wav", content[:place] + tag + content[place:])) == 100


def test_a_file_without_permission(tmp_path: Path):
    written(tmp_path / "a.wav")
    (tmp_path / "a.wav").chmod(0)
    if os.access(tmp_path / "a.wav", os.R_OK):
        pytest.skip("root may read every file")
    with pytest.raises(AudioError, match="a.wav: permission denied"):
        load_audio(tmp_path / "a.wav")


@pytest.mark.parametrize("channels, rate", [(1, 16_000), (2, 44_100), (2, 8_000)])
def test_blocks_join_to_the_whole(tmp_path: Path, channels: int, rate: int):
    content = written(tmp_path / "a.wav", 3_011, channels, rate, subtype="PCM_16")
    wanted = load_audio(tmp_path / "a.wav")
    for seconds in (0.001, 0.01, None):
        for source in (tmp_path / "a.wav", Pipe(content)):
            blocks = list(audio_blocks(source, seconds=seconds))
            np.testing.assert_array_equal(np.concatenate(blocks), wanted)
            assert seconds is None or len(blocks) > 3


def test_content_that_is_not_audio(tmp_path: Path):
    good = written(tmp_path / "a.wav", subtype="PCM_16")
    place = good.index(b"fmt ")
    for content in (b"\0", good[:30], good[:12], b"text\n" * 99, good[:place] + good[good.index(b"data") :]):
        refused(tmp_path / "b.wav", content, r"not an audio file that can be read \(Invalid|contains no audio")
    with pytest.raises(AudioError, match="<stdin>: not an audio file that can be read"):
        piped(b"")
    refused(
        tmp_path / "b.wav", as_riff(with_size(good, 0), 36)[: good.index(b"data") + 8], r"contains no audio \(0 sec"
    )
    written(tmp_path / "c.wav", 100, 1, subtype="FLOAT")
    soundfile.write(tmp_path / "c.wav", np.full(100, np.nan, "<f4"), RATE, subtype="FLOAT")
    refused(tmp_path / "b.wav", (tmp_path / "c.wav").read_bytes(), "contains NaN")


# In 16-bit PCM, ffmpeg looks for S/PDIF in the first 64 KiB, which are 2 s of audio. In floats it does not.
@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24", "FLOAT"])
@pytest.mark.parametrize("kind", ["WAV", "WAVEX"])
def test_a_block_is_returned_before_the_writer_closes(tmp_path: Path, kind: str, subtype: str):
    content = with_size(written(tmp_path / "a.wav", 8_000, 1, format=kind, subtype=subtype), 0xFFFFFFFF)
    wanted = load_audio(tmp_path / "a.wav")
    begin = content.index(b"data") + 8
    half = begin + (len(content) - begin) // 2
    reading, writing = os.pipe()
    seen = threading.Event()
    in_time = []

    def write() -> None:
        os.write(writing, content[:half])  # 0.25 s
        in_time.append(seen.wait(20))
        os.write(writing, content[half:])
        os.close(writing)

    writer = threading.Thread(target=write)
    writer.start()
    found = []
    with os.fdopen(reading, "rb") as stream:
        for block in audio_blocks(stream, seconds=0.1):
            found.append(block)
            seen.set()
    writer.join()
    assert in_time == [True]
    np.testing.assert_array_equal(np.concatenate(found), wanted)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(5, "Input/output error")])
@pytest.mark.parametrize("after", [0, 44, 3_000])
def test_errors_while_reading_are_not_treated_as_the_end(tmp_path: Path, error: BaseException, after: int):
    content = written(tmp_path / "a.wav", 2_000, subtype="PCM_16")

    class Broken(Pipe):
        def read(self, count: int = -1) -> bytes:
            part = super().read(min(count, 100))
            if not part:
                raise error
            return part

    wanted = AudioError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(wanted, match="^<stdin>: input/output error$" if isinstance(error, OSError) else None):
        list(audio_blocks(Broken(with_size(content, 0)[:after])))


def test_many_threads(tmp_path: Path):
    paths = []
    for number, kind in enumerate(("wav", "flac", "mp3", "ogg") * 3):
        paths.append(tmp_path / f"{number}.{kind}")
        written(paths[-1], 20_000 + number, 1 + number % 2, (8_000, 16_000, 44_100)[number % 3])
    wanted = [load_audio(path) for path in paths]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for found, samples in zip(pool.map(load_audio, paths * 10), wanted * 10, strict=True):
            np.testing.assert_array_equal(found, samples)


def test_after_a_fork(tmp_path: Path):
    for kind in ("wav", "flac", "mp3"):
        written(tmp_path / f"a.{kind}", 20_000)
        wanted = load_audio(tmp_path / f"a.{kind}")

        def read(kind: str = kind, wanted: np.ndarray = wanted) -> None:
            np.testing.assert_array_equal(load_audio(tmp_path / f"a.{kind}"), wanted)

        assert in_fork(read) == 0


def test_streams_are_left_open(tmp_path: Path):
    stream = io.BytesIO(written(tmp_path / "a.wav"))
    assert sum(map(len, audio_blocks(stream))) == 100
    assert not stream.closed

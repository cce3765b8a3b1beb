"""`load_audio`, which reads samples, and `log_mel`, which computes frames from them."""

from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr
import torch

from fastcompress import audio
from fastcompress.audio import (
    AudioError,
    AudioWarning,
    audio_seconds,
    float_samples,
    load_audio,
    log_mel,
    mel_centres,
)
from tests.support import processes


def sine(frequency: float, seconds: float, rate: int, level: float = 0.4) -> np.ndarray:
    return (level * np.sin(2 * np.pi * frequency * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def noise(count: int, seed: int = 0) -> np.ndarray:
    return 0.1 * np.random.default_rng(seed).standard_normal(count, dtype=np.float32)


# Lossless formats must return the same samples; for MP3 and Vorbis the level may differ by 2 %.
@pytest.mark.parametrize(
    "suffix, level_error, wave_error",
    [
        ("wav", 1e-3, 1e-3),
        ("flac", 1e-3, 1e-3),
        ("mp3", 0.02, None),
        ("ogg", 0.02, None),
    ],
)
@pytest.mark.parametrize("rate", [8_000, 16_000, 44_100, 48_000])
def test_every_format_and_rate_keeps_frequency_level_and_time(tmp_path, suffix, level_error, wave_error, rate):
    path = tmp_path / f"tone.{suffix}"
    stereo = np.stack([sine(440, 1.5, rate, level=0.6), sine(440, 1.5, rate, level=0.2)], axis=1)
    soundfile.write(path, stereo, rate)
    samples = load_audio(path)
    assert samples.dtype == np.float32 and samples.ndim == 1
    # ffmpeg decodes Vorbis up to a part of a block.
    assert abs(len(samples) - 24_000) <= (512 if suffix == "ogg" else 1)
    middle = samples[4_000:20_000]  # one second, so that a bin of the spectrum is 1 Hz
    assert np.abs(np.fft.rfft(middle)).argmax() == 440
    assert np.sqrt(2 * np.mean(middle**2)) == pytest.approx(0.4, rel=level_error)  # the mean of 0.6 and 0.2
    if wave_error:  # there is no delay, not even by a part of a sample
        np.testing.assert_allclose(middle, sine(440, 1.5, 16_000)[4_000:20_000], atol=wave_error)


@pytest.mark.parametrize("kind", ["a.wav", "a.flac", "a.mp3"])
def test_channels_of_opposite_sign_cancel_with_a_warning(tmp_path, kind):
    path = tmp_path / kind
    soundfile.write(path, np.stack([sine(300, 1, 16_000), -sine(300, 1, 16_000)], 1), 16_000)
    with pytest.warns(AudioWarning, match=rf"{kind}: the 2 channels cancel when averaged to mono, which is ") as caught:
        assert np.abs(load_audio(path)).max() < 1e-3
    assert len(caught) == 1 and caught[0].filename == __file__


def test_channels_that_differ_do_not_cancel(tmp_path, recwarn):
    left, silent = noise(16_000), np.zeros(16_000, np.float32)
    for number, channels in enumerate(
        ([left, silent], [left, noise(16_000, 1)], [left, 0.3 * left], [silent] * 2, [left, *[silent] * 7])
    ):
        for subtype in ("PCM_U8", "PCM_24"):  # the middle of 8 bits is 128
            path = tmp_path / f"{number}.wav"
            soundfile.write(path, np.stack(channels, 1), 16_000, subtype)
            load_audio(path)
    assert not recwarn.list


@pytest.mark.parametrize("kind", ["wav", "flac", "mp3", "ogg", "aiff"])
def test_the_content_of_a_file_is_read_as_the_file(tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    soundfile.write(path, sine(300, 2, 44_100), 44_100)
    content = path.read_bytes()
    for part in ({}, {"offset": 0.5, "duration": 0.25}):
        np.testing.assert_array_equal(load_audio(content, **part), load_audio(path, **part))
    assert audio_seconds(content) == audio_seconds(path)
    with pytest.raises(AudioError, match=r"^row 3: not an audio file"):
        load_audio(b"no audio", name="row 3")
    with pytest.raises(AudioError, match=r"^audio: the file is empty"):
        load_audio(b"")


def test_integer_samples_are_scaled_to_full_scale():
    wanted = noise(4_000)
    for dtype, full in ((np.int16, 2**15), (np.int32, 2**31), (np.int8, 2**7)):
        integers = (wanted.astype(np.float64) * full).astype(dtype)
        for samples in (integers, torch.from_numpy(integers)):
            np.testing.assert_allclose(float_samples(samples), wanted, atol=1.1 / full)
        torch.testing.assert_close(log_mel(integers), log_mel(integers / np.float32(full)))
    np.testing.assert_allclose(float_samples((128 + 127 * wanted).astype(np.uint8)), wanted, atol=0.02)
    assert float_samples(torch.ones(3, dtype=torch.bfloat16)).dtype == np.float32
    for samples in ([0, 1], np.zeros(3, bool), np.zeros(3, np.uint16), np.zeros(3, complex), np.array([None])):
        with pytest.raises(TypeError, match="samples must be floating point with full scale at 1, or uint8"):
            float_samples(samples)


def test_what_16_khz_cannot_hold_is_filtered_out(tmp_path):
    soundfile.write(tmp_path / "a.wav", sine(10_000, 1, 48_000), 48_000)
    assert np.abs(load_audio(tmp_path / "a.wav")[1_000:-1_000]).max() < 1e-3  # unfiltered: 0.4 at 6 kHz


@pytest.mark.parametrize("count", [1, 2, 999, 1_000, 1_001, 12_345])
@pytest.mark.parametrize("rate", [8_000, 11_025, 16_000, 44_100])
def test_blocks_join_without_a_seam(tmp_path, monkeypatch, count, rate):
    monkeypatch.setattr(audio, "_BLOCK_FRAMES", 1_000)
    signal = noise(count)
    soundfile.write(tmp_path / "a.wav", signal, rate, subtype="FLOAT")
    whole = soxr.resample(signal, rate, 16_000) if rate != 16_000 else signal
    np.testing.assert_allclose(load_audio(tmp_path / "a.wav"), whole, atol=1e-6)
    assert abs(len(whole) - count * 16_000 / rate) <= 1


def test_another_sample_rate(tmp_path):
    soundfile.write(tmp_path / "a.wav", sine(440, 1, 16_000), 16_000)
    samples = load_audio(tmp_path / "a.wav", sample_rate=24_000)
    assert len(samples) == 24_000 and np.abs(np.fft.rfft(samples)).argmax() == 440


def test_progress_reaches_the_end(tmp_path):
    soundfile.write(tmp_path / "a.wav", noise(200_000), 16_000)
    calls = []
    load_audio(tmp_path / "a.wav", progress=lambda done, total: calls.append((done, total)))
    done = [d for d, _ in calls]
    assert len(calls) > 2 and done == sorted(done) and calls[-1] == (12.5, 12.5)


def broken_file(folder: Path, kind: str) -> Path:
    path = folder / f"{kind}.wav"
    if kind == "folder":
        path.mkdir()
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("this is not audio\n" * 100)
    elif kind == "no-samples":
        soundfile.write(path, np.zeros(0), 16_000)
    elif kind == "nan":
        soundfile.write(path, np.array([0.0, np.nan] * 100), 16_000, subtype="FLOAT")
    elif kind == "infinite":
        soundfile.write(path, np.array([[0.0, np.inf]] * 100), 16_000, subtype="FLOAT")
    elif kind == "headerless":
        path = folder / "headerless.raw"
        path.write_bytes(bytes(1_000))
    elif kind == "cut-flac":
        path = folder / "cut.flac"
        soundfile.write(path, noise(80_000), 16_000)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


@pytest.mark.parametrize(
    "kind, cause",
    [
        ("missing", "no such file or directory"),
        ("folder", "is a directory"),
        ("empty", "the file is empty (0 bytes)"),
        ("text", "not an audio file that can be read (Invalid data found when processing input)"),
        ("headerless", "has no audio stream"),  # by its name, ffmpeg detects images
        ("no-samples", "contains no audio (0 seconds)"),
        ("nan", "contains NaN or infinite samples before 0.0 s"),
        ("infinite", "contains NaN or infinite samples before 0.0 s"),
        ("cut-flac", "decoding failed after "),
    ],
)
def test_errors_name_the_file_and_the_reason(tmp_path, kind, cause):
    path = broken_file(tmp_path, kind)
    with pytest.raises(AudioError) as caught:
        load_audio(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: {cause}") and "\n" not in message
    assert message == f"{path}: {cause}" or cause == "decoding failed after "


def test_a_rate_that_cannot_be_resampled_is_an_error(tmp_path):
    soundfile.write(tmp_path / "a.wav", noise(100), 44_100)
    with pytest.raises(AudioError, match=r"a\.wav: cannot resample 44100 Hz to -1 Hz"):
        load_audio(tmp_path / "a.wav", sample_rate=-1)


def test_silence_is_legal(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.zeros(16_000), 44_100)
    samples = load_audio(tmp_path / "a.wav")
    assert len(samples) == 5_805 and not samples.any()
    frames = log_mel(samples)
    assert frames.shape == (36, 80) and (frames == -1.5).all()  # log10(1e-10) = -10, (-10 + 4) / 4


def test_log_mel_is_whispers():
    transformers = pytest.importorskip("transformers")
    samples = noise(16_000 * 5) * np.linspace(0, 1, 16_000 * 5, dtype=np.float32) ** 4
    for bins in (80, 128):
        extractor = transformers.WhisperFeatureExtractor(feature_size=bins)
        expected = extractor(samples, sampling_rate=16_000, padding="do_not_pad", return_tensors="pt").input_features
        torch.testing.assert_close(log_mel(samples, mel_bins=bins), expected[0].T, atol=1e-6, rtol=0)


@pytest.mark.parametrize("frequency", [200, 1_000, 3_000, 7_000])
def test_a_tone_is_loudest_in_the_band_around_it(frequency):
    frames = log_mel(sine(frequency, 1, 16_000))
    nearest = (mel_centres() - frequency).abs().argmin()
    allowed = 1 if frequency == 200 else 0  # at low frequencies, bands (37 Hz) are narrower than the FFT's bins (40 Hz)
    assert (frames[5:-5].argmax(1) - nearest).abs().max() <= allowed


def test_frame_t_is_centred_on_sample_160_t():
    samples = np.zeros(16_000, np.float32)
    samples[160 * 42] = 1.0
    power = log_mel(samples).mean(1)
    assert power.argmax() == 42
    torch.testing.assert_close(power[41], power[43], atol=1e-4, rtol=0)


@pytest.mark.parametrize("chunk", [1, 7, 64, 149])
def test_chunks_do_not_change_the_result(chunk):
    # The signal is quiet and then loud at the end. If the floor were computed per chunk, it would be 60 dB lower in the
    # quiet part.
    samples = noise(24_000 + 77)
    samples[:20_000] *= 1e-5
    whole = log_mel(samples, chunk_frames=10**6)
    assert whole.shape == (150, 80)
    assert (whole[:120] == whole.min()).float().mean() > 0.9  # most values are at the global floor
    torch.testing.assert_close(log_mel(samples, chunk_frames=chunk), whole, atol=5e-7, rtol=0)


def test_less_than_a_window_is_an_error_and_a_window_is_two_frames():
    message = r"the audio is 24\.9 ms long; the least is one window of 25 ms \(400 samples\)"
    with pytest.raises(ValueError, match=message):
        log_mel(noise(399))
    assert log_mel(noise(400)).shape == (2, 80)


def test_process_wide_defaults_have_no_effect_on_log_mel():
    samples = np.random.default_rng(0).standard_normal(8000).astype(np.float32)
    audio.mel_filters.cache_clear()
    wanted = log_mel(samples)
    try:
        torch.set_default_dtype(torch.float64)
        torch.set_default_device("meta")
        audio.mel_filters.cache_clear()
        found = log_mel(samples)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
        audio.mel_filters.cache_clear()
    assert found.dtype == torch.float32 and torch.equal(found, wanted)


def test_log_mel_takes_tensors_and_float64_and_names_a_wrong_shape():
    samples = noise(4_000)
    expected = log_mel(samples)
    assert torch.equal(log_mel(torch.from_numpy(samples)), expected)
    assert torch.equal(log_mel(samples.astype(np.float64)), expected)
    with pytest.raises(ValueError, match=r"samples must be \[S\], got shape \(2, 400\)"):
        log_mel(np.zeros((2, 400), np.float32))
    with pytest.raises(ValueError, match="chunk_frames must be at least 1, got 0"):
        log_mel(samples, chunk_frames=0)


# Prints the growth of the peak memory of this process in MB, in load_audio and then in log_mel.
PEAK_SCRIPT = """
import sys
from fastcompress.audio import load_audio, log_mel

def peak_mb():
    status = open("/proc/self/status").read()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024

small, large = sys.argv[1:]
log_mel(load_audio(small))  # libraries, thread pools and plans
before = peak_mb()
samples = load_audio(large)
loaded = peak_mb()
frames = log_mel(samples)
print(len(samples), loaded - before, peak_mb() - loaded)
"""


def peak_growth(folder: Path, seconds: int, rate: int, channels: int) -> tuple[int, float, float]:
    """Return the samples of a file of this kind, and the growth of peak memory in `load_audio` and `log_mel` in MB."""
    block = noise(rate * channels).reshape(rate, channels)
    soundfile.write(folder / "small.wav", np.concatenate([block] * 40), rate)  # longer than one chunk of log-mel
    with soundfile.SoundFile(folder / "large.wav", "w", rate, channels) as file:
        for _ in range(seconds):
            file.write(block)
    done = processes.run(["-c", PEAK_SCRIPT, str(folder / "small.wav"), str(folder / "large.wav")])
    assert done.returncode == 0, done.stderr
    count, loading, encoding = done.stdout.split()
    return int(count), float(loading), float(encoding)


linux_only = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc for the peak memory")


@linux_only
def test_memory_is_the_result_and_a_block(tmp_path):
    count, loading, encoding = peak_growth(tmp_path, seconds=300, rate=48_000, channels=2)
    assert count == 300 * 16_000
    assert loading < 19 + 15  # result 19 MB; the file as float32 is 115 MB, its mix 58 MB
    assert encoding < 10 + 35  # result 10 MB, a chunk 20 MB; all windows and spectra at once are 170 MB


@pytest.mark.slow
@linux_only
def test_an_hour_needs_the_memory_of_its_16_khz_samples(tmp_path):
    count, loading, encoding = peak_growth(tmp_path, seconds=3_600, rate=44_100, channels=2)
    assert count == 3_600 * 16_000
    assert loading < 230 + 20  # the file as float32 is 1,270 MB
    assert encoding < 115 + 35

"""Parts of a long recording: the samples that a manifest selects, and the samples that are decoded."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from fastcompress.audio import AudioError, load_audio
from fastcompress.training.manifest import Utterance, read_manifest
from fastcompress.training.usable import check_audio, load_utterance
from tests.support.lalm_data import write_lines

RATE = 16_000


def recording(path: Path, seconds: float, rate: int = RATE, **more: Any) -> Path:
    soundfile.write(path, 0.1 * np.random.default_rng(0).standard_normal(int(seconds * rate)), rate, **more)
    return path


@pytest.mark.parametrize(
    "line, seconds",
    [
        ({"offset": 0.0, "duration": 2.5}, 2.5),
        ({"offset": 0.0, "duration": 9.95}, 9.95),
        ({"offset": 0.0}, 10.0),
        ({"offset": 2.5, "duration": 3.0}, 3.0),
        ({"offset": 8.0, "duration": 2.05}, 2.0),  # rounded
        ({"offset": 8.0}, 2.0),
        ({"duration": 2.5}, 2.5),
        ({"duration": 9.95}, 10.0),  # rounded
        ({"duration": 10.05}, 10.0),
        ({}, 10.0),
    ],
    ids=str,
)
def test_the_selected_samples(line: dict[str, float], seconds: float, tmp_path: Path):
    recording(tmp_path / "long.wav", 10.0)
    utterances = read_manifest(write_lines(tmp_path, {"audio_filepath": "long.wav", "text": "a", **line}))
    checked, _ = check_audio(utterances)
    again = check_audio([Utterance(**vars(checked[0]))])[0]
    assert checked[0].duration == again[0].duration == pytest.approx(seconds)
    whole = load_audio(tmp_path / "long.wav")
    begin = round(line.get("offset", 0.0) * RATE)
    for u in (*utterances, *checked):
        assert np.array_equal(load_utterance(u, RATE), whole[begin : begin + round(seconds * RATE)])


@pytest.mark.parametrize("kind", ["wav", "flac", "mp3", "samples"])
@pytest.mark.parametrize(
    "line, reason",
    [
        ({"duration": 12.0}, "the audio is 10.0.. s long, but the manifest says 12 s"),
        ({"offset": 0.0, "duration": 12.0}, "the audio is 10.0.. s long, but the manifest says 12 s"),
        ({"offset": 8.0, "duration": 3.0}, "the segment from 8 to 11 s ends after the audio, which is 10.0.. s long"),
        ({"offset": 11.0, "duration": 1.0}, "offset 11 s is after the end of the audio, which is 10.0.. s long"),
        ({"offset": 11.0}, "offset 11 s is after the end of the audio, which is 10.0.. s long"),
    ],
    ids=str,
)
def test_what_is_missing(line: dict[str, float], reason: str, kind: str, tmp_path: Path):
    """By the header, and without it when the samples are decoded."""
    if kind == "samples":
        u = Utterance(None, "a", "a", samples=(np.ones(10 * RATE, np.float32), RATE), **line)
    else:
        recording(tmp_path / f"a.{kind}", 10.0)
        (u,) = read_manifest(write_lines(tmp_path, {"audio": f"a.{kind}", "text": "a", **line}))
    ((skipped, why),) = check_audio([u])[1]
    assert skipped == u and re.fullmatch(reason, why)
    with pytest.raises(AudioError) as caught:
        load_utterance(u, RATE)
    message = str(caught.value).removeprefix(f"{u.name}: ")
    if "offset" not in line or line["offset"] < 10:
        assert re.fullmatch(reason.replace("10.0..", r"(9\.9|10\.).*"), message)
    else:
        assert "after the end of the audio" in message


def test_samples_are_cut_as_files_are():
    samples = np.random.default_rng(0).standard_normal(RATE).astype(np.float32)
    u = Utterance(None, "a", "a", 0.25, 0.5, samples=(samples, RATE))
    assert check_audio([u])[0][0].duration == 0.25
    assert np.array_equal(load_utterance(u, RATE), samples[RATE // 2 : 3 * RATE // 4])


@pytest.mark.parametrize("kind", ["wav", "flac", "ogg", "mp3"])
@pytest.mark.parametrize("rate", [16_000, 44_100, 8_000])
def test_a_part_is_that_of_the_whole(rate: int, kind: str, tmp_path: Path):
    path = recording(tmp_path / f"a.{kind}", 6.0, rate)
    whole = load_audio(path)
    for offset, duration in ((0.0, 1.0), (0.0313, 0.5), (2.34567, 1.0), (5.5, 9.0), (5.9, None), (3.0, 0.0)):
        part = load_audio(path, offset=offset, duration=duration)
        begin = round(offset * RATE)
        wanted = whole[begin:] if duration is None else whole[begin : begin + round(duration * RATE)]
        np.testing.assert_allclose(part, wanted, atol=1e-6)
    assert len(load_audio(path, offset=7.0)) == 0


def test_a_part_is_all_that_is_decoded(tmp_path: Path):
    path = recording(tmp_path / "a.wav", 60.0, 8000)
    seen: list[float] = []
    load_audio(path, progress=lambda done, total: seen.append(done), offset=30.0, duration=1.0)
    assert len(seen) == 1 and 30 < seen[0] < 39  # a block is 8.2 s

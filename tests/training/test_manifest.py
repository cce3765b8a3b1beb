"""Manifests: reading, checks and errors."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from fastcompress.audio import AudioError
from fastcompress.training.manifest import (
    ManifestError,
    Utterance,
    check_audio,
    format_skipped,
    from_hf_dataset,
    load_utterance,
    read_manifest,
    write_manifest,
)
from tests.support.lalm_data import write_lines

RATE = 16_000


def test_a_manifest_is_read_and_written(tmp_path: Path):
    path = write_lines(
        tmp_path,
        {"audio_filepath": "a/x.wav", "duration": 1.5, "text": "hello", "speaker": 3},
        "",
        {
            "audio_filepath": "/abs/y.wav",
            "text": "über",
            "target": "over",
            "prompt": "Translate.",
            "phones": "a b",
            "offset": 2,
        },
        {"text": "question", "target": "answer", "duration": None},
    )
    first, second, third = read_manifest(path)
    assert first == Utterance(tmp_path / "a/x.wav", "hello", "hello", 1.5, more={"speaker": 3})
    assert second.audio_filepath == Path("/abs/y.wav") and second.target == "over"
    assert second.offset == 2 and first.offset is None
    assert second.prompt == "Translate." and second.phones == "a b" and second.duration is None
    assert not third.has_audio and third.target == "answer"
    write_manifest(tmp_path / "again.jsonl", [first, second, third])
    assert read_manifest(tmp_path / "again.jsonl") == [first, second, third]
    assert '"audio_filepath": "a/x.wav"' in (tmp_path / "again.jsonl").read_text()
    assert "über" in (tmp_path / "again.jsonl").read_text(encoding="utf-8")


@pytest.mark.parametrize("character", ["\u2028", "\x85", "\x0c", "\x1e", "\r", "\n", "\ufeff", "\U0001f600"])
def test_any_text_is_read_as_it_was_written(character: str, tmp_path: Path):
    """Python treats some of these characters as ends of lines, JSON does not."""
    text = f"one{character}two"
    utterances = [Utterance(None, text, text, more={"note": text}), Utterance(None, "three", "three")]
    write_manifest(tmp_path / "m.jsonl", utterances)
    assert read_manifest(tmp_path / "m.jsonl") == utterances


@pytest.mark.parametrize(
    "line, reason",
    [
        ({"text": "a", "offset": 10**400}, "offset must be a number of seconds, got 1000"),
        ({"text": "a", "duration": 1e300}, "duration must be a number of seconds, got 1e+300"),
        ({"audio_filepath": "a\0", "text": "a"}, r"audio_filepath must be a path, got 'a\x00'"),
        ({"text": "\ud800"}, r"holds '\ud800', which is not a character"),
        ("[" * 100_000, "nested too deeply"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_lines_with_extreme_values(line: Any, reason: str, tmp_path: Path):
    with pytest.raises(ManifestError) as caught:
        read_manifest(write_lines(tmp_path, line))
    assert reason in str(caught.value)


def test_a_name_that_is_too_long_is_skipped(tmp_path: Path):
    good, skipped = check_audio(read_manifest(write_lines(tmp_path, {"audio_filepath": "a" * 5000, "text": "a"})))
    assert not good and skipped[0][1] == "file name too long"


@pytest.mark.parametrize(
    "line, reason",
    [
        ("{nonsense", ":2: not JSON (Expecting property name enclosed in double quotes at column 2)"),
        ("[1, 2]", ":2: must be an object, got list"),
        ({"audio_filepath": "x.wav"}, ":2: has neither text nor target"),
        ({"audio_filepath": "x.wav", "text": ""}, ":2: has neither text nor target"),
        ({"audio_filepath": 3, "text": "a"}, ":2: audio_filepath must be str, got 3"),
        ({"audio_filepath": "x", "text": "a", "duration": "long"}, ":2: duration must be float, got 'long'"),
        ({"audio_filepath": "x", "text": "a", "duration": True}, ":2: duration must be float, got True"),
        ({"audio_filepath": "x", "text": "a", "duration": -1}, ":2: duration must be a number of seconds, got -1"),
        ('{"audio_filepath": "x", "text": "a", "offset": NaN}', ":2: offset must be a number of seconds, got nan"),
    ],
)
def test_lines_that_are_wrong(line: Any, reason: str, tmp_path: Path):
    path = write_lines(tmp_path, {"audio_filepath": "x.wav", "text": "fine"}, line)
    with pytest.raises(ManifestError, match=re.escape(f"{path}{reason}")):
        read_manifest(path)


def test_manifests_that_cannot_be_read(tmp_path: Path):
    with pytest.raises(ManifestError, match="no such file"):
        read_manifest(tmp_path / "none.jsonl")
    with pytest.raises(ManifestError, match="has no utterance"):
        read_manifest(write_lines(tmp_path, "", "  "))
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "\xfc"}')
    with pytest.raises(ManifestError, match="latin.jsonl: 'utf-8' codec"):
        read_manifest(tmp_path / "latin.jsonl")


def tone(path: Path, seconds: float, rate: int = RATE) -> Path:
    soundfile.write(path, 0.1 * np.sin(np.arange(int(seconds * rate)) * 0.1), rate)
    return path


def test_audio_is_checked_by_its_headers(tmp_path: Path):
    good = tone(tmp_path / "good.wav", 2.0)
    (tmp_path / "text.wav").write_text("no audio")
    (tmp_path / "empty.wav").touch()
    lines = [
        Utterance(good, "a", "a"),
        Utterance(tmp_path / "none.wav", "a", "a"),
        Utterance(tmp_path / "text.wav", "a", "a"),
        Utterance(tmp_path / "empty.wav", "a", "a"),
        Utterance(tone(tmp_path / "short.wav", 0.01), "a", "a"),
        Utterance(good, "a", "a", offset=3.0),
        Utterance(good, "a", "a", offset=0.5, duration=1.0),
        Utterance(None, "a", "a"),
        Utterance(None, "a", "a", samples=(np.zeros(8000, np.float32), RATE)),
    ]
    kept, skipped = check_audio(lines, max_seconds=10)
    assert [u.duration for u in kept] == [2.0, 1.0, None, 0.5]
    reasons = [reason for _, reason in skipped]
    assert reasons[0] == "no such file" and "0.010 s, not between 0.025 and 10" in reasons[3]
    assert "-1.000 s" in reasons[4]
    assert len(check_audio(lines[:1], max_seconds=1.9)[0]) == 0
    text = format_skipped(skipped, most=2)
    assert text.startswith("skipped 5 utterances:") and "none.wav: no such file" in text and "... and 3 more" in text


def test_part_of_a_file(tmp_path: Path):
    path = tone(tmp_path / "a.wav", 2.0, 8000)
    whole = load_utterance(Utterance(path, "", ""), RATE)
    assert abs(len(whole) - 2 * RATE) <= 1
    part = load_utterance(Utterance(path, "", "", offset=0.5, duration=1.0), RATE)
    np.testing.assert_allclose(part, whole[RATE // 2 : RATE // 2 + RATE], atol=1e-6)  # up to resampling
    # Durations in manifests are rounded, so a duration without an offset does not cut.
    assert len(load_utterance(Utterance(path, "", "", duration=1.99), RATE)) == len(whole)
    with pytest.raises(AudioError, match=r"has 0.000 s of audio after 5 s, less than one frame"):
        load_utterance(Utterance(path, "", "", offset=5.0), RATE)
    given = np.sin(np.arange(4000) * 0.1).astype(np.float32)
    assert len(load_utterance(Utterance(None, "", "", samples=(given, 8000)), RATE)) == 8000
    with pytest.raises(AudioError, match=r"samples must be \[S\] and finite"):
        load_utterance(Utterance(None, "x", "", samples=(given * np.nan, RATE)), RATE)


def test_datasets_of_hugging_face():
    """Rows of `datasets`, with decoded audio or a path."""
    rows = [
        {"audio": {"array": np.zeros(8000), "sampling_rate": 8000.0}, "sentence": "one", "german": "eins"},
        {"audio": {"path": "/a/b.wav", "bytes": None}, "sentence": "two", "german": "zwei"},
    ]
    first, second = from_hf_dataset(rows, text_column="sentence", target_column="german", prompt="Translate.")
    assert first.duration == 1.0 and first.target == "eins" and first.prompt == "Translate." and first.has_audio
    assert second.audio_filepath == Path("/a/b.wav")
    with pytest.raises(ManifestError, match="row 0 has no column 'text', only 'audio', 'sentence', 'german'"):
        from_hf_dataset(rows)
    with pytest.raises(ManifestError, match="row 0: audio has neither array nor path"):
        from_hf_dataset([{"audio": None, "text": "a"}])
    ones = np.ones(8)
    for audio, message in (
        ([1.0], "audio has neither array nor path"),
        (ones, "audio has neither array nor path"),
        (3, "audio has neither array nor path"),
        ({"path": 3}, "audio has neither array nor path"),
        ({"array": ones}, "audio needs an array of numbers and a sampling_rate: KeyError('sampling_rate')"),
        ({"array": ["a"], "sampling_rate": 8000}, "audio needs an array of numbers and a sampling_rate"),
        ({"array": ones, "sampling_rate": 0}, "audio must be an array [S] at a positive sampling_rate, got [8] at 0"),
        ({"array": ones, "sampling_rate": np.nan}, "positive sampling_rate, got [8] at nan"),
        ({"array": ones[None], "sampling_rate": 8000}, "positive sampling_rate, got [1, 8] at 8000"),
    ):
        with pytest.raises(ManifestError, match=re.escape(message)):
            from_hf_dataset([{"audio": audio, "text": "a"}])

"""Manifests: reading, checks and errors."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from fastcompress.audio import AudioError, load_audio
from fastcompress.training.manifest import (
    AUDIO_KEYS,
    TEXT_KEYS,
    ManifestError,
    Utterance,
    from_hf_dataset,
    read_manifest,
    warnings_of,
)
from fastcompress.training.usable import check_audio, load_utterance
from tests.support.lalm_data import write_lines

RATE = 16_000


def test_a_manifest_is_read(tmp_path: Path):
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
    assert second.text == "über"


@pytest.mark.parametrize("character", ["\u2028", "\x85", "\x0c", "\x1e", "\r", "\n", "\ufeff", "\U0001f600"])
def test_any_text_is_read_as_it_was_written(character: str, tmp_path: Path):
    """Python treats some of these characters as ends of lines, JSON does not."""
    text = f"one{character}two"
    lines = [json.dumps({"text": t, "note": t}, ensure_ascii=False) for t in (text, "three")]
    assert read_manifest(write_lines(tmp_path, *lines)) == [
        Utterance(None, t, t, more={"note": t}) for t in (text, "three")
    ]


@pytest.mark.parametrize(
    "line, reason",
    [
        ('{"text": "a", "offset": ' + 5000 * "1" + "}", "Exceeds the limit"),
        ({"text": "a", "offset": 10**400}, "offset must be a number of seconds, got 1000"),
        ({"text": "a", "duration": 1e300}, "duration must be a number of seconds, got 1e+300"),
        ({"audio_filepath": "a\0", "text": "a"}, r"audio_filepath must be a path, got 'a\x00'"),
        ({"text": "\ud800"}, r"contains '\ud800', which is not a character"),
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
        ({"audio_filepath": "x.wav"}, ":2: has neither text nor target, only audio_filepath"),
        (
            {"audio_filepath": "x.wav", "txet": "a"},
            ":2: has neither text nor target, only audio_filepath, txet; rename txet to text",
        ),
        ({"audio_filepath": "x.wav", "text": None}, ":2: has neither text nor target"),
        ({"audio": "x.wav", "path": "y.wav", "text": "a"}, ":2: audio and path differ: keep the one to be read"),
        ({"wav": "x.wav", "sentence": "a", "text": "b"}, ":2: text and sentence differ: keep the one to be read"),
        (
            {"clip": "x.WAV", "text": "a"},
            ":2: has no audio_filepath, but clip is 'x.WAV': rename the key, or remove it",
        ),
        ({"audios": ["x.wav", "y.wav"], "text": "a"}, ":2: audios must be str, got ['x.wav', 'y.wav']"),
        ({"audio": {"array": [0.1]}, "text": "a"}, ":2: audio must be str, got {'array': [0.1]}"),
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
    assert [reason for _, reason in skipped] == [
        "no such file",
        "not an audio file that can be read (Invalid data found when processing input)",
        "the file is empty (0 bytes)",
        "0.010 s, less than one frame of 0.025 s",
        "offset 3 s is after the end of the audio, which is 2.000 s long",
    ]
    (long,) = check_audio(lines[:1], max_seconds=1.9)[1]
    assert long[1] == "2.000 s, more than the 1.9 s that are allowed"


def test_part_of_a_file(tmp_path: Path):
    path = tone(tmp_path / "a.wav", 2.0, 8000)
    whole = load_utterance(Utterance(path, "", ""), RATE)
    assert abs(len(whole) - 2 * RATE) <= 1
    part = load_utterance(Utterance(path, "", "", offset=0.5, duration=1.0), RATE)
    np.testing.assert_allclose(part, whole[RATE // 2 : RATE // 2 + RATE], atol=1e-6)  # up to resampling
    # Durations in manifests are rounded, so a duration without an offset does not cut.
    assert len(load_utterance(Utterance(path, "", "", duration=1.99), RATE)) == len(whole)
    with pytest.raises(AudioError, match=r"a.wav: offset 5 s is after the end of the audio"):
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
    with pytest.raises(ManifestError, match="row 0: audio has neither array, bytes nor path"):
        from_hf_dataset([{"audio": None, "text": "a"}])
    for text in (None, float("nan"), 3):
        with pytest.raises(ManifestError, match=f"row 1: sentence must be text, got {text}"):
            from_hf_dataset([rows[0], rows[1] | {"sentence": text}], text_column="sentence")
    with pytest.raises(ManifestError, match="row 0: german must be text, got None"):
        from_hf_dataset([rows[0] | {"german": None}], text_column="sentence", target_column="german")
    ones = np.ones(8)
    for audio, message in (
        ([1.0], "audio has neither array, bytes nor path"),
        (ones, "audio has neither array, bytes nor path"),
        (3, "audio has neither array, bytes nor path"),
        ({"path": 3}, "audio has neither array, bytes nor path"),
        ({"array": ones}, "audio needs an array of numbers and a sampling_rate: KeyError('sampling_rate')"),
        ({"array": ["a"], "sampling_rate": 8000}, "audio needs an array of numbers and a sampling_rate"),
        ({"array": ones, "sampling_rate": 0}, "audio must be an array [S] at a positive sampling_rate, got [8] at 0"),
        ({"array": ones, "sampling_rate": np.nan}, "positive sampling_rate, got [8] at nan"),
        ({"array": ones[None], "sampling_rate": 8000}, "positive sampling_rate, got [1, 8] at 8000"),
    ):
        with pytest.raises(ManifestError, match=re.escape(message)):
            from_hf_dataset([{"audio": audio, "text": "a"}])


@pytest.mark.parametrize("kind", ["wav", "mp3", "flac"])
@pytest.mark.parametrize("path", ["0.wav", None])
def test_rows_of_datasets_with_the_content_of_files(path: str | None, kind: str, tmp_path: Path):
    file = tmp_path / f"a.{kind}"
    soundfile.write(file, 0.1 * np.sin(np.arange(2 * RATE) * 0.1), RATE)
    (u,) = from_hf_dataset([{"audio": {"bytes": file.read_bytes(), "path": path}, "text": "a"}])
    assert u.has_audio and u.name == ("row 0 (0.wav)" if path else "row 0")
    ((checked,), skipped) = check_audio([u])
    assert not skipped and checked.duration == pytest.approx(2, abs=0.1)
    np.testing.assert_array_equal(load_utterance(checked, RATE), load_audio(file))
    part = Utterance(None, "a", "a", 0.5, 1.0, encoded=file.read_bytes())
    assert len(load_utterance(part, RATE)) == RATE // 2
    ((_, reason),) = check_audio(from_hf_dataset([{"audio": {"bytes": b"no audio", "path": path}, "text": "a"}]))[1]
    assert reason.startswith("not an audio file that can be read")  # without the name, which is shown before it


@pytest.mark.parametrize("dtype, full", [(np.int16, 2**15), (np.int32, 2**31)])
def test_integer_samples_of_datasets_are_scaled(dtype: Any, full: int):
    samples = (0.5 * np.sin(np.arange(RATE) * 0.1) * full).astype(dtype)
    (u,) = from_hf_dataset([{"audio": {"array": samples, "sampling_rate": RATE}, "text": "a"}])
    for utterance in (u, Utterance(None, "a", "a", samples=(samples, RATE))):
        np.testing.assert_allclose(load_utterance(utterance, RATE), samples / full, atol=1e-6)
    with pytest.raises(ManifestError, match="row 0: audio needs an array of numbers.*got int64"):
        from_hf_dataset([{"audio": {"array": [0, 1, 2], "sampling_rate": RATE}, "text": "a"}])
    with pytest.raises(AudioError, match="the utterance 'a': samples must be floating point.*got uint16"):
        load_utterance(Utterance(None, "a", "a", samples=(samples.astype(np.uint16), RATE)), RATE)


# Other names, other forms


@pytest.mark.parametrize("key", AUDIO_KEYS)
@pytest.mark.parametrize(
    "value", ["a/x.wav", ["a/x.wav"], {"path": "a/x.wav", "bytes": None}], ids=["str", "list", "hf"]
)
def test_other_names_of_the_audio(key: str, value: Any, tmp_path: Path):
    (u,) = read_manifest(write_lines(tmp_path, {key: value, "text": "hello", "speaker": 1}))
    assert u == Utterance(tmp_path / "a/x.wav", "hello", "hello", more={"speaker": 1})


def test_one_audio_under_two_names(tmp_path: Path):
    line = {"path": "x.wav", "audio": {"path": "x.wav"}, "sentence": "a", "text": "a"}
    assert read_manifest(write_lines(tmp_path, line)) == [Utterance(tmp_path / "x.wav", "a", "a")]


@pytest.mark.parametrize("key", TEXT_KEYS)
def test_other_names_of_the_text(key: str, tmp_path: Path):
    assert read_manifest(write_lines(tmp_path, {"audio": "x", key: "hello"}))[0].text == "hello"


def test_what_is_unusual_about_a_manifest(tmp_path: Path):
    texts = read_manifest(write_lines(tmp_path, *[{"text": "a", "prompt": "b"}] * 3))
    assert warnings_of(texts) == ["none of the 3 utterances has audio: audio_filepath is missing"]
    line = {"audio": "x.wav", "text": "a"}
    assert warnings_of(read_manifest(write_lines(tmp_path, line, {"text": "a"}))) == []
    cut = read_manifest(write_lines(tmp_path, line | {"start": 1.0, "end": 2.0}))
    assert warnings_of(cut) == ["start, end are not read: a segment has offset and duration, in seconds"]
    assert warnings_of(read_manifest(write_lines(tmp_path, line | {"start": 1.0, "offset": 1.0}))) == []


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_byte_order_mark(encoding: str, end: str, tmp_path: Path):
    mark = "\ufeff" if encoding.endswith("e") else ""  # the others write it
    text = mark + end.join(['{"text": "über"}', "", '{"text": "b"}', ""])
    (tmp_path / "m.jsonl").write_bytes(text.encode(encoding))
    assert [u.text for u in read_manifest(tmp_path / "m.jsonl")] == ["über", "b"]


def test_an_array(tmp_path: Path):
    path = tmp_path / "m.json"
    path.write_text('\ufeff\n[\n {"audio": "x.wav",\n  "text": "a\u2028b"},\n {"text": "b"}]\n', encoding="utf-8")
    first, second = read_manifest(path)
    assert first.text == "a\u2028b" and first.audio_filepath == tmp_path / "x.wav" and second.text == "b"
    assert (first.source, second.source) == (f"{path}: item 1", f"{path}: item 2")
    for text, reason in (
        ("[]", "has no utterance"),
        ('[{"text": "a"}, 3]', "item 2: must be an object, got int"),
        ('[{"text": "a"},\n {"target": 3}]', "item 2: target must be str, got 3"),
        ('[{"text": "a"},\n}]', "not JSON (Expecting value at line 2, column 1)"),
    ):
        path.write_text(text)
        with pytest.raises(ManifestError, match=re.escape(f"{path}: {reason}")):
            read_manifest(path)


def test_utterances_name_their_lines(tmp_path: Path):
    path = write_lines(tmp_path, "", {"audio": "x.wav", "text": "a"}, {"text": "b"})
    first, second = read_manifest(path)
    assert (first.source, first.name) == (f"{path}:2", str(tmp_path / "x.wav"))
    assert second.source == second.name == f"{path}:3"


@pytest.mark.parametrize("line", [{"text": ""}, {"text": " "}, {"text": "a", "target": ""}])
def test_an_empty_text_is_read(line: dict[str, str], tmp_path: Path):
    (u,) = read_manifest(write_lines(tmp_path, {"audio": "x.wav", **line}))
    assert u.target.strip() == "" and u.text == line["text"]

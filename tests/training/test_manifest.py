"""Manifests, the texts of the synthetic tasks, and synthetic speech."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from fastcompress.audio import AudioError
from fastcompress.synthesis import texts
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
pytestmark = pytest.mark.skipif("config.getoption('--device') or config.getoption('--backend')", reason="of the CPU")


# Manifests


def test_a_manifest_is_read_and_written(tmp_path: Path):
    path = write_lines(
        tmp_path,
        {"audio_filepath": "a/x.wav", "duration": 1.5, "text": "hello", "speaker": 3},
        "",
        {"audio_filepath": "/abs/y.wav", "text": "über", "target": "over", "prompt": "Translate.", "phones": "a b",
         "offset": 2},
        {"text": "question", "target": "answer", "duration": None},
    )  # fmt: skip
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
    """Some are ends of lines to Python and none to JSON."""
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
        ({"text": "\ud800"}, r"holds '\ud800', which is no character"),
        ("[" * 100_000, "nested too deeply"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_lines_that_no_reader_should_choke_on(line: Any, reason: str, tmp_path: Path):
    with pytest.raises(ManifestError) as caught:
        read_manifest(write_lines(tmp_path, line))
    assert reason in str(caught.value)


def test_a_name_that_is_too_long_is_skipped(tmp_path: Path):
    good, skipped = check_audio(read_manifest(write_lines(tmp_path, {"audio_filepath": "a" * 5000, "text": "a"})))
    assert not good and skipped[0][1] == "file name too long"


@pytest.mark.parametrize(
    "line, reason",
    [
        ("{nonsense", ":2: no JSON (Expecting property name enclosed in double quotes at column 2)"),
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
    with pytest.raises(ManifestError, match="holds no utterance"):
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
    np.testing.assert_allclose(part, whole[RATE // 2 : RATE // 2 + RATE], atol=1e-6)  # resampled
    # Durations are rounded: without an offset they do not cut.
    assert len(load_utterance(Utterance(path, "", "", duration=1.99), RATE)) == len(whole)
    with pytest.raises(AudioError, match=r"has 0.000 s of audio after 5 s, less than one frame"):
        load_utterance(Utterance(path, "", "", offset=5.0), RATE)
    given = np.sin(np.arange(4000) * 0.1).astype(np.float32)
    assert len(load_utterance(Utterance(None, "", "", samples=(given, 8000)), RATE)) == 8000
    with pytest.raises(AudioError, match=r"samples must be \[S\] and finite"):
        load_utterance(Utterance(None, "x", "", samples=(given * np.nan, RATE)), RATE)


def test_datasets_of_hugging_face():
    """Rows as `datasets` gives them: decoded, or a path."""
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


# Texts


def test_numbers():
    said = {
        0: ("zero", "null"), 1: ("one", "eins"), 7: ("seven", "sieben"), 11: ("eleven", "elf"), 12: ("twelve", "zwölf"),
        16: ("sixteen", "sechzehn"), 17: ("seventeen", "siebzehn"), 20: ("twenty", "zwanzig"),
        21: ("twenty one", "einundzwanzig"), 30: ("thirty", "dreißig"), 61: ("sixty one", "einundsechzig"),
        77: ("seventy seven", "siebenundsiebzig"), 100: ("one hundred", "einhundert"),
        101: ("one hundred one", "einhunderteins"), 111: ("one hundred eleven", "einhundertelf"),
        216: ("two hundred sixteen", "zweihundertsechzehn"), 1000: ("one thousand", "eintausend"),
        1001: ("one thousand one", "eintausendeins"), 1100: ("one thousand one hundred", "eintausendeinhundert"),
        3021: ("three thousand twenty one", "dreitausendeinundzwanzig"),
        9999: ("nine thousand nine hundred ninety nine", "neuntausendneunhundertneunundneunzig"),
    }  # fmt: skip
    for number, (english, german) in said.items():
        assert (texts.english(number), texts.german(number)) == (english, german)
    for spell in (texts.english, texts.german):
        assert len({spell(n) for n in range(10_000)}) == 10_000


@pytest.mark.parametrize("task", texts.TASKS)
def test_texts_are_of_one_split(task: str):
    found = {split: [texts.sentence(task, split, i) for i in range(300)] for split in texts.SPLITS}
    said = {split: {text for text, _ in lines} for split, lines in found.items()}
    assert not (said["train"] & said["dev"] | said["train"] & said["test"] | said["dev"] & said["test"])
    assert all(len(lines) > 100 for lines in said.values())
    assert found["train"] == [texts.sentence(task, "train", i) for i in range(300)]
    assert found["train"] != [texts.sentence(task, "train", i, seed=1) for i in range(300)]
    for text, target in found["train"]:
        assert re.fullmatch(r"[a-z]+( [a-z]+)*", text) and re.fullmatch(r"[a-zäöüß]+( [a-zäöüß]+)*", target)
    # What is held out is made of words that are trained on.
    words = {word for text, _ in (texts.sentence(task, "train", i) for i in range(4000)) for word in text.split()}
    assert {word for text in said["test"] for word in text.split()} <= words


def test_a_task_that_is_none():
    with pytest.raises(ValueError, match="task must be one of digits, numbers, commands, got 'poems'"):
        texts.sentence("poems", "train", 0)


# Speech

espeakng_loader = pytest.importorskip("espeakng_loader", reason="speech needs espeakng-loader")

from fastcompress.synthesis import data as synthesis  # noqa: E402
from fastcompress.synthesis import espeak  # noqa: E402


def test_speech():
    samples, rate = espeak.synthesize("seven two five zero", "en-us+f3")
    assert rate == 22050 and samples.dtype == np.float32 and 1.0 < len(samples) / rate < 3.0
    assert 0.1 < np.abs(samples).max() <= 1.0
    slow, _ = espeak.synthesize("seven two five zero", "en-us+f3", rate=90)
    other, _ = espeak.synthesize("seven two five zero", "en-us+m3")
    assert len(slow) > 1.3 * len(samples) and not np.array_equal(other[:20000], samples[:20000])
    assert np.array_equal(espeak.synthesize("seven two five zero", "en-us+f3")[0], samples)  # whatever was said between
    assert espeak.phonemes("seven") == ["s", "E", "v", "@", "n"]
    assert espeak.phonemes("one two") == espeak.phonemes("one") + espeak.phonemes("two")
    with pytest.raises(espeak.SynthesisError, match="espeak-ng has no voice 'xx-nowhere'"):
        espeak.synthesize("a", "xx-nowhere")
    with pytest.raises(ValueError, match=re.escape("rate must lie in [80, 450], got 10")):
        espeak.synthesize("a", rate=10)


def test_a_synthesiser_that_dies_is_started_again():
    samples, _ = espeak.synthesize("two")
    espeak._client._server.kill()
    espeak._client._server.wait()
    assert np.array_equal(espeak.synthesize("two")[0], samples)


def test_calls_from_many_threads():
    import concurrent.futures

    words = ["one", "two", "three", "four"] * 5
    alone = {word: espeak.synthesize(word)[0] for word in set(words)}
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for word, (samples, _) in zip(words, pool.map(espeak.synthesize, words), strict=True):
            assert np.array_equal(samples, alone[word])


def test_without_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    script = tmp_path / "server.py"
    script.write_text("import sys; sys.modules['espeakng_loader'] = None\n" + espeak._SERVER.read_text())
    monkeypatch.setattr(espeak, "_SERVER", script)
    with pytest.raises(espeak.SynthesisError, match=r"needs espeakng-loader: pip install 'fastcompress\[synthesis\]'"):
        espeak._Client().ask(function="speak")


def test_voices_are_held_out_and_there():
    assert not set(synthesis.TRAIN_VARIANTS) & set(synthesis.HELD_OUT_VARIANTS)
    for variant in (*synthesis.TRAIN_VARIANTS, *synthesis.HELD_OUT_VARIANTS):
        samples, _ = espeak.synthesize("two", f"en-us+{variant}")
        assert np.abs(samples).max() > 0.05


def digest(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*.wav"))
    }


def manifests(folder: Path) -> dict[str, list[Utterance]]:
    return {p.stem: read_manifest(p) for p in folder.glob("*.jsonl")}


def test_data_is_a_function_of_its_seed(tmp_path: Path):
    sizes = {"train": 6, "dev": 2, "test": 3}
    counts = synthesis.make_data(tmp_path / "one", "digits", **sizes)
    assert counts["train"] == 6 and counts["test-noise"] == 3
    synthesis.make_data(tmp_path / "two", "digits", jobs=2, **sizes)
    assert digest(tmp_path / "one") == digest(tmp_path / "two")
    synthesis.make_data(tmp_path / "more", "digits", train=8, dev=2, test=3)
    more = digest(tmp_path / "more")
    assert digest(tmp_path / "one").items() <= more.items() and len(more) == len(digest(tmp_path / "one")) + 2
    synthesis.make_data(tmp_path / "other", "digits", seed=1, **sizes)
    assert not set(digest(tmp_path / "one").values()) & set(digest(tmp_path / "other").values())
    for name, utterances in manifests(tmp_path / "one").items():
        for u in utterances:
            info = soundfile.info(str(u.audio_filepath))
            assert info.samplerate == RATE and abs(info.frames / RATE - u.duration) < 1e-3 and u.phones
            variant = u.more["voice"].partition("+")[2]
            if name != "test-engine":
                assert (variant in synthesis.HELD_OUT_VARIANTS) == (name == "test-voice")
            assert texts.split_of(u.text) == {"train": "train", "dev": "dev"}.get(name, "test")


def test_what_was_broken_off_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    sizes = {"train": 4, "dev": 1, "test": 1}
    synthesis.make_data(tmp_path / "whole", "numbers", "translation", **sizes)
    make, calls = synthesis.make_utterance, []

    def broken(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return make(*arguments)

    monkeypatch.setattr(synthesis, "make_utterance", broken)
    with pytest.raises(KeyboardInterrupt):
        synthesis.make_data(tmp_path / "broken", "numbers", "translation", **sizes)
    (tmp_path / "broken/audio/train/000002.unfinished").write_bytes(b"half")
    (tmp_path / "broken/audio/train/000002.wav").write_bytes(b"RIFF half")  # without its note: not finished
    calls.clear()
    monkeypatch.setattr(synthesis, "make_utterance", lambda *a: (calls.append(a), make(*a))[1])
    synthesis.make_data(tmp_path / "broken", "numbers", "translation", **sizes)
    whole, mended = digest(tmp_path / "whole"), digest(tmp_path / "broken")
    assert whole == mended and len(calls) == len(whole) - 2
    target = read_manifest(tmp_path / "broken/train.jsonl")[0].target
    assert target == texts.sentence("numbers", "train", 0)[1]
    with pytest.raises(ValueError, match="holds other data"):
        synthesis.make_data(tmp_path / "broken", "digits", **sizes)


def test_noise_is_as_loud_as_it_says():
    """Against the same utterance without any: the power of what was added."""
    import random

    clean, rate = espeak.synthesize("seven two five zero nine", "en-us")
    found = []
    for seed in range(200):
        mixed = synthesis._degrade(clean, random.Random(seed), (3.0, 3.0))
        # Level and tilt are undone by a least-squares filter of three taps.
        columns = np.stack([np.roll(clean, k) for k in range(3)], 1)
        taps = np.linalg.lstsq(columns, mixed, rcond=None)[0]
        speech = columns @ taps
        found.append(10 * np.log10(np.mean(speech**2) / np.mean((mixed - speech) ** 2)))
        assert np.abs(mixed).max() <= 0.9 + 1e-6
    untilted = [x for x in found if abs(x - 3.0) < 0.3]
    assert 60 < len(untilted) < 140  # half of them are not tilted, which changes the ratio


@pytest.mark.parametrize(
    "values, message",
    [
        ({"task": "poems"}, "task must be one of digits, numbers, commands, got 'poems'"),
        ({"direction": "backwards"}, "direction must be one of recognition, translation, got 'backwards'"),
        ({"direction": "translation"}, "direction 'translation' needs a task with German: numbers or commands"),
        ({"train": 0}, "train must be at least 1, got 0"),
        ({"jobs": 0}, "jobs must be at least 1, got 0"),
    ],
)
def test_data_that_cannot_be_made(values: dict[str, Any], message: str, tmp_path: Path):
    with pytest.raises(ValueError, match=re.escape(message)):
        synthesis.make_data(tmp_path, **({"task": "digits"} | values))

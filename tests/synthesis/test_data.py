"""Synthetic speech, and data sets of it."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from fastcompress.synthesis import data as synthesis
from fastcompress.synthesis import espeak, texts
from fastcompress.training.manifest import (
    Utterance,
    read_manifest,
)

RATE = 16_000


def test_speech():
    samples, rate = espeak.synthesize("seven two five zero", "en-us+f3")
    assert rate == 22050 and samples.dtype == np.float32 and 1.0 < len(samples) / rate < 3.0
    assert 0.1 < np.abs(samples).max() <= 1.0
    slow, _ = espeak.synthesize("seven two five zero", "en-us+f3", rate=90)
    other, _ = espeak.synthesize("seven two five zero", "en-us+m3")
    assert len(slow) > 1.3 * len(samples) and not np.array_equal(other[:20000], samples[:20000])
    assert np.array_equal(espeak.synthesize("seven two five zero", "en-us+f3")[0], samples)  # as before
    assert espeak.phonemes("seven") == ["s", "E", "v", "@", "n"]
    assert espeak.phonemes("one two") == espeak.phonemes("one") + espeak.phonemes("two")
    with pytest.raises(espeak.SynthesisError, match="espeak-ng has no voice 'xx-nowhere'"):
        espeak.synthesize("a", "xx-nowhere")
    with pytest.raises(ValueError, match=re.escape("rate must lie in [80, 450], got 10")):
        espeak.synthesize("a", rate=10)


def test_a_synthesizer_that_crashes_is_started_again():
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


def test_held_out_voices_exist():
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


def test_an_interrupted_run_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
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
    (tmp_path / "broken/audio/train/000002.wav").write_bytes(b"RIFF half")  # not finished, since it has no record
    calls.clear()
    monkeypatch.setattr(synthesis, "make_utterance", lambda *a: (calls.append(a), make(*a))[1])
    synthesis.make_data(tmp_path / "broken", "numbers", "translation", **sizes)
    whole, mended = digest(tmp_path / "whole"), digest(tmp_path / "broken")
    assert whole == mended and len(calls) == len(whole) - 2
    target = read_manifest(tmp_path / "broken/train.jsonl")[0].target
    assert target == texts.sentence("numbers", "train", 0)[1]
    with pytest.raises(ValueError, match="contains other data"):
        synthesis.make_data(tmp_path / "broken", "digits", **sizes)


def test_noise_is_as_loud_as_it_says():
    """The power of the difference to the same utterance without noise is the requested one."""
    import random

    clean, rate = espeak.synthesize("seven two five zero nine", "en-us")
    found = []
    for seed in range(200):
        mixed = synthesis._degrade(clean, random.Random(seed), (3.0, 3.0))
        # A least-squares filter with three taps undoes level and tilt.
        columns = np.stack([np.roll(clean, k) for k in range(3)], 1)
        taps = np.linalg.lstsq(columns, mixed, rcond=None)[0]
        speech = columns @ taps
        found.append(10 * np.log10(np.mean(speech**2) / np.mean((mixed - speech) ** 2)))
        assert np.abs(mixed).max() <= 0.9 + 1e-6
    untilted = [x for x in found if abs(x - 3.0) < 0.3]
    assert 60 < len(untilted) < 140  # half of the utterances have no tilt, which changes the ratio


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
def test_invalid_arguments(values: dict[str, Any], message: str, tmp_path: Path):
    with pytest.raises(ValueError, match=re.escape(message)):
        synthesis.make_data(tmp_path, **({"task": "digits"} | values))

"""The experiment on an audio LLM of real parts, with tiny parts: its strings, training, rows, resumption and tables."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import transformers

from experiments import real_digits, training_free
from fastcompress.training.manifest import read_manifest
from fastcompress.training.recipes import build_tokenizer
from tests.support import tiny_whisper

pytestmark = [
    pytest.mark.xdist_group("training"),
]

PEOPLE = (*real_digits.TRAINED, *real_digits.DEV, *real_digits.NEW)
WORDS = ("one", "two")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of a tiny encoder, a tiny decoder, and digits whose level is the number of the person."""
    found = tmp_path_factory.mktemp("digits")
    tiny_whisper.write(found / real_digits.ENCODER)
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        "llama", vocab_size=16, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(found / real_digits.DECODER)
    build_tokenizer([" ".join(WORDS)]).save_pretrained(found / real_digits.DECODER)
    (found / real_digits.DECODER / "chat_template.jinja").write_text("long system prompt {{ messages }}")
    (found / "speech" / "fsdd").mkdir(parents=True)
    lines = []
    for number, person in enumerate(PEOPLE, 1):
        for digit, word in enumerate(WORDS, 1):
            for take in (0, 1, 5, 6):
                file = f"fsdd/{word}-{person}-{take}.flac"
                samples = np.full(800 * digit, number / 10 + take / 100, np.float32)
                soundfile.write(found / "speech" / file, samples, real_digits.RATE)
                lines.append({"audio_filepath": file, "text": word, "speaker": person, "take": take})
    (found / "speech" / "fsdd.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return found


@pytest.mark.parametrize("test", [False, True])
def test_strings(folder: Path, tmp_path: Path, test: bool):
    digits = read_manifest(folder / "speech" / "fsdd.jsonl")
    path = real_digits.make_strings(digits, tmp_path, "some", real_digits.TRAINED, test, 8)
    utterances = read_manifest(path)
    assert [u.more["speaker"] for u in utterances] == [*real_digits.TRAINED] * 2
    for u in utterances:
        samples, rate = soundfile.read(u.audio_filepath)
        assert u.duration == pytest.approx(len(samples) / rate)
        words = u.target.split()
        sounds = [part for part in np.split(samples, np.flatnonzero(np.diff(samples != 0)) + 1) if part[0]]
        assert [WORDS[len(part) // 800 - 1] for part in sounds] == words and 1 <= len(words) <= 4
        for part in sounds:
            person, take = divmod(round(100 * part[0]), 10)
            assert PEOPLE[person - 1] == u.more["speaker"] and (take in real_digits.TEST_TAKES) == test


def test_training_rows_and_tables(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
):
    threads = torch.get_num_threads()
    request.addfinalizer(lambda: torch.set_num_threads(threads))
    monkeypatch.setattr(training_free, "RATES", (4,))
    numbers = {"--strings": 8, "--scored": 3, "--steps": 2, "--batch-size": 2}
    arguments = [str(value) for pair in numbers.items() for value in pair]
    arguments = ["digits", str(folder), "--out", str(tmp_path / "out"), "--results", str(tmp_path), *arguments]
    monkeypatch.setattr("sys.argv", arguments)
    assert real_digits.main() == 0
    found = json.loads((tmp_path / "real-digits.json").read_text())
    assert len(found["rows"]) == 1 + 3 * 4 and found["steps"] == 2 == found["log"][-1]["step"]
    assert [len(words) for words in found["words"].values()] == [3, 3]
    rates = {row["compression"]: row["scores"]["test"]["tokens_per_second"] for row in found["rows"]}
    assert rates["uniform 4x"] == rates["min-variance 4x"] == rates["min-variance 4x, lengths in random order"]
    assert rates["every frame"] > 3 * rates["uniform 4x"]
    for row in found["rows"]:
        for name, score in row["scores"].items():
            assert score["wer"] == pytest.approx(100 * sum(score["errors"]) / sum(found["words"][name]))
    assert not (tmp_path / "out" / "decoder" / "chat_template.jinja").exists()
    text = (tmp_path / "real-digits.md").read_text()
    assert text.count("| min-variance 4x ") == 2 + 4  # two tables of rates, one of differences
    monkeypatch.setattr(training_free, "score", lambda *_: pytest.fail("scored again"))
    monkeypatch.setattr(real_digits, "Run", lambda *_: pytest.fail("trained again"))
    assert real_digits.main() == 0

"""What cannot be used: counted, and listed on stderr and in a file, by one class that all commands share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from fastcompress.audio import AudioError
from fastcompress.cli.main import main
from fastcompress.training import usable
from fastcompress.training.evaluation import evaluate
from fastcompress.training.examples import Examples
from fastcompress.training.manifest import ManifestError, Utterance
from fastcompress.training.recipes import build_small
from fastcompress.training.usable import Skipped
from tests.support import audio_llms
from tests.support.command_line import flags
from tests.support.lalm_data import RATE, write_lines, write_tones


def tone(path: Path, seconds: float = 0.5) -> Path:
    soundfile.write(path, 0.1 * np.sin(np.arange(int(seconds * RATE)) * 0.1), RATE)
    return path


def nan(path: Path) -> Path:
    """Audio whose header is fine."""
    soundfile.write(path, np.full(8000, np.nan, np.float32), RATE, subtype="FLOAT")
    return path


def test_each_utterance_is_listed_once(tmp_path: Path):
    said: list[str] = []
    skipped = Skipped(tmp_path / "skipped.txt", said.append, listed=2)
    tone(tmp_path / "a.wav")
    lines = [{"audio": f"{name}.wav", "text": "x"} for name in "abcd"]
    manifest = write_lines(tmp_path, *lines, {"audio": "a.wav", "text": " "})
    assert [u.source for u in skipped.read(manifest)] == [f"{manifest}:1", f"{manifest}:5"]
    listed = [f"{manifest}:{i}: {tmp_path}/{name}.wav: no such file" for i, name in ((2, "b"), (3, "c"), (4, "d"))]
    assert list(skipped.lines) == listed and len(skipped) == 3
    head = f"{manifest}: skipped 3 of 5 utterances:"
    assert said == ["\n  ".join([head, *listed[:2], f"... and 1 more, listed in {tmp_path}/skipped.txt"])]
    assert not (tmp_path / "skipped.txt").exists()
    skipped.write()
    assert (tmp_path / "skipped.txt").read_text().splitlines() == listed
    said.clear()
    for name in "efge":
        u = Utterance(Path(f"{name}.wav"), "x", "x")
        skipped.add(u, AudioError(f"{name}.wav: damaged"))  # whose message has the name
    assert said[:2] == ["skipped e.wav: damaged", "skipped f.wav: damaged"] and len(said) == 3
    skipped.merge(["g.wav: damaged", "h.wav: damaged"])
    skipped.finish()
    assert said[3:] == [f"skipped 4 utterances that could not be decoded, listed in {tmp_path}/skipped.txt"]
    all_of_them = [*listed, *(f"{name}.wav: damaged" for name in "efgh")]
    assert (tmp_path / "skipped.txt").read_text().splitlines() == all_of_them
    resumed = Skipped(tmp_path / "skipped.txt", said.append)
    resumed.read(manifest)
    resumed.write()
    assert (tmp_path / "skipped.txt").read_text().splitlines() == all_of_them
    with pytest.raises(ManifestError, match="has no usable utterance"):
        Skipped(report=None).read(write_lines(tmp_path, {"audio": "none.wav", "text": "x"}))


def test_an_empty_target_is_scored_and_not_learnt(tmp_path: Path):
    tone(tmp_path / "a.wav")
    lines = [
        {"audio": "a.wav", "text": "a"},
        {"audio": "a.wav", "text": ""},
        {"audio": "a.wav", "text": "b", "target": " "},
    ]
    manifest = write_lines(tmp_path, *lines)
    assert len(Skipped(report=None).read(manifest)) == 3
    skipped = Skipped(report=None)
    assert len(skipped.read(manifest, training=True)) == 1
    assert [line.rpartition(": ")[2] for line in skipped.lines] == ["the target is empty"] * 2


def test_a_manifest_without_audio_is_reported(tmp_path: Path):
    said: list[str] = []
    manifest = write_lines(tmp_path, {"text": "a"}, {"text": "b"})
    assert len(Skipped(report=said.append).read(manifest)) == 2
    assert said == [f"{manifest}: warning: none of the 2 utterances has audio: audio_filepath is missing"]


def test_rates_are_per_second_that_was_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A header may declare more samples than the decoder returns, for example in lossy formats."""
    utterances = [Utterance(tone(tmp_path / f"{i}.wav", 0.5 + i), "low", "low") for i in range(2)]
    model, processor = build_small(utterances)
    monkeypatch.setattr(usable, "audio_seconds", lambda path, name=None: 1.75)
    good, _ = usable.check_audio(utterances)
    assert [u.duration for u in good] == [1.75, 1.75]
    monkeypatch.setattr(usable, "_PADDING", 9.0)
    result, _ = evaluate(model, Examples(good, processor), timed=0, max_new_tokens=2)
    assert result.seconds == 2.0 and result.frames_per_second == pytest.approx(50)


def test_no_utterance_is_timed_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    utterances = [Utterance(tone(tmp_path / f"{i}.wav", 0.5 + i), "low", "low") for i in range(3)]
    model, processor = build_small(utterances)
    batches: list[tuple[int, ...]] = []
    batch = Examples.batch
    monkeypatch.setattr(Examples, "batch", lambda self, i, **k: (batches.append(tuple(i)), batch(self, i, **k))[1])
    for timed, wanted in ((0, []), (2, [(0,), (1,)]), (10, [(0,), (1,), (2,)])):
        batches.clear()
        evaluate(model, Examples(utterances, processor), timed=timed, max_new_tokens=2)
        assert batches[1:] == wanted


# The commands


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A manifest of which half is not usable, and models that have learnt nothing."""
    folder = tmp_path_factory.mktemp("usable")
    from fastcompress.training.manifest import read_manifest

    tones = read_manifest(write_tones(folder, 4))
    for part in build_small(tones):
        part.save_pretrained(folder / "model")
    audio_llms.make("qwen2_audio").save_pretrained(folder / "stock")
    audio_llms.processor("qwen2_audio").save_pretrained(folder / "stock")
    lines: list[dict[str, Any]] = [{"audio": str(u.audio_filepath), "text": u.text} for u in tones]
    tone(folder / "short.wav")
    nan(folder / "nan.wav")
    lines += [{"audio": "missing.wav"}, {"audio": "short.wav", "duration": 3.0}, {"audio": "nan.wav"}]
    lines += [{"audio": "short.wav", "offset": 0.2, "duration": 9.0}]
    write_lines(folder, *({"text": "low"} | line for line in lines))
    return folder


REASONS = {
    "m.jsonl:5": "missing.wav: no such file",
    "m.jsonl:6": "short.wav: the audio is 0.500 s long, but the manifest says 3 s",
    "m.jsonl:7": "nan.wav: contains NaN or infinite samples before 0.5 s",
    "m.jsonl:8": "short.wav: the segment from 0.2 to 9.2 s ends after the audio, which is 0.500 s long",
}


@pytest.mark.parametrize("command", ["train", "finetune", "evaluate", "transcribe"])
def test_every_command_lists_what_it_skips(
    command: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    manifest, out, scores = data / "m.jsonl", tmp_path / "run", tmp_path / "scores.json"
    training = flags(data=manifest, output_dir=out, max_steps=10, per_device_train_batch_size=2, logging_steps=5)
    reasons = {f"{data}/{source}": f"{data}/{why}" for source, why in REASONS.items()}
    arguments = {
        "train": [*training, "--save-steps", "10"],
        "finetune": [*training, *flags(model=data / "stock", bf16=False, lora_rank=2)],
        "evaluate": [str(data / "model"), str(manifest), *flags(json=scores, max_new_tokens=2)],
        "transcribe": [str(data / "nan.wav"), str(data / "short.wav"), str(data / "missing.wav"), "--max-new-tokens=2"],
    }[command]
    if command == "transcribe":
        arguments += ["--model", str(data / "model")]
        reasons = {"fastcompress: error": reasons[f"{data}/m.jsonl:7"]}
    capsys.readouterr()
    assert main([command, *arguments]) == (command == "transcribe")
    err = capsys.readouterr().err
    wanted = {f"{source}: {why}" for source, why in reasons.items()}
    assert wanted <= {line.strip().removeprefix("skipped ") for line in err.splitlines()}
    if command in ("train", "finetune"):
        assert set((out / "skipped.txt").read_text().splitlines()) == wanted
    if command == "evaluate":
        found = json.loads(scores.read_text())["manifests"][str(manifest)]
        assert set(found["skipped_lines"]) == wanted and (found["skipped"], found["utterances"]) == (4, 4)

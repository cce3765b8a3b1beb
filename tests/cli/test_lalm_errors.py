"""Mistakes that end a command with one line instead of a traceback."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from fastcompress.audio import AudioError
from fastcompress.cli import main as cli
from fastcompress.lalm import FastCompressProcessor
from fastcompress.training import logs
from fastcompress.training.examples import Examples
from fastcompress.training.manifest import ManifestError, Utterance, read_manifest
from fastcompress.training.recipes import build_small, build_tokenizer
from fastcompress.training.usable import check_audio
from tests.support.command_line import fails
from tests.support.lalm_data import write_tones


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write tones, and an untrained model in the folder ``model``."""
    folder = tmp_path_factory.mktemp("errors")
    model, processor = build_small(read_manifest(write_tones(folder, 4)))
    for part in (model, processor):
        part.save_pretrained(folder / "model")
    return folder


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a machine without a GPU")
def test_a_device_that_is_not_there(data: Path, capsys: pytest.CaptureFixture[str]):
    sound = str(data / "audio" / "train-0.wav")
    for command in (["transcribe", sound, "--model", str(data / "model")], ["evaluate", str(data / "model"), "x"]):
        assert "--device cuda" in fails([*command, "--device", "cuda"], capsys)
    assert "must be cpu, cuda or cuda:N, got 'nope'" in fails([*command, "--device", "nope"], capsys)


def test_parts_that_are_not_there(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    arguments = ["train", "--output-dir", str(tmp_path / "run"), "--data", str(data / "train.jsonl")]
    error = fails([*arguments, "--audio-model", "./nope", "--text-model", "./no-text"], capsys)
    assert "--audio-model ./nope, --text-model ./no-text: cannot be loaded" in error
    assert not (tmp_path / "run").exists()


def test_a_name_that_is_no_text(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """A file name that is not UTF-8 contains lone surrogates in Python."""
    name = os.fsdecode(b"bad\xff.wav")
    try:
        shutil.copy(data / "audio" / "train-0.wav", tmp_path / name)
    except OSError:
        pytest.skip("this file system has no such names")
    few = ["--max-new-tokens", "4"]
    sound, model = str(tmp_path / name), str(data / "model")
    for arguments in (
        ["inspect", sound, "--no-noise", "--rule", "uniform:3", "--json", str(tmp_path / "a.json")],
        ["inspect", sound, "--no-noise", "--rule", "uniform:3", "--png", str(tmp_path / "pictures")],
        ["transcribe", sound, sound, "--model", model, *few],
        ["transcribe", sound, sound, "--model", model, "--stream", *few],
        ["transcribe", sound + "x", sound, "--model", model],
    ):
        assert cli.main(arguments) == (0 if arguments[1] == sound else 1)
        assert "bad\\udcff.wav" in capsys.readouterr().out


def test_a_development_loss_that_is_none(tmp_path: Path):
    log = logs.Logs(tmp_path, 0)
    log.write(1, {"loss": 2.0, "development_loss": float("nan"), "grad_norm": float("inf")})
    log.close()
    (row,) = logs.read(tmp_path / "log.csv")
    assert np.isnan(row["development_loss"]) and row["grad_norm"] == float("inf") and row["loss"] == 2
    logs.Logs(tmp_path, 1).close()
    assert len(logs.read(tmp_path / "log.csv")) == 1


def test_audio_shorter_than_a_window_of_the_features(tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]):
    from transformers import ParakeetFeatureExtractor

    soundfile.write(tmp_path / "a.wav", 0.1 * np.ones(450), 16_000)
    processor = FastCompressProcessor(ParakeetFeatureExtractor(feature_size=80), build_tokenizer(["a"]))
    (u,), _ = check_audio([Utterance(tmp_path / "a.wav", "a", "a")])
    examples = Examples([u], processor)
    with pytest.raises(AudioError, match=r"a.wav: has 0.028 s of audio, less than one frame of 0.032 s"):
        examples.features(0)
    assert not examples.is_usable(0)
    model = tmp_path / "model"
    shutil.copytree(data / "model", model)
    found = json.loads((model / "processor_config.json").read_text())
    found["feature_extractor"]["n_fft"] = 512
    (model / "processor_config.json").write_text(json.dumps(found))
    assert "0.028 s of audio" in fails(["transcribe", str(tmp_path / "a.wav"), "--model", str(model)], capsys)


def test_phones_that_the_model_lacks(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    lines = [json.loads(line) for line in (data / "train.jsonl").read_text().splitlines()]
    lines[-1]["phones"] = "low xx"
    (data / "other.jsonl").write_text("\n".join(map(json.dumps, lines)))
    arguments = ["--data", str(data / "other.jsonl"), "--model", str(data / "model")]
    error = fails(["train", "--output-dir", str(tmp_path / "run"), *arguments], capsys)
    assert "the model has no phone 'xx'" in error
    with pytest.raises(ManifestError, match="the model has no phone"):
        Examples(read_manifest(data / "train.jsonl"), None, phones=["x"])


def test_a_folder_that_is_missing_is_made_before_the_work(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    from fastcompress.training import evaluation

    arguments = ["evaluate", str(data / "model"), str(data / "train.jsonl"), "--max-new-tokens", "2", "--json"]
    assert cli.main([*arguments, str(tmp_path / "no" / "such" / "folder" / "a.json")]) == 0
    assert (tmp_path / "no" / "such" / "folder" / "a.json").is_file()
    monkeypatch.setattr(evaluation, "evaluate", lambda *_, **__: pytest.fail("worked first"))
    assert "is a directory" in fails([*arguments, str(tmp_path)], capsys)
    (tmp_path / "file").touch()
    assert "not a directory" in fails([*arguments, str(tmp_path / "file" / "a.json")], capsys)

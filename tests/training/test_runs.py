"""Runs of the reference audio LLM: the contents of their folders, and the conditions for resuming."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from fastcompress.decoder.generation import unwrap
from fastcompress.lalm.loading import RunError, load_model
from fastcompress.training import logs
from fastcompress.training.manifest import read_manifest
from fastcompress.training.parsing import read_record
from fastcompress.training.recipes import build_tokenizer
from fastcompress.training.runs import Run
from fastcompress.training.settings import SettingsError, TrainSettings
from tests.support.lalm_data import write_tones
from tests.support.reference_models import TEXT, WHISPER

pytestmark = [
    pytest.mark.xdist_group("training"),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    write_tones(folder, 8)
    write_tones(folder, 4, "dev", seed=1)
    return folder


def settings(data: Path, run: Path, /, **values: Any) -> TrainSettings:
    small = {
        "output_dir": str(run),
        "data": str(data / "train.jsonl"),
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "save_steps": 2,
    }
    return TrainSettings(**(small | values))


def test_an_adapter_finds_its_parts_from_elsewhere(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    transformers.WhisperModel(transformers.AutoConfig.for_model("whisper", **WHISPER)).save_pretrained("audio")
    transformers.WhisperFeatureExtractor(feature_size=16).save_pretrained("audio")
    config = transformers.AutoConfig.for_model("llama", **TEXT)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained("text")
    build_tokenizer([u.target for u in read_manifest(data / "train.jsonl")]).save_pretrained("text")
    given = settings(data, tmp_path / "run", audio_model="audio", text_model="text", lora_rank=2, max_steps=1)
    given = dataclasses.replace(given, audio_padding="longest")
    Run(given, say=lambda text: None).train()
    base = json.loads((tmp_path / "run" / "final" / "base.json").read_text())
    assert base == {"audio_model": str(tmp_path / "audio"), "text_model": str(tmp_path / "text")}
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    loaded, _ = load_model(tmp_path / "run")
    assert unwrap(loaded).config.audio_padding == "longest"


def test_the_padding_of_a_small_model(data: Path, tmp_path: Path):
    for padding, wanted in ((None, "longest"), ("window", "window")):
        run = Run(settings(data, tmp_path / str(padding), audio_padding=padding), say=lambda text: None)
        assert run.model.config.audio_padding == wanted


def test_the_rate_that_is_logged(data: Path, tmp_path: Path):
    given = settings(
        data, tmp_path / "run", learning_rate=1e-3, projector_learning_rate=5e-3, warmup_steps=0, max_steps=2
    )
    Run(given, say=lambda text: None).train()
    rows = logs.read(tmp_path / "run" / "log.csv")
    assert [row["learning_rate"] for row in rows] == [1e-3 * given.rate(step) for step in range(2)]


def test_a_projector_with_learning_rate_0(data: Path, tmp_path: Path):
    run = Run(settings(data, tmp_path / "run", projector_learning_rate=0.0), say=lambda text: None)
    before = {name: p.clone() for name, p in run.training.trained.items()}
    run.training.update()
    changed = {name for name, p in run.training.trained.items() if not torch.equal(p, before[name])}
    assert changed and not any("projector" in name for name in changed)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"projector_learning_rate": -1e-3}, "`projector_learning_rate` must be at least 0, got -0.001"),
        ({"projector_learning_rate": float("nan")}, "`projector_learning_rate` must be a number, got nan"),
        ({"audio_padding": "short"}, "`audio_padding` must be window or longest, got 'short'"),
        ({"logging_steps": 2, "eval_steps": 3}, "`eval_steps` must be a multiple of `logging_steps` (2), got 3"),
    ],
)
def test_settings_that_are_wrong(values: dict[str, Any], message: str, data: Path):
    with pytest.raises(SettingsError, match=re.escape(message)):
        settings(data, data / "run", **values)


def test_a_changed_manifest_is_an_error(data: Path, tmp_path: Path):
    manifest = data / "changed.jsonl"
    manifest.write_text((data / "train.jsonl").read_text())
    said: list[str] = []
    run = Run(settings(data, tmp_path / "run", data=str(manifest)), say=said.append)
    run.training.update()
    run.training.save()
    said.clear()
    Run(read_record(TrainSettings, tmp_path / "run"), resume=True, say=said.append)
    assert said == ["resuming after step 1 of 4"]
    manifest.write_text("".join(manifest.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(RunError, match="changed.jsonl has changed since this run started; restore it to resume"):
        Run(read_record(TrainSettings, tmp_path / "run"), resume=True, say=said.append)
    (tmp_path / "run" / "environment.json").unlink()  # as in a run that was moved without this file
    Run(read_record(TrainSettings, tmp_path / "run"), resume=True, say=said.append)

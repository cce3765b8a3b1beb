"""Runs of the reference audio LLM: what their folders say, and what resuming them asks for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from fastcompress.lalm.loading import RunError, load_model
from fastcompress.training import logs
from fastcompress.training.manifest import read_manifest
from fastcompress.training.recipes import build_tokenizer
from fastcompress.training.runs import Run
from fastcompress.training.settings import RunSettings
from tests.lalm.test_model import TEXT, WHISPER
from tests.support.lalm_data import write_tones

pytestmark = [
    pytest.mark.xdist_group("training"),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    write_tones(folder, 8)
    write_tones(folder, 4, "dev", seed=1)
    return folder


def settings(data: Path, **values: Any) -> RunSettings:
    small = {"train": str(data / "train.jsonl"), "steps": 4, "batch_size": 2, "log_every": 1, "save_every": 2}
    return RunSettings.from_flat(small | values)


def test_an_adapter_finds_its_parts_from_elsewhere(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    transformers.WhisperModel(transformers.AutoConfig.for_model("whisper", **WHISPER)).save_pretrained("audio")
    transformers.WhisperFeatureExtractor(feature_size=16).save_pretrained("audio")
    config = transformers.AutoConfig.for_model("llama", **TEXT)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained("text")
    build_tokenizer([u.target for u in read_manifest(data / "train.jsonl")]).save_pretrained("text")
    given = settings(data, audio_model="audio", text_model="text", lora_rank=2, steps=1)
    Run(tmp_path / "run", given, say=lambda text: None).train()
    base = json.loads((tmp_path / "run" / "final" / "base.json").read_text())
    assert base == {"audio_model": str(tmp_path / "audio"), "text_model": str(tmp_path / "text")}
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    load_model(tmp_path / "run")


def test_the_rate_that_is_logged(data: Path, tmp_path: Path):
    given = settings(data, learning_rate=1e-3, projector_learning_rate=5e-3, warmup_steps=0, steps=2)
    Run(tmp_path / "run", given, say=lambda text: None).train()
    rows = logs.read(tmp_path / "run" / "log.csv")
    assert [row["learning_rate"] for row in rows] == [1e-3 * given.training.rate(step) for step in range(2)]


def test_a_projector_that_stays(data: Path, tmp_path: Path):
    run = Run(tmp_path / "run", settings(data, projector_learning_rate=0.0), say=lambda text: None)
    before = {name: p.clone() for name, p in run.training.trained.items()}
    run.training.update()
    changed = {name for name, p in run.training.trained.items() if not torch.equal(p, before[name])}
    assert changed and not any("projector" in name for name in changed)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"projector_learning_rate": -1e-3}, "projector_learning_rate must not be negative, got -0.001"),
        ({"projector_learning_rate": float("nan")}, "projector_learning_rate must not be negative, got nan"),
        ({"log_every": 2, "evaluate_every": 3}, "evaluate_every must be a multiple of log_every, 2, got 3"),
    ],
)
def test_settings_that_are_wrong(values: dict[str, Any], message: str, data: Path):
    with pytest.raises(RunError, match=message):
        settings(data, **values)


def test_a_manifest_that_changed_is_said(data: Path, tmp_path: Path):
    manifest = data / "changed.jsonl"
    manifest.write_text((data / "train.jsonl").read_text())
    said: list[str] = []
    run = Run(tmp_path / "run", settings(data, train=str(manifest)), say=said.append)
    run.training.update()
    run.training.save()
    said.clear()
    Run(tmp_path / "run", None, resume=True, say=said.append)
    assert said == ["going on after step 1 of 4"]
    manifest.write_text("".join(manifest.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(RunError, match="changed.jsonl: is not what the run began with"):
        Run(tmp_path / "run", None, resume=True, say=said.append)
    (tmp_path / "run" / "environment.json").unlink()  # as one that was moved without it
    Run(tmp_path / "run", None, resume=True, say=said.append)

"""`fastcompress inspect --encoder` with the folder of an audio LLM."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import transformers

import fastcompress as fc
from fastcompress.audio import load_audio
from fastcompress.cli.main import main
from fastcompress.inspection.audio_llm import AudioLLM, load_source
from fastcompress.inspection.table import EncoderError
from fastcompress.integrations.transformers import FAMILIES, apply_to, compressed_prompt, prompts
from fastcompress.lalm.loading import load_model
from tests.support import ROOT, audio_llms

DIGITS = ROOT / "assets" / "digits" / "0.wav"


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stock")
    for name in ("qwen2_audio", "audioflamingo3"):
        audio_llms.make(name).save_pretrained(folder / name)
        audio_llms.processor(name).save_pretrained(folder / name)
    return folder


@pytest.mark.parametrize("name", ["qwen2_audio", "audioflamingo3"])
def test_a_rule_compresses_as_the_table_says(name: str, stock: Path, capsys: pytest.CaptureFixture[str]):
    """The tokens of the table are those of the model."""
    rule = "local-max"
    assert main(["inspect", str(DIGITS), "--encoder", str(stock / name), "--rule", rule, "--no-noise"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert f"audio of {name} {name}" in out[0]
    found = [int(line.split()[2]) for line in out if line.startswith(rule)]
    model, processor = audio_llms.make(name), audio_llms.processor(name)
    apply_to(model, rule, pack=False)
    samples, tokens = load_audio(DIGITS), 0
    for piece in (samples[:16_000], samples[16_000:]):  # the window of the test's extractor
        inputs = prompts.processor_inputs(processor, [piece], [""])
        text = int((inputs["input_ids"] != audio_llms.AUDIO).sum())
        tokens += len(compressed_prompt(model, **inputs).source) - text
    assert 1 < found[0] and abs(found[0] - tokens) <= 1  # a segment may span the pieces


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("name", list(FAMILIES))
def test_every_family(name: str, before: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The rows are those that a compressor gets, with the inputs of the tests in place of a processor's."""
    model = audio_llms.make(name).eval()
    model.save_pretrained(tmp_path)
    inputs = audio_llms.batch(name, model, (20,))
    processor = type("Processor", (), {"feature_extractor": transformers.WhisperFeatureExtractor(chunk_length=1)})()
    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", lambda *_, **__: processor)
    monkeypatch.setattr(prompts, "processor_inputs", lambda *_: inputs)
    if before and FAMILIES[name].why_not_before:
        with pytest.raises(EncoderError, match="cannot load an audio LLM"):
            load_source(tmp_path, before)
        return
    source = load_source(tmp_path, before)
    assert isinstance(source, AudioLLM)
    rows, _ = source.frames(np.zeros(16_000, np.float32))
    seen: list[Any] = []

    class Compressor(torch.nn.Module):
        def forward(self, x: torch.Tensor, cu_seqlens: torch.Tensor) -> fc.Pooled:
            seen.append(x)
            return fc.segment_pool(x, cu_seqlens=cu_seqlens, rule="uniform:3")

    apply_to(model, Compressor(), pack=False, before_projector=before)
    with torch.no_grad():
        compressed_prompt(model, **inputs)
    assert len(rows) > 3 and rows.dtype == torch.float32
    torch.testing.assert_close(rows, seen[0][: len(rows)].float())


def test_folders_that_are_not_compressed(tmp_path: Path, stock: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "moshi"}))
    assert main(["inspect", str(DIGITS), "--encoder", str(tmp_path)]) == 2
    assert "moshi cannot be compressed: it models streams of discrete codes" in capsys.readouterr().err
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "voxtral"}))
    assert main(["inspect", str(DIGITS), "--encoder", str(tmp_path)]) == 2
    assert "cannot load an audio LLM (" in capsys.readouterr().err
    assert main(["inspect", str(DIGITS), "--before-projector"]) == 2
    assert "--before-projector needs --encoder" in capsys.readouterr().err
    soundfile.write(tmp_path / "short.wav", np.zeros(2), 16_000)
    assert main(["inspect", str(tmp_path / "short.wav"), "--encoder", str(stock / "qwen2_audio")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_reference_model(capsys: pytest.CaptureFixture[str]):
    folder = ROOT / "assets" / "models" / "digits"
    source = load_source(folder)
    samples = load_audio(DIGITS)
    rows, rate = source.frames(samples)
    model, processor = load_model(folder)
    features = processor.pad_features([processor.features(samples, 16_000)])
    with torch.no_grad():
        frames, lengths = model.encode(*features.values())
    assert torch.equal(rows, frames[0, : lengths[0]]) and rate == pytest.approx(50, rel=0.01)
    assert main(["inspect", str(DIGITS), "--encoder", str(folder), "--ratio", "3", "--no-noise"]) == 0
    assert "whisper encoder of digits" in capsys.readouterr().out

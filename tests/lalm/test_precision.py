"""Training of pretrained parts in half precision: trained weights are in fp32 and are restored by loading."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from accelerate.state import AcceleratorState

from fastcompress.decoder.generation import unwrap
from fastcompress.lalm.loading import load_model
from fastcompress.lalm.lora import add_lora
from fastcompress.training.examples import Examples
from fastcompress.training.manifest import read_manifest
from fastcompress.training.recipes import build_tokenizer
from fastcompress.training.runs import Run
from fastcompress.training.settings import TrainSettings
from tests.support.lalm_data import write_tones
from tests.support.reference_models import TEXT, WHISPER, batch, build


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write an encoder and a decoder in bf16, and a manifest."""
    folder = tmp_path_factory.mktemp("pretrained")
    manifest = write_tones(folder, 8, texts=2)
    tokenizer = build_tokenizer([u.target for u in read_manifest(manifest)])
    torch.manual_seed(0)
    audio = transformers.WhisperModel(transformers.AutoConfig.for_model("whisper", **WHISPER))
    audio.to(torch.bfloat16).save_pretrained(folder / "audio")
    transformers.WhisperFeatureExtractor(feature_size=16, chunk_length=1).save_pretrained(folder / "audio")
    text = transformers.AutoConfig.for_model("qwen2", **TEXT, initializer_range=0.2)
    decoder = transformers.AutoModelForCausalLM.from_config(text)
    decoder.to(torch.bfloat16).save_pretrained(folder / "text")
    tokenizer.save_pretrained(folder / "text")
    return folder


@pytest.fixture
def one_precision() -> Iterator[None]:
    """Reset accelerate's state: a process has one precision, and each run is usually a process."""
    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()


def settings(folder: Path, run: Path, **more: Any) -> TrainSettings:
    values: dict[str, Any] = {
        "output_dir": str(run),
        "data": str(folder / "train.jsonl"),
        "audio_model": str(folder / "audio"),
        "text_model": str(folder / "text"),
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "warmup_steps": 0,
        "logging_steps": 1,
        "save_steps": 0,
    }
    return TrainSettings(**(values | more))


@pytest.mark.usefixtures("one_precision")
@pytest.mark.parametrize("train_encoder", [False, True], ids=["frozen", "encoder"])
@pytest.mark.parametrize("rank", [0, 2], ids=["full", "lora"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_trained_weights_are_in_fp32(pretrained: Path, tmp_path: Path, precision: str, rank: int, train_encoder: bool):
    chosen = settings(
        pretrained, tmp_path / "run", bf16=precision == "bf16", lora_rank=rank, train_encoder=train_encoder
    )
    run = Run(chosen, say=lambda text: None)
    run.train()
    assert {p.dtype for p in run.training.trained.values()} == {torch.float32}
    state = run.training.optimizer.state_dict()["state"].values()
    assert {s[name].dtype for s in state for name in ("exp_avg", "exp_avg_sq")} == {torch.float32}
    assert unwrap(run.model).audio_tower.dtype == (torch.float32 if train_encoder else torch.bfloat16)
    if rank:  # frozen weights keep their dtype
        assert unwrap(run.model).get_input_embeddings().weight.dtype == torch.bfloat16
    loaded, processor = load_model(tmp_path / "run")
    found = dict(loaded.named_parameters())
    for name, p in run.training.trained.items():
        assert found[name].dtype == torch.float32 and torch.equal(found[name], p), name
    if precision == "bf16":  # accelerate has put autocast into the trained model's forward
        return
    inputs = Examples(read_manifest(pretrained / "train.jsonl"), processor).batch([0, 8])
    assert torch.equal(loaded(**inputs).loss, run.model.eval()(**inputs).loss)


def test_lora_on_half_precision():
    """The decoder's weights stay in bf16, and fully trained weights are in fp32, with autocast and without."""
    model = add_lora(build(rule="local-max").to(torch.bfloat16), rank=2)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert unwrap(model).language_model.dtype == unwrap(model).audio_tower.dtype == torch.bfloat16
    expected = build(rule="local-max")(**batch()).loss
    torch.testing.assert_close(model(**batch()).loss, expected, rtol=0.05, atol=0.05)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(**batch()).loss, expected, rtol=0.05, atol=0.05)
    with model.disable_adapter():
        torch.testing.assert_close(model(**batch()).loss, expected, rtol=0.05, atol=0.05)

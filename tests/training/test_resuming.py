"""Trained encoders that have their own random numbers or statistics: repeated and resumed runs have equal bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from fastcompress.lalm import (
    FastCompressConfig,
    FastCompressForConditionalGeneration,
    FastCompressProcessor,
)
from fastcompress.training import checkpoints
from fastcompress.training.examples import Examples
from fastcompress.training.manifest import read_manifest
from fastcompress.training.recipes import build_tokenizer
from fastcompress.training.settings import TrainerSettings
from fastcompress.training.trainer import Training
from tests.support.lalm_data import write_tones

pytestmark = [
    pytest.mark.xdist_group("training"),
]

#: Sizes of every encoder and decoder in this file.
SIZE = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}


def training(kind: str, folder: Path, **values: Any) -> Training:
    """Make a ``Training`` whose encoder has SpecAugment and layer drop (wav2vec2) or batch norm (Parakeet)."""
    if not (folder.parent / "train.jsonl").exists():
        write_tones(folder.parent, 12)
    utterances = read_manifest(folder.parent / "train.jsonl")
    tokenizer = build_tokenizer([u.target for u in utterances])
    if kind == "wav2vec2":
        audio = transformers.Wav2Vec2Config(
            **SIZE,
            num_hidden_layers=2,
            conv_dim=(8,) * 7,
            num_conv_pos_embeddings=16,
            num_conv_pos_embedding_groups=4,
            mask_time_length=2,
            mask_time_prob=0.3,
            layerdrop=0.5,
        )
        processor = FastCompressProcessor(transformers.Wav2Vec2FeatureExtractor(), tokenizer)
    else:
        audio = transformers.ParakeetEncoderConfig(
            **SIZE, num_hidden_layers=2, subsampling_conv_channels=4, num_mel_bins=80
        )
        processor = FastCompressProcessor(transformers.ParakeetFeatureExtractor(feature_size=80), tokenizer)
    text = transformers.Qwen2Config(
        **SIZE,
        vocab_size=len(tokenizer),
        num_hidden_layers=1,
        num_key_value_heads=1,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    config = FastCompressConfig(audio, text, audio_token_id=processor.audio_token_id, train_encoder=True)
    settings = TrainerSettings(
        **({"max_steps": 6, "per_device_train_batch_size": 4, "logging_steps": 1, "save_steps": 3} | values)
    )
    model = FastCompressForConditionalGeneration(config)
    return Training(model, Examples(utterances, processor), settings, folder)


def steps(run: Training, count: int) -> list[float]:
    return [run.update()["loss"] for _ in range(count)]


def state(run: Training) -> dict[str, torch.Tensor]:
    return dict(run.model.state_dict())


@pytest.mark.parametrize("kind", ["wav2vec2", "parakeet"])
def test_an_encoder_is_repeated_and_resumed_to_the_bit(kind: str, tmp_path: Path):
    whole = training(kind, tmp_path / "whole")
    found = steps(whole, 6)
    assert steps(training(kind, tmp_path / "again"), 6) == found
    half = training(kind, tmp_path / "half")
    assert steps(half, 3) == found[:3]
    half.save()
    resumed = training(kind, tmp_path / "half")
    assert resumed.resume() == 3
    assert steps(resumed, 3) == found[3:]
    for name, value in state(whole).items():
        assert torch.equal(value, state(resumed)[name]), name
    other = training(kind, tmp_path / "other", seed=1)
    assert steps(other, 1) != found[:1]


def test_statistics_that_a_checkpoint_lacks(tmp_path: Path):
    """Checkpoints of earlier versions have no statistics."""
    run = training("parakeet", tmp_path / "run")
    steps(run, 1)
    before = training("parakeet", tmp_path / "run")
    assert set(run.buffers) == set(before.buffers) and "audio_tower.layers.0.conv.norm.running_mean" in run.buffers
    run.buffers = {}
    run.save()
    (saved,) = checkpoints.found(tmp_path / "run" / "checkpoints")
    assert before.resume() == 1
    assert torch.equal(before.trained["projector.weight"], run.trained["projector.weight"])
    assert not before.buffers["audio_tower.layers.0.conv.norm.running_mean"].any()
    weights = checkpoints.load_file(saved / "weights.safetensors")
    assert not any("running_mean" in name for name in weights)


def test_frozen_statistics_are_not_saved(tmp_path: Path):
    run = training("parakeet", tmp_path / "run")
    run.model.train_encoder(False)
    frozen = Training(run.model, run.examples, run.settings, tmp_path / "frozen")
    assert run.buffers and not frozen.buffers


def test_unused_weights_of_an_encoder_are_in_the_graph(tmp_path: Path):
    """Dropped layers and the embedding of masked frames get gradients, for which other processes wait."""
    run = training("wav2vec2", tmp_path / "run")
    run.model.train()
    run.model.audio_tower.config.layerdrop, run.model.audio_tower.config.mask_time_prob = 1.0, 0.0
    run.model(**run.examples.batch([0, 1])).loss.backward()
    assert [name for name, p in run.trained.items() if p.grad is None] == []
    assert not run.trained["audio_tower.encoder.layers.0.attention.q_proj.weight"].grad.any()
    assert run.trained["audio_tower.feature_projection.projection.weight"].grad.any()

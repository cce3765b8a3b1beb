"""Whisper with a pooled encoder: the stock model for the identity, and one answer for every form of batch."""

from __future__ import annotations

import copy
import json
import math
import pickle
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor

import fastcompress as fc
from fastcompress.integrations.transformers import apply_to, revert, whisper

MELS, COLUMNS, FRAMES = 16, 100, 50
#: Columns of each sample that contain audio.
AUDIO = (100, 60, 31, 1)


def make(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = transformers.WhisperConfig(
        vocab_size=120, num_mel_bins=MELS, d_model=24, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_source_positions=FRAMES,
        max_target_positions=60, init_std=0.3, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=3, suppress_tokens=None, begin_suppress_tokens=None, max_length=None,
    )  # fmt: skip
    return transformers.WhisperForConditionalGeneration(config).eval()


def batch(sizes: tuple[int, ...] = AUDIO) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(1)
    features = torch.randn(len(sizes), MELS, COLUMNS, generator=g)
    for row, size in zip(features, sizes, strict=True):
        row[:, size:] = -0.5
    return {"input_features": features, "labels": torch.randint(4, 100, (len(sizes), 7), generator=g)}


def generated(model: Any, features: Tensor, **kwargs: Any) -> list[list[int]]:
    """Return the ids of each sample without padding."""
    found = model.generate(features, max_new_tokens=9, do_sample=False, **kwargs)
    return [[token for token in row if token != 0] for row in found.tolist()]


def test_the_identity_is_the_stock_model():
    model, inputs = make(), batch()
    with torch.no_grad():
        stock = model(**inputs)
        ids = generated(model, inputs["input_features"])
        for silence in ("keep", "pool"):
            apply_to(model, "uniform:1", silence=silence)
            found = model(**inputs)
            assert torch.equal(found.logits, stock.logits) and torch.equal(found.loss, stock.loss)
            assert generated(model, inputs["input_features"]) == ids
            revert(model)
        assert torch.equal(model(**inputs).logits, stock.logits)


@pytest.mark.parametrize("silence", ["keep", "pool", 0.2], ids=str)
def test_a_sample_does_not_depend_on_its_batch(silence: str | float):
    model, inputs = apply_to(make(), "min-variance:rate=3", silence=silence), batch()
    with torch.no_grad():
        together = model(**inputs)
        for kwargs in ({}, {"num_beams": 3}, {"cache_implementation": "static"}):
            answers = generated(model, inputs["input_features"], **kwargs)
            for i, answer in enumerate(answers):
                assert generated(model, inputs["input_features"][i : i + 1], **kwargs) == [answer], (kwargs, i)
        for i in range(len(AUDIO)):
            alone = model(**{name: value[i : i + 1] for name, value in inputs.items()})
            assert (alone.logits - together.logits[i : i + 1]).abs().max() < 1e-4


def test_what_happens_to_the_silence():
    model, inputs = make(), batch()
    frames = [math.ceil(size / 2) for size in AUDIO]
    assert whisper.audio_frames(inputs["input_features"]).tolist() == frames
    counts = {
        "keep": [math.ceil(n / 3) + FRAMES - n for n in frames],
        "pool": [math.ceil(FRAMES / 3)] * len(frames),
        # A frame lasts 0.6 s here, since the window has 30 s.
        3.0: [math.ceil(min(n + 5, FRAMES) / 3) for n in frames],
        0: [math.ceil(n / 3) for n in frames],
        1e300: [math.ceil(FRAMES / 3)] * len(frames),
    }
    for silence, wanted in counts.items():
        apply_to(model, "uniform:3", silence=silence)
        lengths = model.model.encoder(inputs["input_features"]).token_lengths
        assert (lengths > 0).sum(1).tolist() == wanted
        if silence in ("keep", "pool"):
            assert lengths.sum(1).tolist() == [FRAMES] * len(frames)
        revert(model)


def test_proportional_attention_equals_attention_to_the_frames():
    """A cross-attention to L equal frames equals one to a token of L frames, to rounding, if log(L) is added."""
    model = make().double()
    layer = model.model.decoder.layers[0]
    hidden, tokens = torch.randn(2, 5, 24).double(), torch.randn(2, 4, 24).double()
    lengths = torch.tensor([[3, 1, 4, 2], [5, 2, 0, 0]])
    apply_to(model, "uniform:2")
    found = layer(hidden, None, tokens, fastcompress_bias=whisper._bias(lengths, True, torch.float64))
    plain = layer(hidden, None, tokens, fastcompress_bias=whisper._bias(lengths, False, torch.float64))
    revert(model)
    for i, sizes in enumerate(lengths):
        wanted = layer(hidden[i : i + 1], None, tokens[i].repeat_interleave(sizes, 0)[None])
        assert (found[i : i + 1] - wanted).abs().max() < 1e-12 < (plain[i : i + 1] - wanted).abs().max()


def test_training_with_gradient_checkpointing_and_peft():
    for use_reentrant in (False, True):
        model, inputs = make(), batch()
        apply_to(model, "min-variance:rate=3")
        wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
        losses, grads = [], []
        for checkpointing in (False, True):
            model.train()
            if checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
                model.enable_input_require_grads()
            loss = wrapped(**inputs).loss
            loss.backward()
            losses.append(loss.detach())
            grads.append([p.grad.clone() for p in wrapped.parameters() if p.grad is not None])
            wrapped.zero_grad()
        assert torch.equal(*losses) and len(grads[0]) == len(grads[1]) > 0
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*grads, strict=True))


def test_long_form_and_timestamps():
    """Audio of several windows: the encoder is called for each, whose last one ends with zeros."""
    model = make()
    model.config.max_target_positions = 60
    generation = model.generation_config
    generation.no_timestamps_token_id, generation.max_initial_timestamp_index = 70, 49
    generation.is_multilingual = False
    features = torch.randn(1, MELS, 230, generator=torch.Generator().manual_seed(3))
    options = {"return_timestamps": True, "attention_mask": torch.ones(1, 230).long(), "max_new_tokens": 8}
    with torch.no_grad():
        stock = model.generate(features, **options)
        apply_to(model, "uniform:1")
        assert torch.equal(model.generate(features, **options), stock)
        revert(model)
        apply_to(model, "min-variance:rate=3")
        assert model.generate(features, **options).shape[1] > 1
        with pytest.raises(NotImplementedError, match="return_token_timestamps must be False"):
            model.generate(features, return_token_timestamps=True)


def test_the_rule_travels_with_the_weights(tmp_path: Path):
    model, inputs = make(), batch()
    apply_to(model, "min-variance:rate=3", proportional_attention=False, silence=1.5)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())["fastcompress"]
    assert saved["rule"] == "min-variance:rate=3" and saved["silence"] == 1.5
    assert saved["proportional_attention"] is False
    again = transformers.WhisperForConditionalGeneration.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert torch.equal(apply_to(again)(**inputs).logits, model(**inputs).logits)
        other = transformers.WhisperForConditionalGeneration.from_pretrained(tmp_path)
        with pytest.warns(UserWarning, match="runs without compression") as caught:
            other(**inputs)
        assert len(caught) == 1
        with pytest.warns(UserWarning, match="was trained with min-variance:rate=3.*silence=1.5"):
            apply_to(other, "min-variance:rate=3", proportional_attention=True, silence=1.5)
    with pytest.raises(NotImplementedError, match="whisper has no positions of audio"):
        apply_to(make(), "min-variance:rate=3", positions="time")
    twin = copy.deepcopy(model)
    assert torch.equal(twin(**inputs).logits, model(**inputs).logits)
    with pytest.raises(pickle.PicklingError, match="cannot be pickled"):
        pickle.dumps(model)


def test_half_precision_and_attention():
    model, inputs = make().bfloat16(), batch()
    inputs["input_features"] = inputs["input_features"].bfloat16()
    apply_to(model, "min-variance:rate=3")
    losses = []
    for attention in ("sdpa", "eager"):
        model.set_attn_implementation(attention)
        losses.append(float(model(**inputs).loss))
    assert abs(losses[0] - losses[1]) < 0.05
    revert(model)
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(NotImplementedError, match="needs attn_implementation='sdpa' or 'eager', got 'flash_att"):
        apply_to(model, "uniform:2")


def test_errors():
    model, inputs = make(), batch()
    for arguments, error, message in (
        (("label-change",), NotImplementedError, "label-change needs labels"),
        ((fc.nn.NoveltyPool(0.1),), NotImplementedError, "whisper needs a rule"),
        (("uniform:2", "budget"), NotImplementedError, "whisper has no budget mode"),
    ):
        with pytest.raises(error, match=message):
            apply_to(model, *arguments)
    with pytest.raises(NotImplementedError, match="whisper has no projector"):
        apply_to(model, "uniform:2", before_projector=False)
    for silence, message in (("drop", "silence must be 'keep', 'pool' or a number"), (-1, "at least 0, got -1")):
        with pytest.raises(ValueError, match=message):
            apply_to(model, "uniform:2", silence=silence)
    with pytest.raises(ValueError, match="no compression was saved with this whisper"):
        apply_to(model)
    apply_to(model, "uniform:2")
    with pytest.raises(ValueError, match="already compressed"):
        apply_to(model, "uniform:2")
    hidden = torch.zeros(len(AUDIO), FRAMES, 24)
    with pytest.raises(ValueError, match="encoder_outputs must have the token_lengths"):
        model(encoder_outputs=(hidden,), decoder_input_ids=inputs["labels"])

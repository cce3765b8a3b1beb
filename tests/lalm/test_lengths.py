"""Lengths in ``generate`` of the reference audio LLM count the ids of the prompt, not the compressed rows."""

from __future__ import annotations

import pytest
import torch
import transformers

from fastcompress.lalm.encoders import encode
from tests.support.encoders import encoder_of
from tests.support.reference_models import batch, build


@pytest.mark.parametrize("rule", [None, "uniform:3"])
def test_lengths_count_the_ids_of_the_prompt(rule: str | None):
    model = build(rule=rule)
    full = batch()
    del full["labels"]
    asked = full["input_ids"].shape[1]
    greedy = {"do_sample": False}
    model.language_model.generation_config.eos_token_id = None
    wanted = model.generate(**full, max_new_tokens=3, **greedy)
    config = transformers.GenerationConfig(max_length=asked + 3, **greedy)
    assert torch.equal(model.generate(**full, max_length=asked + 3, **greedy), wanted)
    assert torch.equal(model.generate(**full, generation_config=config), wanted)
    assert config.max_length == asked + 3
    assert torch.equal(model.generate(**full, max_length=500, max_new_tokens=3, **greedy), wanted)
    model.language_model.generation_config.max_length = asked + 3
    assert torch.equal(model.generate(**full, **greedy), wanted)
    with pytest.raises(ValueError, match=f"max_length must be > {asked}, the number of ids of the prompt, got {asked}"):
        model.generate(**full, max_length=asked, **greedy)


def test_the_minimum_length():
    model = build(rule="uniform:3")
    full = batch()
    del full["labels"]
    asked = full["input_ids"].shape[1]
    every = list(range(1, 60))  # all ids except 0 end the text
    out = model.generate(**full, min_length=asked + 2, max_length=asked + 4, do_sample=False, eos_token_id=every)
    assert out.shape[1] == asked + 3


@pytest.mark.parametrize("kind", ["whisper", "wav2vec2", "hubert", "wavlm"])
def test_a_mask_of_the_input_becomes_lengths_of_frames_in_one_line(kind: str):
    """The line of the guide; ``encode`` of the reference model does the same."""
    encoder = encoder_of(kind).eval()
    lengths = torch.tensor([100, 61, 37] if kind == "whisper" else [1800, 960, 1501])
    mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
    x = torch.randn(3, 16, 100) if kind == "whisper" else torch.randn(mask.shape)
    frames, wanted = encode(encoder, x, mask)
    found = encoder._get_feat_extract_output_lengths(mask.sum(-1))
    assert found.tolist() == wanted.tolist() and int(found.max()) == frames.shape[1]

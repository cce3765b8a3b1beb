"""Audio embeddings for vLLM, made by a stock model of transformers."""

from __future__ import annotations

import pytest
import torch

import fastcompress as fc
from fastcompress.integrations.transformers import apply_to
from fastcompress.integrations.vllm import embed
from tests.support import audio_llms
from tests.support.compressed_llms import batch, make

NAMES = ("qwen2_audio", "audioflamingo3", "glmasr")
SIZES = {"audioflamingo3": (130, 9, 50)}  # one audio has three windows


def stock_rows(model, inputs) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: found.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    with torch.no_grad():
        model(**inputs)
    hook.remove()
    ids = inputs["input_ids"]
    return [rows[kept] for rows, kept in zip(found[0], ids == audio_llms.AUDIO, strict=True)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rule", ["uniform:3", "local-max", "threshold:0.9"])
def test_each_audio_is_pooled(name: str, rule: str):
    model = make(name)
    inputs = batch(name, model, SIZES.get(name, (20, 9, 16)))
    rows = stock_rows(model, inputs)
    found = embed(model, inputs, rule)
    for audio, tokens in zip(rows, found, strict=True):
        assert torch.equal(tokens, fc.segment_pool(audio, rule).values)
    assert sum(map(len, found)) < sum(map(len, rows))


def test_reductions_modules_and_several_audios_in_a_prompt():
    model = make("qwen2_audio")
    inputs = batch("qwen2_audio", model, (20, 9))
    one, two = stock_rows(model, inputs)
    assert torch.equal(
        embed(model, inputs, "uniform:3", "max")[1], fc.segment_pool(two, "uniform:3", reduce="max").values
    )
    assert torch.equal(embed(model, inputs, fc.nn.NoveltyPool())[0], fc.nn.NoveltyPool()(one).values)
    ids = torch.cat([row[kept.bool()] for row, kept in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)])
    together = {**inputs, "input_ids": ids[None], "attention_mask": torch.ones_like(ids)[None]}
    found = embed(model, together, "uniform:3")
    for tokens, wanted in zip(found, embed(model, inputs, "uniform:3"), strict=True):
        assert torch.equal(tokens, wanted)


def test_the_decoder_does_not_run():
    model = make("qwen2_audio")
    inputs = batch("qwen2_audio", model)
    model.model.language_model.forward = None  # type: ignore[assignment]
    assert len(embed(model, inputs, "local-max")) == 3
    assert not model.model.language_model._forward_pre_hooks


def test_errors():
    model = make("qwen2_audio")
    inputs = batch("qwen2_audio", model)
    with pytest.raises(ValueError, match="inputs must have audio, got input_ids without the placeholder 100"):
        embed(model, batch("qwen2_audio", model, (None,)), "local-max")
    apply_to(model, "uniform:3", "budget")  # which older versions of transformers support
    with pytest.raises(ValueError, match="model must be a stock model, got a compressed Qwen2Audio.*; call revert"):
        embed(model, inputs, "local-max")

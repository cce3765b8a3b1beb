"""Caches that start with a compressed prompt: what users do with them beyond ``generate``."""

from __future__ import annotations

import copy
import pickle
import threading
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import fastcompress as fc
from fastcompress.decoder.attention import takes_positions
from fastcompress.integrations.transformers import BudgetProcessor, apply_to, revert
from fastcompress.lalm import FastCompressForConditionalGeneration
from tests.support import audio_llms, reference_models
from tests.support.compressed_llms import GREEDY, batch, make
from tests.support.decoders import decoder

PARTS = {"proportional_attention": True, "positions": "time"}


def reference() -> tuple[Any, dict[str, Any]]:
    """Return a reference model that was trained on every frame and gets a rule, and a prompt of one sample."""
    model = reference_models.build()
    model.trained_on_frames = True
    model.rule = "uniform:3"
    prompt = reference_models.samples(reference_models.batch())[2]
    del prompt["labels"]
    return model, prompt


def written(model: Any, prompt: dict[str, Any], **options: Any) -> Any:
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None} | options
    return model.generate(**prompt, **options)


def test_calls_that_overlap_do_not_affect_each_other():
    model, prompt = reference()
    alone = written(model, prompt)
    found: list[Any] = []

    def nested(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        found.append(written(model, prompt))
        return scores

    assert torch.equal(written(model, prompt, logits_processor=[nested]), alone)
    assert len(found) == 5 and all(torch.equal(one, alone) for one in found)
    together: list[Any] = []
    barrier = threading.Barrier(2)

    def run() -> None:
        barrier.wait()
        together.append(written(model, prompt))

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(together) == 2 and all(torch.equal(one, alone) for one in together)


def test_the_cache_of_generate_continues():
    model, prompt = reference()
    whole = written(model, prompt, max_new_tokens=3)
    for new in (1, 2):
        out = written(model, prompt, max_new_tokens=new, return_dict_in_generate=True)
        cache = getattr(out, "cache", None) or out.past_key_values
        ids = out.sequences[:, -1:]
        for _ in range(3 - new):
            ids = model.language_model(ids, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
        assert int(ids) == int(whole[0, -1])


@pytest.mark.parametrize("name", ["qwen2_audio", "voxtral"])
def test_caches_are_copied_cropped_repeated_and_pickled(name: str):
    model = make(name)
    inputs = batch(name, model, side="left")
    apply_to(model, "uniform:3")
    with torch.no_grad():
        out = model(**inputs, use_cache=True)
        cache = getattr(out, "cache", None) or out.past_key_values
        mask = torch.nn.functional.pad(out.compressed.unpack(side="left")[1], (0, 1), value=1)
        token = torch.full((3, 1), 7)

        def step(cache: Any, rows: Any = slice(None)) -> torch.Tensor:
            logits: torch.Tensor = model(
                input_ids=token[rows], attention_mask=mask[rows], past_key_values=cache, use_cache=True
            ).logits
            return logits

        copied, pickled = copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))
        wanted = step(cache)
        cache.crop(-1)
        again = step(cache)
        cache.crop(-1)
        cache.reorder_cache(torch.tensor([2, 0, 1]))
        turned = step(cache, [2, 0, 1])
        copied.batch_select_indices(torch.tensor([1]))
        copied.batch_repeat_interleave(2)
        single = step(copied, [1, 1])
    for found in (again, step(pickled), turned[[1, 2, 0]]):
        assert (found - wanted).abs().max() <= 1e-9
    assert (single - wanted[[1]]).abs().max() <= 1e-9


@pytest.mark.parametrize("parts", [{}, {"proportional_attention": False}, {"positions": "compact"}], ids=str)
@pytest.mark.parametrize("text", ["qwen2", "gemma2", "mistral"])
def test_static_caches_without_padding(text: str, parts: dict[str, Any]):
    """transformers passes no mask for one prompt without padding, while a static cache returns all of its slots."""
    model = reference_models.build(text=text)
    model.trained_on_frames = True
    model.rule = "uniform:3"
    for name, value in parts.items():
        setattr(model, name, value)
    prompt = reference_models.samples(reference_models.batch())[2]
    del prompt["labels"]
    scores = [
        torch.stack(written(model, prompt, output_logits=True, return_dict_in_generate=True, **options).logits)
        for options in ({}, {"cache_implementation": "static"})
    ]
    torch.testing.assert_close(scores[0], scores[1], rtol=1e-4, atol=1e-4)


def test_a_static_cache_of_the_user_serves_other_prompts():
    model = make("glmasr")
    inputs, text = batch("glmasr", model, side="left"), torch.tensor([[5, 6, 7]])
    cache = transformers.StaticCache(config=model.config.get_text_config(), max_cache_len=64)
    plain = model.generate(text, **GREEDY)
    apply_to(model, "uniform:3")
    wanted = model.generate(**inputs, **GREEDY)
    for compressed in (False, True, False, True):
        cache.reset()
        if compressed:
            assert torch.equal(model.generate(**inputs, **GREEDY, past_key_values=cache), wanted)
        else:
            assert torch.equal(model.generate(text, **GREEDY, past_key_values=cache), plain)
        cache.layers[0].batch_size = None
        for layer in cache.layers:  # batches of other sizes need other buffers
            layer.is_initialized = False
    revert(model)
    cache.reset()
    assert torch.equal(model.generate(text, **GREEDY, past_key_values=cache), plain)


def test_gradient_checkpointing_keeps_the_bias():
    model = make("qwen2_audio").train()
    inputs = batch("qwen2_audio", model)
    apply_to(model, "uniform:3", pack=False)
    wanted = model(**inputs, use_cache=False).logits
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    config = model.config.get_text_config()
    for arguments in ({}, {"use_cache": True}, {"past_key_values": transformers.DynamicCache(config=config)}):
        assert (model(**inputs, **arguments).logits - wanted).abs().max() <= 1e-9
    with torch.no_grad():
        out = model(**inputs, use_cache=True)
    cache = getattr(out, "cache", None) or out.past_key_values
    assert cache.fastcompress_wide and (out.logits - wanted).abs().max() <= 1e-9


def test_quantized_caches_are_refused():
    class Quantized(transformers.cache_utils.DynamicLayer):
        def _quantize(self, tensor: torch.Tensor) -> torch.Tensor:
            return tensor

    model = make("qwen2_audio")
    inputs = batch("qwen2_audio", model)
    apply_to(model, "uniform:3")
    with pytest.raises(NotImplementedError, match="a quantized cache cannot be used with proportional attention"):
        model(**inputs, past_key_values=transformers.Cache(layers=[Quantized(), Quantized()]))


def test_budget_mode_with_a_cache():
    model = audio_llms.make("glmasr")
    inputs = audio_llms.batch("glmasr", model, (20,))
    apply_to(model, "uniform:3", "budget", **PARTS)
    shortened = BudgetProcessor(None, model).shorten(dict(inputs))
    dynamic = model.generate(**shortened, **GREEDY)
    assert torch.equal(model.generate(**shortened, **GREEDY, cache_implementation="static"), dynamic)
    out = model(**shortened, use_cache=True)
    cache = getattr(out, "cache", None) or out.past_key_values
    with pytest.raises(NotImplementedError, match="audio cannot follow rows of a cache with proportional attention"):
        model(**shortened, past_key_values=cache)


def test_settings_that_cannot_be_used(tmp_path: Any):
    class Plain(nn.Module):
        def forward(self, x: torch.Tensor, cu_seqlens: Any = None, lengths: Any = None) -> Any:
            pooled = fc.segment_pool(x, cu_seqlens=cu_seqlens, lengths=lengths, rule="uniform:2")
            return fc.ops.token_merging.Merged(pooled.values, pooled.cu_seqlens, pooled.values, pooled.values)

    model = make("qwen2_audio")
    for value in ("no", 0):
        with pytest.raises(TypeError, match=f"proportional_attention must be True, False or None, got {value!r}"):
            apply_to(model, "uniform:3", proportional_attention=value)
    inputs = batch("qwen2_audio", model)
    for before in (False, True):
        apply_to(model, Plain(), proportional_attention=True, before_projector=before)
        with pytest.raises(ValueError, match="need a compressor that returns segments, .* got Merged"):
            model(**inputs)
        apply_to(revert(model), Plain(), before_projector=before)
        assert model(**inputs).compressed.row_lengths is None
        revert(model)
    tiny, prompt = reference()
    tiny.use_compressor(Plain())
    tiny.proportional_attention = True
    for call in (tiny, tiny.generate):
        with pytest.raises(ValueError, match="needs row_lengths, which is None"):
            call(**prompt)
    budget = audio_llms.make("glmasr")
    apply_to(budget, "uniform:3", "budget", **PARTS)
    with pytest.warns(UserWarning, match="an engine that runs the stock decoder does not apply this"):
        BudgetProcessor.from_config(None, budget.config)
    reference_models.build().save_pretrained(tmp_path)
    loaded = FastCompressForConditionalGeneration.from_pretrained(tmp_path, rule="uniform:3")
    assert (loaded.rule, loaded.proportional_attention, loaded.positions) == ("uniform:3", True, "time")
    falcon = transformers.FalconConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, alibi=True
    )
    assert not takes_positions(transformers.FalconForCausalLM(falcon)) and takes_positions(decoder("llama"))

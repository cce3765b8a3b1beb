"""Models and input that raise an error, and unusual input that is valid."""

from __future__ import annotations

import re

import pytest
import torch
import transformers
from torch import nn

import fastcompress as fc
from fastcompress.integrations import transformers as integration
from fastcompress.integrations.transformers import FAMILIES, REFUSED, apply_to, revert
from tests.support import audio_llms
from tests.support.compressed_llms import GREEDY, batch, make


def test_text_alone():
    model = make("qwen2_audio")
    inputs = batch("qwen2_audio", model, (None, None), labels=True)
    stock = model(**inputs).loss
    apply_to(model, "uniform:3")
    out = model(**inputs)
    assert abs(out.loss - stock) <= 1e-6
    out.loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    text = {k: v for k, v in inputs.items() if k != "labels"}
    assert not hasattr(model(**text), "compressed")  # the stock model ran
    assert model.generate(**text, **GREEDY).shape == (2, text["input_ids"].shape[1] + 6)
    mixed = batch("qwen2_audio", model, (20, None, 9), labels=True)
    assert model(**mixed).compressed.cu_seqlens.diff().tolist() == [7 + 4, 10, 13 + 2]


def test_bad_input():
    model = make("qwen2_audio")
    inputs = batch("qwen2_audio", model)
    apply_to(model, "uniform:3")
    for more, error, text in (
        ({"position_ids": torch.zeros_like(inputs["input_ids"])}, ValueError, "position_ids must be None"),
        ({"attention_mask": torch.ones(3, 1, 21, 21)}, ValueError, "must have the shape of input_ids, [3, 21], got"),
        ({"inputs_embeds": torch.zeros(3, 21, 32)}, ValueError, "without inputs_embeds"),
    ):
        with pytest.raises(error, match=re.escape(text)):
            model(**inputs | more)
    unexpanded = {k: v[:1] for k, v in inputs.items()}
    unexpanded["input_ids"] = torch.tensor([[5, audio_llms.AUDIO, 6]])
    unexpanded["attention_mask"] = torch.ones(1, 3).long()
    with pytest.raises(ValueError, match="input_ids must have one placeholder per row of audio"):
        model(**unexpanded)
    omni = make("qwen2_5_omni_thinker")
    apply_to(omni, "uniform:3")
    with pytest.raises(NotImplementedError, match="takes only audio and text, got pixel_values"):
        omni(**batch("qwen2_5_omni_thinker", omni), pixel_values=torch.zeros(1))


def test_models_that_cannot_be_compressed_are_refused():
    class Config:
        def __init__(self, kind):
            self.model_type = kind

    class Model:
        def __init__(self, kind):
            self.config = Config(kind)

    for kind, reason in REFUSED.items():
        with pytest.raises(NotImplementedError, match=re.escape(f"{kind} cannot be compressed: {reason}")):
            apply_to(Model(kind), "uniform:3")
    with pytest.raises(NotImplementedError, match="bert is not a supported audio LLM; supported: audioflam"):
        apply_to(Model("bert"), "uniform:3")
    with pytest.raises(NotImplementedError, match="must be the one with a head"):
        apply_to(make("qwen2_audio").model, "uniform:3")
    model = make("qwen2_audio")
    with pytest.raises(NotImplementedError, match="budget mode pools the projector's output"):
        apply_to(model, "uniform:3", "budget", before_projector=True)
    model = make("granite_speech")
    with pytest.raises(NotImplementedError, match="before its projector: its projector attends to frames in windows"):
        apply_to(model, "uniform:3", before_projector=True)
    for arguments, error, text in (
        ({"mode": "static"}, ValueError, "mode must be 'dynamic' or 'budget', got 'static'"),
        ({"mode": "budget", "pack": True}, ValueError, "pack must be None or False in budget mode"),
        ({"compressor": "uniform:0"}, ValueError, "size"),
        ({"compressor": 3}, TypeError, ""),
    ):
        with pytest.raises(error, match=text):
            apply_to(model, **{"compressor": "uniform:3"} | arguments)
        assert not hasattr(model, "fastcompress_settings") and not hasattr(model, "audio_compressor")
        assert model.model.language_model.config._attn_implementation == "sdpa"
    apply_to(model, "uniform:3")
    with pytest.raises(ValueError, match="already compressed by uniform:3, .*after the projector"):
        apply_to(model, "uniform:2")


def test_decoders_that_would_leak_are_not_packed():
    model = make("qwen2_audio")
    model.model.language_model.config.layer_types = ["linear_attention", "full_attention"]
    with pytest.raises(NotImplementedError, match="pass pack=False to compress without packing"):
        apply_to(model, "uniform:3")
    model.model.language_model.config.layer_types = ["full_attention"] * 2
    apply_to(model, "uniform:3", pack=False)


def test_versions(monkeypatch):
    model = make("qwen2_audio")
    module = integration.families.transformers  # transformers replaces its own module while it is imported
    monkeypatch.setattr(module, "__version__", "5.15.3")
    with pytest.raises(ImportError, match="dynamic mode needs transformers 5.24 or later, got 5.15.3: install a newer"):
        apply_to(model, "uniform:3")
    with pytest.raises(ImportError, match="budget mode needs transformers 5.16 or later, got 5.15.3: install a newer"):
        apply_to(model, "uniform:3", "budget")
    monkeypatch.setattr(module, "__version__", "5.16.0")
    with pytest.raises(ImportError, match="or use budget mode, which needs 5.16"):
        apply_to(model, "uniform:3")
    revert(apply_to(model, "uniform:3", "budget"))
    monkeypatch.setattr(module, "__version__", "6.0.0.dev0")
    with pytest.warns(UserWarning, match="transformers 6.0.0.dev0 is newer than the tested versions"):
        apply_to(model, "uniform:3")


def test_the_table_names_every_family():
    assert set(audio_llms.FAMILIES) == set(FAMILIES)
    text = integration.table()
    for kind in (*FAMILIES, *REFUSED):
        assert kind in text


# Cases that could give wrong results without an error


def test_subclasses_and_replaced_compressors_are_used():
    class Learned(fc.nn.SegmentPool):
        def __init__(self) -> None:
            super().__init__("uniform:2")
            self.linear = nn.Linear(32, 32).double()

        def forward(self, rows: torch.Tensor, **layout) -> fc.Pooled:
            return super().forward(self.linear(rows), **layout)

    model = make("audioflamingo3")
    inputs = batch("audioflamingo3", model, labels=True)
    compressor = Learned()
    apply_to(model, compressor)
    model(**inputs).loss.backward()
    assert compressor.linear.weight.grad.abs().sum() > 0
    revert(model)
    apply_to(model, "uniform:3")
    rows = len(model(**inputs).compressed.source)
    model.audio_compressor = fc.nn.SegmentPool("uniform:10")
    assert len(model(**inputs).compressed.source) < rows
    with pytest.raises(NotImplementedError, match="label-change needs labels"):
        apply_to(make("glmasr"), "label-change")


@pytest.mark.parametrize("name", ["audioflamingo3", "voxtral", "qwen2_5_omni_thinker", "granite_speech"])
def test_a_missing_mask_is_inferred_as_in_the_stock_model(name):
    model = make(name)
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, 2
    inputs = batch(name, model)
    assert not inputs.pop("attention_mask").all()
    stock = model.generate(**inputs, **GREEDY)
    apply_to(model, "uniform:1")
    assert torch.equal(model.generate(**inputs, **GREEDY), stock)


def test_caches():
    model = make("audioflamingo3")
    inputs = audio_llms.one("audioflamingo3", batch("audioflamingo3", model), 0)
    apply_to(model, "uniform:3")
    with torch.no_grad():
        cache = transformers.DynamicCache()
        out = model(**inputs, cache=cache)
        assert cache.get_seq_length() == out.logits.shape[1]
        with pytest.raises(NotImplementedError, match="cannot follow rows of a cache"):
            model(**inputs, cache=cache)
        written = model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
        kept = written.get("cache") if written.get("cache") is not None else written.past_key_values
        with pytest.raises(NotImplementedError, match="cannot continue from the cache of a compressed prompt"):
            model.generate(written.sequences, cache=kept, **GREEDY)
    with pytest.raises(NotImplementedError, match="needs input_ids, which locate it in the prompt"):
        model(inputs_embeds=torch.zeros(1, 4, 32).double(), input_features=inputs["input_features"])
    prefixed = peft_prefix(model)
    with pytest.raises(NotImplementedError, match="or of prefix tuning"):
        prefixed(**inputs)


def peft_prefix(model: nn.Module) -> nn.Module:
    peft = pytest.importorskip("peft")
    config = peft.PrefixTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=3,
        num_layers=2,
        token_dim=16,
        num_attention_heads=2,
        num_transformer_submodules=1,
    )
    return peft.get_peft_model(model, config)


def test_methods_that_are_replaced_afterwards():
    model = make("audioflamingo3")
    inputs = batch("audioflamingo3", model)
    apply_to(model, "uniform:3")
    decoder = model.model.language_model
    ours = decoder.forward
    decoder.forward = type(decoder).forward.__get__(decoder)
    with pytest.raises(RuntimeError, match="forward of language_model was replaced after apply_to"):
        model(**inputs)
    with pytest.raises(RuntimeError, match="forward of Qwen2Model was replaced after apply_to"):
        revert(model)
    decoder.forward = ours
    assert model(**inputs).compressed is not None


def test_nothing_left_to_generate_from():
    model = make("audioflamingo3")
    inputs = batch("audioflamingo3", model, (20, 9))
    is_audio = inputs["input_ids"] == audio_llms.AUDIO
    inputs["attention_mask"] = torch.where(
        torch.tensor([[True], [False]]), is_audio, inputs["attention_mask"] > 0
    ).long()
    apply_to(model, "uniform:size=100,tail=drop")
    with pytest.raises(ValueError, match="sample 0 is empty: SegmentPool"):
        model.generate(**inputs, **GREEDY)


def test_compressed_prompt():
    model = make("qwen2_audio")
    inputs = batch("qwen2_audio", model)
    with pytest.raises(ValueError, match="model must be compressed in dynamic mode, got Qwen2AudioFor"):
        integration.compressed_prompt(model, **inputs)
    apply_to(model, "uniform:3")
    packed = integration.compressed_prompt(model, **inputs)
    assert packed.cu_seqlens.tolist() == model(**inputs).compressed.cu_seqlens.tolist()
    with pytest.raises(ValueError, match="inputs must have input_ids"):
        integration.compressed_prompt(model)
    with pytest.raises(NotImplementedError, match="the router's loss needs rows"):
        model(**inputs, output_router_logits=True)

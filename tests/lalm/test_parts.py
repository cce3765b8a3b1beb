"""The reference audio LLM made from pretrained parts, which keep their attention, settings and dtype."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from fastcompress.lalm import FastCompressConfig, FastCompressForConditionalGeneration
from fastcompress.lalm.dtypes import part_dtypes
from fastcompress.lalm.encoders import build_encoder, encode
from fastcompress.lalm.loading import load_model
from fastcompress.training.manifest import read_manifest
from fastcompress.training.recipes import build_small
from tests.support.lalm_data import write_tones
from tests.support.reference_models import AUDIO, ENCODERS, TEXT, WHISPER, batch

pytestmark = [
    pytest.mark.filterwarnings("ignore:the decoder runs padded"),
]


def encoder(kind: str = "whisper", **options: Any) -> Any:
    torch.manual_seed(0)
    return build_encoder(transformers.AutoConfig.for_model(kind, **ENCODERS[kind] | options)).eval()


def decoder(kind: str = "qwen2", **options: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **TEXT | {"initializer_range": 0.5} | options)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def parts(audio: Any, text: Any, **options: Any) -> FastCompressForConditionalGeneration:
    torch.manual_seed(1)
    return FastCompressForConditionalGeneration.from_parts(audio, text, audio_token_id=AUDIO, **options).eval()


@pytest.mark.parametrize("kind", ["whisper", "wav2vec2", "parakeet_encoder", "wav2vec2-bert"])
def test_an_encoder_gives_the_same_output(kind: str):
    audio = encoder(kind)
    before = audio.config._attn_implementation
    if kind == "wav2vec2":
        lengths, features = torch.tensor([900, 400]), torch.randn(2, 900)
    else:
        lengths, features = torch.tensor([70, 31]), torch.randn(2, 16, 70)
    mask = (torch.arange(features.shape[-1]) < lengths[:, None]).long()
    features = features * mask.view(2, *[1] * (features.dim() - 2), -1)
    expected, counts = encode(audio, features, mask)
    model = parts(audio, decoder(), audio_padding="longest" if kind == "whisper" else "window")
    assert model.audio_tower.config._attn_implementation == before == "sdpa"
    frames, lengths_found = model.encode(features, mask)
    alone, count = model.encode(features[1:, ..., : lengths[1]], mask[1:, : lengths[1]])
    assert torch.equal(lengths_found, counts) and count == counts[1]
    torch.testing.assert_close(frames[1, : counts[1]], alone[0, : counts[1]], rtol=1e-4, atol=1e-4)
    if kind != "whisper":  # whisper pads to its window
        for found, wanted, n in zip(frames, expected, counts, strict=True):
            torch.testing.assert_close(found[:n], wanted[:n])


def test_a_decoder_that_runs_padded_stays_causal():
    text = decoder("lfm2", layer_types=["full_attention", "conv"])
    mask = batch()["attention_mask"]
    ids = torch.randint(3, 50, mask.shape)
    other = ids.clone()
    other[0, -1] = 3
    with torch.no_grad():
        before = text(ids, attention_mask=mask, use_cache=False).logits
        model = parts(encoder(), text)
        after, changed = (text(x, attention_mask=mask, use_cache=False).logits for x in (ids, other))
    assert not model._runs_packed and model.language_model.config._attn_implementation == "sdpa"
    assert torch.equal(after, before)
    assert torch.equal(after[0, :-1], changed[0, :-1]) and not torch.equal(after[0, -1], changed[0, -1])


def test_a_configuration_of_parts_keeps_their_implementations():
    audio = transformers.AutoConfig.for_model("whisper", **WHISPER, attn_implementation="eager")
    text = transformers.AutoConfig.for_model("qwen2", **TEXT, attn_implementation="sdpa")
    text._experts_implementation = "eager"
    config = FastCompressConfig(audio, text)
    assert (config.audio_config._attn_implementation, config.text_config._attn_implementation) == ("eager", "sdpa")
    assert config.text_config._experts_implementation == "eager"
    config = FastCompressConfig(audio, text, attn_implementation="eager")  # which applies to all parts
    assert config.text_config._attn_implementation == "eager"


@pytest.mark.parametrize("kind", ["whisper", "voxtral_encoder"])
def test_short_padding_with_another_attention(kind: str):
    features, mask = batch()["input_features"], batch()["feature_attention_mask"]
    found = []
    for implementation in ("sdpa", "eager"):
        audio = encoder(kind, attn_implementation=implementation)
        for p in audio.parameters():
            if p.dim() == 2:
                torch.nn.init.normal_(p, std=2 / p.shape[1] ** 0.5)
        frames, lengths = encode(audio, features, mask, "longest")
        alone = encode(audio, features[1:2, :, :9], mask[1:2, :9], "longest")[0][0]
        torch.testing.assert_close(frames[1, : lengths[1]], alone[: lengths[1]], rtol=1e-4, atol=1e-4)
        found.append(alone)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
    audio.config._attn_implementation = "flex_attention"
    with pytest.raises(NotImplementedError, match="audio_padding='longest' needs .* sdpa or eager, got flex"):
        encode(audio, features, mask, "longest")


def test_generation_settings_are_those_of_the_decoder(tmp_path: Path):
    text = decoder()
    text.generation_config.eos_token_id, text.generation_config.suppress_tokens = [2, 5], [7, 9]
    model = parts(encoder(), text)
    assert model.generation_config is text.generation_config
    inputs = {name: tensor for name, tensor in batch().items() if name != "labels"}
    written = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    model.save_pretrained(tmp_path)
    loaded = FastCompressForConditionalGeneration.from_pretrained(tmp_path)
    settings = loaded.language_model.generation_config
    assert settings is loaded.generation_config
    assert (settings.eos_token_id, settings.suppress_tokens) == ([2, 5], [7, 9])
    assert torch.equal(loaded.generate(**inputs, max_new_tokens=8, do_sample=False), written)
    loaded.generation_config = transformers.GenerationConfig(eos_token_id=7)
    assert loaded.language_model.generation_config.eos_token_id == 7


@pytest.mark.parametrize("kind", ["whisper", "parakeet_encoder"])
def test_each_part_is_loaded_in_its_dtype(kind: str, tmp_path: Path):
    text = decoder().to(torch.bfloat16)
    with torch.no_grad():
        text.get_input_embeddings().weight[20] = 1e6  # infinite in fp16
    model = parts(encoder(kind).half(), text, ctc_tokens=["a"], keys="ctc", boundary_ratio=2.0)
    assert {part_dtypes(model)[name] for name in ("projector", "compressor", "ctc_head")} == {torch.float32}
    model.projector.to(torch.bfloat16)
    model.compressor.to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    load = FastCompressForConditionalGeneration.from_pretrained
    loaded = load(tmp_path)
    saved, found = model.state_dict(), loaded.state_dict()
    assert saved.keys() == found.keys() and len({tensor.dtype for tensor in saved.values()}) > 2
    for name, tensor in saved.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
    for name, buffer in decoder().named_buffers():  # frequencies, which are computed and not saved, keep fp32
        assert torch.equal(loaded.language_model.get_buffer(name), buffer), name
    config = FastCompressConfig.from_pretrained(tmp_path)
    for options in ({}, {"config": config}):
        assert {p.dtype for p in load(tmp_path, dtype=torch.float32, **options).parameters()} == {torch.float32}
        assert {p.dtype for p in load(tmp_path, dtype="auto", **options).parameters()} > {torch.float16, torch.bfloat16}
    half = dict.fromkeys(("language_model", "projector", "compressor"), "bfloat16")
    assert config.part_dtypes == half | {"ctc_head": "float32"}
    model.float().save_pretrained(tmp_path)
    assert {p.dtype for p in load(tmp_path).parameters()} == {torch.float32}


def test_a_head_and_an_encoder_of_other_dtypes():
    full, labels = batch(), torch.tensor([[1], [1], [1]])
    for rule in (None, "label-change", "local-max"):
        keys = "ctc" if rule == "local-max" else "frames"
        model = parts(encoder().bfloat16(), decoder(), ctc_tokens=["a"], rule=rule, keys=keys)
        assert model(**full, ctc_labels=labels).loss.isfinite()


def test_half_becomes_float_on_the_cpu_part_by_part(tmp_path: Path):
    model, processor = build_small(read_manifest(write_tones(tmp_path, 3)))
    model.audio_tower.to(torch.bfloat16)
    model.language_model.half()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded, _ = load_model(tmp_path)
    dtypes = {"audio_tower": torch.bfloat16} | dict.fromkeys(("language_model", "projector", "ctc_head"), torch.float32)
    assert part_dtypes(loaded) == dtypes

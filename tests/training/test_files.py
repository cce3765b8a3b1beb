"""Files that the reference audio LLM writes and reads: whole models, pretrained parts, LoRA."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import transformers

import fastcompress as fc
from fastcompress.lalm import FastCompressConfig, FastCompressForConditionalGeneration, add_lora
from fastcompress.lalm.lora import lora_targets
from tests.support.reference_models import AUDIO, TEXT, WHISPER, batch, build


@pytest.mark.parametrize("rule", [None, "local-max:order=2"])
def test_saved_and_loaded(tmp_path: Path, rule: str | None):
    model = build(rule=rule, projector_hidden_size=40, ctc_tokens=["a", "b"])
    model.save_pretrained(tmp_path)
    for loader in (
        FastCompressForConditionalGeneration,
        transformers.AutoModel,
        transformers.AutoModelForMultimodalLM,
    ):
        loaded = loader.from_pretrained(tmp_path).eval()
        assert type(loaded) is FastCompressForConditionalGeneration and loaded.rule == rule
        assert torch.equal(loaded(**batch()).loss, model(**batch()).loss)
    loaded = FastCompressForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.projector[0].weight.dtype == torch.bfloat16


def test_tied_weights_are_saved_once_and_stay_tied(tmp_path: Path):
    text = transformers.AutoConfig.for_model("qwen2", **TEXT, tie_word_embeddings=True)
    audio = transformers.AutoConfig.for_model("whisper", **WHISPER)
    model = FastCompressForConditionalGeneration(FastCompressConfig(audio, text, audio_token_id=AUDIO))
    model.save_pretrained(tmp_path)
    from safetensors import safe_open

    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert len([name for name in file.keys() if "lm_head" in name or "embed_tokens" in name]) == 1  # noqa: SIM118
    loaded = FastCompressForConditionalGeneration.from_pretrained(tmp_path)
    table, head = loaded.get_input_embeddings().weight, loaded.get_output_embeddings().weight
    assert table.data_ptr() == head.data_ptr() and torch.equal(table, model.get_input_embeddings().weight)


def test_from_parts(tmp_path: Path):
    whisper = transformers.WhisperModel(transformers.AutoConfig.for_model("whisper", **WHISPER))
    decoder = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model("llama", **TEXT))
    whisper.save_pretrained(tmp_path / "audio")
    decoder.to(torch.bfloat16).save_pretrained(tmp_path / "text")
    model = FastCompressForConditionalGeneration.from_parts(
        str(tmp_path / "audio"), str(tmp_path / "text"), audio_token_id=AUDIO, rule=fc.LocalMax()
    )
    assert torch.equal(model.audio_tower.conv1.weight, whisper.encoder.conv1.weight)
    assert torch.equal(model.get_input_embeddings().weight, decoder.get_input_embeddings().weight)
    assert model.rule == "local-max" and not hasattr(model.audio_tower, "decoder")
    assert model(**batch()).loss.isfinite()


# LoRA


def test_lora_is_on_the_decoder_alone():
    pytest.importorskip("peft")
    for text in ("qwen2", "phi3"):
        model = build(text=text)
        wrapped = add_lora(model, rank=4)
        hit = {name.split(".lora_A")[0] for name, _ in wrapped.named_parameters() if "lora_A" in name}
        expected = {
            name
            for name, module in build(text=text).named_modules()
            if isinstance(module, torch.nn.Linear) and name.startswith("language_model.model.")
        }
        assert {name.removeprefix("base_model.model.") for name in hit} == expected and len(expected) == 8 + 6 * (
            text == "qwen2"
        )
        trained = {n for n, p in wrapped.named_parameters() if p.requires_grad}
        assert all("lora_" in name or ".projector.modules_to_save." in name for name in trained)
        assert any("projector" in name for name in trained)
    assert not re.fullmatch(lora_targets(build().language_model), "audio_tower.layers.0.self_attn.q_proj")


def test_lora_with_a_trained_encoder():
    pytest.importorskip("peft")
    wrapped = add_lora(build(train_encoder=True, ctc_tokens=["a"]), rank=4)
    wrapped(**batch(), ctc_labels=torch.ones(3, 2).long()).loss.backward()
    trained = {n: p for n, p in wrapped.named_parameters() if p.requires_grad}
    assert any("audio_tower" in n for n in trained) and any("ctc_head" in n for n in trained)
    assert not any("embed_positions" in n for n in trained)  # sinusoids, which are also frozen without LoRA
    assert all(p.grad is not None for p in trained.values())


def test_an_adapter_is_saved_and_loaded(tmp_path: Path):
    peft = pytest.importorskip("peft")
    wrapped = add_lora(build(rule="uniform:3"), rank=4)
    optimizer = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=0.5)
    for _ in range(2):
        wrapped(**batch()).loss.backward()
        optimizer.step()
    wrapped.eval()
    before, after = build(rule="uniform:3")(**batch()).loss, wrapped(**batch()).loss
    assert abs(before - after) > 1e-3
    wrapped.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(build(rule="uniform:3"), str(tmp_path)).eval()
    torch.testing.assert_close(loaded(**batch()).loss, after)
    full = batch()
    del full["labels"]
    assert torch.equal(loaded.generate(**full, max_new_tokens=4), wrapped.generate(**full, max_new_tokens=4))
    merged = loaded.merge_and_unload()
    assert type(merged) is FastCompressForConditionalGeneration
    torch.testing.assert_close(merged(**batch()).loss, after, rtol=1e-4, atol=1e-4)

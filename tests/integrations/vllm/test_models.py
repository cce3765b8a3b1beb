"""Model classes of vLLM with the plug-in, without an engine: pooling, positions, counts of usage."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.multimodal.inputs import (
    MultiModalBatchedField,
    MultiModalFeatureSpec,
    MultiModalFieldElem,
    MultiModalKwargsItem,
    PlaceholderRange,
)

import fastcompress as fc
from fastcompress.integrations.vllm import models
from fastcompress.integrations.vllm.families import FAMILIES, REFUSED
from fastcompress.integrations.vllm.settings import Compression
from tests.support import torchvision_stub

torchvision_stub.install()
ARCHITECTURES = [(family, name) for family in FAMILIES for name in family.architectures]
THREE = Compression(fc.Uniform(3))


def class_of(architecture: str) -> Any:
    return getattr(models, f"{architecture}_vllm_test")


def instance(architecture: str, compression: Compression | None) -> Any:
    """Return a model without weights."""
    found = object.__new__(class_of(architecture))
    torch.nn.Module.__init__(found)
    found.fastcompress = compression
    return found


@pytest.mark.parametrize(("family", "architecture"), ARCHITECTURES, ids=[name for _, name in ARCHITECTURES])
def test_every_family_is_pooled(family: Any, architecture: str, monkeypatch: pytest.MonkeyPatch):
    """The rows that the stock class returns are pooled once, and their number is compared with the prompt's."""
    cls = class_of(architecture)
    assert not cls.fastcompress_family.refused
    stock = next(base for base in cls.__mro__ if base.__module__.startswith("vllm.") and family.method in vars(base))
    rows = [torch.randn(9, 4), torch.randn(4, 4)]
    monkeypatch.setattr(stock, family.method, lambda self, *args, **kwargs: tuple(rows))
    if family.method != "embed_multimodal":
        plain = next(
            base for base in cls.__mro__ if "embed_multimodal" in vars(base) and base.__module__ != models.__name__
        )
        monkeypatch.setattr(plain, "embed_multimodal", lambda self, **kwargs: self._process_audio_input(kwargs))
    model = instance(architecture, THREE)
    found = model.embed_multimodal(input_features=None, fastcompress_tokens=torch.tensor([3, 2]))
    for tokens, audio in zip(found, rows, strict=True):
        assert torch.equal(tokens, fc.segment_pool(audio, "uniform:3").values)
    with pytest.raises(RuntimeError, match=r"the audios have \[3, 2\] tokens, but their prompts have \[4, 2\]"):
        model.embed_multimodal(input_features=None, fastcompress_tokens=torch.tensor([4, 2]))
    model.fastcompress = None
    assert all(a is b for a, b in zip(model.embed_multimodal(input_features=None), rows, strict=True))
    if family.embeds:
        model.fastcompress = THREE
        assert all(a is b for a, b in zip(model._process_audio_input({"type": "audio_embeds"}), rows, strict=True))


def feature(offset: int, length: int, frames: int) -> MultiModalFeatureSpec:
    data = MultiModalKwargsItem(
        {"audio_feature_lengths": MultiModalFieldElem(torch.tensor(frames), MultiModalBatchedField(keep_on_cpu=True))}
    )
    return MultiModalFeatureSpec(data, "audio", f"hash {offset}", PlaceholderRange(offset=offset, length=length))


@pytest.mark.parametrize(
    "architecture",
    ["Qwen2_5OmniModel", "Qwen3OmniMoeForConditionalGeneration", "Qwen3ASRForConditionalGeneration"],
)
@pytest.mark.parametrize("compression", [None, THREE, Compression(fc.MinVariance(2.5))], ids=str)
def test_positions_follow_the_placeholders(architecture: str, compression: Compression | None):
    """M-RoPE: positions of text and audio increase by one per token of the compressed prompt."""
    model = instance(architecture, compression)
    vision = SimpleNamespace(spatial_merge_size=2, tokens_per_second=25)
    model.config = SimpleNamespace(vision_config=vision, position_id_per_seconds=25)
    for frames in range(20, 420, 8):
        if architecture.startswith("Qwen3"):
            rest = (frames % 100 - 1) // 2 + 1
            rows = ((rest - 1) // 2 + 1 - 1) // 2 + 1 + frames // 100 * 13
        else:
            rows = ((frames - 1) // 2 + 1 - 2) // 2 + 1
        count = rows if compression is None else compression.count(rows)
        features = [feature(4, count, frames), feature(4 + count + 3, count, frames)]
        ids = [5] * (4 + count + 3 + count + 6)
        positions, delta = model.get_mrope_input_positions(ids, features)
        assert positions.tolist() == [list(range(len(ids)))] * 3, frames
        assert delta == 0


def test_usage_of_transcriptions(monkeypatch: pytest.MonkeyPatch):
    cls = class_of("GraniteSpeechForConditionalGeneration")
    stock = next(base for base in cls.__mro__ if base.__module__.startswith("vllm."))
    monkeypatch.setattr(stock, "get_num_audio_tokens", classmethod(lambda cls, seconds, stt, model: int(10 * seconds)))
    for key, wanted in ((None, 100), ({"rule": "uniform:3"}, 34)):
        config = SimpleNamespace(hf_config=SimpleNamespace(fastcompress=key))
        assert cls.get_num_audio_tokens(10.0, None, config) == wanted


@pytest.mark.parametrize("family", REFUSED, ids=lambda family: family.title)
def test_refused_families_run_only_without_the_key(family: Any, monkeypatch: pytest.MonkeyPatch):
    try:
        cls = class_of(family.architectures[0])
    except ImportError as error:
        pytest.skip(f"vLLM cannot import {family.title} here: {error}")
    built = []
    stock = cls.__mro__[2]
    monkeypatch.setattr(
        stock, "__init__", lambda self, **kwargs: (torch.nn.Module.__init__(self), built.append(kwargs))
    )
    config = SimpleNamespace(
        model_config=SimpleNamespace(hf_config=SimpleNamespace(fastcompress={"rule": "uniform:3"})), lora_config=None
    )
    with pytest.raises(NotImplementedError, match=f"{family.title} cannot be compressed in vLLM: {family.refused}"):
        cls(vllm_config=config)
    config.model_config.hf_config.fastcompress = None
    assert cls(vllm_config=config).fastcompress is None
    assert built == [{"vllm_config": config, "prefix": ""}]


def test_adapters_on_the_encoder_are_refused():
    key = SimpleNamespace(hf_config=SimpleNamespace(fastcompress={"rule": "uniform:3"}))
    config = SimpleNamespace(model_config=key, lora_config=SimpleNamespace(enable_tower_connector_lora=True))
    with pytest.raises(NotImplementedError, match="enable_tower_connector_lora is not supported with compression"):
        class_of("Qwen2AudioForConditionalGeneration")(vllm_config=config)


def test_an_unknown_stock_class_is_refused(monkeypatch: pytest.MonkeyPatch):
    """Another vLLM may lack what the plug-in extends: models without the key still run."""
    module = pytest.importorskip("vllm.model_executor.models.qwen2_audio")

    class Changed(torch.nn.Module):
        def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
            super().__init__()

    monkeypatch.setattr(module, "Qwen2AudioForConditionalGeneration", Changed)
    cls = models.make(FAMILIES[0], "Changed")
    model = SimpleNamespace(hf_config=SimpleNamespace(fastcompress=None))
    config = SimpleNamespace(model_config=model, lora_config=None)
    assert cls(vllm_config=config).fastcompress is None
    model.hf_config.fastcompress = {"rule": "uniform:3"}
    with pytest.raises(NotImplementedError, match="the class of vLLM .* has no _processor_factory"):
        cls(vllm_config=config)

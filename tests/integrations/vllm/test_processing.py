"""vLLM's front end with the plug-in: the number of placeholders of each audio, without an engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import vllm
from vllm import ModelRegistry
from vllm.config import ModelConfig
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.processing import PromptUpdateDetails
from vllm.multimodal.processing.context import TimingContext
from vllm.multimodal.processing.inputs import ProcessorInputs
from vllm.multimodal.processing.processor import PlaceholderFeaturesInfo
from vllm.plugins import load_general_plugins

import fastcompress as fc
from fastcompress.integrations.vllm import models
from fastcompress.integrations.vllm.families import FAMILIES, REFUSED
from fastcompress.integrations.vllm.processing import ANNOUNCED, CompressedExpandedProcessor, shorten
from fastcompress.integrations.vllm.settings import Compression
from tests.support import served_llms, torchvision_stub

torchvision_stub.install()

ARCHITECTURES = [
    "Qwen2AudioForConditionalGeneration",
    "GlmAsrForConditionalGeneration",
    "AudioFlamingo3ForConditionalGeneration",
    "Qwen3ASRForConditionalGeneration",
]
#: Rows per second, and rows of a window of 30 s.
ROWS = {"qwen2_audio": (25, 750), "glmasr": (12.5, 375), "audioflamingo3": (25, 750), "qwen3_asr": (13, 390)}


@pytest.fixture(scope="module", autouse=True)
def registered() -> dict[str, Any]:
    """Load the plug-in through its entry point, and return what it registers.

    The classes then replace their names, since vLLM inspects a class that it knows by name in a new process.
    """
    load_general_plugins()
    found = dict(ModelRegistry.models)
    for architecture in ARCHITECTURES:
        ModelRegistry.register_model(architecture, found[architecture].load_model_cls())
    return found


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: served_llms.write(name, tmp_path_factory.mktemp(name)) for name in served_llms.FAMILIES}


def processor_of(folder: Path, key: Any, **settings: Any) -> Any:
    overrides = {} if key is None else {"hf_overrides": {"fastcompress": key}}
    config = ModelConfig(model=str(folder), dtype="float32", max_model_len=4096, **overrides, **settings)
    return MULTIMODAL_REGISTRY.create_processor(config)


def apply(name: str, processor: Any, audio: Any, count: int, **settings: Any) -> Any:
    ids = processor.info.get_tokenizer()(served_llms.prompt(name, count))["input_ids"]
    items = processor.info.parse_mm_data({"audio": audio})
    inputs = ProcessorInputs(prompt=ids, mm_data_items=items, hf_processor_mm_kwargs=settings)
    return processor.apply(inputs, TimingContext(enabled=False))


def lengths(name: str) -> list[float]:
    """Return 50 lengths in seconds, most of them around the borders of windows."""
    rate, window = ROWS[name]
    longest = 1 if name == "qwen2_audio" else 2  # windows
    rng = np.random.default_rng(0)
    around = [max(0.2, (border * window + step) / rate) for border in range(longest + 1) for step in range(-8, 9)]
    return [*around, *rng.uniform(0.3, longest * 30, 50)][:50]


@pytest.mark.parametrize("rule", ["uniform:3", "min-variance:rate=3.5"])
@pytest.mark.parametrize("name", served_llms.FAMILIES)
def test_numbers_of_placeholders(name: str, rule: str, folders: dict[str, Path]):
    stock, compressed = processor_of(folders[name], None), processor_of(folders[name], {"rule": rule})
    window = ROWS[name][1]
    cut = None if name == "qwen3_asr" else window
    wanted = Compression(fc.Rule.from_string(rule), window=cut)  # type: ignore[arg-type]
    token = served_llms.token(served_llms.FAMILIES[name].placeholder[1])
    counted = []
    for seconds in lengths(name):
        audio = [(np.zeros(int(seconds * served_llms.RATE), np.float32), served_llms.RATE)]
        before, after = (apply(name, processor, audio, 1) for processor in (stock, compressed))
        (place,) = after["mm_placeholders"]["audio"]
        rows, tokens = (found["prompt_token_ids"].count(token) for found in (before, after))
        assert tokens == wanted.count(rows) == place.get_num_embeds()
        assert int(after["mm_kwargs"]["audio"][0][ANNOUNCED].data) == tokens
        assert ANNOUNCED not in before["mm_kwargs"]["audio"][0]
        others = [[i for i in found["prompt_token_ids"] if i != token] for found in (before, after)]
        assert others[0] == others[1]
        counted.append(rows)
    assert max(counted) >= window * (1 if name == "qwen2_audio" else 2)
    assert len(set(counted)) > 20


def test_two_audios_and_embeddings(folders: dict[str, Path]):
    name = "qwen2_audio"
    processor = processor_of(folders[name], {"rule": "uniform:3"}, enable_mm_embeds=True)
    audios = [(served_llms.speech(seconds), served_llms.RATE) for seconds in (2.0, 3.37)]
    found = apply(name, processor, audios, 2)
    assert [place.length for place in found["mm_placeholders"]["audio"]] == [17, 28]
    embeds = [torch.randn(7, 64), torch.randn(11, 64)]  # any number of tokens, whatever the rule is
    found = apply(name, processor, {"audio_embeds": embeds}, 2)
    assert [place.length for place in found["mm_placeholders"]["audio"]] == [7, 11]


def test_profiling_and_keys_of_caches(folders: dict[str, Path]):
    name = "qwen2_audio"
    found: dict[str | None, Any] = {}
    for rule in (None, "uniform:3", "uniform:2"):
        processor = processor_of(folders[name], rule and {"rule": rule})
        most = processor.info.get_mm_max_tokens_per_item(4096, {"audio": 1})
        assert most == {"audio": {None: 750, "uniform:3": 250, "uniform:2": 375}[rule]}
        audio = [(served_llms.speech(1.0), served_llms.RATE)]
        found[rule] = apply(name, processor, audio, 1)["mm_hashes"]["audio"][0]
    assert len(set(found.values())) == 3
    assert found["uniform:3"].startswith(found[None])


def test_too_short_and_refused(folders: dict[str, Path]):
    name = "qwen2_audio"
    dropping = processor_of(folders[name], {"rule": "uniform:size=50,tail=drop"})
    with pytest.raises(ValueError, match="too short for the rule uniform:50,tail=drop: it has 25 rows"):
        apply(name, dropping, [(served_llms.speech(1.0), served_llms.RATE)], 1)
    with pytest.raises(NotImplementedError, match="number depends on the audio; .* pass audio_embeds"):
        processor_of(folders[name], {"rule": "local-max"})
    with pytest.raises(NotImplementedError, match="proportional attention, which vLLM does not have"):
        processor_of(folders[name], {"rule": "uniform:3", "proportional_attention": True})
    with pytest.raises(ValueError, match="use_audio_in_video is not supported with compression"):
        processor = processor_of(folders[name], {"rule": "uniform:3"})
        processor._get_prompt_updates(processor.info.parse_mm_data({}), {"use_audio_in_video": True}, _no_kwargs())


def _no_kwargs() -> Any:
    from vllm.multimodal.inputs import MultiModalKwargsItems

    return MultiModalKwargsItems({})


def test_shorten_keeps_other_tokens():
    three = Compression(fc.Uniform(3))
    details = PromptUpdateDetails.select_token_id([1, 9, 9, 9, 9, 2], 9)
    short = shorten(details, three)
    assert list(short.full) == [1, 9, 9, 2]
    assert short.is_embed is not None and short.is_embed(short.full).tolist() == [False, True, True, False]
    assert list(shorten(PromptUpdateDetails([9] * 10), three).full) == [9] * 4
    with pytest.raises(RuntimeError, match="placeholders of an audio must be adjacent"):
        shorten(PromptUpdateDetails.select_token_id([9, 1, 9], 9), three)


def test_prompts_that_are_already_expanded():
    """Voxtral: mistral_common writes all placeholders before vLLM's processor runs."""

    class Stock:
        def _maybe_apply_prompt_updates(self, mm_items: Any, mm_res: Any) -> Any:
            places = [
                PlaceholderFeaturesInfo("audio", i, start, [9] * n, None) for i, start, n in ((0, 2, 7), (1, 11, 4))
            ]
            return mm_res, {"audio": places}

    processor: Any = type("Processor", (CompressedExpandedProcessor, Stock), {})()
    processor.info = type("Info", (), {"compression": Compression(fc.Uniform(3), window=5)})
    ids, places = processor._maybe_apply_prompt_updates(None, [1, 5, *[9] * 7, 5, 6, *[9] * 4, 3])
    assert ids == [1, 5, 9, 9, 9, 5, 6, 9, 9, 3]  # a window of 5 and one of 2; a window of 4
    assert [(place.start_idx, place.tokens) for place in places["audio"]] == [(2, [9] * 3), (7, [9] * 2)]
    processor.info.compression = None
    assert processor._maybe_apply_prompt_updates(None, [1, 2])[0] == [1, 2]


def test_classes_are_registered_lazily(registered: dict[str, Any]):
    for family in (*FAMILIES, *REFUSED):
        for architecture in family.architectures:
            assert registered[architecture].module_name == models.__name__
            version = vllm.__version__.replace(".", "_").replace("+", "_")
            assert registered[architecture].class_name == f"{architecture}_vllm_{version}"

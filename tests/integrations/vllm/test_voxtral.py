"""Voxtral's prompts, which mistral_common writes with all placeholders, in vLLM's real processor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mistral_common
import numpy as np
import pytest
from mistral_common.tokens.tokenizers.base import SpecialTokens
from vllm import ModelRegistry
from vllm.config import ModelConfig
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.processing.context import TimingContext
from vllm.multimodal.processing.inputs import ProcessorInputs

from fastcompress.integrations.vllm import models
from fastcompress.integrations.vllm.processing import ANNOUNCED

RATE, WINDOW = 16000, 375
MELS = {"num_mel_bins": 16, "sampling_rate": RATE, "hop_length": 160, "window_size": 400}
PARAMS: dict[str, Any] = {
    "dim": 64, "n_layers": 1, "head_dim": 32, "hidden_dim": 64, "n_heads": 2, "n_kv_heads": 2, "norm_eps": 1e-5,
    "vocab_size": 131072, "rope_theta": 1e4, "max_position_embeddings": 4096,
    "multimodal": {
        "whisper_model_args": {
            "encoder_args": {
                "audio_encoding_args": MELS, "dim": 32, "n_layers": 1, "head_dim": 16, "hidden_dim": 32, "n_heads": 2,
                "vocab_size": 51866,
            },
            "downsample_args": {"downsample_factor": 4},
        },
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a configuration, and a tokenizer that ships with mistral_common and gets tokens of audio."""
    found = tmp_path_factory.mktemp("voxtral")
    (found / "params.json").write_text(json.dumps(PARAMS))
    shipped = Path(mistral_common.__file__).parent / "data" / "tekken_240911.json"
    tekken = json.loads(shipped.read_text(encoding="utf-8"))
    names = [token.value for token in SpecialTokens]
    names += [f"<SPECIAL_{i}>" for i in range(len(names), tekken["config"]["default_num_special_tokens"])]
    tekken["special_tokens"] = [{"rank": i, "token_str": name, "is_control": True} for i, name in enumerate(names)]
    encoding = {name: MELS[name] for name in ("num_mel_bins", "hop_length", "window_size")}
    tekken["audio"] = {
        "sampling_rate": RATE, "frame_rate": 12.5, "audio_encoding_config": encoding, "chunk_length_s": 30.0,
    }  # fmt: skip
    tekken["config"]["version"] = "v11"
    del tekken["image"]
    (found / "tekken.json").write_text(json.dumps(tekken), encoding="utf-8")
    return found


def processor_of(folder: Path, key: Any) -> Any:
    ModelRegistry.register_model("VoxtralForConditionalGeneration", models.VoxtralForConditionalGeneration_vllm_test)
    overrides = {} if key is None else {"hf_overrides": {"fastcompress": key}}
    config = ModelConfig(
        model=str(folder), tokenizer_mode="mistral", config_format="mistral", dtype="float32", max_model_len=2048,
        **overrides,
    )  # fmt: skip
    return MULTIMODAL_REGISTRY.create_processor(config)


@pytest.mark.parametrize(("rule", "window"), [(None, 375), ("uniform:3", 125), ("uniform:4", 94), ("top-k:rate=5", 75)])
def test_surplus_placeholders_are_dropped(folder: Path, rule: str | None, window: int):
    processor = processor_of(folder, rule and {"rule": rule})
    stock = processor.info.get_hf_processor()
    audio, begin = stock.audio_token_id, stock.begin_audio_token_id
    ids = [1, begin, *[audio] * WINDOW, 2000, begin, *[audio] * 2 * WINDOW, 2001, 2002]
    samples = [(np.zeros(seconds * RATE, np.float32), RATE) for seconds in (30, 60)]
    inputs = ProcessorInputs(prompt=ids, mm_data_items=processor.info.parse_mm_data({"audio": samples}))
    found = processor.apply(inputs, TimingContext(enabled=False))
    wanted = [1, begin, *[audio] * window, 2000, begin, *[audio] * 2 * window, 2001, 2002]
    assert found["prompt_token_ids"] == wanted
    places = [(place.offset, place.length) for place in found["mm_placeholders"]["audio"]]
    assert places == [(2, window), (4 + window, 2 * window)]
    announced = [item.get(ANNOUNCED) for item in found["mm_kwargs"]["audio"]]
    assert [item and int(item.data) for item in announced] == ([None] * 2 if rule is None else [window, 2 * window])

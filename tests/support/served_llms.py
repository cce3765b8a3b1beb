"""Tiny checkpoints that vLLM can serve: folders with random weights, a real processor and a tokenizer of words.

They differ from ``audio_llms`` in what vLLM requires: windows of 30 s, and a decoder whose heads have a size that its
CPU kernels support.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

WORDS = "zero one two three four five six seven eight nine write what you hear low middle high please".split()
SPECIAL = (
    "<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>", "<|pad|>", "<|begin_of_audio|>", "<|end_of_audio|>", "<sound>",
    "<|audio_pad|>", "<|audio_start|>", "<|audio_end|>", "<|user|>", "<|assistant|>", "<|im_start|>", "<|im_end|>",
    "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
#: Attributes of the tokenizer of Qwen3-ASR.
QWEN3 = {
    "audio_token": "<|audio_pad|>",
    "audio_bos_token": "<|audio_start|>",
    "audio_eos_token": "<|audio_end|>",
}
FILLERS = 160
RATE = 16000
MELS = 16
TEXT = {
    "vocab_size": FILLERS + len(SPECIAL), "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 4096,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.3, "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
}  # fmt: skip
ENCODER = {"num_mel_bins": MELS, "initializer_range": 0.3}
TEMPLATE = (
    "{% for m in messages %}<s> {{ m.role }} {% if m.content is string %}{{ m.content }}{% else %}"
    "{% for c in m.content %}{% if c.type == 'text' %} {{ c.text }}{% else %}BEFORE<AUDIO>AFTER{% endif %}{% endfor %}"
    "{% endif %} {% endfor %}{% if add_generation_prompt %}<s> assistant {% endif %}"
)


@dataclass(frozen=True)
class Family:
    """A family.

    Attributes:
        build: Function that returns a model with random weights.
        processor: Function of a feature extractor, a tokenizer and a chat template that returns the processor.
        placeholder: Text before, at and after one audio in a prompt.
        several: Whether a prompt may have several audios.
        embeds: Whether vLLM takes embeddings of audio.
        extractor: Class of the feature extractor.
    """

    build: Callable[[], Any]
    processor: Callable[[Any, Any, str], Any]
    placeholder: tuple[str, str, str]
    several: bool = True
    embeds: bool = True
    extractor: str = "WhisperFeatureExtractor"


def token(text: str) -> int:
    """Return the id of a special token."""
    return FILLERS + SPECIAL.index(text)


def _qwen2_audio() -> Any:
    audio = {"d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 32, "dropout": 0.0}
    config = transformers.Qwen2AudioConfig(
        audio_config=ENCODER | audio | {"model_type": "qwen2_audio_encoder", "max_source_positions": 1500},
        text_config=TEXT | {"model_type": "qwen2"},
        audio_token_id=token("<|AUDIO|>"),
    )
    return transformers.Qwen2AudioForConditionalGeneration(config)


def _glmasr() -> Any:
    audio = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.GlmAsrConfig(
        audio_config=ENCODER | audio | {"model_type": "glmasr_encoder", "max_position_embeddings": 1500},
        text_config=TEXT | {"model_type": "llama"},
        audio_token_id=token("<|pad|>"),
    )
    return transformers.GlmAsrForConditionalGeneration(config)


def _flamingo() -> Any:
    audio = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.AudioFlamingo3Config(
        audio_config=ENCODER | audio | {"model_type": "audioflamingo3_encoder", "max_source_positions": 1500},
        text_config=TEXT | {"model_type": "qwen2"},
        audio_token_id=token("<sound>"),
    )
    return transformers.AudioFlamingo3ForConditionalGeneration(config)


def _of(name: str, **settings: Any) -> Callable[[Any, Any, str], Any]:
    def make(extractor: Any, tokenizer: Any, template: str) -> Any:
        return getattr(transformers, name)(extractor, tokenizer, chat_template=template, **settings)

    return make


def _qwen3_asr() -> Any:
    audio = {
        "d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 32, "output_dim": 64,
        "downsample_hidden_size": 8, "n_window": 50, "n_window_infer": 800,
    }  # fmt: skip
    config = transformers.Qwen3ASRConfig(
        audio_config=ENCODER | audio | {"model_type": "qwen3_asr_encoder"},
        # Tied, since vLLM does not load the head under the name that transformers saves.
        text_config=TEXT | {"model_type": "qwen3", "tie_word_embeddings": True},
        audio_token_id=token("<|audio_pad|>"),
        pad_token_id=0,
        eos_token_id=2,
        tie_word_embeddings=True,
    )
    return transformers.Qwen3ASRForConditionalGeneration(config)


#: By ``model_type``.
FAMILIES = {
    "qwen2_audio": Family(_qwen2_audio, _of("Qwen2AudioProcessor"), ("<|audio_bos|>", "<|AUDIO|>", "<|audio_eos|>")),
    "glmasr": Family(
        _glmasr, _of("GlmAsrProcessor"), ("<|begin_of_audio|>", "<|pad|>", "<|end_of_audio|>"), several=False
    ),
    "audioflamingo3": Family(_flamingo, _of("AudioFlamingo3Processor"), ("", "<sound>", ""), several=False),
    "qwen3_asr": Family(
        _qwen3_asr,
        _of("Qwen3ASRProcessor"),
        ("<|audio_start|>", "<|audio_pad|>", "<|audio_end|>"),
        several=False,
        embeds=False,
        extractor="Qwen3ASRFeatureExtractor",
    ),
}


def tokenizer(name: str) -> Any:
    """Return the tokenizer of a family: words, separated by spaces."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "<s>", "</s>", "<unk>", *WORDS]
    words += [f"w{i}" for i in range(len(words), FILLERS)] + list(SPECIAL)
    found = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    found.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=found,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens=QWEN3 if name == "qwen3_asr" else {},  # other processors would read them too
    )
    fast.add_tokens(list(SPECIAL), special_tokens=True)
    assert fast.convert_tokens_to_ids(list(SPECIAL)) == [token(text) for text in SPECIAL]
    return fast


def write(name: str, folder: Path, seed: int = 0) -> Path:
    """Write the model of a family and its processor into a folder."""
    family = FAMILIES[name]
    torch.manual_seed(seed)
    family.build().eval().save_pretrained(folder)
    _rename_weights(folder / "model.safetensors")
    extractor = getattr(transformers, family.extractor)(feature_size=MELS)
    before, placeholder, after = family.placeholder
    template = TEMPLATE.replace("BEFORE", before).replace("<AUDIO>", placeholder).replace("AFTER", after)
    family.processor(extractor, tokenizer(name), template).save_pretrained(folder)
    return folder


def _rename_weights(file: Path) -> None:
    """Give weights the names of published checkpoints. transformers 5.19 saves some with one ``model.`` too many."""
    from safetensors.torch import load_file, save_file

    weights = load_file(file)
    renamed = {name.replace("language_model.model.model.", "language_model.model."): x for name, x in weights.items()}
    save_file(renamed, file, metadata={"format": "pt"})


def prompt(name: str, audios: int, ending: str = "write what you hear") -> str:
    """Return a prompt with one placeholder per audio."""
    text = " ".join("".join(FAMILIES[name].placeholder) for _ in range(audios))
    return f"<s> please {text} {ending}"


def speech(seconds: float, seed: int = 0) -> np.ndarray:
    """Return audio that changes every 80 ms, so that rules that look at it cut at different places."""
    rng = np.random.default_rng(seed)
    samples = np.arange(int(seconds * RATE))
    pieces = samples // 1280
    tones = rng.uniform(100, 3000, int(pieces[-1]) + 1)[pieces]
    loud = rng.uniform(0.05, 0.5, int(pieces[-1]) + 1)[pieces]
    noise = 0.01 * rng.standard_normal(len(samples))
    return (loud * np.sin(2 * np.pi * tones * samples / RATE) + noise).astype(np.float32)

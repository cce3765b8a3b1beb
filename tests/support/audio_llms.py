"""Tiny audio LLMs with random weights, made from the real classes of transformers, and batches for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

VOCABULARY = 120
AUDIO, PAD, END = 100, 0, 2
MELS = 16

#: Configuration of the decoder for models that support several decoders; it has grouped queries.
TEXT = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512,
    "bos_token_id": 1, "eos_token_id": END, "pad_token_id": PAD, "initializer_range": 0.3,
    "tie_word_embeddings": False, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
}  # fmt: skip
WHISPER = {
    "num_mel_bins": MELS,
    "d_model": 24,
    "encoder_layers": 2,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "max_source_positions": 50,
    "initializer_range": 0.3,
    "dropout": 0.0,
}


@dataclass(frozen=True)
class Family:
    """A model family.

    Attributes:
        build: Function that returns a model with random weights.
        features: Function from the model and the maximum number of rows of each audio to the features, as arguments of
            the model, and the number of placeholders of each audio.
    """

    build: Callable[[], Any]
    features: Callable[[Any, Sequence[int]], tuple[dict[str, Any], list[int]]]


def make(name: str, seed: int = 0) -> Any:
    """Return the model of a family, in evaluation mode."""
    torch.manual_seed(seed)
    return FAMILIES[name].build().eval()


def batch(
    name: str,
    model: Any,
    sizes: Sequence[int | None] = (40, 9, 22),
    *,
    labels: bool = False,
    side: str = "left",
    seed: int = 0,
) -> dict[str, Any]:
    """Return a batch with one sample per size. A size is the number of frames of the audio (at most 100).

    With size ``None`` a sample has only text. Other samples have text before and after the audio. With ``labels``, the
    last four ids of each sample are labels.
    """
    g = torch.Generator().manual_seed(seed)
    inputs, counts = FAMILIES[name].features(model, [s for s in sizes if s]) if any(sizes) else ({}, [])
    counts = list(counts)
    rows = []
    for i, size in enumerate(sizes):
        before, behind = (torch.randint(3, 99, (n,), generator=g) for n in (2 + i, 5 + 2 * i))
        audio = torch.full((counts.pop(0) if size else 0,), AUDIO)
        rows.append(torch.cat([before, audio, behind]))
    longest = max(map(len, rows))

    def padded(values: list[Tensor], value: int) -> Tensor:
        return torch.stack(
            [
                torch.nn.functional.pad(
                    v, (longest - len(v), 0) if side == "left" else (0, longest - len(v)), value=value
                )
                for v in values
            ]
        )

    found = {"input_ids": padded(rows, PAD), "attention_mask": padded([torch.ones_like(r) for r in rows], 0)}
    if labels:
        found["labels"] = padded([torch.cat([torch.full_like(r[:-4], -100), r[-4:]]) for r in rows], -100)
    return found | inputs


def one(name: str, inputs: dict[str, Any], index: int) -> dict[str, Any]:
    """Return one sample of a batch, without padding. Every sample must have an audio of one window."""
    kept = inputs["attention_mask"][index].bool()
    row = slice(index, index + 1)
    return {
        key: value
        if isinstance(value, bool)
        else value[row, kept]
        if value.shape == inputs["input_ids"].shape
        else value[row]
        for key, value in inputs.items()
    }


def _mel(sizes: Sequence[int], width: int, bins: int = MELS) -> tuple[Tensor, Tensor]:
    """Return features ``[A, bins, width]``, which are 0 after the end of each audio, and their mask."""
    g = torch.Generator().manual_seed(len(sizes) + sum(sizes))
    mask = torch.arange(width) < torch.tensor(sizes)[:, None]
    return torch.randn(len(sizes), bins, width, generator=g) * mask[:, None], mask.long()


def _qwen2_audio() -> Any:
    from transformers import Qwen2AudioConfig, Qwen2AudioForConditionalGeneration

    config = Qwen2AudioConfig(
        audio_config=WHISPER | {"model_type": "qwen2_audio_encoder"},
        text_config=TEXT | {"model_type": "qwen2"},
        audio_token_id=AUDIO,
    )
    return Qwen2AudioForConditionalGeneration(config)


def _qwen2_audio_features(model: Any, sizes: Sequence[int]) -> tuple[dict[str, Tensor], list[int]]:
    features, mask = _mel([2 * s for s in sizes], 100)
    counts = model.model.audio_tower._get_feat_extract_output_lengths(mask.sum(-1))[1]
    return {"input_features": features, "feature_attention_mask": mask}, counts.tolist()


def _flamingo(music: bool) -> Any:
    import transformers

    name = "MusicFlamingo" if music else "AudioFlamingo3"
    config = getattr(transformers, f"{name}Config")(
        audio_config={
            "num_mel_bins": MELS,
            "hidden_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "max_source_positions": 50,
            "initializer_range": 0.3,
            "model_type": "audioflamingo3_encoder",
        },
        text_config=TEXT | {"model_type": "qwen2"},
        audio_token_id=AUDIO,
    )
    return getattr(transformers, f"{name}ForConditionalGeneration")(config)


def _flamingo_features(model: Any, sizes: Sequence[int]) -> tuple[dict[str, Tensor], list[int]]:
    frames, windows = [], []  # windows of at most 100 frames
    for size in sizes:
        windows.append(-(-size // 50))
        frames += [100] * (windows[-1] - 1) + [2 * size - 100 * (windows[-1] - 1)]
    features, mask = _mel(frames, 100)
    rows = model.model.audio_tower._get_feat_extract_output_lengths(mask.sum(-1))[1]
    counts = [int(part.sum()) for part in rows.split(windows)]
    return {"input_features": features, "input_features_mask": mask}, counts


def _glmasr() -> Any:
    from transformers import GlmAsrConfig, GlmAsrForConditionalGeneration

    config = GlmAsrConfig(
        audio_config={"num_mel_bins": MELS, "hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2,
                      "num_attention_heads": 2, "max_position_embeddings": 400, "initializer_range": 0.3,
                      "model_type": "glmasr_encoder"},
        text_config=TEXT | {"model_type": "llama"}, audio_token_id=AUDIO, tie_word_embeddings=False,
    )  # fmt: skip
    return GlmAsrForConditionalGeneration(config)


def _glmasr_features(model: Any, sizes: Sequence[int]) -> tuple[dict[str, Tensor], list[int]]:
    features, mask = _mel([8 * s for s in sizes], 320)
    return {"input_features": features, "input_features_mask": mask}, list(sizes)


def _voxtral() -> Any:
    from transformers import VoxtralConfig, VoxtralForConditionalGeneration

    config = VoxtralConfig(
        audio_config={
            "num_mel_bins": MELS,
            "hidden_size": 32,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_source_positions": 80,
            "initializer_range": 0.3,
            "model_type": "voxtral_encoder",
        },
        text_config=TEXT | {"model_type": "llama"},
        audio_token_id=AUDIO,
    )
    return VoxtralForConditionalGeneration(config)


def _voxtral_features(model: Any, sizes: Sequence[int]) -> tuple[dict[str, Tensor], list[int]]:
    windows = [-(-s // 20) for s in sizes]  # each window gives 20 tokens, also if it is partly empty
    features, _ = _mel([160] * sum(windows), 160)
    return {"input_features": features}, [20 * n for n in windows]


def _qwen3_asr() -> Any:
    from transformers import Qwen3ASRConfig, Qwen3ASRForConditionalGeneration

    config = Qwen3ASRConfig(
        audio_config={"num_mel_bins": MELS, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 32,
                      "d_model": 24, "output_dim": 32, "n_window": 50, "n_window_infer": 200,
                      "downsample_hidden_size": 8, "max_position_embeddings": 13, "initializer_range": 0.3,
                      "model_type": "qwen3_asr_encoder"},
        text_config=TEXT | {"model_type": "qwen3"}, audio_token_id=AUDIO, pad_token_id=PAD, eos_token_id=END,
        tie_word_embeddings=False,
    )  # fmt: skip
    return Qwen3ASRForConditionalGeneration(config)


def _qwen3_asr_features(model: Any, sizes: Sequence[int]) -> tuple[dict[str, Tensor], list[int]]:
    features, mask = _mel([8 * s for s in sizes], 400)  # 4 chunks of 100
    counts = model.model.audio_tower._post_cnn_length(mask.view(len(sizes), 4, 100).sum(-1)).sum(-1)
    return {"input_features": features, "input_features_mask": mask}, counts.tolist()


def _fun_asr_nano() -> Any:
    from transformers import FunAsrNanoConfig, FunAsrNanoForConditionalGeneration

    layers = {"hidden_size": 24, "num_attention_heads": 2, "intermediate_size": 32, "num_hidden_layers": 2}
    config = FunAsrNanoConfig(
        audio_config=layers | {"num_mel_bins": MELS, "num_timestamp_prediction_layers": 1, "hidden_dropout": 0.0,
                               "attention_dropout": 0.0, "num_stacked_frames": 2, "model_type": "fun_asr_nano_encoder"},
        adaptor_config=layers | {"hidden_size": 32, "intermediate_size": 8, "projector_hidden_size": 32},
        text_config=TEXT | {"model_type": "qwen3"}, audio_token_id=AUDIO, tie_word_embeddings=False,
    )  # fmt: skip
    return FunAsrNanoForConditionalGeneration(config)


def _fun_asr_nano_features(model: Any, sizes: Sequence[int]) -> tuple[dict[str, Tensor], list[int]]:
    features, mask = _mel(sizes, max(sizes), 2 * MELS)
    return {"input_features": features.transpose(1, 2), "input_features_mask": mask}, list(sizes)


def _granite_speech(plus: bool) -> Any:
    import transformers

    name = "GraniteSpeechPlus" if plus else "GraniteSpeech"
    kind = "granite_speech_plus" if plus else "granite_speech"
    encoder = {"input_dim": 2 * MELS, "num_layers": 2, "hidden_dim": 24, "feedforward_mult": 2, "num_heads": 2,
               "dim_head": 12, "output_dim": 10, "context_size": 20, "max_pos_emb": 32, "dropout": 0.0,
               "conv_kernel_size": 3, "model_type": f"{kind}_encoder"}  # fmt: skip
    width = 24
    if plus:
        encoder["cat_hidden_layers"] = [1]
        width = 48
    config = getattr(transformers, f"{name}Config")(
        encoder_config=encoder,
        projector_config={"model_type": "blip_2_qformer", "hidden_size": 24, "num_hidden_layers": 1,
                          "num_attention_heads": 2, "intermediate_size": 32, "encoder_hidden_size": width,
                          "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
        text_config=TEXT | {"model_type": "granite"}, audio_token_index=AUDIO, has_lora_adapter=False,
        tie_word_embeddings=False,
    )  # fmt: skip
    return getattr(transformers, f"{name}ForConditionalGeneration")(config)


def _granite_speech_features(model: Any, sizes: Sequence[int]) -> tuple[dict[str, Tensor], list[int]]:
    features, _ = _mel([5 * s for s in sizes], 5 * max(sizes), 2 * MELS)
    counts = [-(-5 * s // 15) * 3 for s in sizes]
    mask = torch.arange(max(counts)) < torch.tensor(counts)[:, None]
    return {"input_features": features.transpose(1, 2).contiguous(), "input_features_mask": mask}, counts


def _qwen2_5_omni() -> Any:
    from transformers import Qwen2_5OmniThinkerConfig, Qwen2_5OmniThinkerForConditionalGeneration

    config = Qwen2_5OmniThinkerConfig(
        audio_config={"num_mel_bins": MELS, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 32,
                      "d_model": 24, "output_dim": 32, "n_window": 25, "max_source_positions": 50,
                      "initializer_range": 0.3},
        vision_config={"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32},
        text_config=TEXT | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}},
        audio_token_id=AUDIO, image_token_id=101, video_token_id=102, audio_start_token_id=103, audio_end_token_id=104,
        vision_start_token_id=105, vision_end_token_id=106, pad_token_id=PAD, initializer_range=0.3,
    )  # fmt: skip
    return Qwen2_5OmniThinkerForConditionalGeneration(config)


def _qwen2_5_omni_features(model: Any, sizes: Sequence[int]) -> tuple[dict[str, Tensor], list[int]]:
    features, mask = _mel([4 * s for s in sizes], 4 * max(sizes))
    counts = model.model.audio_tower._get_feat_extract_output_lengths(mask.sum(-1))[1]
    return {"input_features": features, "feature_attention_mask": mask}, counts.tolist()


def _qwen3_omni() -> Any:
    from transformers import Qwen3OmniMoeThinkerForConditionalGeneration
    from transformers.models.qwen3_omni_moe.configuration_qwen3_omni_moe import Qwen3OmniMoeThinkerConfig

    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1], "mrope_interleaved": True}
    config = Qwen3OmniMoeThinkerConfig(
        audio_config={"num_mel_bins": MELS, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 32,
                      "d_model": 24, "output_dim": 32, "n_window": 50, "n_window_infer": 200,
                      "downsample_hidden_size": 8, "max_source_positions": 50, "initializer_range": 0.3},
        vision_config={"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32,
                       "deepstack_visual_indexes": [0], "num_position_embeddings": 16},
        text_config=TEXT | {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2,
                            "rope_parameters": rope},
        audio_token_id=AUDIO, image_token_id=101, video_token_id=102, audio_start_token_id=103, audio_end_token_id=104,
        vision_start_token_id=105, vision_end_token_id=106, pad_token_id=PAD, initializer_range=0.3,
        experts_implementation="eager",  # the default does not support double precision
    )  # fmt: skip
    return Qwen3OmniMoeThinkerForConditionalGeneration(config)


def _qwen3_omni_features(model: Any, sizes: Sequence[int]) -> tuple[dict[str, Tensor], list[int]]:
    from transformers.models.qwen3_omni_moe.modeling_qwen3_omni_moe import _get_feat_extract_output_lengths

    features, mask = _mel([8 * s for s in sizes], 8 * max(sizes))
    counts = _get_feat_extract_output_lengths(mask.sum(-1))
    return {"input_features": features, "feature_attention_mask": mask}, counts.tolist()


def _moss() -> Any:
    from transformers import MossTranscribeDiarizeConfig, MossTranscribeDiarizeForConditionalGeneration

    config = MossTranscribeDiarizeConfig(
        audio_config={"num_mel_bins": MELS, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
                      "intermediate_size": 32, "max_source_positions": 80, "initializer_range": 0.3,
                      "model_type": "moss_transcribe_diarize_audio"},
        text_config=TEXT | {"model_type": "qwen3"}, audio_token_id=AUDIO, audio_chunk_size=25600,
        tie_word_embeddings=False,
    )  # fmt: skip
    return MossTranscribeDiarizeForConditionalGeneration(config)


def _moss_features(model: Any, sizes: Sequence[int]) -> tuple[dict[str, Tensor], list[int]]:
    features, mask = _mel([8 * s for s in sizes], 160)
    samples = torch.ones(len(sizes), 25600)
    return {"input_features": features, "input_features_mask": mask, "padding_mask": samples}, list(sizes)


def _vibevoice() -> Any:
    from transformers import VibeVoiceAsrConfig, VibeVoiceAsrForConditionalGeneration

    encoder = {
        "model_type": "vibevoice_acoustic_tokenizer_encoder",
        "num_filters": 4,
        "depths": [1, 1],
        "downsampling_ratios": [4],
        "hidden_size": 16,
        "kernel_size": 3,
        "initializer_range": 0.3,
    }
    config = VibeVoiceAsrConfig(
        acoustic_tokenizer_encoder_config=dict(encoder),
        semantic_tokenizer_encoder_config=dict(encoder),
        text_config=TEXT | {"model_type": "qwen2"},
        audio_token_id=AUDIO,
        audio_bos_token_id=101,
        audio_eos_token_id=102,
    )
    return VibeVoiceAsrForConditionalGeneration(config)


def _vibevoice_features(model: Any, sizes: Sequence[int]) -> tuple[dict[str, Any], list[int]]:
    hop = model.config.acoustic_tokenizer_encoder_config.hop_length
    samples, mask = _mel([hop * s for s in sizes], hop * max(sizes), 1)
    # Disable the noise that the model adds to its frames, so that results can be compared.
    return {"input_values": samples, "padding_mask": mask.bool(), "sample": False}, list(sizes)


FAMILIES = {
    "qwen2_audio": Family(_qwen2_audio, _qwen2_audio_features),
    "audioflamingo3": Family(lambda: _flamingo(False), _flamingo_features),
    "musicflamingo": Family(lambda: _flamingo(True), _flamingo_features),
    "voxtral": Family(_voxtral, _voxtral_features),
    "glmasr": Family(_glmasr, _glmasr_features),
    "granite_speech": Family(lambda: _granite_speech(False), _granite_speech_features),
    "granite_speech_plus": Family(lambda: _granite_speech(True), _granite_speech_features),
    "qwen2_5_omni_thinker": Family(_qwen2_5_omni, _qwen2_5_omni_features),
    "qwen3_omni_moe_thinker": Family(_qwen3_omni, _qwen3_omni_features),
    "qwen3_asr": Family(_qwen3_asr, _qwen3_asr_features),
    "fun_asr_nano": Family(_fun_asr_nano, _fun_asr_nano_features),
    "vibevoice_asr": Family(_vibevoice, _vibevoice_features),
    "moss_transcribe_diarize": Family(_moss, _moss_features),
}


WORDS = "zero one two three four five six seven eight nine user assistant write what you hear low middle high".split()
TEMPLATE = (
    "{% for m in messages %}<s> {{ m.role }} {% if m.content is string %}{{ m.content }}{% else %}"
    "{% for c in m.content %}{% if c.type == 'audio' %}<audio>{% else %} {{ c.text }}{% endif %}{% endfor %}"
    "{% endif %} {% endfor %}{% if add_generation_prompt %}<s> assistant {% endif %}"
)


def processor(name: str) -> Any:
    """Return the real processor of ``qwen2_audio`` or ``audioflamingo3``, with the ids of the tiny model."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "<s>", "</s>", "<unk>", *WORDS]
    words += [f"<{i}>" for i in range(len(words), AUDIO)]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
    )
    fast.add_tokens(["<audio>"], special_tokens=True)
    assert fast.convert_tokens_to_ids("<audio>") == AUDIO
    extractor = transformers.WhisperFeatureExtractor(feature_size=MELS, chunk_length=1)
    kind = {"qwen2_audio": "Qwen2AudioProcessor", "audioflamingo3": "AudioFlamingo3Processor"}[name]
    return getattr(transformers, kind)(extractor, fast, chat_template=TEMPLATE, audio_token="<audio>")

"""Tiny reference audio LLMs and encoders with random weights, and a batch for them."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor

from fastcompress.lalm import FastCompressConfig, FastCompressForConditionalGeneration

AUDIO = 60  # not in the decoder's table
WINDOW = 100  # mel frames
TEXT = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WHISPER = {
    "d_model": 24, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_layers": 1,
    "num_mel_bins": 16, "max_source_positions": WINDOW // 2, "vocab_size": 4, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip
WAVE = {
    "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "conv_dim": (16, 16),
    "conv_stride": (5, 4), "conv_kernel": (10, 8), "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2,
    "apply_spec_augment": False, "hidden_dropout": 0.0, "attention_dropout": 0.0, "layerdrop": 0.0,
    "feat_proj_dropout": 0.0, "num_feat_extract_layers": 2, "mask_time_prob": 0.0, "feat_extract_norm": "layer",
    "do_stable_layer_norm": True,
}  # fmt: skip
MELS = 16
NO_DROPOUT = dict.fromkeys(
    ("dropout", "layerdrop", "activation_dropout", "attention_dropout", "hidden_dropout", "feat_proj_dropout"), 0.0
)
ENCODERS: dict[str, dict[str, Any]] = {
    "whisper": WHISPER,
    "voxtral_encoder": {
        "num_mel_bins": MELS, "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 2, "max_source_positions": WINDOW // 2,
    },
    "wav2vec2": WAVE,
    "hubert": WAVE,
    "wavlm": WAVE,
    "unispeech": WAVE,
    "unispeech-sat": WAVE,
    "parakeet_encoder": NO_DROPOUT | {
        "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48,
        "num_mel_bins": MELS, "subsampling_conv_channels": 8, "conv_kernel_size": 5, "dropout_positions": 0.0,
    },
    "wav2vec2-bert": NO_DROPOUT | {
        "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48,
        "feature_projection_input_dim": MELS, "conv_depthwise_kernel_size": 5, "apply_spec_augment": False,
        "conformer_conv_dropout": 0.0, "vocab_size": 4,
    },
}  # fmt: skip


def build(audio: str = "whisper", text: str = "qwen2", **options: Any) -> FastCompressForConditionalGeneration:
    audio_config = transformers.AutoConfig.for_model(audio, **(WHISPER if audio == "whisper" else WAVE))
    text_config = transformers.AutoConfig.for_model(text, **TEXT)
    torch.manual_seed(0)
    config = FastCompressConfig(audio_config, text_config, audio_token_id=AUDIO, **options)
    model = FastCompressForConditionalGeneration(config)
    for p in model.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=1.0 / p.shape[1] ** 0.5)
    return model.eval()


IDS = [[AUDIO, 3, 4, 5], [6, 7, 8], [9, AUDIO, AUDIO, 10, 11]]
LENGTHS = (70, 9, 100)


def batch(seed: int = 0, left: bool = False) -> dict[str, Tensor]:
    """Return three samples, with one audio, none and two."""
    g = torch.Generator().manual_seed(seed)
    rows, masks = [], []
    for ids in IDS:
        padding = [0] * (5 - len(ids))
        rows.append(padding + ids if left else ids + padding)
        masks.append([0] * len(padding) + [1] * len(ids) if left else [1] * len(ids) + [0] * len(padding))
    ids, mask = torch.tensor(rows), torch.tensor(masks)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "input_features": torch.randn(3, 16, 100, generator=g),
        "feature_attention_mask": (torch.arange(100) < torch.tensor(LENGTHS)[:, None]).long(),
        "labels": ids.masked_fill((mask == 0) | (ids == AUDIO), -100),
    }


def samples(full: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Return each sample alone, without padding of text or audio."""
    found, audio = [], 0
    for row, mask, labels in zip(full["input_ids"], full["attention_mask"], full["labels"], strict=True):
        keep = mask.bool()
        part = {"input_ids": row[keep][None], "labels": labels[keep][None]}
        count = int((part["input_ids"] == AUDIO).sum())
        if count:
            lengths = LENGTHS[audio : audio + count]
            part["input_features"] = full["input_features"][audio : audio + count, :, : max(lengths)]
            part["feature_attention_mask"] = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
        audio += count
        found.append(part)
    return found

"""Tiny encoders of the reference model, which are normed in different ways."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from fastcompress.lalm.encoders import build_encoder
from tests.support import audio_llms

TINY = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
CONVOLUTIONS = {"conv_dim": (8, 8), "conv_kernel": (10, 3), "conv_stride": (5, 2), "num_feat_extract_layers": 2,
                "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}  # fmt: skip
#: Encoders whose first layer is normed over time ("group") and over channels.
ENCODERS: dict[str, dict[str, Any]] = {
    "whisper": audio_llms.WHISPER,
    "wav2vec2": TINY | CONVOLUTIONS,
    "hubert": TINY | CONVOLUTIONS | {"feat_extract_norm": "layer"},
    "wavlm": TINY | CONVOLUTIONS,
    "wav2vec2-bert": TINY | {"feature_projection_input_dim": 16, "conv_depthwise_kernel_size": 3},
    "parakeet_encoder": TINY | {"num_mel_bins": 16, "subsampling_conv_channels": 8},
}


def encoder_of(kind: str) -> Any:
    torch.manual_seed(0)
    return build_encoder(transformers.AutoConfig.for_model(kind, **ENCODERS[kind]))

"""A tiny Whisper model with random weights and its processor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

WORDS = ("low", "middle", "high")
#: Ids of padding, start of the text, end of the text, and start of decoding; words follow.
PAD, BEGIN, END, START = 0, 1, 2, 3


def make(seed: int = 0, **changes: Any) -> Any:
    """Return a model whose window is one second, in evaluation mode."""
    torch.manual_seed(seed)
    values = {
        "vocab_size": 60, "num_mel_bins": 16, "d_model": 24, "encoder_layers": 1, "decoder_layers": 1,
        "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32,
        "max_source_positions": 50, "max_target_positions": 40, "init_std": 0.3, "pad_token_id": PAD,
        "bos_token_id": BEGIN, "eos_token_id": END, "decoder_start_token_id": START, "suppress_tokens": None,
        "begin_suppress_tokens": None, "max_length": None,
    }  # fmt: skip
    return transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(**values | changes)).eval()


def processor() -> Any:
    """Return the processor of the model."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "<s>", "</s>", "<start>", *WORDS]
    words += [f"w{i}" for i in range(len(words), 60)]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    extractor = transformers.WhisperFeatureExtractor(feature_size=16, chunk_length=1)
    return transformers.WhisperProcessor(extractor, fast)


def write(folder: Path, **changes: Any) -> Path:
    """Write the model and its processor into a folder."""
    make(**changes).save_pretrained(folder)
    processor().save_pretrained(folder)
    return folder

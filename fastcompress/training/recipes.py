"""A small audio LLM to train from scratch on two cores: tokenizer, processor and model for given data.

It has 1.3 million parameters: a Whisper encoder of 3 layers and a Qwen2 decoder of 3 layers. Two choices made it
converge in trials on synthetic speech: word tokens instead of characters, and an auxiliary CTC loss over phones
instead of pretraining.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from fastcompress.lalm.configuration import FastCompressConfig
from fastcompress.lalm.modeling import FastCompressForConditionalGeneration
from fastcompress.lalm.processing import FastCompressProcessor
from fastcompress.training.examples import phones_of
from fastcompress.training.manifest import Utterance

PAD, BEGIN, END, UNKNOWN, AUDIO = "<pad>", "<s>", "</s>", "<unk>", "<|audio|>"

#: Up to this number of distinct words, each word is a token. Larger vocabularies use byte-pair encoding with ``PIECES``
#: pieces.
MOST_WORDS = 400
PIECES = 200

#: Width and layers of the encoder, and of the decoder.
WIDTH, LAYERS = 128, 3
#: Window of the encoder in seconds. Longer audio is cut into windows.
WINDOW = 8


def build_tokenizer(texts: Sequence[str]) -> Any:
    """Build a tokenizer of the words of texts, or of pieces of words if there are too many words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = [PAD, BEGIN, END, UNKNOWN]
    words = sorted({word for text in texts for word in text.split()})
    if len(words) <= MOST_WORDS:
        vocabulary = {token: i for i, token in enumerate([*special, *words])}
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    else:
        tokenizer = Tokenizer(models.BPE(unk_token=UNKNOWN))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
        trainer = trainers.BpeTrainer(vocab_size=PIECES, special_tokens=special, show_progress=False)
        tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, bos_token=BEGIN, eos_token=END, unk_token=UNKNOWN
    )


def build_small(
    utterances: Sequence[Utterance], *, rule: str | None = None, seed: int = 0
) -> tuple[FastCompressForConditionalGeneration, FastCompressProcessor]:
    """Build a model with random weights, and its processor, for the utterances of a training manifest.

    Args:
        utterances: Utterances. Their targets determine the vocabulary, and their phones the units of a CTC loss.
        rule: Compression rule.
        seed: Seed of the weights.
    """
    from transformers import Qwen2Config, WhisperConfig, WhisperFeatureExtractor

    tokenizer = build_tokenizer([utterance.target for utterance in utterances])
    extractor = WhisperFeatureExtractor(feature_size=80, chunk_length=WINDOW)
    processor = FastCompressProcessor(extractor, tokenizer, audio_token=AUDIO)
    audio = WhisperConfig(
        d_model=WIDTH, encoder_layers=LAYERS, encoder_attention_heads=4, encoder_ffn_dim=4 * WIDTH, num_mel_bins=80,
        max_source_positions=50 * WINDOW, dropout=0.0, attention_dropout=0.0, activation_dropout=0.0,
        vocab_size=4, decoder_layers=1, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    text = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=3 * WIDTH, max_position_embeddings=1024, tie_word_embeddings=True,
        initializer_range=0.06, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    )  # fmt: skip
    config = FastCompressConfig(
        audio_config=audio,
        text_config=text,
        rule=rule,
        audio_token_id=processor.audio_token_id,
        train_encoder=True,
        ctc_tokens=phones_of(utterances) or None,
        ctc_weight=1.0,
        audio_padding="longest",
        normalize_features=True,
    )
    torch.manual_seed(seed)
    model = FastCompressForConditionalGeneration(config)
    _initialize_encoder(model.audio_tower)
    return model, processor


def _initialize_encoder(encoder: nn.Module) -> None:
    """Initialize with larger weights than Whisper, which expects long training, and with weaker positions."""
    for module in encoder.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
        elif isinstance(module, nn.Conv1d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        else:
            continue
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    with torch.no_grad():
        encoder.get_parameter("embed_positions.weight").mul_(0.1)

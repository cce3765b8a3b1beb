"""One interface to the speech encoders of transformers: ``encode`` returns the frames of each audio.

There are three families. Whisper's encoders take log-mel features in windows of a fixed length, others take samples,
and others take features with a mask. Audio longer than a window is cut into windows that are encoded separately;
nothing is dropped.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastcompress.checks import as_mask

#: Log-mel features ``[A, bins, T]`` in windows of twice ``max_source_positions``.
WHISPER = frozenset({"whisper", "voxtral_encoder"})
#: Samples ``[A, S]``.
WAVEFORM = frozenset({"data2vec-audio", "hubert", "sew", "unispeech", "unispeech-sat", "wav2vec2", "wavlm"})
#: Features ``[A, T, bins]`` and a mask.
MASKED = frozenset({"parakeet_encoder", "wav2vec2-bert"})

#: Silence in Whisper's features, below the loudest: they are clipped at 8 below it in log10 of power, and divided by 4.
_SILENCE = 2.0


def check_encoder(config: Any) -> None:
    """Check that an encoder is supported.

    Raises:
        NotImplementedError: The encoder is not supported. The message lists those that are.
    """
    known = WHISPER | WAVEFORM | MASKED
    if config.model_type not in known:
        raise NotImplementedError(
            f"audio_config has model_type {config.model_type!r}; supported encoders: {', '.join(sorted(known))}"
        )


def build_encoder(config: Any) -> nn.Module:
    """Build an encoder with random weights from a transformers configuration."""
    from transformers import AutoModel
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    check_encoder(config)
    if config.model_type == "whisper":  # AutoModel would also build Whisper's decoder
        return WhisperEncoder(config)
    return AutoModel.from_config(config)


def load_encoder(path: str) -> nn.Module:
    """Load a pretrained encoder; Whisper's decoder is left out."""
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.from_pretrained(path)
    check_encoder(config)
    model = AutoModel.from_pretrained(path)
    return model.get_encoder() if config.model_type == "whisper" else model


def window_length(config: Any) -> int | None:
    """Return the length of the encoder's window in log-mel frames; ``None``: the encoder takes any length."""
    return 2 * config.max_source_positions if config.model_type in WHISPER else None


def encode(
    encoder: Any, features: Tensor, mask: Tensor | None, padding: str = "window", normalize: bool = False
) -> tuple[Tensor, Tensor]:
    """Encode a batch of audios into frames.

    Args:
        encoder: Encoder returned by ``build_encoder`` or ``load_encoder``.
        features: Log-mel features ``[A, bins, T]`` or samples ``[A, S]``, floating point.
        mask: ``[A, T]`` or ``[A, S]`` bool or numbers: 1 for audio, 0 after the end of each audio; ``None``: all audios
            fill the whole length.
        padding: ``audio_padding`` of ``FastCompressConfig``.
        normalize: ``normalize_features`` of ``FastCompressConfig``.

    Returns:
        Frames ``[A, F, D]`` in the encoder's dtype, and the number of frames of each audio, ``[A]`` int64.

    Raises:
        ValueError: ``features`` or ``mask`` has a wrong shape, an audio is shorter than one frame (checked on the CPU
            only), or ``normalize`` is set for an encoder without windows.
        NotImplementedError: ``padding`` is ``"longest"`` and the encoder's attention is neither sdpa nor eager.
    """
    kind = encoder.config.model_type
    wanted = 2 if kind in WAVEFORM else 3
    if features.dim() != wanted:
        shape = "[A, S] (samples)" if wanted == 2 else "[A, bins, T] (log-mel features)"
        raise ValueError(f"input_features of {kind} must have shape {shape}, got {list(features.shape)}")
    features = features.to(encoder.dtype)
    if mask is None:
        mask = torch.ones(features.shape[0], features.shape[-1], dtype=torch.int64, device=features.device)
    if mask.shape != (features.shape[0], features.shape[-1]):
        raise ValueError(
            f"feature_attention_mask must have shape {[features.shape[0], features.shape[-1]]}, got {list(mask.shape)}"
        )
    mask = as_mask("feature_attention_mask", mask).long()
    lengths = mask.sum(1)
    inside = torch.arange(mask.shape[1], device=mask.device) < lengths[:, None]
    if lengths.device.type == "cpu":
        if bool((mask != inside).any()):
            raise ValueError(
                "feature_attention_mask must be 1 for each audio and 0 after its end, got 0 before 1 in audio "
                f"{int((mask != inside).any(1).nonzero()[0])}"
            )
        if bool((lengths < 1).any()):
            raise ValueError(f"audio {int((lengths < 1).nonzero()[0])} is empty: its feature_attention_mask is all 0")
    if kind in WHISPER:
        return _encode_windows(encoder, features, lengths, padding, normalize), (lengths - 1) // 2 + 1
    if normalize:
        raise ValueError(f"normalize_features must be False for {kind}: only Whisper's log-mel features are normalized")
    # Before the encoder, whose convolutions, norms and attention also run over what the mask excludes.
    features = torch.where(inside if wanted == 2 else inside[:, None], features, 0.0)
    if kind in WAVEFORM:
        frames = encoder(features, attention_mask=mask).last_hidden_state
        return frames, _checked(encoder._get_feat_extract_output_lengths(lengths), frames)
    frames = encoder(features.transpose(1, 2), attention_mask=mask).last_hidden_state
    if kind == "parakeet_encoder":
        lengths = encoder._get_subsampling_output_length(lengths)
    return frames, _checked(lengths, frames)


def _checked(lengths: Tensor, frames: Tensor) -> Tensor:
    if lengths.device.type == "cpu" and bool((lengths < 1).any()):
        raise ValueError(f"audio {int((lengths < 1).nonzero()[0])} is too short: the encoder returned no frame for it")
    return lengths.clamp(max=frames.shape[1])


def _encode_windows(encoder: Any, features: Tensor, lengths: Tensor, padding: str, normalize: bool) -> Tensor:
    """Run Whisper's encoder on audio of any length: ``[A, bins, T]`` -> ``[A, F, D]``."""
    audios, bins, longest = features.shape
    window = window_length(encoder.config)
    assert window is not None
    count = -(-longest // window)
    width = window
    if padding == "longest" and count == 1:
        # Two extra columns: the convolutions see silence after the end of the longest audio, as after any other.
        width = min(window, longest + 2 + longest % 2)
    inside = (torch.arange(count * width, device=features.device) < lengths[:, None])[:, None]
    features = nn.functional.pad(features, (0, count * width - longest))
    silence = features.masked_fill(~inside, -torch.inf).amax((1, 2), keepdim=True) - _SILENCE
    if normalize:
        count_inside = inside.sum((1, 2), keepdim=True) * bins
        mean = torch.where(inside, features, 0.0).sum((1, 2), keepdim=True) / count_inside
        features, silence = 2 * (features - mean), 2 * (silence - mean)
    features = torch.where(inside, features, silence)
    if count == 1:
        return _run(encoder, features, lengths, padding)
    windows = features.view(audios, bins, count, width).transpose(1, 2).reshape(audios * count, bins, width)
    left = (lengths[:, None] - torch.arange(count, device=lengths.device) * width).clamp(0, width).view(-1)
    used = left.nonzero()[:, 0]  # windows of padding are not computed
    frames = _run(encoder, windows[used], left[used], padding)
    every = frames.new_zeros(audios * count, *frames.shape[1:]).index_copy(0, used, frames)
    return every.view(audios, count * frames.shape[1], frames.shape[2])


def _run(encoder: Any, features: Tensor, lengths: Tensor, padding: str) -> Tensor:
    """Encode single windows: ``[W, bins, T]`` -> ``[W, T / 2, D]``."""
    if padding == "window":
        return encoder(features).last_hidden_state
    implementation = encoder.config._attn_implementation
    if implementation not in ("sdpa", "eager"):
        raise NotImplementedError(
            f"audio_padding='longest' needs the encoder's attn_implementation to be sdpa or eager, got {implementation}"
        )
    # WhisperEncoder.forward accepts whole windows only and attends to their padding, so its layers are called here.
    hidden = nn.functional.gelu(encoder.conv1(features))
    hidden = nn.functional.gelu(encoder.conv2(hidden)).transpose(1, 2)
    rows = hidden.shape[1]
    hidden = hidden + encoder.embed_positions.weight[:rows]
    hidden = nn.functional.dropout(hidden, encoder.dropout, encoder.training)
    seen = torch.arange(rows, device=hidden.device) < ((lengths + 1) // 2)[:, None]
    mask = seen[:, None, None].expand(-1, 1, rows, -1)
    if implementation == "eager":  # eager attention adds its mask to the scores
        mask = torch.zeros_like(mask, dtype=hidden.dtype).masked_fill(~mask, torch.finfo(hidden.dtype).min)
    for layer in encoder.layers:
        hidden = layer(hidden, mask)
    return encoder.layer_norm(hidden)

"""Compression of Whisper: the encoder's frames are pooled before the decoder attends to them.

Whisper's decoder reads audio by cross-attention only, so the encoder returns fewer rows, and the cross-attention gets
an additive mask: it hides padding, and adds ``log(L)`` to the scores of a token of ``L`` frames (proportional
attention), which then weighs as much as its frames.

The mask is an argument of the decoder's layers, so that gradient checkpointing passes it again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from fastcompress.checks import as_number
from fastcompress.decoder.saved_rule import SavedRule
from fastcompress.integrations.transformers import patches
from fastcompress.integrations.transformers.settings import NotPickled
from fastcompress.nn import SegmentPool
from fastcompress.ops.segment_pool import segment_pool

#: Attention implementations that add a mask of numbers to the scores.
ATTENTION = ("eager", "sdpa")
#: Name of the argument of the decoder and its layers for the mask of the cross-attention.
_BIAS = "fastcompress_bias"


@dataclass
class PooledEncoderOutput(BaseModelOutput):
    """Output of a compressed encoder.

    Attributes:
        last_hidden_state: Tokens, ``[B, S, D]``, padded on the right.
        token_lengths: Frames of each token, ``[B, S]`` int64; 0 for padding.
    """

    token_lengths: Tensor | None = None


@dataclass
class WhisperSettings(NotPickled):
    """Compression settings of a Whisper model.

    Attributes:
        compressor: Rule and reduction.
        proportional_attention: Whether the cross-attention adds the logarithm of the number of frames of a token.
        silence: Treatment of the frames of the silence that fills the window after the audio: ``"keep"`` each as a
            token, ``"pool"`` them like audio, or a number of seconds that are pooled, while the rest is dropped.
    """

    compressor: SegmentPool
    proportional_attention: bool
    silence: str | float

    def saved_rule(self, model: Any) -> SavedRule:
        """Return what is saved with the weights."""
        return SavedRule(
            "dynamic",
            True,
            rule=str(self.compressor.rule),
            reduce=self.compressor.reduce,
            proportional_attention=self.proportional_attention,
            silence=self.silence,
        )


def takes(model: Any) -> bool:
    """Return whether a model is a Whisper model with a head."""
    return getattr(getattr(model, "config", None), "model_type", None) == "whisper" and hasattr(model, "proj_out")


def settings(
    compressor: nn.Module, proportional_attention: bool | None, silence: str | float | None
) -> WhisperSettings:
    """Check the settings of ``apply_to``, and fill in the defaults."""
    if type(compressor) is not SegmentPool:
        raise NotImplementedError(f"whisper needs a rule, such as 'min-variance:rate=4', got {compressor}")
    if silence is None:
        silence = "keep"
    if silence not in ("keep", "pool"):
        if isinstance(silence, str):
            raise ValueError(f"silence must be 'keep', 'pool' or a number of seconds, got {silence!r}")
        silence = as_number("silence", silence)
        if not 0 <= silence < math.inf:
            raise ValueError(f"silence must be a finite number of seconds of at least 0, got {silence}")
    return WhisperSettings(compressor, proportional_attention is not False, silence)


def install(model: Any, settings: WhisperSettings) -> None:
    """Replace methods of a ``WhisperForConditionalGeneration``."""
    _check_attention(model.config)
    core = model.model
    model.fastcompress_settings = core.encoder.fastcompress_settings = settings
    patches.replace(core, "forward", _forward)
    patches.replace(core.encoder, "forward", _encode)
    for layer in core.decoder.layers:
        patches.replace(layer, "forward", _decode_layer)
    patches.replace(model, "generate", _generate)


def uninstall(model: Any) -> None:
    """Restore the methods."""
    core = model.model
    patches.restore(model, core, core.encoder, *core.decoder.layers)
    del core.encoder.fastcompress_settings


def audio_frames(input_features: Tensor) -> Tensor:
    """Return the number of encoder frames of each sample that contain audio, ``[B]`` int64.

    The silence that fills the window has equal columns: those of zero samples, or zeros that ``generate`` appends to
    the last window of long audio.

    Args:
        input_features: Log-mel features, ``[B, mels, columns]``; two columns per frame.
    """
    differs = (input_features != input_features[..., -1:]).any(1)
    columns = torch.arange(1, input_features.shape[-1] + 1, device=input_features.device)
    return ((columns * differs).amax(-1) + 1) // 2


def _check_attention(config: Any) -> None:
    if config._attn_implementation not in ATTENTION:
        raise NotImplementedError(
            f"compressed Whisper needs attn_implementation='sdpa' or 'eager', got {config._attn_implementation!r}: the "
            "cross-attention of the others takes no mask of numbers"
        )


def _generate(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Replace ``generate`` by a method that raises an error for timestamps of tokens."""
    stock = patches.original(self, "generate")
    if patches.named(stock, args, kwargs).get("return_token_timestamps"):
        raise NotImplementedError(
            "return_token_timestamps must be False: it reads the place of each word from the attention to the frames, "
            "which are pooled; return_timestamps=True works"
        )
    return stock(*args, **kwargs)


def _forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Replace ``forward`` of the model without its head: pass the mask of the cross-attention to the decoder."""
    stock = patches.original(self, "forward")
    arguments = patches.named(stock, args, kwargs)
    encoded = arguments.get("encoder_outputs")
    extra = {name: value for name, value in arguments.items() if name in ("output_attentions", "output_hidden_states")}
    if encoded is None:
        features = arguments["input_features"]
        frames = audio_frames(features)  # before the masks of SpecAugment
        features = self._mask_input_features(features, attention_mask=arguments.get("attention_mask"))
        encoded = arguments["encoder_outputs"] = self.encoder(features, fastcompress_frames=frames, **extra)
    lengths = getattr(encoded, "token_lengths", None)
    if lengths is None:
        raise ValueError(
            "encoder_outputs must have the token_lengths that the compressed encoder returns, got "
            f"{type(encoded).__name__} without them"
        )
    settings: WhisperSettings = self.encoder.fastcompress_settings
    arguments[_BIAS] = _bias(lengths, settings.proportional_attention, encoded[0].dtype)
    return stock(**arguments)


def _bias(lengths: Tensor, proportional: bool, dtype: torch.dtype) -> Tensor | None:
    """Return the mask of the cross-attention, ``[B, 1, 1, S]``; ``None`` if it would change nothing."""
    if bool((lengths == 1).all()):
        return None
    scores = lengths.clamp_min(1).double().log() if proportional else torch.zeros_like(lengths, dtype=torch.float64)
    return scores.to(dtype).masked_fill(lengths == 0, torch.finfo(dtype).min)[:, None, None]


def _encode(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Replace ``forward`` of the encoder: pool its frames."""
    stock = patches.original(self, "forward")
    frames = kwargs.pop("fastcompress_frames", None)
    arguments = patches.named(stock, args, kwargs)
    if frames is None:
        frames = audio_frames(arguments["input_features"])
    out = stock(**arguments | {"return_dict": True})
    hidden: Tensor = out.last_hidden_state
    settings: WhisperSettings = self.fastcompress_settings
    frames = frames.to(hidden.device)
    place = torch.arange(hidden.shape[1], device=hidden.device).expand(hidden.shape[:2])
    if settings.silence == "pool":
        groups = torch.ones_like(place)
    elif settings.silence == "keep":
        groups = (place < frames[:, None]).long()
    else:
        rate = self.config.max_source_positions / 30  # frames per second: the window has 30 s
        kept = frames + round(min(float(settings.silence) * rate, hidden.shape[1]))
        groups = torch.where(place < kept.clamp_min(1)[:, None], 1, -1)
    pool = settings.compressor
    pooled = segment_pool(hidden, rule=pool.rule, row_group=groups.int(), reduce=pool.reduce)
    return PooledEncoderOutput(pooled.to_padded()[0], out.hidden_states, out.attentions, pooled.padded_lengths())


def _decode_layer(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Replace ``forward`` of a decoder layer: mask its cross-attention."""
    bias = kwargs.pop(_BIAS, None)
    if bias is not None:
        _check_attention(self.encoder_attn.config)
        kwargs["encoder_attention_mask"] = bias
    return patches.original(self, "forward")(*args, **kwargs)

"""Packed attention for the decoders of transformers, registered as ``"fastcompress"``.

Importing this module registers the implementation, so that ``attn_implementation="fastcompress"`` works.
``prepare`` sets it on a model and raises if the model cannot run packed. The decoder then accepts
``fastcompress.PackedInputs.model_inputs``: each sequence attends only to itself, and no mask of T x T is built.
Without ``cu_seq_lens_q`` (padded batches, decoding) the implementation is stock SDPA.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from fastcompress.checks import checks_at_once
from fastcompress.decoder.packed_attention import (
    add_bias,
    attend,
    key_bias_of,
    packed_attention,
    widen_keys,
    with_key_bias,
)

__all__ = ["NAME", "attention_forward", "check_decoder", "packed_attention", "prepare"]

NAME = "fastcompress"

#: Layer types that can run packed: their rows interact only by attention over the sequence or a window of it.
LAYER_TYPES = frozenset({"full_attention", "sliding_attention", "attention"})
#: Settings that only models with recurrent or convolutional layers have; these layers would mix packed sequences.
RECURRENT_SETTINGS = (
    "mamba_d_state", "mamba_state_dim", "mamba_d_conv", "ssm_cfg", "ssm_state_size", "state_size", "conv_L_cache",
    "conv_kernel", "linear_conv_kernel_dim", "lru_width", "hybrid_override_pattern", "attn_layer_period",
)  # fmt: skip
#: Arguments of a layer that change its attention scores and are not supported here.
UNKNOWN_ARGUMENTS = ("s_aux", "sinks", "position_bias", "attention_bias", "block_table", "indices", "block_indices")
#: Types of rotary embeddings that choose the frequencies of the whole batch by its longest sample.
BATCH_WIDE_ROPE = ("dynamic", "longrope")


def check_decoder(config: Any) -> None:
    """Check by its configuration that a decoder can run packed.

    Args:
        config: Configuration of the decoder, such as ``model.config.get_text_config(decoder=True)``.

    Raises:
        NotImplementedError: The decoder cannot run packed. The message has the reason.
    """
    kind = getattr(config, "model_type", type(config).__name__)
    types = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or ()
    for layer in types:
        if layer not in LAYER_TYPES:
            raise NotImplementedError(
                f"{kind} cannot run packed: its {layer!r} layers would mix sequences; supported layer types: "
                f"{', '.join(sorted(LAYER_TYPES))}"
            )
    for setting in RECURRENT_SETTINGS:
        if getattr(config, setting, None) is not None:
            raise NotImplementedError(
                f"{kind} cannot run packed: it has recurrent or convolutional layers ({setting} in its configuration), "
                "whose state would pass from one sequence to the next"
            )
    if getattr(config, "keep_window_size", None) is not None:
        raise NotImplementedError(
            f"{kind} cannot run packed: its layers select the keys of each row (keep_window_size in its configuration)"
        )


def prepare(decoder: Any) -> Any:
    """Set packed attention on a decoder of transformers.

    The attention itself raises for unsupported layers when it runs; this function raises before, and also for models
    without attention layers.

    Args:
        decoder: ``PreTrainedModel``, which may also have an audio encoder; changed in place.

    Returns:
        ``decoder``.

    Raises:
        NotImplementedError: The decoder cannot run packed. The message has the reason.
    """
    config = decoder.config.get_text_config(decoder=True)
    check_decoder(config)
    layers = stack_of(decoder)
    reason = ""
    if not getattr(layers, "_supports_attention_backend", False):
        reason = "its layers do not use AttentionInterface (_supports_attention_backend is not set)"
    elif any(getattr(module, "is_causal", True) is False for module in layers.modules()):
        reason = "its attention is not causal"
    if reason:
        raise NotImplementedError(f"{config.model_type} cannot run packed: {reason}")
    decoder.set_attn_implementation(NAME)
    return decoder


def stack_of(decoder: Any) -> Any:
    """Return the stack of layers of a decoder of transformers, without its head."""
    layers = decoder.get_decoder()
    return layers if isinstance(layers, PreTrainedModel) else decoder.base_model


def takes_positions(decoder: Any) -> bool:
    """Return whether a decoder of transformers uses ``position_ids``; decoders with ALiBi do not."""
    stack = stack_of(decoder)
    return "position_ids" in inspect.signature(stack.forward).parameters and not getattr(stack.config, "alibi", False)


def _layer_window(module: torch.nn.Module, config: Any, given: int | None) -> int | None:
    """Return the sliding window of a layer; decoders that put it only into their masks have it in their config."""
    if given is not None or config is None or getattr(config, "sliding_window", None) is None:
        return given
    types = getattr(config, "layer_types", None)
    if types and hasattr(module, "layer_idx"):
        return config.sliding_window if types[module.layer_idx] == "sliding_attention" else None
    if getattr(config, "use_sliding_window", True) is False:
        return None
    raise NotImplementedError(
        f"{config.model_type} cannot run packed: its configuration has a sliding_window of {config.sliding_window}, "
        f"but {type(module).__name__} does not specify whether its layer uses one"
    )


def _check_rope(config: Any, longest: int, next_positions: Tensor | None) -> None:
    """Raise if the longest packed sample would change the rotary frequencies of the others.

    Args:
        config: Configuration of the decoder.
        longest: Bound of the rows of a sample.
        next_positions: Position that follows each sample, which replaces the bound.
    """
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [p for p in parameters.values() if isinstance(p, dict)]  # one entry per layer type
    for rope in nested or [parameters]:
        kind = rope.get("rope_type")
        if kind not in BATCH_WIDE_ROPE:
            continue
        limit = config.max_position_embeddings if kind == "dynamic" else rope["original_max_position_embeddings"]
        if next_positions is not None:
            longest = int(next_positions.max())
        if longest > limit:
            raise NotImplementedError(
                f"{config.model_type} cannot run samples of {longest} positions packed: beyond {limit} its {kind!r} "
                "rotary embedding depends on the longest sample of the batch. If no sample is that long, use "
                "pack(..., exact_max_seqlen=True)"
            )


def _shown(tensor: Tensor) -> str:
    return str(tensor.tolist()) if tensor.numel() <= 16 else f"shape {list(tensor.shape)}"


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    key_bias: Tensor | None = None,
    next_positions: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute the attention of one layer; transformers calls this function.

    With ``cu_seq_lens_q`` this is [`packed_attention`][], and ``B`` must be 1; else it is stock SDPA, whose scores can
    have a bias per key (``fastcompress.decoder.prompt``).

    Args:
        module: Attention module of the layer, whose configuration is checked.
        query: ``[B, H, L, D]``, fp32, fp16, bf16 or fp64.
        key: ``[B, Hkv, L, D]``, or ``[B, Hkv, L, D + 8]`` from a cache that keeps the bias of each key; ``H`` is a
            multiple of ``Hkv``.
        value: ``[B, Hkv, L, D]``.
        attention_mask: Mask for stock SDPA; ``None`` or empty with packed rows.
        dropout: Probability that an attention weight becomes 0.
        scaling: Factor of the scores; ``None``: ``D ** -0.5``.
        is_causal: Whether a row attends only to itself and the rows before it; ``None``: ``module.is_causal``.
        sliding_window: Number of rows that a row attends to; ``None``: all.
        softcap: Bound of the scores, as in [`packed_attention`][].
        cu_seq_lens_q: Offsets of the packed samples, ``[samples + 1]`` int32; ``None``: not packed.
        cu_seq_lens_k: Must equal ``cu_seq_lens_q``. The values are compared on the CPU, and on a GPU only with
            ``FASTCOMPRESS_CHECK=1``.
        max_length_q: Upper bound of the rows of a sample; ``None``: ``L``.
        max_length_k: Ignored.
        key_bias: Number that is added to the scores of each key, after scale and soft cap, ``[L]`` for packed rows or
            ``[B, L]``; ``None``: 0.
        next_positions: Position that follows each packed sample, ``[samples]`` int64, if positions are not 0, 1, 2, ...
        kwargs: Further arguments of the layer; unsupported ones that change the result are refused.

    Returns:
        Outputs ``[B, L, H, D]``, and ``None`` in place of attention weights.

    Raises:
        ValueError: Packed rows have a mask, a cache of earlier rows, or several batch rows.
        NotImplementedError: The decoder, or an argument of the layer, is not supported.
    """
    config = getattr(module, "config", None)
    if cu_seq_lens_q is None:
        if attention_mask is not None and attention_mask.numel() == 0 and query.numel() > 0:
            raise NotImplementedError(
                f"{getattr(config, 'model_type', type(module).__name__)} cannot run packed: it does not pass "
                "cu_seq_lens_q of PackedInputs.model_inputs() to its attention"
            )
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        scale = query.shape[3] ** -0.5 if scaling is None else scaling
        if key_bias is not None:
            key = widen_keys(key, key_bias[:, None])
        if key.shape[3] != query.shape[3]:
            return _biased_attention(query, key, value, attention_mask, scale, causal, softcap, dropout), None
        if softcap is not None:  # stock SDPA does not support it
            causal = causal and attention_mask is None and query.shape[2] > 1
            out = attend(query, key, value, scale, causal, None, softcap, dropout, attention_mask)
            return out.transpose(1, 2), None
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )
    longest = query.shape[2] if max_length_q is None else max_length_q
    if config is not None:
        check_decoder(config)
        _check_rope(config, longest, next_positions)
    for name in UNKNOWN_ARGUMENTS:
        if kwargs.get(name) is not None:
            raise NotImplementedError(f"packed attention does not support {name}, which {type(module).__name__} passes")
    if kwargs.get("output_attentions") or getattr(config, "output_attentions", False):
        raise NotImplementedError("output_attentions must be False: packed attention does not return weights")
    if getattr(config, "output_router_logits", False) or kwargs.get("output_router_logits"):
        raise NotImplementedError(
            "output_router_logits must be False: the router's auxiliary loss needs a mask [B, L], which packed rows do "
            "not have"
        )
    if query.shape[0] != 1:
        raise ValueError(f"packed rows must have batch size 1, [1, T, ...], got {query.shape[0]}")
    if attention_mask is not None and attention_mask.numel() > 0:
        raise ValueError(
            f"packed rows take no attention mask, got shape {list(attention_mask.shape)}; pass the empty mask of "
            "PackedInputs.model_inputs(), which stops transformers from building its own"
        )
    if key.shape[2] != query.shape[2]:
        raise ValueError(
            f"packed rows cannot follow rows of a cache, got {query.shape[2]} queries and {key.shape[2]} keys; "
            "pass use_cache=False, and generate from PackedInputs.unpack() instead"
        )
    if cu_seq_lens_k is not None and cu_seq_lens_k is not cu_seq_lens_q:
        q, k = cu_seq_lens_q, cu_seq_lens_k
        free = q.device.type == k.device.type == "cpu" or checks_at_once(q)
        if q.shape != k.shape or (free and q.tolist() != k.tolist()):
            raise ValueError(f"cu_seq_lens_q and cu_seq_lens_k must be equal, got {_shown(q)} and {_shown(k)}")
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    query, key, value = (t[0].transpose(0, 1) for t in (query, key, value))
    out = packed_attention(
        query,
        key,
        value,
        cu_seq_lens_q,
        max_seqlen=longest,
        scale=scaling,
        causal=causal,
        window=_layer_window(module, config, sliding_window),
        softcap=softcap,
        dropout=dropout,
        key_bias=key_bias,
    )
    return out[None], None


def _biased_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    causal: bool,
    softcap: float | None,
    dropout: float,
) -> Tensor:
    """Compute attention of queries ``[B, H, Q, D]`` to keys ``[B, Hkv, K, D + 8]`` of ``widen_keys``.

    Returns:
        Outputs ``[B, Q, H, Dv]``.
    """
    rows, groups = query.shape[2], query.shape[1] // key.shape[1]
    causal = causal and mask is None and rows > 1
    if softcap is None and rows > 1:  # no mask of Q x K with a bias is built
        width = value.shape[3]
        query, key, value = with_key_bias(query, key, value, scale)
        out = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, mask, dropout, is_causal=causal, scale=scale, enable_gqa=groups > 1
        )
        return out[..., :width].transpose(1, 2)
    key, bias = key_bias_of(key)
    bias = bias[:, :1, None]  # [B, 1, 1, K]: the heads of a key have the same bias
    if softcap is None:  # of one query: a mask is cheaper than a copy of all values, and rounds the bias
        mask = add_bias(mask, bias, query.dtype)
        return attend(query, key, value, scale, False, None, None, dropout, mask).transpose(1, 2)
    return attend(query, key, value, scale, causal, None, softcap, dropout, mask, bias).transpose(1, 2)


AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, sdpa_mask)

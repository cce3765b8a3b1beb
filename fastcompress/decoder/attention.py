"""Attention over packed sequences in the decoders of transformers, registered as ``"fastcompress"``.

Importing this module registers the implementation, so ``attn_implementation="fastcompress"`` works from then on;
:func:`prepare` sets it on a model and says at once if the model cannot run packed. A decoder then takes
:meth:`fastcompress.PackedInputs.model_inputs`: each sequence attends to itself alone, and no mask of T x T is built.
Without ``cu_seq_lens_q`` (padded batches, decoding) the implementation is stock SDPA.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from fastcompress.decoder.packed_attention import attend, packed_attention

__all__ = ["NAME", "attention_forward", "check_decoder", "packed_attention", "prepare"]

NAME = "fastcompress"

#: Kinds of decoder layers whose rows meet only in attention of the whole sequence, or of a window of it.
LAYER_TYPES = frozenset({"full_attention", "sliding_attention", "attention"})
#: Settings of models alone whose layers mix rows by a recurrence or a convolution, through which packing would leak.
RECURRENT_SETTINGS = (
    "mamba_d_state", "mamba_state_dim", "mamba_d_conv", "ssm_cfg", "ssm_state_size", "state_size", "conv_L_cache",
    "conv_kernel", "linear_conv_kernel_dim", "lru_width", "hybrid_override_pattern", "attn_layer_period",
)  # fmt: skip
#: What a layer can pass that changes its scores, and that is not computed here.
UNKNOWN_ARGUMENTS = ("s_aux", "sinks", "position_bias", "attention_bias", "block_table", "indices", "block_indices")
#: Kinds of rotary embeddings whose frequencies for the whole batch depend on its longest sample.
BATCH_WIDE_ROPE = ("dynamic", "longrope")


def check_decoder(config: Any) -> None:
    """Raises if packing would leak through a decoder's layers, or if their attention is none of ours.

    Args:
        config: of the decoder, such as ``model.config.get_text_config(decoder=True)``.

    Raises:
        NotImplementedError: with the reason.
    """
    kind = getattr(config, "model_type", type(config).__name__)
    types = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or ()
    for layer in types:
        if layer not in LAYER_TYPES:
            raise NotImplementedError(
                f"{kind} cannot run packed: it has {layer!r} layers, which would mix sequences; only "
                f"{', '.join(sorted(LAYER_TYPES))} can be cut between them"
            )
    for setting in RECURRENT_SETTINGS:
        if getattr(config, setting, None) is not None:
            raise NotImplementedError(
                f"{kind} cannot run packed: it has recurrent or convolutional layers ({setting} in its configuration), "
                "whose state would pass from one sequence to the next"
            )
    if getattr(config, "keep_window_size", None) is not None:
        raise NotImplementedError(f"{kind} cannot run packed: its layers choose what a row sees (keep_window_size)")


def prepare(decoder: Any) -> Any:
    """Gives a decoder of transformers the attention of this module, and returns it.

    The implementation refuses by itself what it meets in an attention layer; this refuses before anything runs, also
    models that have no such layer.

    Args:
        decoder: a ``PreTrainedModel``, also one with an audio encoder beside its decoder.

    Raises:
        NotImplementedError: packing would leak through its layers, with the reason.
    """
    config = decoder.config.get_text_config(decoder=True)
    check_decoder(config)
    layers = decoder.get_decoder()
    layers = layers if isinstance(layers, PreTrainedModel) else decoder.base_model
    reason = ""
    if not getattr(layers, "_supports_attention_backend", False):
        reason = "its layers do not take their attention from AttentionInterface, or are not marked as doing so"
    elif any(getattr(module, "is_causal", True) is False for module in layers.modules()):
        reason = "its attention is not causal"
    if reason:
        raise NotImplementedError(f"{config.model_type} cannot run packed: {reason}")
    decoder.set_attn_implementation(NAME)
    return decoder


def _layer_window(module: torch.nn.Module, config: Any, given: int | None) -> int | None:
    """The window of a layer, which some decoders say in their masks alone."""
    if given is not None or config is None or getattr(config, "sliding_window", None) is None:
        return given
    types = getattr(config, "layer_types", None)
    if types and hasattr(module, "layer_idx"):
        return config.sliding_window if types[module.layer_idx] == "sliding_attention" else None
    if getattr(config, "use_sliding_window", True) is False:
        return None
    raise NotImplementedError(
        f"{config.model_type} cannot run packed: its configuration has a sliding_window of {config.sliding_window}, "
        f"but {type(module).__name__} does not say whether its layer has one"
    )


def _check_rope(config: Any, longest: int) -> None:
    """Refuses frequencies that one sample would choose for all the others."""
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [p for p in parameters.values() if isinstance(p, dict)]  # one a kind of layer
    for rope in nested or [parameters]:
        kind = rope.get("rope_type")
        if kind not in BATCH_WIDE_ROPE:
            continue
        limit = config.max_position_embeddings if kind == "dynamic" else rope["original_max_position_embeddings"]
        if longest > limit:
            raise NotImplementedError(
                f"{config.model_type} cannot run samples of {longest} rows packed: from {limit} rows on the {kind!r} "
                "rotary embedding of the longest sample would be that of all the others. If none is so long, "
                "pack(..., exact_max_seqlen=True) says so"
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
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in each layer: ``[B, H, L, D]`` -> ``[B, L, H, D]`` and no weights.

    With ``cu_seq_lens_q`` it is :func:`packed_attention` of ``B`` = 1 packed row, else stock SDPA. ``cu_seq_lens_k``
    must be ``cu_seq_lens_q``, whose values are compared where reading them costs nothing.

    Args:
        module: the layer's attention, whose configuration is checked and whose mode decides about dropout.
        query, key, value: ``[B, H, L, D]``; ``key`` and ``value`` may have fewer heads.
        attention_mask: of stock SDPA; ``None`` with packed rows.
        dropout: share of weights that are dropped.
        scaling: of the products; ``None``: ``D ** -0.5``.
        is_causal, sliding_window, softcap: as transformers gives them.
        cu_seq_lens_q, cu_seq_lens_k: ``[samples + 1]`` int32, where packed samples begin.
        max_length_q, max_length_k: rows of the longest sample.
        kwargs: what else transformers passes; what changes the result is refused.

    Raises:
        ValueError: packed rows with a mask, with a cache of earlier rows, or in several batch rows.
        NotImplementedError: a decoder, or an argument of its attention, that packing does not know.
    """
    config = getattr(module, "config", None)
    if cu_seq_lens_q is None:
        if attention_mask is not None and attention_mask.numel() == 0 and query.numel() > 0:
            raise NotImplementedError(
                f"{getattr(config, 'model_type', type(module).__name__)} cannot run packed: it got the empty mask of "
                "PackedInputs.model_inputs(), but hands no cu_seq_lens_q on to its attention"
            )
        if softcap is not None:  # which stock SDPA refuses
            causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
            causal = causal and attention_mask is None and 1 < query.shape[2] == key.shape[2]
            scale = query.shape[3] ** -0.5 if scaling is None else scaling
            out = attend(query, key, value, scale, causal, None, softcap, dropout, attention_mask)
            return out.transpose(1, 2), None
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )
    longest = query.shape[2] if max_length_q is None else max_length_q
    if config is not None:
        check_decoder(config)
        _check_rope(config, longest)
    for name in UNKNOWN_ARGUMENTS:
        if kwargs.get(name) is not None:
            raise NotImplementedError(f"packed attention does not know {name}, which {type(module).__name__} passes")
    if kwargs.get("output_attentions") or getattr(config, "output_attentions", False):
        raise NotImplementedError("packed attention has no weights to return: output_attentions must be False")
    if getattr(config, "output_router_logits", False) or kwargs.get("output_router_logits"):
        raise NotImplementedError(
            "the auxiliary loss of the router weighs rows by a mask of [B, L], which packed rows do not have: "
            "output_router_logits must be False"
        )
    if query.shape[0] != 1:
        raise ValueError(f"packed rows must be one batch row, [1, T, ...], got a batch of {query.shape[0]}")
    if attention_mask is not None and attention_mask.numel() > 0:
        raise ValueError(
            f"packed rows take no attention mask, got one of shape {list(attention_mask.shape)}; "
            "PackedInputs.model_inputs() has an empty one, which keeps transformers from building its own"
        )
    if key.shape[2] != query.shape[2]:
        raise ValueError(
            f"packed rows cannot follow rows in a cache, got {query.shape[2]} queries and {key.shape[2]} keys; "
            "pass use_cache=False, and to generate give PackedInputs.unpack() instead"
        )
    if cu_seq_lens_k is not None and cu_seq_lens_k is not cu_seq_lens_q:
        q, k = cu_seq_lens_q, cu_seq_lens_k
        free = q.device.type == k.device.type == "cpu" or os.environ.get("FASTCOMPRESS_CHECK") == "1"
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
    )
    return out[None], None


AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, sdpa_mask)

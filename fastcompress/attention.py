"""Causal attention over packed sequences, and its registration with transformers as ``"fastcompress"``.

Importing this module registers the implementation, so ``attn_implementation="fastcompress"`` works from then on;
:func:`prepare` sets it on a model and says at once if the model cannot run packed. A decoder then takes
:meth:`fastcompress.PackedInputs.model_inputs`: each sequence attends to itself alone, and no mask of T x T is built.
Without ``cu_seq_lens_q`` (padded batches, decoding) the implementation is stock SDPA.

On a GPU half types go through ``torch.nn.attention.varlen``; everything else is SDPA sequence by sequence.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from fastcompress.checks import check_float, check_offsets, check_same_device

NAME = "fastcompress"

#: Queries of a block, where a window or a soft cap keeps a sequence from being one call: its scores and its mask, of
#: the block alone, then take megabytes for any length.
BLOCK = 256

#: Kinds of decoder layers whose rows meet only in attention of the whole sequence, or of a window of it.
LAYER_TYPES = frozenset({"full_attention", "sliding_attention", "attention"})
#: Settings of models alone whose layers mix rows by a recurrence or a convolution, through which packing would leak.
RECURRENT_SETTINGS = (
    "mamba_d_state", "mamba_state_dim", "mamba_d_conv", "ssm_cfg", "ssm_state_size", "state_size", "conv_L_cache",
    "conv_kernel", "linear_conv_kernel_dim", "lru_width", "hybrid_override_pattern", "attn_layer_period",
)  # fmt: skip

_host_offsets = WeakTensorKeyDictionary()


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    *,
    max_seqlen: int | None = None,
    scale: float | None = None,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Attention of each sequence to itself.

    Args:
        query: ``[T, Hq, D]``; fp32, fp16, bf16 or fp64.
        key, value: ``[T, Hkv, D]``; ``Hq`` is a multiple of ``Hkv``, whose heads are shared by neighbouring queries'.
        cu_seqlens: ``[B + 1]`` int32 or int64, rows before each sequence; ends at ``T``.
        max_seqlen: at least the rows of the longest sequence; ``None``: ``T``. A close bound saves a GPU empty blocks.
        scale: of the scores; ``None``: ``1 / sqrt(D)``.
        causal: whether a row sees only those before it and itself.
        window: with ``causal``, how many rows a row sees, itself among them.
        softcap: scores become ``softcap * tanh(score / softcap)``.
        dropout: probability that a weight becomes 0.

    Returns:
        ``[T, Hq, D]``, differentiable.

    Raises:
        TypeError: a tensor of another type.
        ValueError: a shape, device or value that does not fit, named in the message.
    """
    check_float("query", query)
    for name, tensor in (("key", key), ("value", value)):
        check_float(name, tensor)
        check_same_device(name, tensor, query)
        if tensor.dim() != 3 or query.dim() != 3 or tensor.shape[0] != query.shape[0]:
            raise ValueError(
                f"query and {name} must have shapes [T, Hq, D] and [T, Hkv, D], got {list(query.shape)} and "
                f"{list(tensor.shape)}"
            )
        if query.shape[1] % max(tensor.shape[1], 1):
            heads = f"{query.shape[1]} and {tensor.shape[1]}"
            raise ValueError(f"the heads of query must be a multiple of those of {name}, got {heads}")
    check_same_device("cu_seqlens", cu_seqlens, query)
    if cu_seqlens.dtype not in (torch.int32, torch.int64) or cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"cu_seqlens must be [B + 1] int32 or int64, got {list(cu_seqlens.shape)} {cu_seqlens.dtype}")
    if window is not None and (window < 1 or not causal):
        raise ValueError(f"window must be at least 1 and goes with causal attention, got {window}, causal={causal}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive, got {softcap}")
    half = query.dtype in (torch.float16, torch.bfloat16) and query.shape[2] == value.shape[2] <= 256
    if query.is_cuda and half and softcap is None and dropout == 0:
        varlen = _varlen()
        if varlen is not None and (window is None or varlen.has_windows):
            longest = query.shape[0] if max_seqlen is None else max_seqlen
            return varlen(query, key, value, cu_seqlens.int(), longest, scale, causal, window)
    scale = query.shape[2] ** -0.5 if scale is None else scale
    heads = [t.transpose(0, 1)[None] for t in (query, key, value)]  # [1, H, T, D]
    offsets = _read_offsets(cu_seqlens, query.shape[0])
    outputs = [
        _attend(*(t[:, :, begin:end] for t in heads), scale, causal, window, softcap, dropout)
        for begin, end in zip(offsets[:-1], offsets[1:], strict=True)
        if begin < end
    ]
    if not outputs:
        return query.new_zeros(*query.shape[:2], value.shape[2])
    return torch.cat(outputs)


def _read_offsets(cu_seqlens: Tensor, rows: int) -> list[int]:
    """Offsets on the host. Those of a GPU are read once for all the layers of a model."""
    known = _host_offsets.get(cu_seqlens) if cu_seqlens.is_cuda else None
    if known is not None and known[0] == cu_seqlens._version:
        offsets = known[1]
    else:
        offsets = cu_seqlens.tolist()
        if cu_seqlens.is_cuda:
            _host_offsets[cu_seqlens] = (cu_seqlens._version, offsets)
    check_offsets("cu_seqlens", offsets, rows, "the number of rows")
    return offsets


def _attend(
    query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool, window: int | None, softcap: float | None,
    dropout: float,
) -> Tensor:  # fmt: skip
    """One sequence, ``[1, H, S, D]`` -> ``[S, H, D]``."""
    rows = query.shape[2]
    if softcap is None and (window is None or window >= rows):
        gqa = query.shape[1] != key.shape[1]
        out = F.scaled_dot_product_attention(
            query, key, value, dropout_p=dropout, is_causal=causal and rows > 1, scale=scale, enable_gqa=gqa
        )
        return out[0].transpose(0, 1)
    window = rows if window is None else window
    outputs = []
    for begin in range(0, rows, BLOCK):
        end = min(begin + BLOCK, rows)
        first, last = (max(0, begin - window + 1), end) if causal else (0, rows)
        mask = None
        if causal:
            q = torch.arange(begin, end, device=query.device)[:, None]
            k = torch.arange(first, last, device=query.device)
            mask = (k <= q) & (k > q - window)  # [block, keys]
        part = query[:, :, begin:end], key[:, :, first:last], value[:, :, first:last]
        outputs.append(_attend_block(*part, mask, scale, softcap, dropout)[0].transpose(0, 1))
    return torch.cat(outputs)


def _attend_block(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, softcap: float | None, dropout: float
) -> Tensor:
    """``[B, H, Q, D]`` and ``[B, H, K, D]`` -> ``[B, H, Q, D]``; ``mask`` says what is seen, or is added to scores."""
    groups = query.shape[1] // key.shape[1]
    if softcap is None:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=dropout, scale=scale, enable_gqa=groups > 1
        )
    key, value = (t.repeat_interleave(groups, 1) if groups > 1 else t for t in (key, value))
    scores = softcap * torch.tanh(query @ key.transpose(2, 3) * scale / softcap)
    if mask is not None:
        # The least number and not -inf: padding that sees nothing must not become NaN.
        lowest = torch.finfo(scores.dtype).min
        scores = scores.masked_fill(~mask, lowest) if mask.dtype == torch.bool else scores + mask
    weights = torch.softmax(scores, -1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(query.dtype)
    return F.dropout(weights, dropout) @ value


class _Varlen:
    """``torch.nn.attention.varlen.varlen_attn``, whose arguments are others in torch 2.10, 2.11 and from 2.12 on."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.parameters = set(inspect.signature(function).parameters)

    @property
    def has_windows(self) -> bool:
        return "window_size" in self.parameters

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float | None,
        causal: bool, window: int | None,
    ) -> Tensor:  # fmt: skip
        kwargs: dict[str, Any] = {}
        if self.has_windows:
            kwargs["window_size"] = (-1 if window is None else window - 1, 0) if causal else (-1, -1)
        else:
            kwargs["is_causal"] = causal
        if scale is not None:
            if "scale" in self.parameters:
                kwargs["scale"] = scale
            else:
                query = query * (scale * query.shape[2] ** 0.5)
        groups = query.shape[1] // key.shape[1]
        if "enable_gqa" in self.parameters:
            kwargs["enable_gqa"] = groups > 1
        elif groups > 1:
            key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        return self.function(query, key, value, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, **kwargs)


@functools.cache
def _varlen() -> _Varlen | None:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return _Varlen(varlen_attn)


# ---- transformers ----


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
    reason = ""
    if not getattr(layers, "_supports_attention_backend", False):
        reason = "its layers do not take their attention from AttentionInterface"
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

    With ``cu_seq_lens_q`` it is :func:`packed_attention` of ``B`` = 1 packed row, else stock SDPA.

    Raises:
        ValueError: packed rows with a mask, with a cache of earlier rows, or in several batch rows.
        NotImplementedError: a decoder, or an argument of its attention, that packing does not know.
    """
    if cu_seq_lens_q is None:
        if softcap is not None:  # which stock SDPA refuses
            causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
            if attention_mask is None and causal and query.shape[2] > 1:
                attention_mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
            scale = query.shape[3] ** -0.5 if scaling is None else scaling
            return _attend_block(query, key, value, attention_mask, scale, softcap, dropout).transpose(1, 2), None
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )
    config = getattr(module, "config", None)
    if config is not None:
        check_decoder(config)
    for name in ("s_aux", "position_bias", "block_table"):
        if kwargs.get(name) is not None:
            raise NotImplementedError(f"packed attention does not know {name}, which {type(module).__name__} passes")
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
            "pass use_cache=False"
        )
    if cu_seq_lens_k is not None and cu_seq_lens_k is not cu_seq_lens_q and cu_seq_lens_k.shape != cu_seq_lens_q.shape:
        raise ValueError(
            f"cu_seq_lens_q and cu_seq_lens_k must be equal, got shapes {list(cu_seq_lens_q.shape)} and "
            f"{list(cu_seq_lens_k.shape)}"
        )
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    out = packed_attention(
        *(t[0].transpose(0, 1) for t in (query, key, value)),
        cu_seq_lens_q,
        max_seqlen=max_length_q,
        scale=scaling,
        causal=causal,
        window=_layer_window(module, config, sliding_window),
        softcap=softcap,
        dropout=dropout,
    )
    return out[None], None


AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, sdpa_mask)

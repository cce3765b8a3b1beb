"""Causal attention over packed sequences, each to itself alone.

On a GPU half types go through ``torch.nn.attention.varlen``; everything else is SDPA sequence by sequence. No mask of
T x T is built.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from fastcompress.checks import check_float, check_offsets, check_same_device

#: Queries of a block, where a window or a soft cap keeps a sequence from being one call: its scores and its mask, of
#: the block alone, then take megabytes for any length.
BLOCK = 256

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
    """Attention of each sequence to itself. Under autocast it runs in autocast's dtype, as SDPA does.

    Args:
        query: ``[T, Hq, D]``; fp32, fp16, bf16 or fp64.
        key: ``[T, Hkv, D]`` in the dtype of ``query``; ``Hq`` is a multiple of ``Hkv``, whose heads are shared by
            neighbouring queries'.
        value: ``[T, Hkv, Dv]`` likewise.
        cu_seqlens: ``[B + 1]`` int32 or int64, rows before each sequence; ends at ``T``. Where a GPU's kernel takes
            them their values are not read, so not checked, unless ``FASTCOMPRESS_CHECK=1``.
        max_seqlen: at least the rows of the longest sequence; ``None``: ``T``. A close bound saves a GPU empty blocks.
        scale: of the scores; ``None``: ``1 / sqrt(D)``.
        causal: whether a row sees only those before it and itself.
        window: with ``causal``, how many rows a row sees, itself among them.
        softcap: scores become ``softcap * tanh(score / softcap)``.
        dropout: probability that a weight becomes 0.

    Returns:
        ``[T, Hq, Dv]``, differentiable.

    Raises:
        TypeError: a tensor of another type.
        ValueError: a shape, device or value that does not fit, named in the message.
    """
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check_float(name, tensor)
        check_same_device(name, tensor, query)
    query, key, value = _autocast(query, key, value)
    for name, tensor in (("key", key), ("value", value)):
        if tensor.dim() != 3 or query.dim() != 3 or tensor.shape[0] != query.shape[0]:
            raise ValueError(
                f"query and {name} must have shapes [T, Hq, D] and [T, Hkv, D], got {list(query.shape)} and "
                f"{list(tensor.shape)}"
            )
        if tensor.dtype != query.dtype:
            raise TypeError(f"query and {name} must have one dtype, got {query.dtype} and {tensor.dtype}")
    if query.shape[1] % max(key.shape[1], 1):
        heads = f"{query.shape[1]} and {key.shape[1]}"
        raise ValueError(f"the heads of query must be a multiple of those of key, got {heads}")
    if key.shape[1] != value.shape[1] or key.shape[2] != query.shape[2]:
        raise ValueError(
            "key must have as many heads as value and the width of query, got query, key and value of shapes "
            f"{list(query.shape)}, {list(key.shape)} and {list(value.shape)}"
        )
    check_same_device("cu_seqlens", cu_seqlens, query)
    if cu_seqlens.dtype not in (torch.int32, torch.int64) or cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"cu_seqlens must be [B + 1] int32 or int64, got {list(cu_seqlens.shape)} {cu_seqlens.dtype}")
    if window is not None and (window < 1 or not causal):
        raise ValueError(f"window must be at least 1 and goes with causal attention, got {window}, causal={causal}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive, got {softcap}")
    if query.is_cuda and softcap is None and dropout == 0 and _has_kernel(query, value):
        varlen = _varlen()
        if varlen is not None and (window is None or varlen.has_windows):
            longest = query.shape[0] if max_seqlen is None else max_seqlen
            if os.environ.get("FASTCOMPRESS_CHECK") == "1":
                _read_offsets(cu_seqlens, query.shape[0], longest)
            return varlen(query, key, value, cu_seqlens.int(), longest, scale, causal, window)
    scale = query.shape[2] ** -0.5 if scale is None else scale
    q, k, v = (t.transpose(0, 1)[None] for t in (query, key, value))  # [1, H, T, D]
    offsets = _read_offsets(cu_seqlens, query.shape[0], max_seqlen)
    outputs = [
        attend(q[:, :, begin:end], k[:, :, begin:end], v[:, :, begin:end], scale, causal, window, softcap, dropout)[
            0
        ].transpose(0, 1)
        for begin, end in zip(offsets[:-1], offsets[1:], strict=True)
        if begin < end
    ]
    if not outputs:
        return query.new_zeros(*query.shape[:2], value.shape[2])
    return torch.cat(outputs)


def _autocast(*tensors: Tensor) -> Iterator[Tensor]:
    """The tensors as SDPA would take them. Rotary embeddings leave queries and keys in fp32 beside values in bf16."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return iter(tensors)
    dtype = torch.get_autocast_dtype(kind)
    return (t if t.dtype == torch.float64 else t.to(dtype) for t in tensors)


def _has_kernel(query: Tensor, value: Tensor) -> bool:
    """Whether the GPU's kernel takes tensors like these (flash attention's conditions)."""
    width = query.shape[2]
    return (
        query.dtype in (torch.float16, torch.bfloat16)
        and width == value.shape[2]
        and width <= 256
        and width % 8 == 0
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


def _read_offsets(cu_seqlens: Tensor, rows: int, max_seqlen: int | None) -> list[int]:
    """Offsets on the host. Those of a GPU are read once for all the layers of a model."""
    if not cu_seqlens.is_cuda or cu_seqlens.is_inference():  # which have no version
        offsets = cu_seqlens.tolist()
    else:
        known = _host_offsets.get(cu_seqlens)
        if known is None or known[0] != cu_seqlens._version:
            known = _host_offsets[cu_seqlens] = (cu_seqlens._version, cu_seqlens.tolist())
        offsets = known[1]
    check_offsets("cu_seqlens", offsets, rows, "the number of rows")
    longest = max((b - a for a, b in zip(offsets[:-1], offsets[1:], strict=True)), default=0)
    if max_seqlen is not None and longest > max_seqlen:
        raise ValueError(f"max_seqlen must be at least the rows of the longest sequence, {longest}, got {max_seqlen}")
    return offsets


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    causal: bool,
    window: int | None,
    softcap: float | None,
    dropout: float,
    mask: Tensor | None = None,
) -> Tensor:
    """Sequences of one length, ``[B, H, Q, D]`` -> ``[B, H, Q, Dv]``; ``mask`` ``[B, 1 or H, Q, K]`` goes without
    ``causal``."""
    rows, columns = query.shape[2], key.shape[2]
    if softcap is None and mask is None and (window is None or window >= rows):
        gqa = query.shape[1] != key.shape[1]
        return F.scaled_dot_product_attention(
            query, key, value, dropout_p=dropout, is_causal=causal and rows > 1, scale=scale, enable_gqa=gqa
        )
    window = rows if window is None else window
    outputs = []
    for begin in range(0, rows, BLOCK):
        end = min(begin + BLOCK, rows)
        first, last = (max(0, begin - window + 1), end) if causal else (0, columns)
        seen = None if mask is None else mask[:, :, begin:end]
        if causal:
            q = torch.arange(begin, end, device=query.device)[:, None]
            k = torch.arange(first, last, device=query.device)
            seen = (k <= q) & (k > q - window)  # [block, keys]
        part = query[:, :, begin:end], key[:, :, first:last], value[:, :, first:last]
        outputs.append(_attend_block(*part, seen, scale, softcap, dropout))
    return torch.cat(outputs, 2)


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
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        scale: float | None,
        causal: bool,
        window: int | None,
    ) -> Tensor:
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
        out: Tensor = self.function(query, key, value, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, **kwargs)
        return out


@functools.cache
def _varlen() -> _Varlen | None:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return _Varlen(varlen_attn)

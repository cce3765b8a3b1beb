"""Attention over packed sequences, in which each sequence attends only to itself.

On a GPU, fp16 and bf16 use ``torch.nn.attention.varlen``. All other cases run SDPA on one sequence after another.
No T x T mask is built.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from fastcompress.checks import check_float, check_offsets, check_same_device, checks_at_once

#: Queries per block. A sequence with a window or a soft cap runs block by block, so that the memory for scores and
#: masks grows linearly with its length.
BLOCK = 256
#: Columns that ``widen_keys`` adds: 3 for the bias, padded to a multiple of 8, which GPU kernels need.
BIAS_WIDTH = 8
#: Largest absolute value of a bias, which fp16 can represent. -inf becomes -MAX_BIAS, which also excludes a key.
MAX_BIAS = 3e4

#: Host copies of ``cu_seqlens`` tensors on a GPU, with the tensor's version at the time of the copy.
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
    key_bias: Tensor | None = None,
) -> Tensor:
    """Compute the attention of each packed sequence to itself. Like SDPA, it runs in the dtype of autocast.

    Args:
        query: ``[T, Hq, D]``; fp32, fp16, bf16 or fp64.
        key: ``[T, Hkv, D]`` in the dtype of ``query``; ``Hq`` is a multiple of ``Hkv``, and ``Hq / Hkv`` neighbouring
            query heads share a head of ``key`` and ``value``.
        value: ``[T, Hkv, Dv]`` in the dtype of ``query``.
        cu_seqlens: Offsets of the sequences, ``[B + 1]`` int32 or int64, from 0 to ``T``. The GPU kernel does not
            check the values unless ``FASTCOMPRESS_CHECK=1``.
        max_seqlen: Upper bound of the rows of a sequence; ``None``: ``T``. A tight bound saves empty blocks on a GPU.
        scale: Factor of the scores; ``None``: ``1 / sqrt(D)``.
        causal: Whether a row attends only to itself and the rows before it.
        window: Number of rows that a row attends to, including itself; needs ``causal``. ``None``: all.
        softcap: Bound of the scores, which become ``softcap * tanh(score / softcap)``; ``None``: no bound.
        dropout: Probability that an attention weight becomes 0.
        key_bias: Bias of each key, ``[T]`` floating point, which is added to its scores after scale and soft cap. With
            ``log(L)``, a key weighs as much as ``L`` equal ones. It gets no gradient. ``None``: 0.

    Returns:
        Outputs ``[T, Hq, Dv]``, differentiable with respect to ``query``, ``key`` and ``value``.

    Raises:
        TypeError: A tensor is not floating point, or the dtypes differ.
        ValueError: A shape, device or value does not fit; the message names the argument.
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
        raise ValueError(f"the number of heads of query must be a multiple of that of key, got {heads}")
    if key.shape[1] != value.shape[1] or key.shape[2] != query.shape[2]:
        raise ValueError(
            "key must have the number of heads of value and the width of query, got query, key and value of shapes "
            f"{list(query.shape)}, {list(key.shape)} and {list(value.shape)}"
        )
    check_same_device("cu_seqlens", cu_seqlens, query)
    if cu_seqlens.dtype not in (torch.int32, torch.int64) or cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"cu_seqlens must be [B + 1] int32 or int64, got {list(cu_seqlens.shape)} {cu_seqlens.dtype}")
    if window is not None and (window < 1 or not causal):
        raise ValueError(f"window must be at least 1 and needs causal=True, got {window} and causal={causal}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive, got {softcap}")
    width = value.shape[2]
    if key_bias is not None:
        _check_key_bias(key_bias, query)
        if softcap is None:
            scale = query.shape[2] ** -0.5 if scale is None else scale
            query, key, value = with_key_bias(query, widen_keys(key, key_bias[:, None]), value, scale)
            key_bias = None
    if query.is_cuda and softcap is None and dropout == 0 and _has_kernel(query, value):
        varlen = _varlen()
        if varlen is not None and (window is None or varlen.has_windows):
            longest = query.shape[0] if max_seqlen is None else max_seqlen
            if checks_at_once(cu_seqlens):
                _read_offsets(cu_seqlens, query.shape[0], longest)
            return varlen(query, key, value, cu_seqlens.int(), longest, scale, causal, window)[..., :width]
    scale = query.shape[2] ** -0.5 if scale is None else scale
    q, k, v = (t.transpose(0, 1)[None] for t in (query, key, value))  # [1, H, T, D]
    offsets = _read_offsets(cu_seqlens, query.shape[0], max_seqlen)
    outputs = []
    for begin, end in zip(offsets[:-1], offsets[1:], strict=True):
        if begin < end:
            bias = None if key_bias is None else key_bias[begin:end]
            part = q[:, :, begin:end], k[:, :, begin:end], v[:, :, begin:end]
            out = attend(*part, scale, causal, window, softcap, dropout, key_bias=bias)
            outputs.append(out[0].transpose(0, 1))
    if not outputs:
        return query.new_zeros(*query.shape[:2], width)
    return torch.cat(outputs)[..., :width]


def _check_key_bias(key_bias: Tensor, query: Tensor) -> None:
    check_float("key_bias", key_bias)
    check_same_device("key_bias", key_bias, query)
    if key_bias.shape != query.shape[:1]:
        raise ValueError(f"key_bias must have shape [{query.shape[0]}], one per row, got {list(key_bias.shape)}")


def widen_keys(key: Tensor, bias: Tensor) -> Tensor:
    """Append ``BIAS_WIDTH`` columns with a bias to keys; ``with_key_bias`` makes queries that match them.

    The bias is stored as the sum of two numbers in the dtype of the keys, since one fp16 or bf16 number would round it.

    Args:
        key: ``[..., D]``.
        bias: Bias of each key, ``[...]`` or a shape that broadcasts to it.
    """
    bias = bias.detach().to(torch.promote_types(key.dtype, torch.float32)).clamp(-MAX_BIAS, MAX_BIAS)
    high = bias.to(key.dtype)
    columns = torch.stack([high, high, (bias - high).to(key.dtype)], -1)
    columns = torch.nn.functional.pad(columns, (0, BIAS_WIDTH - columns.shape[-1]))
    return torch.cat([key, columns.expand(*key.shape[:-1], BIAS_WIDTH)], -1)


def key_bias_of(key: Tensor) -> tuple[Tensor, Tensor]:
    """Split the result of ``widen_keys``, ``[..., D + BIAS_WIDTH]``, into keys and fp32 bias."""
    width = key.shape[-1] - BIAS_WIDTH
    return key[..., :width], key[..., width].float() + key[..., width + 2].float()


def with_key_bias(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Widen queries and values to match ``widen_keys``, so that ``scale * (query @ key.T)`` includes the bias.

    Args:
        query: ``[..., D]``.
        key: ``[..., D + BIAS_WIDTH]``.
        value: ``[..., Dv]``. The result has ``BIAS_WIDTH`` more columns, which are 0: fused kernels need equal widths.
        scale: Factor of the scores.
    """
    inverse = query.new_full((), 1 / scale, dtype=torch.promote_types(query.dtype, torch.float32))
    high = inverse.to(query.dtype)
    columns = torch.stack([high, (inverse - high).to(query.dtype), high])
    columns = torch.nn.functional.pad(columns, (0, BIAS_WIDTH - columns.shape[-1]))
    query = torch.cat([query, columns.expand(*query.shape[:-1], BIAS_WIDTH)], -1)
    return query, key, torch.nn.functional.pad(value, (0, BIAS_WIDTH))


def _autocast(*tensors: Tensor) -> Iterator[Tensor]:
    """Cast tensors as autocast does for SDPA: after rotary embeddings, queries and keys are in fp32, values in bf16."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return iter(tensors)
    dtype = torch.get_autocast_dtype(kind)
    return (t if t.dtype == torch.float64 else t.to(dtype) for t in tensors)


def _has_kernel(query: Tensor, value: Tensor) -> bool:
    """Return whether the varlen kernel supports these dtypes and widths on this GPU (flash attention's conditions)."""
    width = query.shape[2]
    return (
        query.dtype in (torch.float16, torch.bfloat16)
        and width == value.shape[2]
        and width <= 256
        and width % 8 == 0
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


def _read_offsets(cu_seqlens: Tensor, rows: int, max_seqlen: int | None) -> list[int]:
    """Check offsets and return them as a list. A GPU tensor is read once for all layers of a model."""
    if not cu_seqlens.is_cuda or cu_seqlens.is_inference():  # inference tensors have no version counter
        offsets = cu_seqlens.tolist()
    else:
        known = _host_offsets.get(cu_seqlens)
        if known is None or known[0] != cu_seqlens._version:
            known = _host_offsets[cu_seqlens] = (cu_seqlens._version, cu_seqlens.tolist())
        offsets = known[1]
    check_offsets("cu_seqlens", offsets, rows, "the number of rows")
    longest = max((b - a for a, b in zip(offsets[:-1], offsets[1:], strict=True)), default=0)
    if max_seqlen is not None and longest > max_seqlen:
        raise ValueError(f"max_seqlen must be at least {longest}, the rows of the longest sequence, got {max_seqlen}")
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
    key_bias: Tensor | None = None,
) -> Tensor:
    """Compute attention of sequences of equal length: ``[B, H, Q, D]`` -> ``[B, H, Q, Dv]``.

    ``mask`` ``[B, 1 or H, Q, K]`` is bool, or is added to the scores; it must not be combined with ``causal``.
    ``key_bias`` is added to the scores, and broadcasts to ``[B, H, 1, K]``.
    """
    rows, columns = query.shape[2], key.shape[2]
    if softcap is None and mask is None and key_bias is None and (window is None or window >= rows):
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
        if key_bias is not None:
            seen = add_bias(seen, key_bias[..., first:last], query.dtype)
        part = query[:, :, begin:end], key[:, :, first:last], value[:, :, first:last]
        outputs.append(_attend_block(*part, seen, scale, softcap, dropout))
    return torch.cat(outputs, 2)


def add_bias(mask: Tensor | None, bias: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the sum of a bias and a bool or additive mask, as an additive mask in ``dtype``."""
    if mask is None:
        return bias.to(dtype)
    if mask.dtype != torch.bool:
        return (mask + bias).clamp_min(torch.finfo(dtype).min).to(dtype)
    return torch.where(mask, bias.to(dtype), torch.finfo(dtype).min)


def _attend_block(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, softcap: float | None, dropout: float
) -> Tensor:
    """Compute the attention of one block of queries: ``[B, H, Q, D]`` -> ``[B, H, Q, Dv]``."""
    groups = query.shape[1] // key.shape[1]
    if softcap is None:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=dropout, scale=scale, enable_gqa=groups > 1
        )
    key, value = (t.repeat_interleave(groups, 1) if groups > 1 else t for t in (key, value))
    scores = softcap * torch.tanh(query @ key.transpose(2, 3) * scale / softcap)
    if mask is not None:
        # The lowest finite number instead of -inf: a padding row that attends to nothing must not become NaN.
        lowest = torch.finfo(scores.dtype).min
        scores = scores.masked_fill(~mask, lowest) if mask.dtype == torch.bool else (scores + mask).clamp_min(lowest)
    weights = torch.softmax(scores, -1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(query.dtype)
    return F.dropout(weights, dropout) @ value


class _Varlen:
    """Call ``varlen_attn`` of torch, whose arguments differ between torch 2.10, 2.11 and 2.12."""

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

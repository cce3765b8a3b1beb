"""``packed_attention`` against plain attention with a full mask."""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest
import torch

from fastcompress.decoder.packed_attention import (
    _Varlen,
    _varlen,
    key_bias_of,
    packed_attention,
    widen_keys,
    with_key_bias,
)
from tests.support.attention import reference
from tests.support.sample_inputs import offsets

OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"scale": 0.7},
    {"window": 1},
    {"window": 7},
    {"window": 300},
    {"softcap": 2.0},
    {"softcap": 2.0, "window": 100, "scale": 0.5},
    {"causal": False},
    {"causal": False, "softcap": 1.0},
)
#: One per way to add a bias: columns of queries and keys, or a mask if there is a soft cap; a block of queries has both.
BIASED: tuple[dict[str, Any], ...] = (
    {},
    {"window": 7, "scale": 0.7},
    {"softcap": 2.0},
    {"causal": False, "softcap": 1.0},
)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (3, 1)], ids=str)
def test_packed_attention(options: dict[str, Any], heads: tuple[int, int], biased: bool):
    if biased and (options not in BIASED or heads == (3, 1)):
        return
    lengths = (0, 5, 1, 600, 0, 257)
    cu = offsets(lengths)
    shapes = [(sum(lengths), h, 8) for h in (heads[0], heads[1], heads[1])]
    query, key, value = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    if biased:
        options = options | {"key_bias": torch.randn(sum(lengths), dtype=torch.float64)}
    out = packed_attention(query, key, value, cu, **options)
    expected = reference(query, key, value, cu.tolist(), **options)
    torch.testing.assert_close(out, expected)
    grad = torch.randn_like(out)
    for a, b in zip(*(torch.autograd.grad(o, [query, key, value], grad) for o in (out, expected)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_does_not_round_the_bias(dtype: torch.dtype):
    """Equal keys: the weights are those of the biases alone. Scores of 1 / sqrt(D) have no exact inverse in half."""
    bias = torch.tensor([1.0, 3.0, 5.0, 7.0, 11.0]).log()
    value = torch.eye(5, dtype=dtype)[:, None].expand(5, 1, 5)
    zeros = torch.zeros(5, 1, 5, dtype=dtype)
    cu = torch.tensor([0, 5])
    out = packed_attention(zeros, zeros, value, cu, causal=False, key_bias=bias)
    torch.testing.assert_close(out[0, 0].float(), bias.exp() / bias.exp().sum(), rtol=4e-3, atol=0)
    keys = key_bias_of(widen_keys(zeros, bias[:, None].float()))[1]
    torch.testing.assert_close(keys[:, 0], bias, rtol=1e-5, atol=1e-5)


def test_nothing_to_attend_to():
    empty = torch.zeros(0, 2, 8, requires_grad=True)
    assert packed_attention(empty, empty, empty, torch.tensor([0, 0])).shape == (0, 2, 8)
    assert packed_attention(empty, empty, empty, torch.tensor([0])).shape == (0, 2, 8)


def test_autocast():
    """Rotary embeddings return queries and keys in fp32. All tensors are cast, as SDPA does."""
    q = torch.randn(40, 2, 8)
    with torch.autocast("cpu", torch.bfloat16):
        out = packed_attention(q, q, q.bfloat16(), torch.tensor([0, 30, 40]))
    assert out.dtype == torch.bfloat16
    bf16 = q.bfloat16()
    torch.testing.assert_close(out, packed_attention(bf16, bf16, bf16, torch.tensor([0, 30, 40])))
    double = q.double()
    with torch.autocast("cpu", torch.bfloat16):
        assert packed_attention(double, double, double, torch.tensor([0, 40])).dtype == torch.float64


def test_inference_tensors():
    with torch.inference_mode():
        cu = torch.tensor([0, 30, 40])
    q = torch.randn(40, 2, 8)
    assert torch.equal(packed_attention(q, q, q, cu), packed_attention(q, q, q, torch.tensor([0, 30, 40])))


def test_dropout_drops():
    q = torch.randn(40, 2, 8)
    for softcap in (None, 5.0):
        kept, dropped = (
            packed_attention(q, q, q, torch.tensor([0, 40]), softcap=softcap, dropout=p) for p in (0.0, 0.5)
        )
        assert not torch.equal(kept, dropped)


Q = torch.randn(6, 4, 8)
CU = torch.tensor([0, 6])


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: packed_attention(Q.int(), Q, Q, CU), TypeError, "query must be float32"),
        (lambda: packed_attention(Q, Q[:, 0], Q, CU), ValueError, "query and key must have shapes [T, Hq, D] and [T, Hkv, D], got [6, 4, 8] and [6, 8]"),
        (lambda: packed_attention(Q, Q, Q[:3], CU), ValueError, "query and value must have shapes"),
        (lambda: packed_attention(Q, Q.half(), Q, CU), TypeError, "query and key must have one dtype, got torch.float32 and torch.float16"),
        (lambda: packed_attention(Q, Q[:, :2], Q, CU), ValueError, "key must have the number of heads of value and the width of query, got query, key and value of shapes [6, 4, 8], [6, 2, 8] and [6, 4, 8]"),
        (lambda: packed_attention(Q, Q[:, :2], Q, CU, softcap=1.0), ValueError, "key must have the number of heads of value"),
        (lambda: packed_attention(Q, Q[..., :4], Q, CU), ValueError, "the width of query"),
        (lambda: packed_attention(Q, Q, Q, CU, max_seqlen=5), ValueError, "max_seqlen must be at least 6, the rows of the longest sequence, got 5"),
        (lambda: packed_attention(Q, Q[:, :3], Q[:, :3], CU), ValueError, "must be a multiple of that of key, got 4 and 3"),
        (lambda: packed_attention(Q, Q, Q, CU.float()), ValueError, "cu_seqlens must be [B + 1] int32 or int64"),
        (lambda: packed_attention(Q, Q, Q, torch.tensor([0, 5])), ValueError, "cu_seqlens must end at the number of rows, 6, got 5"),
        (lambda: packed_attention(Q, Q, Q, torch.tensor([0, 9, 6])), ValueError, "cu_seqlens must not decrease, got 9 and then 6"),
        (lambda: packed_attention(Q, Q, Q, CU, window=0), ValueError, "window must be at least 1 and needs causal=True, got 0"),
        (lambda: packed_attention(Q, Q, Q, CU, window=2, causal=False), ValueError, "got 2 and causal=False"),
        (lambda: packed_attention(Q, Q, Q, CU, softcap=-1.0), ValueError, "softcap must be positive, got -1.0"),
        (lambda: packed_attention(Q, Q, Q, CU, key_bias=Q[:3, 0, 0]), ValueError, "key_bias must have shape [6], one per row, got [3]"),
        (lambda: packed_attention(Q, Q, Q, CU, key_bias=CU), TypeError, "key_bias must be float32"),
    ],
)  # fmt: skip
def test_errors(call: Any, error: type[Exception], message: str):
    with pytest.raises(error, match=re.escape(message)):
        call()


# The kernels of a GPU, whose arguments differ between versions of torch


def varlen_of(version: str) -> Any:
    """Return a function with the signature of a version of torch, which computes attention on the CPU."""

    def compute(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, causal, window, scale, gqa):
        assert gqa or query.shape[1] == key.shape[1]
        lengths = cu_seq_q.diff()
        assert cu_seq_q.dtype == torch.int32 and max_q == max_k >= int(lengths.max())
        options = {"causal": causal, "scale": scale, "window": window}
        return reference(query, key, value, cu_seq_q.tolist(), **options)

    def v2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
        return compute(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal, None, None, False)

    def v2_11(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
    ):
        return v2_12(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, window_size=window_size)

    def v2_12(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False
    ):
        window = None if window_size[0] == -1 else window_size[0] + 1
        causal = window_size[1] == 0
        return compute(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, causal, window, scale, enable_gqa)

    return {"2.10": v2_10, "2.11": v2_11, "2.12": v2_12}[version]


@pytest.mark.parametrize("version", ["2.10", "2.11", "2.12"])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2)], ids=str)
def test_varlen_of_every_torch(version: str, heads: tuple[int, int]):
    varlen = _Varlen(varlen_of(version))
    query, key, value = (torch.randn(40, h, 8) for h in (heads[0], heads[1], heads[1]))
    cu = torch.tensor([0, 30, 40], dtype=torch.int32)
    for scale in (None, 0.3):
        for causal, window in ((True, None), (True, 5), (False, None)):
            if window is not None and not varlen.has_windows:
                continue
            out = varlen(query, key, value, cu, 30, scale, causal, window)
            expected = packed_attention(query, key, value, cu, scale=scale, causal=causal, window=window)
            torch.testing.assert_close(out, expected)
    bias = torch.randn(40)
    biased = with_key_bias(query, widen_keys(key, bias[:, None]), value, 0.3)
    out = varlen(*biased, cu, 30, 0.3, True, None)[..., :8]
    torch.testing.assert_close(out, packed_attention(query, key, value, cu, scale=0.3, key_bias=bias))
    assert varlen.has_windows == (version != "2.10")


def test_the_installed_varlen_is_one_that_is_known():
    varlen = _varlen()
    assert varlen is not None and {"cu_seq_q", "cu_seq_k", "max_q", "max_k"} <= varlen.parameters
    assert {"window_size", "is_causal"} & varlen.parameters, inspect.signature(varlen.function)

"""Masks contain bools or 0 and 1. An additive mask would be inverted, so it raises an error with the conversion."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import fastcompress as fc
from fastcompress.lalm.encoders import build_encoder, encode
from tests.support.sample_inputs import assert_same_bits

X = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(3))
D = fc.adjacent_distance(X)
IDS = torch.tensor([[5, 9, 9, 5, 7, 7], [9, 9, 5, 5, 9, 7]])
KEPT = torch.tensor([[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
ADDITIVE = torch.where(KEPT.bool(), 0.0, -1e9)

CALLS: dict[str, Callable[[Tensor], Tensor]] = {
    "segment_pool": lambda mask: fc.segment_pool(X, "uniform:2", attention_mask=mask).values,
    "segment_pool, scalar rule": lambda mask: fc.segment_pool(X, "top-k:rate=2", attention_mask=mask).values,
    "segment_pool, minimum variance": lambda mask: fc.segment_pool(X, "min-variance:2", attention_mask=mask).values,
    "select_boundaries": lambda mask: fc.select_boundaries(D, "local-max", attention_mask=mask).starts,
    "normalize_distance": lambda mask: fc.normalize_distance(D, attention_mask=mask),
    "segments_from_mask": lambda mask: fc.segments_from_mask(D > 1, attention_mask=mask).starts,
    "row_groups": lambda mask: fc.row_groups(IDS, 9, attention_mask=mask),
    "row_groups, counts": lambda mask: fc.row_groups(IDS, 9, attention_mask=mask, placeholder_counts=1),
    "pack": lambda mask: fc.pack(IDS, torch.eye(10), attention_mask=mask).inputs_embeds,
    "pack, placeholder": lambda mask: (
        fc.pack(IDS, inputs_embeds=X, placeholder=9, rule="uniform:2", attention_mask=mask).inputs_embeds
    ),
    "SegmentPool": lambda mask: fc.nn.SegmentPool("uniform:2")(X, attention_mask=mask).values,
}
DTYPES = (torch.bool, torch.uint8, torch.int8, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float64)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_0_and_1_of_any_dtype(call: Callable[[Tensor], Tensor]):
    expected = call(KEPT)
    assert expected.numel() != call(torch.ones_like(KEPT)).numel() or not torch.equal(
        expected, call(torch.ones_like(KEPT))
    )
    for dtype in DTYPES:
        assert_same_bits(call(KEPT.to(dtype)), expected, str(dtype))


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_other_values_raise_with_a_fix_that_works(call: Callable[[Tensor], Tensor]):
    for wrong in (ADDITIVE, ADDITIVE.half(), KEPT * 2, KEPT - 1, KEPT.float() * torch.nan, ADDITIVE * torch.inf):
        with pytest.raises(ValueError, match="attention_mask must be bool or contain only 0 and 1, got"):
            call(wrong)
    with pytest.raises(ValueError, match="got -1e[+]09: .*by `attention_mask >= 0`") as error:
        call(ADDITIVE)
    fixed = eval(str(error.value).split("`")[1], {"attention_mask": ADDITIVE})
    assert_same_bits(call(fixed), call(KEPT))
    with pytest.raises(TypeError, match="attention_mask must be bool, integers or floating point, got torch.complex64"):
        call(KEPT.to(torch.complex64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bool], ids=str)
def test_masks_in_traced_programs(dtype: torch.dtype):
    def pool(x: Tensor, mask: Tensor) -> Tensor:
        return fc.segment_pool(x, "uniform:2", attention_mask=mask).values

    mask, expected = KEPT.to(dtype), pool(X, KEPT)
    torch._dynamo.reset()
    compiled = torch.compile(pool, fullgraph=True, backend="aot_eager")
    assert_same_bits(compiled(X, mask), expected)

    class Model(torch.nn.Module):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return pool(x, mask)

    dims = {"x": {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}}
    program = torch.export.export(Model(), (X, mask), dynamic_shapes=dims | {"mask": dims["x"]}).module()
    assert_same_bits(program(X, mask), expected)
    assert_same_bits(make_fx(pool, tracing_mode="symbolic")(X, mask)(X, mask), expected)
    if dtype == torch.float32:  # an additive mask of floats is an error in a traced program as well
        for f in (compiled, program):
            with pytest.raises(RuntimeError, match="attention_mask must be bool or contain only 0 and 1"):
                f(X, ADDITIVE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # vmap runs the op in a loop
        batched = torch.vmap(lambda x, m: fc.segment_pool(x, "uniform:2", attention_mask=m, compact=False).values)
        got = batched(X[:, None], mask[:, None])
    for one, x, m in zip(got, X, mask, strict=True):
        assert_same_bits(one, fc.segment_pool(x[None], "uniform:2", attention_mask=m[None], compact=False).values)


@pytest.mark.skipif("not __import__('importlib.util').util.find_spec('transformers')", reason="needs transformers")
def test_the_mask_of_features():
    from transformers import WhisperConfig

    config = WhisperConfig(
        d_model=16, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=16, num_mel_bins=8,
        max_source_positions=50,
    )  # fmt: skip
    encoder, features = build_encoder(config).eval(), torch.randn(2, 8, 100)
    mask = (torch.arange(100) < torch.tensor([[100], [37]])).long()
    frames, lengths = encode(encoder, features, mask)
    assert lengths.tolist() == [50, 19]
    for dtype in DTYPES:
        found = encode(encoder, features, mask.to(dtype))
        assert torch.equal(found[0], frames) and torch.equal(found[1], lengths)
    with pytest.raises(ValueError, match="feature_attention_mask must be bool or contain only 0 and 1, got -1: .*>= 0"):
        encode(encoder, features, mask.float() - 1)

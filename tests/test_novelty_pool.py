"""AdaTS: segments by a threshold on distances, and means weighted by these distances."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import fastcompress as fc
from tests.support.sample_inputs import features

SIZES = (23, 0, 1, 2, 34)


def novelty_pool(x: Tensor, threshold: float) -> list[Tensor]:
    """Return the tokens of one sequence, computed frame by frame as the paper defines them."""
    tokens: list[Tensor] = []
    total, weight = torch.zeros(x.shape[1], dtype=torch.float64), 0.0
    for t, frame in enumerate(x.double()):
        d = 1.0
        if t:
            a, b = x[t - 1].double(), frame
            norms = float(a.norm() * b.norm())
            d = 1 - float(a @ b) / norms if norms else float(bool(a.any() or b.any()))
        if t and d > threshold:
            tokens.append(total / weight)
            total, weight = torch.zeros_like(total), 0.0
        w = 1.0 if t == 0 else (0.0 if math.isnan(d) else max(d, 0.0)) + 1e-6
        total, weight = total + w * frame, weight + w
    return [*tokens, total / weight] if len(x) else tokens


def kinds(kind: str, dtype: torch.dtype) -> Tensor:
    x = features("smooth", sum(SIZES), 8, dtype)
    if kind == "silence":
        x[5:12] = 0
    elif kind == "constant":
        x[:] = x[0].clone()
    elif kind == "repeats":
        x[1::2] = x[:-1:2].clone()
    elif kind == "nan":
        x[[7, 40]] = torch.nan
        x[30, 2] = torch.inf
    return x


KINDS = ("smooth", "silence", "constant", "repeats", "nan")


# Kinds: distances that are 0, equal or NaN. Dtypes: they have different tolerances. Thresholds: many, some, few tokens.
@pytest.mark.parametrize(
    ("threshold", "kind", "dtype"),
    [
        *((0.15, kind, dtype) for kind in KINDS for dtype in (torch.float64, torch.float32, torch.bfloat16)),
        *((threshold, kind, torch.float64) for threshold in (0.0123, 0.6) for kind in KINDS),
    ],
    ids=str,
)
def test_definition(threshold: float, kind: str, dtype: torch.dtype):
    x, cu = kinds(kind, dtype), torch.tensor([0, *SIZES]).cumsum(0)
    module = fc.nn.NoveltyPool(threshold)
    wanted = [novelty_pool(part, threshold) for part in x.split(list(SIZES))]
    out = module(x, cu_seqlens=cu)
    assert out.cu_seqlens.diff().tolist() == [len(tokens) for tokens in wanted]
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 1e-2}[dtype]
    found = torch.stack([token for tokens in wanted for token in tokens])
    torch.testing.assert_close(out.values.double(), found, rtol=tolerance, atol=tolerance, equal_nan=True)
    assert out.values.dtype == dtype
    padded = torch.nn.utils.rnn.pad_sequence(list(x.split(list(SIZES))), True, padding_value=9.0)
    again = module(padded, lengths=torch.tensor(SIZES))
    assert torch.equal(again.values.nan_to_num(), out.values.nan_to_num())


def test_gradients_are_those_of_given_weights():
    x = features("smooth", 20, 4, torch.float64).requires_grad_()
    d = fc.adjacent_distance(x.detach())
    weights = torch.cat([d.new_ones(1), d[:-1].clamp_min(0) + 1e-6])
    given = fc.segment_pool(x, rule="threshold:0.15", weights=weights).values
    found = fc.nn.NoveltyPool()(x).values
    grad = torch.randn_like(found)
    torch.testing.assert_close(torch.autograd.grad(found, x, grad)[0], torch.autograd.grad(given, x, grad)[0])
    assert str(fc.nn.NoveltyPool()) == "NoveltyPool(threshold=0.15)"


def test_compiles():
    x, cu = features("smooth", 30, 4, torch.float32).requires_grad_(), torch.tensor([0, 11, 30])
    module = fc.nn.NoveltyPool(0.05)

    def run(x: Tensor) -> Tensor:
        return module(x, cu_seqlens=cu).values.square().sum()

    torch._dynamo.reset()
    with torch._dynamo.config.patch(capture_scalar_outputs=True, capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")(x)
    eager = run(x)
    assert torch.equal(compiled, eager)
    assert torch.equal(torch.autograd.grad(compiled, x)[0], torch.autograd.grad(eager, x)[0])

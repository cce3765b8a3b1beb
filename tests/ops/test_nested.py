"""Jagged nested tensors go in wherever frames do, and results come back as one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastcompress as fc
from tests.support.sample_inputs import assert_same_bits

G = torch.Generator().manual_seed(7)
PARTS = [torch.randn(n, 4, generator=G) for n in (5, 1, 9)]
ALPHAS = [torch.rand(n, generator=G) for n in (5, 1, 9)]
X, ALPHA, CU = torch.cat(PARTS), torch.cat(ALPHAS), torch.tensor([0, 5, 6, 15])
LABELS = (X[:, 0] > 0).long()


def jagged(parts: list[Tensor]) -> Tensor:
    return torch.nested.nested_tensor(parts, layout=torch.jagged)


torch.manual_seed(0)
MODULES = [
    fc.nn.SegmentPool("uniform:2"), fc.nn.NoveltyPool(0.9), fc.nn.BipartiteMerge(3.0), fc.nn.IterativeFusion(2),
    fc.nn.GreedySegments(0.9), fc.nn.IntegrateAndFire(4), fc.nn.LearnedBoundary(4),
]  # fmt: skip
CALLS: dict[str, Callable[..., Any]] = {
    **{f"segment_pool, {rule}": lambda x, alpha, rule=rule, **cu: fc.segment_pool(x, rule, **cu)
       for rule in ("uniform:2", "local-max", "top-k:rate=2", "lookback:2,threshold=0.9", "min-variance:2")},
    "segment_pool, weights": lambda x, alpha, **cu: fc.segment_pool(x, "uniform:2", weights=alpha, **cu),
    "segment_pool, keys": lambda x, alpha, **cu: fc.segment_pool(x, "threshold:0.9", keys=x, **cu),
    "segment_pool, groups": lambda x, alpha, **cu: fc.segment_pool(x, "uniform:2", row_group=LABELS.int(), **cu),
    "segment_pool, loose": lambda x, alpha, **cu: fc.segment_pool(x, "local-max", compact=False, **cu),
    "integrate_and_fire": lambda x, alpha, **cu: fc.integrate_and_fire(x, alpha, **cu),
    "bipartite_merge": lambda x, alpha, **cu: fc.bipartite_merge(x, 1.5, keys=x, size=alpha, **cu),
    "iterative_fusion": lambda x, alpha, **cu: fc.iterative_fusion(x, 2, weights=alpha, **cu),
    **{type(m).__name__: lambda x, alpha, m=m, **cu: m(x, **cu) for m in MODULES},
}  # fmt: skip


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_nested_is_packed(call: Callable[..., Any]):
    nested, alpha = jagged(PARTS).requires_grad_(), jagged(ALPHAS)
    x = X.clone().requires_grad_()
    tokens, expected = call(nested, alpha), call(x, ALPHA, cu_seqlens=CU)
    assert_same_bits(tokens.values.detach(), expected.values.detach())
    assert torch.equal(tokens.cu_seqlens, expected.cu_seqlens)
    tokens.values.square().sum().backward()
    expected.values.square().sum().backward()
    assert nested.grad is not None and x.grad is not None
    assert_same_bits(nested.grad.values(), x.grad)
    back = tokens.to_nested()
    assert back.layout == torch.jagged and back.shape[0] == 3 and back.shape[2] == 4
    bounds = expected.cu_seqlens.tolist()
    for part, begin, end in zip(back.unbind(), bounds[:-1], bounds[1:], strict=True):
        assert_same_bits(part.detach(), expected.values[begin:end].detach())
    assert back.values().shape[0] == bounds[-1]  # without the empty tokens at the end


def test_other_ops_take_nested_frames():
    nested = jagged(PARTS)
    assert_same_bits(fc.adjacent_distance(nested), fc.adjacent_distance(X, cu_seqlens=CU))
    segments = fc.greedy_segments(nested, 0.9)
    assert torch.equal(segments.starts, fc.greedy_segments(X, 0.9, cu_seqlens=CU).starts)
    assert_same_bits(
        fc.segment_reduce(nested, segments, "mean", jagged(ALPHAS)), fc.segment_reduce(X, segments, "mean", ALPHA)
    )
    labels = torch.nested.nested_tensor(list(LABELS.split([5, 1, 9])), layout=torch.jagged)
    pooled = fc.segment_pool(nested, "label-change", labels=labels)
    assert_same_bits(pooled.values, fc.segment_pool(X, "label-change", labels=LABELS, cu_seqlens=CU).values)


def test_gradients_go_through_the_nested_result():
    nested = jagged(PARTS).requires_grad_()
    (fc.segment_pool(nested, "uniform:2").to_nested() * 2).values().sum().backward()
    x = X.clone().requires_grad_()
    (fc.segment_pool(x, "uniform:2", cu_seqlens=CU).values * 2).sum().backward()
    assert_same_bits(nested.grad.values(), x.grad)


def test_no_sequence_and_empty_sequences():
    empty = torch.nested.nested_tensor([torch.zeros(0, 4), torch.ones(3, 4)], layout=torch.jagged)
    pooled = fc.segment_pool(empty, "uniform:2")
    assert pooled.cu_seqlens.tolist() == [0, 0, 2]
    assert [len(part) for part in pooled.to_nested().unbind()] == [0, 2]


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_nested_frames_in_a_compiled_program(backend: str):
    def pool(x: Tensor) -> Tensor:
        return fc.segment_pool(x, "uniform:2", compact=False).values

    torch._dynamo.reset()
    compiled = torch.compile(pool, fullgraph=True, backend=backend)
    for sizes in ((5, 1, 9), (3, 4), (2, 2, 8, 1)):
        parts = list(X[: sum(sizes)].split(sizes))
        assert_same_bits(compiled(jagged(parts)), pool(jagged(parts)))


def test_errors():
    nested = jagged(PARTS)
    with pytest.raises(ValueError, match="x is nested and has its own sequences: pass neither cu_seqlens nor lengths"):
        fc.segment_pool(nested, cu_seqlens=CU)
    with pytest.raises(ValueError, match="keys must have shape"):
        fc.segment_pool(nested, keys=jagged(PARTS[:2]))
    holes = torch.nested.narrow(X.view(3, 5, 4), 1, torch.tensor([0, 1, 0]), torch.tensor([2, 3, 4]), torch.jagged)
    with pytest.raises(ValueError, match="x must be nested as .* without holes; copy it with") as error:
        fc.segment_pool(holes)
    fixed = eval(str(error.value).partition("copy it with ")[2], {"torch": torch, "x": holes})
    assert fc.segment_pool(fixed, "uniform:2").cu_seqlens.tolist() == [0, 1, 3, 5]
    with pytest.raises(ValueError, match="x must be nested as"):
        fc.segment_pool(nested.transpose(1, 2))

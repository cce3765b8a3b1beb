"""``torch.library.opcheck``: schemas, fakes, autograd registration and dynamic shapes of every op."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import fastcompress as fc
from fastcompress.dispatch.schemas import SCHEMAS
from fastcompress.ops.segment_reduce import REDUCTIONS
from tests.support.sample_inputs import TOKEN_ROWS, TOKENS, assert_same_bits, packed, padded, row_groups

OPS = torch.ops.fastcompress
LENGTHS = (4, 0, 9, 1)
RULES = (fc.Uniform(3), fc.LocalMax(order=2, min_len=2, max_len=5), fc.Threshold(0.9))
LINEAR = tuple(reduce for reduce in REDUCTIONS if reduce != "max")


def layouts(dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor, Any, Any, Any]]:
    """Yield name, x, cu_seqlens, lengths and row_group."""
    x = packed("iid", 5, dtype, LENGTHS)
    yield "packed", x.x, x.layout["cu_seqlens"], None, None
    yield "packed-grouped", x.x, x.layout["cu_seqlens"].long(), None, row_groups(len(x.x))
    yield "one-sequence", x.x, None, None, None
    y = padded("iid", 5, dtype, LENGTHS)
    yield "padded", y.x.nan_to_num(0.5), None, y.layout["lengths"], None
    yield "padded-full", y.x.nan_to_num(0.5), None, None, row_groups(y.x[..., 0].numel()).view(y.x.shape[:2])


def test_gradients_of_the_reference_are_contiguous():
    """Regression: gradients had the strides of a transposed input, but fakes return contiguous ones."""
    x, y, starts, sizes = torch.randn(6, 20).t(), torch.randn(2, 6), torch.tensor([0, 9]), torch.tensor([9, 11])
    with fc.backend("reference"):
        assert OPS.segment_max_backward(y, x, y, starts, sizes).is_contiguous()
        assert OPS.segment_weighted_mean_backward(y, x, y, torch.rand(20), starts, sizes)[0].is_contiguous()
        assert OPS.adjacent_distance_backward(torch.rand(20), x, None, None, 1).is_contiguous()


def samples() -> Iterator[Any]:
    """Yield names and arguments of ops."""

    def sample(op: str, what: str, *args: Any) -> Any:
        return pytest.param(op, args, id=f"{op}-{what}")

    # Fakes and gradients depend on the layout (sequences, shape), on `compact` and the rule (maximum number of
    # segments), on keys, and on the dtype (of distances and weights). Their combinations only affect kernels.
    for dtype in (torch.float32, torch.bfloat16):
        short = str(dtype).removeprefix("torch.")
        for name, x, cu, lengths, group in layouts(dtype):
            if dtype == torch.bfloat16 and name not in ("packed", "padded"):
                continue
            plain = dtype == torch.float32 and name == "packed"
            name = f"{name}-{short}"
            d = fc.adjacent_distance(x, cu_seqlens=cu, lengths=lengths)
            if group is None:
                leaf = x.clone().requires_grad_()
                yield sample("adjacent_distance", name, leaf, cu, lengths, 2)
                yield sample("adjacent_distance_backward", name, torch.randn_like(d), x, cu, lengths, 2)
                yield sample("banded_distance", name, x, cu, lengths, 3)
                yield sample("greedy_boundaries", name, x, cu, lengths, 0.9, 3)
                yield sample("nearest_odd", name, x, cu, lengths)
                weights = torch.rand_like(x[..., 0]).requires_grad_()
                yield sample("iterative_fusion", name, leaf, weights, cu, lengths, 2)
                yield sample("iterative_fusion", f"{name}-even", leaf, None, cu, lengths, 2)
                tokens = torch.ops.fastcompress.iterative_fusion(x, weights.detach(), cu, lengths, 2)
                grads = torch.randn_like(tokens[0]), torch.randn_like(tokens[2])
                yield sample("iterative_fusion_backward", name, *grads, x, weights.detach(), cu, lengths, 2)
            near = d.new_zeros((*d.shape, 3))
            yield sample("min_variance_boundaries", name, near, cu, lengths, group, 2.0, 4)
            for compact, rule in itertools.product((True, False), RULES if plain else RULES[1:2]):
                what = f"{name}-{rule}-compact={compact}"
                yield sample("select_boundaries", what, d, cu, lengths, group, *rule.op_args(), compact)
                for keys in (None, x[..., :2].contiguous()) if plain or compact else (None,):
                    args = (x.clone().requires_grad_(), keys, cu, lengths, group, *rule.op_args(), compact)
                    yield sample("segment_pool", f"{what}-keys={keys is not None}", *args)
        x = packed("iid", 5, dtype, LENGTHS).x
        # Gaps, and an empty segment.
        starts, sizes = torch.tensor([0, 4, 4, 9]), torch.tensor([3, 0, 2, 5])
        y = torch.randn(4, 5).to(dtype)
        leaf, weights = x.clone().requires_grad_(), torch.rand(len(x))
        for reduce in REDUCTIONS:
            yield sample("segment_reduce", f"{reduce}-{short}", leaf, starts, sizes, reduce)
        for reduce in LINEAR:
            expanded = y.clone().requires_grad_()
            yield sample("segment_expand", f"{reduce}-{short}", expanded, starts, sizes, len(x), reduce)
        largest = OPS.segment_reduce(x, starts, sizes, "max")
        yield sample("segment_max_backward", short, y, x, largest, starts, sizes)
        mean = OPS.segment_weighted_mean(x, weights, starts, sizes)
        yield sample("segment_weighted_mean", short, leaf, weights.clone().requires_grad_(), starts, sizes)
        yield sample("segment_weighted_mean_backward", short, y, x, mean, weights, starts, sizes)
        count = len(TOKENS[0])
        rows, slopes = torch.randn(TOKEN_ROWS, 5).to(dtype), torch.randn(count, 5).to(dtype)
        scalars = torch.rand(TOKEN_ROWS), torch.rand(count)
        leaves = [t.clone().requires_grad_() for t in (rows, *scalars)]
        for divisors in (None, torch.rand(count) + 0.5):
            yield sample("integrate_rows", f"{short}-divided={divisors is not None}", *leaves, divisors, *TOKENS)
        yield sample("integrate_rows_backward", short, slopes, rows, *scalars, *TOKENS)

    groups = torch.tensor([[0, 1, 1, 0, 2, -1], [2, 0, 0, 3, -1, -1]]).int()
    cu, labels = torch.tensor([0, 2, 2, 3, 5]), torch.arange(12).view(2, 6)
    for compact in (True, False):
        for ids in (labels, None):
            arguments = (groups, ids, None, None, cu, 12, 5, compact)
            yield sample("pack_map", f"ids={ids is not None}-compact={compact}", *arguments)
        index, source, target, packed_cu = OPS.pack_map(*arguments)
        for given in (labels, None):
            yield sample("pack_labels", f"labels={given is not None}-{compact}", source, packed_cu, groups, given)
        for is_table in (True, False):
            text, audio = torch.randn(12, 5, requires_grad=True), torch.randn(5, 5, requires_grad=True)
            yield sample("pack_rows", f"table={is_table}-{compact}", text, audio, index, target, is_table)


SAMPLES = list(samples())


CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.mark.parametrize("op, args", SAMPLES)
def test_opcheck(op: str, args: tuple[Any, ...]):
    # Distances without a pair are NaN, which the last check treats as different. The next test, and the
    # export of segment_pool, replace it.
    checks = CHECKS[:-1] if op in ("adjacent_distance", "banded_distance") else CHECKS
    torch.library.opcheck(getattr(OPS, op).default, args, test_utils=checks)


@pytest.mark.parametrize("args", [s.values[1] for s in SAMPLES if s.values[0] == "adjacent_distance"])
def test_distance_when_traced(args: tuple[Any, ...]):
    x, *rest = args

    def run(x: torch.Tensor) -> torch.Tensor:
        return OPS.adjacent_distance(x, *rest)

    torch._dynamo.reset()
    traced = torch.compile(run, backend="aot_eager", dynamic=True, fullgraph=True)
    results = []
    for f in (run, traced):
        d = f(x)
        results.append((d.detach(), *torch.autograd.grad(d, x, torch.arange(d.numel()).view(d.shape).to(d.dtype))))
    for a, b in zip(*results, strict=True):
        assert_same_bits(a, b)


def test_every_op_has_samples():
    names = {schema.partition("(")[0] for schema in SCHEMAS} - {"cpu_isa", "cuda_archs", "cuda_version"}
    assert {sample.values[0] for sample in SAMPLES} == names

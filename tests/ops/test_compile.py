"""``torch.compile``, ``torch.export``, autocast, pytrees and gradient modes."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim
from torch.utils import _pytree as pytree

import fastcompress as fc
from fastcompress.dispatch import backends
from fastcompress.reference import OPS
from tests.support.sample_inputs import assert_same_bits, packed, padded

BATCHES = ((5, 7, 3), (2, 0, 9, 1), (40, 17, 3, 11, 6), (3, 4, 30, 1, 2, 2, 80))
RULES = (
    fc.Uniform(3),
    fc.LocalMax(),
    fc.LocalMax(order=2, min_len=2, max_len=5),
    fc.LocalMax(prominence=0.1),
    fc.Threshold(0.9, max_len=6),
)


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(f: Callable, backend: str = "aot_eager") -> tuple[Callable, CompileCounterWithBackend]:
    counter = CompileCounterWithBackend(backend)
    return torch.compile(f, fullgraph=True, dynamic=True, backend=counter), counter


def inputs(layout: str, lengths: tuple[int, ...], width: int = 6) -> tuple[Tensor, dict[str, Tensor]]:
    batch = (
        padded("iid", width, torch.float32, lengths)
        if "padded" in layout
        else packed("iid", width, torch.float32, lengths)
    )
    x, arguments = batch.x.nan_to_num(0.5), dict(batch.layout)
    if layout == "masked":
        x = x.view(1, *x.shape).expand(len(lengths), -1, -1).contiguous()
        arguments = {"attention_mask": (torch.arange(x.shape[1]) < torch.tensor(lengths)[:, None]).long()}
    if "grouped" in layout:
        arguments["row_group"] = (torch.arange(x[..., 0].numel()) // 4 % 4 - 1).int().view(x.shape[:-1])
    return x, arguments


LAYOUTS = ("packed", "padded", "masked", "grouped", "grouped-padded")


def assert_same_tree(actual: Any, expected: Any) -> None:
    """Assert equal structure, types, numbers and bits."""
    a, spec = pytree.tree_flatten(actual)
    b, expected_spec = pytree.tree_flatten(expected)
    assert spec == expected_spec
    for one, other in zip(a, b, strict=True):
        if isinstance(other, Tensor):
            assert_same_bits(one.detach(), other.detach())
        else:
            assert one == other


# torch.compile


def graphs_of_the_first_call(rule: fc.Rule) -> int:
    """Return 2 for rules with a float, which dynamo traces first as a variable and then as a constant, else 1."""
    return 2 if any(isinstance(value, float) for value in rule.to_dict().values()) else 1


# Rules: without `compact` the size of the results is a bound that depends on the rule; with it, the graph does not know
# the size. A rule with a prominence runs the three steps. Layouts: they determine the number of sequences.
@pytest.mark.parametrize(
    ("layout", "rule", "compact"),
    [
        *(("packed", rule, False) for rule in RULES),
        *(("packed", rule, True) for rule in (fc.LocalMax(), fc.LocalMax(prominence=0.1))),
        *(("padded", fc.LocalMax(), compact) for compact in (True, False)),
    ],
    ids=str,
)
def test_one_graph_for_batches_of_every_size(layout: str, rule: fc.Rule, compact: bool):
    def pool(x: Tensor, arguments: dict[str, Tensor]) -> fc.Pooled:
        return fc.segment_pool(x, rule=rule, compact=compact, **arguments)

    f, counter = compiled(pool)
    x, arguments = inputs(layout, BATCHES[0])
    f(x, arguments)
    for lengths in BATCHES:
        x, arguments = inputs(layout, lengths)
        assert_same_tree(f(x, arguments), pool(x, arguments))
    assert counter.frame_count == graphs_of_the_first_call(rule)


@pytest.mark.parametrize("layout", ["masked", "grouped", "grouped-padded"])
def test_one_graph_with_masks_and_groups(layout: str):
    def pool(x: Tensor, arguments: dict[str, Tensor]) -> fc.Pooled:
        return fc.segment_pool(x, **arguments)

    f, counter = compiled(pool)
    for lengths in BATCHES:
        x, arguments = inputs(layout, lengths)
        assert_same_tree(f(x, arguments), pool(x, arguments))
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    ("reduce", "layout", "compact"),
    [
        ("mean", "packed", True),
        ("mean", "padded", False),
        ("max", "packed", False),
        ("weights", "packed", False),
        ("weights", "padded", True),
    ],
)
def test_gradients(reduce: str, layout: str, compact: bool):
    how = {} if reduce == "weights" else {"reduce": reduce}

    def loss(x: Tensor, weights: Tensor, arguments: dict[str, Tensor]) -> Tensor:
        more = {"weights": weights.exp()} if reduce == "weights" else how
        pooled = fc.segment_pool(x * 2, compact=compact, **more, **arguments)
        return pooled.values.square().sum() + weights.sum()

    f, counter = compiled(loss)
    for lengths in BATCHES:
        x, arguments = inputs(layout, lengths)
        leaves = [x.requires_grad_(), torch.randn(x.shape[:-1]).requires_grad_()]
        grads = torch.autograd.grad(f(*leaves, arguments), leaves)
        for a, b in zip(grads, torch.autograd.grad(loss(*leaves, arguments), leaves), strict=True):
            torch.testing.assert_close(a, b)
        assert grads[0].abs().sum() > 0
    assert counter.frame_count == 1


def test_gradient_of_distances():
    def loss(x: Tensor, cu: Tensor) -> Tensor:
        return fc.adjacent_distance(x, cu_seqlens=cu).nan_to_num(0.0).square().sum()

    f, counter = compiled(loss)
    for lengths in BATCHES:
        x, arguments = inputs("packed", lengths)
        cu = arguments["cu_seqlens"]
        x.requires_grad_()
        assert_same_bits(*(torch.autograd.grad(g(x, cu), x)[0] for g in (f, loss)))
    assert counter.frame_count == 1


@pytest.mark.parametrize("compact", [True, False])
def test_the_steps_and_methods_of_results(compact: bool):
    def parts(x: Tensor, cu: Tensor) -> tuple:
        d = fc.adjacent_distance(x, cu_seqlens=cu, lag=1)
        s = fc.select_boundaries(d, fc.Threshold(0.9), cu_seqlens=cu, compact=compact)
        y = fc.segment_reduce(x, s, "sum")
        from_mask = fc.segments_from_mask(d > 0.9, cu_seqlens=cu, compact=compact)
        return s, y, fc.segment_expand(y, s), s.ids(), s.counts, s.seconds(50.0), from_mask

    f, counter = compiled(parts)
    for lengths in BATCHES:
        x, arguments = inputs("packed", lengths)
        assert_same_tree(f(x, arguments["cu_seqlens"]), parts(x, arguments["cu_seqlens"]))
    assert counter.frame_count == 1


def test_module_in_a_model():
    model = torch.nn.Sequential(torch.nn.Linear(6, 4), fc.nn.SegmentPool("local-max:order=2"))
    f, counter = compiled(model)
    for rows in (5, 40, 23):
        x = torch.randn(rows, 6)
        assert_same_tree(f(x), model(x))
    assert counter.frame_count == 1


@pytest.mark.parametrize("compact", [True, False])
def test_inductor(compact: bool):
    def loss(x: Tensor, cu: Tensor) -> tuple[Tensor, Tensor]:
        pooled = fc.segment_pool(x * 2, cu_seqlens=cu, compact=compact)
        return pooled.values.sum(), pooled.segments.lengths

    f, counter = compiled(loss, "inductor")
    for lengths in BATCHES[:2]:
        x, arguments = inputs("packed", lengths)
        cu = arguments["cu_seqlens"]
        x.requires_grad_()
        (a, sizes), (b, expected_sizes) = f(x, cu), loss(x, cu)
        assert torch.equal(sizes, expected_sizes)
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(torch.autograd.grad(a, x), torch.autograd.grad(b, x))
    assert counter.frame_count == 1


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_inductor_everywhere(layout: str, rule: fc.Rule):
    def pool(x: Tensor, arguments: dict[str, Tensor]) -> fc.Pooled:
        return fc.segment_pool(x, rule=rule, **arguments)

    f, counter = compiled(pool, "inductor")
    for lengths in BATCHES:
        x, arguments = inputs(layout, lengths)
        assert_same_tree(f(x, arguments), pool(x, arguments))
    assert counter.frame_count == graphs_of_the_first_call(rule)


@pytest.mark.parametrize("text", ["uniform:3", "local-max:order=2", "threshold:0.5"])
def test_text_form_of_a_rule(text: str):
    x, arguments = inputs("packed", BATCHES[0])

    def pool(x: Tensor) -> fc.Pooled:
        return fc.segment_pool(x, rule=text, **arguments)

    assert_same_tree(compiled(pool)[0](x), pool(x))


@pytest.mark.parametrize("f", [fc.adjacent_distance, lambda x: fc.segment_pool(x).values], ids=["distance", "pool"])
def test_forward_mode_is_refused(f: Callable[[Tensor], Tensor]):
    """Forward mode is not implemented and must raise an error, since tangents would be lost silently."""
    x = torch.randn(6, 4)
    refused = pytest.raises(NotImplementedError, match="has no forward-mode derivative")
    with torch.autograd.forward_ad.dual_level(), refused:
        f(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))
    with refused:
        torch.func.jvp(f, (x,), (torch.ones_like(x),))
    with refused:
        torch.func.jacfwd(f)(x)


@pytest.mark.parametrize(
    "f", [fc.adjacent_distance, lambda x: fc.segment_pool(x, rule="uniform:3").values], ids=["distance", "pool"]
)
def test_vmap_keeps_gradients(f: Callable[[Tensor], Tensor]):
    """Regression: `requires_grad` of a tensor is False under vmap, and its gradient was lost."""
    x = torch.randn(3, 12, 4).requires_grad_()
    found, wanted = torch.vmap(f)(x), torch.stack([f(sample) for sample in x])
    grad = torch.randn(wanted.shape)
    assert_same_bits(found, wanted)
    assert_same_bits(*(torch.autograd.grad(out, x, grad)[0] for out in (found, wanted)))


def test_errors_of_shapes_survive_compilation():
    def pool(x: Tensor, cu: Tensor) -> fc.Pooled:
        return fc.segment_pool(x, cu_seqlens=cu)

    f, _ = compiled(pool)
    with pytest.raises(Exception, match="cu_seqlens must have shape"):
        f(torch.randn(5, 3), torch.zeros(2, 2, dtype=torch.int32))
    with pytest.raises((RuntimeError, ValueError), match="cu_seqlens"):
        f(torch.randn(5, 3), torch.tensor([0, 3, 9]))  # values are checked by the kernel


def on_the_reference(x: Tensor) -> Tensor:
    with fc.backend("reference"):
        return fc.adjacent_distance(x)


def test_a_backend_is_not_chosen_inside_a_graph():
    """Such a choice would apply when the graph is traced, not when it runs."""
    x = torch.randn(5, 3)
    with pytest.raises(Exception, match="fastcompress.backend cannot be used inside a compiled function"):
        compiled(on_the_reference)[0](x)

    class Module(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return on_the_reference(x)

    with pytest.raises(Exception, match="fastcompress.backend cannot be used inside a compiled function"):
        torch.export.export(Module(), (x,), strict=False)
    # With breaks in the graph the block runs outside it.
    assert_same_bits(torch.compile(on_the_reference, backend="eager")(x), on_the_reference(x))
    assert not backends._requests


# torch.export


class Pool(torch.nn.Module):
    def __init__(self, rule: fc.Rule, compact: bool) -> None:
        super().__init__()
        self.pool = fc.nn.SegmentPool(rule, compact=compact)

    def forward(self, x: Tensor, arguments: dict[str, Tensor]) -> fc.Pooled:
        return self.pool(x, **arguments)


@pytest.mark.parametrize(
    ("layout", "rule", "compact"),
    [
        *((layout, fc.LocalMax(), True) for layout in ("packed", "padded", "grouped-padded")),
        ("packed", fc.LocalMax(), False),
        ("padded", fc.Uniform(3), False),
        ("grouped-padded", fc.LocalMax(prominence=0.1), False),
        ("packed", fc.LocalMax(prominence=0.1), True),
    ],
    ids=str,
)
def test_export_save_load_and_run_on_another_size(layout: str, rule: fc.Rule, compact: bool):
    model, (x, arguments) = Pool(rule, compact), inputs(layout, BATCHES[0])
    dynamic = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC} if x.dim() == 3 else {0: Dim.DYNAMIC}
    shapes = {name: {0: Dim.DYNAMIC} for name in arguments}
    if "grouped" in layout:
        shapes["row_group"] = dynamic
    program = torch.export.export(model, (x, arguments), dynamic_shapes={"x": dynamic, "arguments": shapes})
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    for f in (program.module(), torch.export.load(file).module()):
        for lengths in BATCHES:
            x, arguments = inputs(layout, lengths)
            pooled = f(x, arguments)
            assert isinstance(pooled, fc.Pooled) and isinstance(pooled.segments, fc.Segments)
            assert_same_tree(pooled, model(x, arguments))


# Modes, autocast, pytrees


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
def test_autocast_leaves_dtypes_alone(dtype: torch.dtype):
    batch = packed("smooth", 6, dtype)
    weights = torch.rand(len(batch.x))
    expected = [fc.adjacent_distance(batch.x, **batch.layout)]
    expected += [
        fc.segment_pool(batch.x, **how, **batch.layout) for how in ({}, {"reduce": "sum"}, {"weights": weights})
    ]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = [fc.adjacent_distance(batch.x, **batch.layout)]
        actual += [
            fc.segment_pool(batch.x, **how, **batch.layout) for how in ({}, {"reduce": "sum"}, {"weights": weights})
        ]
        x = batch.x.clone().requires_grad_()
        fc.segment_pool(x, **batch.layout).values.sum().backward()
    assert_same_tree(actual, expected)
    assert x.grad.dtype == dtype


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_pytree_round_trip(layout: str):
    x, arguments = inputs(layout, BATCHES[0])
    pooled = fc.segment_pool(x, **arguments)
    for value in (pooled, pooled.segments, {"a": [pooled]}):
        leaves, spec = pytree.tree_flatten(value)
        assert_same_tree(pytree.tree_unflatten(leaves, spec), value)
    same = pytree.tree_unflatten(*pytree.tree_flatten(pooled))
    assert type(same) is fc.Pooled and type(same.segments) is fc.Segments
    assert (same.segments.num_rows, same.segments.padded_length) == (
        pooled.segments.num_rows,
        pooled.segments.padded_length,
    )
    assert_same_bits(same.segments.ids(), pooled.segments.ids())
    wide = pytree.tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, pooled)
    assert wide.values.dtype == torch.float64 and wide.cu_seqlens.dtype == torch.int32


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_without_gradients(rule: fc.Rule, mode: Callable):
    for layout in LAYOUTS:
        x, arguments = inputs(layout, BATCHES[1])
        expected = fc.segment_pool(x, rule=rule, **arguments)
        x.requires_grad_()
        with mode():
            pooled = fc.segment_pool(x, rule=rule, **arguments)
            d = fc.adjacent_distance(x)
        assert not pooled.values.requires_grad and not d.requires_grad
        assert pooled.values.is_inference() == d.is_inference() == (mode is torch.inference_mode)
        assert_same_tree(pooled, expected)


def test_inference_tensors_are_ordinary_inputs():
    x, arguments = inputs("packed", BATCHES[0])
    expected = fc.segment_pool(x, **arguments)
    with torch.inference_mode():
        x, arguments = inputs("packed", BATCHES[0])
    assert x.is_inference()
    assert_same_tree(fc.segment_pool(x, **arguments), expected)


def test_fake_tensors_have_the_bound():
    x, arguments = inputs("packed", BATCHES[0])
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        pooled = fc.segment_pool(mode.from_tensor(x), compact=False, **pytree.tree_map(mode.from_tensor, arguments))
    real = fc.segment_pool(x, compact=False, **arguments)
    assert pooled.values.shape == real.values.shape and pooled.values.dtype == real.values.dtype
    meta = fc.segment_pool(x.to("meta"), compact=False, **{k: v.to("meta") for k, v in arguments.items()})
    assert meta.values.shape == real.values.shape and meta.cu_seqlens.shape == real.cu_seqlens.shape


def test_reference_alone_has_every_op():
    for name in OPS:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fastcompress::{name}", "CompositeExplicitAutograd")

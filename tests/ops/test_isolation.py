"""No op depends on process-wide defaults, on later changes of a tensor by its caller, or on the values of padding."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import fastcompress as fc
from tests.support.sample_inputs import assert_same_bits

G = torch.Generator().manual_seed(5)
X, Y = torch.randn(12, 4, generator=G), torch.randn(2, 6, 4, generator=G)
ALPHA = torch.rand(12, generator=G)
CU = torch.tensor([0, 5, 5, 12], dtype=torch.int32)
LENGTHS = torch.tensor([6, 4])
GROUP = torch.tensor([1, 1, 1, 0, -1, 1, 2, 2, 2, 2, 0, 1], dtype=torch.int32)
IDS = torch.tensor([[5, 9, 9, 5, 7, 7], [9, 9, 5, 5, 9, 7]])
SEGMENTS = fc.segment_pool(X, "uniform:3", cu_seqlens=CU).segments


def stream(make: Callable[[], Any], *inputs: Tensor) -> list[Any]:
    """Return the results of a stream in two chunks."""
    one = make()
    return [one(*(t[:7] for t in inputs)), one(*(t[7:7] for t in inputs)), one(*(t[7:] for t in inputs)), one.flush()]


def of_result(pooled: fc.Pooled) -> list[Any]:
    segments = pooled.segments
    return [pooled.mask, pooled.max_seqlen, pooled.to_padded(), segments.ids(), segments.counts, segments.seconds(25)]


#: Each gets its tensors by name, so that a test can pass copies and change them afterwards.
CALLS: dict[str, Callable[..., Any]] = {
    **{
        f"segment_pool, {rule}": lambda x, cu, rule=rule: fc.segment_pool(x, rule, cu_seqlens=cu)
        for rule in ("uniform:3", "local-max", "threshold:0.9", "top-k:rate=2", "lookback:2,threshold=0.5",
                     "peak-height", "min-variance:2.5", "local-max:normalize=True,prominence=0.1")
    },
    "segment_pool, sum": lambda x, cu: fc.segment_pool(x, "uniform:3", cu_seqlens=cu, reduce="sum"),
    "segment_pool, padded": lambda y, lengths: fc.segment_pool(y, "local-max", lengths=lengths, compact=False),
    "segment_pool, one sequence": lambda x: fc.segment_pool(x, "uniform:3"),
    "segment_pool, groups": lambda x, group: fc.segment_pool(x, "uniform:2", row_group=group),
    "segment_pool, mask": lambda y: fc.segment_pool(y, "uniform:2", attention_mask=IDS > 5),
    "adjacent_distance": lambda x, cu: fc.adjacent_distance(x, cu_seqlens=cu, lag=2).nan_to_num(),
    "banded_distance": lambda x, cu: fc.banded_distance(x, 3, cu_seqlens=cu).nan_to_num(),
    "greedy_segments": lambda x, cu: fc.greedy_segments(x, 0.5, cu_seqlens=cu),
    "select_boundaries": lambda alpha, cu: fc.select_boundaries(alpha, "local-max", cu_seqlens=cu),
    "normalize_distance": lambda alpha, cu: fc.normalize_distance(alpha, cu_seqlens=cu),
    "segments_from_ids": lambda group, cu: fc.segments_from_ids(group, cu_seqlens=cu),
    "segments_from_starts": lambda cu: fc.segments_from_starts(torch.tensor([3, 7], device="cpu"), 12, cu_seqlens=cu),
    "segment_reduce": lambda x, alpha: fc.segment_reduce(x, SEGMENTS, "mean", alpha),
    "segment_expand": lambda x: fc.segment_expand(x[: len(SEGMENTS.starts)], SEGMENTS),
    "integrate_and_fire": lambda x, alpha, cu: fc.integrate_and_fire(x, alpha, cu_seqlens=cu),
    "integrate_and_fire, padded": lambda y, lengths: fc.integrate_and_fire(y, y[..., 0].abs(), lengths=lengths),
    "integrate_and_fire, targets": lambda x, alpha, target: fc.integrate_and_fire(x, alpha, target_lengths=target),
    "integrate_and_fire, none": lambda x, alpha: fc.integrate_and_fire(x[:0], alpha[:0]),
    "bipartite_merge": lambda x, cu: fc.bipartite_merge(x, 1.5, cu_seqlens=cu),
    "bipartite_merge, all": lambda x, cu: fc.bipartite_merge(x, 1.5, cu_seqlens=cu, window=None),
    "bipartite_merge, nothing": lambda x, cu: fc.bipartite_merge(x, 1.0, cu_seqlens=cu),
    "iterative_fusion": lambda x, cu: fc.iterative_fusion(x, 2, cu_seqlens=cu),
    "iterative_fusion, nothing": lambda x, alpha, cu: fc.iterative_fusion(x, 99, weights=alpha, cu_seqlens=cu),
    "iterative_fusion, padded": lambda y, lengths: fc.iterative_fusion(y, 2, lengths=lengths),
    "row_groups": lambda ids: fc.row_groups(ids, 9, attention_mask=IDS != 7),
    "row_groups, counts": lambda ids, counts: fc.row_groups(ids, 9, placeholder_counts=counts),
    "pack": lambda ids, x, audio: fc.pack(ids, x, x[:7], placeholder=9, audio_cu_seqlens=audio, labels=ids),
    "pack, embeddings": lambda ids, y: fc.pack(ids, inputs_embeds=y, placeholder=9, rule="uniform:2"),
    "pack, groups": lambda x, cu, group: fc.pack(inputs_embeds=x, cu_seqlens=cu, row_group=group, rule="uniform:2"),
    "unpack": lambda ids, x: fc.pack(ids, x, attention_mask=IDS != 9).unpack(side="left"),
    "results": lambda x, cu: of_result(fc.segment_pool(x, "uniform:2", cu_seqlens=cu)),
    "NoveltyPool": lambda x, cu: fc.nn.NoveltyPool(0.9)(x, cu),
    "StreamingSegmentPool": lambda x: stream(lambda: fc.StreamingSegmentPool("local-max"), x),
    "StreamingSegmentPool, lookback": lambda x: stream(lambda: fc.StreamingSegmentPool("lookback:2,threshold=0.9"), x),
    "StreamingIntegrateAndFire": lambda x, alpha: stream(fc.StreamingIntegrateAndFire, x, alpha),
}  # fmt: skip
INPUTS = {
    "x": X, "y": Y, "alpha": ALPHA, "cu": CU, "lengths": LENGTHS, "group": GROUP, "ids": IDS,
    "target": torch.tensor([4]), "counts": torch.tensor([2, 2, 1]), "audio": torch.tensor([0, 2, 4, 7]),
}  # fmt: skip


def inputs(call: Callable[..., Any]) -> dict[str, Tensor]:
    """Return copies of the tensors that a call takes."""
    names = call.__code__.co_varnames[: call.__code__.co_argcount]
    return {name: INPUTS[name].clone() for name in names if name in INPUTS}


def tensors(tree: Any) -> list[Tensor]:
    """Return the tensors of a result, numbers as tensors."""
    if dataclasses.is_dataclass(tree):
        tree = [getattr(tree, field.name) for field in dataclasses.fields(tree)]
    if isinstance(tree, (list, tuple)):
        return [t for item in tree for t in tensors(item)]
    if isinstance(tree, Tensor):
        return [tree]
    return [] if tree is None or isinstance(tree, bool) else [torch.tensor(tree, device="cpu", dtype=torch.float64)]


@pytest.fixture
def restored() -> Iterator[None]:
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)


@pytest.mark.usefixtures("restored")
@pytest.mark.parametrize("backend", ["default", "reference"])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_process_wide_defaults_have_no_effect(call: Callable[..., Any], backend: str):
    def run() -> list[Tensor]:
        given = inputs(call)
        if backend == "default":
            return tensors(call(**given))
        with fc.backend(backend):
            return tensors(call(**given))

    expected = run()
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        torch.set_default_dtype(dtype)
        for a, b in zip(run(), expected, strict=True):
            assert a.dtype == b.dtype
            assert_same_bits(a, b, str(dtype))
    torch.set_default_dtype(torch.float32)
    torch.set_default_device("meta")
    for a, b in zip(run(), expected, strict=True):
        assert a.device == b.device
        assert_same_bits(a, b, "default device")


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_results_share_no_memory_with_arguments(call: Callable[..., Any]):
    given = inputs(call)
    results = tensors(call(**given))
    expected = [t.clone() for t in results]
    addresses = {t.untyped_storage().data_ptr(): name for name, t in given.items()}
    for result in results:
        assert result.untyped_storage().data_ptr() not in addresses or result.untyped_storage().nbytes() == 0
    for t in given.values():
        t.fill_(3)
    for a, b in zip(results, expected, strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_gradients_do_not_depend_on_what_the_caller_does_to_offsets_later(call: Callable[..., Any]):
    """The memory of NumPy arrays changes without autograd's knowledge, so the version of a tensor does not tell."""

    def run(change: bool) -> list[Tensor | None]:
        given = inputs(call)
        leaves = [t.requires_grad_() for t in given.values() if t.is_floating_point()]
        outputs = [t for t in tensors(call(**given)) if t.requires_grad]
        if not outputs:
            pytest.skip("has no gradient")
        if change:
            for t in given.values():
                if not t.is_floating_point():
                    t.numpy().fill(3)
        return list(torch.autograd.grad([t.sum() for t in outputs], leaves, allow_unused=True))

    for a, b in zip(run(True), run(False), strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            assert_same_bits(a, b)


def test_the_trees_of_results_are_those_of_their_fields():
    for result in (fc.segment_pool(X), fc.integrate_and_fire(X, ALPHA), fc.bipartite_merge(X, 2.0)):
        leaves, spec = pytree.tree_flatten(result)
        assert all(isinstance(leaf, (Tensor, int, type(None))) for leaf in leaves)
        again = pytree.tree_unflatten(leaves, spec)
        assert repr(again) == repr(result)
        assert "object at" in repr(pytree.tree_map(lambda leaf: None, result))  # what is no tensor has no sizes

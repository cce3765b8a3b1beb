"""Under ``torch.func.vmap`` ops give the results of a loop, and invalid input gives the error of the input."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fastcompress as fc
from tests.support.sample_inputs import assert_same_bits

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")
X = torch.randn(3, 10, 4, generator=torch.Generator().manual_seed(9))
CU = torch.tensor([[0, 4, 10], [0, 5, 10], [0, 6, 10]])
LEARNED, NOVELTY = fc.nn.LearnedBoundary(4), fc.nn.NoveltyPool(-1.0)  # every frame is a token

CALLS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    **{
        f"segment_pool, {rule}": lambda x, cu, rule=rule: fc.segment_pool(x, rule, cu_seqlens=cu, compact=False).values
        for rule in (
            "uniform:2",
            "local-max",
            "top-k:count=2",
            "lookback:2,threshold=0.9",
            "peak-height",
            "min-variance:2",
        )
    },
    "adjacent_distance": lambda x, cu: fc.adjacent_distance(x, cu_seqlens=cu).nan_to_num(),
    "normalize_distance": lambda x, cu: fc.normalize_distance(x[:, 0], cu_seqlens=cu),
    "greedy_segments": lambda x, cu: fc.greedy_segments(x, 0.5, cu_seqlens=cu, compact=False).starts,
    "segments_from_mask": lambda x, cu: fc.segments_from_mask(x[:, 0] > 0, cu_seqlens=cu, compact=False).starts,
    "iterative_fusion": lambda x, cu: fc.iterative_fusion(x, 2, cu_seqlens=cu).values,
    "NoveltyPool": lambda x, cu: NOVELTY(x, cu).values,
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_vmap_is_a_loop(call: Callable[[Tensor, Tensor], Tensor]):
    for one, x, cu in zip(torch.vmap(call)(X, CU), X, CU, strict=True):
        assert_same_bits(one, call(x, cu))


@pytest.mark.parametrize("name", [name for name in CALLS if name != "normalize_distance"])
@pytest.mark.parametrize("batched", [False, True])
def test_an_error_is_that_of_the_input(name: str, batched: bool):
    call = CALLS[name]
    bad = torch.tensor([0, 4, 99])
    with pytest.raises(ValueError, match="cu_seqlens must end at the number of rows, 10"):
        if batched:
            torch.vmap(call)(X, torch.stack([CU[0], bad, CU[1]]))
        else:
            torch.vmap(lambda x: call(x, bad))(X)


def test_sizes_that_differ():
    with pytest.raises(ValueError, match="different numbers of segments in the samples of vmap: pass compact=False"):
        torch.vmap(lambda x: fc.segment_pool(x, "threshold:1.0").values)(X)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("integrate_and_fire", lambda x: fc.integrate_and_fire(x, x[:, 0].abs()).values),
        ("bipartite_merge", lambda x: fc.bipartite_merge(x, 2.0).values),
        ("LearnedBoundary", lambda x: LEARNED(x).values),
    ],
)
def test_ops_whose_sizes_depend_on_values(name: str, call: Callable[[Tensor], Tensor]):
    with pytest.raises(NotImplementedError, match=f"{name} does not support torch.func.vmap: the size of its result"):
        torch.vmap(call)(X)


def test_row_groups():
    ids, counts = torch.tensor([[9, 9, 2], [9, 2, 9]]), torch.tensor([[2], [1]])
    found = torch.vmap(lambda i: fc.row_groups(i, 9, placeholder_counts=1))(ids)
    assert found.tolist() == [[1, 2, 0], [1, 0, 3]]
    # Counts cannot be compared here; audios that do not match them are dropped, as on a GPU.
    found = torch.vmap(lambda i, c: fc.row_groups(i, 9, placeholder_counts=c))(ids, counts)
    assert found.tolist() == [[1, 1, 0], [-1, 0, -1]]
    with pytest.raises(ValueError, match=r"ids must lie in \[0, 10\), got 14"):
        torch.vmap(lambda i: fc.pack(i + 5, torch.eye(10), compact=False).inputs_embeds)(ids)

"""``segment_pool`` over many chunks has the same bits for every number of threads and callers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

import fastcompress as fc
from fastcompress.reference import OPS
from tests.support.sample_inputs import DTYPES, assert_same_bits, features, offsets

Case = tuple[Tensor, fc.Rule, dict[str, Tensor]]
EDGE = 1024  # rows per chunk, where a row has 256 bytes: csrc/cpu/segment_pool.cpp takes 256 KiB
ROWS = 16 * EDGE  # 4 MB: enough for several threads


@pytest.fixture
def threads() -> Iterator:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def changes(rows: list[int], dtype: torch.dtype, width: int, total: int = ROWS) -> Tensor:
    """Return frames at distance 0 from each other, except for a distance of 1 at the given rows."""
    turn = torch.zeros(total, dtype=torch.long)
    turn[rows] = 1
    x = torch.zeros(total, width, dtype=torch.float64)
    x[torch.arange(total), turn.cumsum(0) % width] = torch.rand(total, dtype=torch.float64) + 0.5
    return x.to(dtype)


def edges() -> list[int]:
    """Return one row per chunk: at its end, one before or one after."""
    return [chunk * EDGE + chunk % 3 - 1 for chunk in range(1, ROWS // EDGE)]


def slow_waves(dtype: torch.dtype, width: int) -> Tensor:
    """Return frames whose distances rise and fall over about two chunks: few peaks of a high order."""
    t = torch.arange(ROWS, dtype=torch.float64)
    angle = ((1.1 + torch.sin(t / 400)) * 0.02).cumsum(0)
    x = torch.zeros(ROWS, width, dtype=torch.float64)
    x[:, 0], x[:, 1] = angle.cos(), angle.sin()
    return x.to(dtype)


def ragged(seed: int = 0) -> tuple[int, ...]:
    """Return lengths that sum to ``ROWS``: many short sequences, then one of several chunks."""
    sizes = torch.randint(0, 9, (EDGE,), generator=torch.Generator().manual_seed(seed)).tolist()
    return (*sizes, ROWS - sum(sizes))


def groups() -> Tensor:
    """Return row groups: runs of dropped, kept and pooled rows, most of them short, some longer than chunks."""
    sizes = torch.tensor([3, 2 * EDGE, 1, 700, 3 * EDGE + 5, 9, EDGE - 1, 2] * 8)
    values = torch.tensor([1, 2, -1, 0, 7, -1, -1, 0] * 8)
    return values.repeat_interleave(sizes)[:ROWS].int()


def cases(dtype: torch.dtype) -> dict[str, Callable[[], Case]]:
    """Return functions that make the frames, the rule and the layout of each case."""
    width = 256 // dtype.itemsize
    packed = {"cu_seqlens": offsets(ragged())}
    lengths = (8 * EDGE, 5, 3 * EDGE + 1)

    def random() -> Tensor:
        return features("smooth", ROWS, width, dtype)

    def changing(rows: list[int]) -> Tensor:
        return changes(rows, dtype, width)

    def long_padding() -> Tensor:
        x = torch.full((3, 8 * EDGE, width), torch.nan, dtype=dtype)
        for row, size in zip(x, lengths, strict=True):
            row[:size] = random()[:size]
        return x

    return {
        "plain": lambda: (random(), fc.LocalMax(), packed),
        "segment longer than chunks": lambda: (changing([5, 5000, 5001, 12000]), fc.Threshold(0.5), {}),
        "boundaries at chunk edges": lambda: (changing(edges()), fc.Threshold(0.5), {}),
        "peaks at chunk edges": lambda: (changing(edges()), fc.LocalMax(threshold=0.5, max_len=900), {}),
        "sequences end at chunk edges": lambda: (
            random(),
            fc.LocalMax(),
            {"cu_seqlens": torch.tensor([0, *edges(), ROWS])},
        ),
        "min_len longer than a chunk": lambda: (random(), fc.Threshold(-1.0, min_len=EDGE + 500), packed),
        "max_len longer than a chunk": lambda: (changing([5]), fc.Threshold(0.5, max_len=EDGE + 500), {}),
        "max_len of a chunk": lambda: (changing([]), fc.Threshold(0.5, max_len=EDGE), {}),
        "order longer than a chunk": lambda: (slow_waves(dtype, width), fc.LocalMax(order=EDGE + 100), {}),
        "order longer than everything": lambda: (random(), fc.LocalMax(order=10**9), packed),
        "uniform": lambda: (random(), fc.Uniform(3), packed),
        "uniform longer than a chunk": lambda: (random(), fc.Uniform(EDGE + 500, tail="drop"), {}),
        "padding longer than chunks": lambda: (long_padding(), fc.LocalMax(2), {"lengths": torch.tensor(lengths)}),
        "groups longer than chunks": lambda: (
            random(),
            fc.LocalMax(min_len=3, max_len=900),
            {"row_group": groups(), **packed},
        ),
    }


def parts(pooled: fc.Pooled) -> dict[str, Tensor]:
    s = pooled.segments
    # Compare the segments first: values of other segments cannot be compared.
    return dict(cu_segments=s.cu_segments, starts=s.starts, lengths=s.lengths, values=pooled.values)


def assert_same(actual: fc.Pooled, expected: fc.Pooled, what: str) -> None:
    for (name, a), b in zip(parts(actual).items(), parts(expected).values(), strict=True):
        assert_same_bits(a, b, f"{what}: {name}")


def composed(x: Tensor, rule: fc.Rule, layout: dict[str, Tensor]) -> fc.Pooled:
    d = fc.adjacent_distance(x, **{name: value for name, value in layout.items() if name != "row_group"})
    segments = fc.select_boundaries(d, rule, **layout)
    return fc.Pooled(fc.segment_reduce(x, segments), segments)


# Chunks depend on bytes, not on the dtype: all cases run in one dtype, and the first two in all dtypes.
CASES = list(cases(torch.float32))


@pytest.mark.parametrize(
    ("dtype", "case"),
    [*((torch.float32, case) for case in CASES), *((dtype, case) for dtype in DTYPES[1:] for case in CASES[:2])],
    ids=str,
)
def test_chunks_and_threads_do_not_matter(dtype: torch.dtype, case: str, threads):
    x, rule, layout = cases(dtype)[case]()
    threads(1)
    expected = composed(x, rule, layout)
    assert_same(fc.segment_pool(x, rule=rule, **layout), expected, "one thread")
    threads(2)
    for _ in range(3):
        assert_same(fc.segment_pool(x, rule=rule, **layout), expected, "two threads")
    assert_same(composed(x, rule, layout), expected, "the parts on two threads")


# The cases with long segments, and with segments that cross chunks.
LONG = {
    "segment longer than chunks": 4995,
    "boundaries at chunk edges": EDGE + 1,
    "min_len longer than a chunk": EDGE + 500,
    "max_len longer than a chunk": EDGE + 500,
    "max_len of a chunk": EDGE,
    "order longer than a chunk": 2 * EDGE,
    "uniform longer than a chunk": EDGE + 500,
}


@pytest.mark.parametrize("case", LONG)
def test_cases_are_what_they_say(case: str):
    x, rule, layout = cases(torch.float32)[case]()
    lengths = fc.segment_pool(x, rule=rule, **layout).segments.lengths
    assert len(lengths) > 3
    assert lengths.max() >= LONG[case]


@pytest.mark.parametrize("case", ["plain", "segment longer than chunks", "padding longer than chunks"])
def test_definition(case: str, threads):
    x, rule, layout = cases(torch.float32)[case]()
    threads(2)
    pooled = fc.segment_pool(x, rule=rule, **layout)
    args = x, None, layout.get("cu_seqlens"), layout.get("lengths"), None, *rule.op_args(), True
    for name, expected in zip(("values", "starts", "lengths", "cu_segments"), OPS["segment_pool"](*args), strict=True):
        assert_same_bits(parts(pooled)[name], expected, name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_wider_than_a_chunk(dtype: torch.dtype, threads):
    x = features("smooth", 40, 280_000 // dtype.itemsize, dtype)
    threads(1)
    expected = composed(x, fc.LocalMax(), {})
    assert_same(fc.segment_pool(x), expected, "one thread")
    threads(2)
    assert_same(fc.segment_pool(x), expected, "two threads")


@pytest.mark.parametrize("reduce", ["mean", "sum", "max", "first", "last", "middle", "weights"])
@pytest.mark.parametrize("case", ["plain", "segment longer than chunks", "groups longer than chunks"])
def test_gradients_do_not_depend_on_threads(case: str, reduce: str, threads):
    x, rule, layout = cases(torch.float32)[case]()
    inputs = [x.requires_grad_()]
    how = {"reduce": reduce}
    if reduce == "weights":
        inputs.append(torch.rand(len(x)).requires_grad_())
        how = {"weights": inputs[1]}
    results = []
    for count in (1, 2, 2):
        threads(count)
        values = fc.segment_pool(x, rule=rule, **how, **layout).values
        grad = torch.randn(values.shape, generator=torch.Generator().manual_seed(1))
        results.append([values.detach(), *torch.autograd.grad(values, inputs, grad)])
    for other in results[1:]:
        for name, a, b in zip(("values", "grad of x", "grad of weights"), other, results[0], strict=False):
            assert_same_bits(a, b, name)


def test_gradient_of_distances_does_not_depend_on_threads(threads):
    x, _, layout = cases(torch.float32)["plain"]()
    x.requires_grad_()
    results = []
    for count in (1, 2, 2):
        threads(count)
        d = fc.adjacent_distance(x, **layout)
        grad = torch.randn(d.shape, generator=torch.Generator().manual_seed(1))
        results.append(torch.autograd.grad(d, x, grad)[0])
    assert_same_bits(results[1], results[0])
    assert_same_bits(results[2], results[0])


@pytest.mark.parametrize("inner", [1, 2])
def test_concurrent_callers(inner: int, threads):
    threads(inner)
    names = ["plain", "segment longer than chunks", "boundaries at chunk edges", "padding longer than chunks"]
    work = [cases(torch.float32)[name]() for name in names]
    expected = [composed(*one) for one in work]

    def call(i: int) -> fc.Pooled:
        torch.set_num_threads(inner)  # the setting is per thread
        x, rule, layout = work[i % len(work)]
        return fc.segment_pool(x, rule=rule, **layout)

    with ThreadPoolExecutor(4) as pool:
        for i, pooled in enumerate(pool.map(call, range(24))):
            assert_same(pooled, expected[i % len(work)], names[i % len(work)])


def test_concurrent_gradients():
    x, rule, layout = cases(torch.float32)["plain"]()

    def call(_: int) -> Tensor:
        leaf = x.clone().requires_grad_()
        fc.segment_pool(leaf, rule=rule, **layout).values.square().sum().backward()
        return leaf.grad

    expected = call(0)
    with ThreadPoolExecutor(4) as pool:
        for grad in pool.map(call, range(12)):
            assert_same_bits(grad, expected)

"""``adjacent_distance``: the same bits as the definition, close to the exact cosine, and its gradient."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

import fastcompress as fc
from fastcompress.reference import OPS
from tests.support.sample_inputs import (
    DTYPES,
    RAGGED,
    WIDE,
    WIDTHS,
    WIDTHS_AND_FEATURES,
    Batch,
    assert_same_bits,
    batches,
    expanded,
    features,
    offsets,
    packed,
    padded,
    strided,
)

LAGS = (1, 2, 5, 64, 1000)
EPS = 1e-8


def reference(x: Tensor, layout: dict[str, Tensor], lag: int = 1) -> Tensor:
    return OPS["adjacent_distance"](x, layout.get("cu_seqlens"), layout.get("lengths"), lag)


def reference_backward(grad: Tensor, x: Tensor, layout: dict[str, Tensor], lag: int = 1) -> Tensor:
    return OPS["adjacent_distance_backward"](grad, x, layout.get("cu_seqlens"), layout.get("lengths"), lag)


def gradient(x: Tensor, layout: dict[str, Tensor], grad: Tensor, lag: int = 1) -> Tensor:
    x = x.detach().requires_grad_()
    fc.adjacent_distance(x, **layout, lag=lag).backward(grad)
    assert x.grad is not None
    return x.grad


def distance_batches(width: int, dtype: torch.dtype) -> list[Batch]:
    return [b for b in batches(width, dtype) if not {"row_group", "attention_mask"} & set(b.layout)]


def pairs(batch: Batch, lag: int) -> Tensor:
    """Return the rows that have a partner, as indices of ``x.reshape(-1, D)``."""
    rows = [t for begin, end in batch.sequences() for t in range(begin, end - lag)]
    return torch.tensor(rows, dtype=torch.int64)


def random_grad(d: Tensor) -> Tensor:
    return torch.randn(d.shape, dtype=d.dtype, generator=torch.Generator().manual_seed(1))


def plain_cosine(a: Tensor, b: Tensor) -> Tensor:
    """Return the distances of rows as a user would write them in PyTorch."""
    norms = torch.linalg.vector_norm(a, dim=-1).clamp_min(EPS) * torch.linalg.vector_norm(b, dim=-1).clamp_min(EPS)
    return 1 - (a * b).sum(-1) / norms


# The same bits as the definition


@pytest.mark.parametrize(("width", "kind"), WIDTHS_AND_FEATURES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_as_reference(dtype: torch.dtype, width: int, kind: str):
    batch = packed(kind, width, dtype)
    d = fc.adjacent_distance(batch.x, **batch.layout)
    assert_same_bits(d, reference(batch.x, batch.layout), "d")
    grad = random_grad(d)
    assert_same_bits(gradient(batch.x, batch.layout, grad), reference_backward(grad, batch.x, batch.layout), "gradient")


# Widths: less than a vector, with a tail, whole vectors. Lags: rows of equal index modulo the lag are scored as one
# sequence, in the same way for every dtype; 64 is longer than most sequences, and 1000 is longer than all.
@pytest.mark.parametrize(
    ("dtype", "width", "lag"),
    [
        *((dtype, width, 1) for dtype in DTYPES for width in (1, 33, 128)),
        *((dtype, 33, 5) for dtype in DTYPES),
        *((torch.float32, 33, lag) for lag in LAGS if lag not in (1, 5)),
    ],
    ids=str,
)
def test_same_bits_as_reference_in_every_layout(dtype: torch.dtype, width: int, lag: int):
    for batch in distance_batches(width, dtype):
        d = fc.adjacent_distance(batch.x, **batch.layout, lag=lag)
        assert_same_bits(d, reference(batch.x, batch.layout, lag), f"{batch}: d")
        grad = random_grad(d)
        expected = reference_backward(grad, batch.x, batch.layout, lag)
        assert_same_bits(gradient(batch.x, batch.layout, grad, lag), expected, f"{batch}: gradient")


# Both layouts read a row in the same way; a padded batch has one more stride.
@pytest.mark.parametrize(
    ("dtype", "width", "layout"),
    [
        *((dtype, width, "packed") for dtype in DTYPES for width in (1, 7, 33, 128, 257)),
        *((dtype, 33, "padded") for dtype in DTYPES),
    ],
    ids=str,
)
def test_strides_do_not_matter(dtype: torch.dtype, width: int, layout: str):
    batch = (packed if layout == "packed" else padded)("smooth", width, dtype)
    expected = fc.adjacent_distance(batch.x, **batch.layout)
    grad = random_grad(expected)
    expected_grad = gradient(batch.x, batch.layout, grad)
    for name, x in strided(batch.x):
        assert_same_bits(fc.adjacent_distance(x, **batch.layout), expected, name)
        assert_same_bits(gradient(x, batch.layout, grad), expected_grad, f"{name}: gradient")
    for name, strided_grad in strided(grad[..., None]):
        assert_same_bits(gradient(batch.x, batch.layout, strided_grad[..., 0]), expected_grad, f"grad {name}")
    ones = torch.ones_like(expected)
    expanded = torch.ones((), dtype=expected.dtype).expand(expected.shape)
    assert_same_bits(gradient(batch.x, batch.layout, expanded), gradient(batch.x, batch.layout, ones), "expanded")


@pytest.mark.parametrize("width", WIDE)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_as_reference_on_wide_rows(dtype: torch.dtype, width: int):
    batch = packed("smooth", width, dtype, (3, 0, 9, 1))
    d = fc.adjacent_distance(batch.x, **batch.layout)
    assert_same_bits(d, reference(batch.x, batch.layout), "d")
    grad = random_grad(d)
    assert_same_bits(gradient(batch.x, batch.layout, grad), reference_backward(grad, batch.x, batch.layout), "gradient")


@pytest.mark.parametrize("width", (1, 33, 64))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_expanded_input(dtype: torch.dtype, width: int):
    for name, x in expanded(20, width, dtype):
        copy = x.contiguous()
        assert_same_bits(fc.adjacent_distance(x), reference(copy, {}), name)
        grad = random_grad(fc.adjacent_distance(x))
        assert_same_bits(gradient(x, {}, grad), reference_backward(grad, copy, {}), f"{name}: gradient")


def dot_by_hand(a: Tensor, b: Tensor) -> float:
    """Compute the dot product as docs/numerics.md defines it: 32 sums, then a tree in fp64."""
    dtype = np.float64 if a.dtype == torch.float64 else np.float32
    a, b = (row.double().numpy().astype(dtype) for row in (a, b))
    sums = np.zeros(32, dtype)
    for i in range(len(a)):
        sums[i % 32] = sums[i % 32] + a[i] * b[i]
    tree = [float(value) for value in sums]
    for half in (16, 8, 4, 2, 1):
        tree = [tree[j] + tree[j + half] for j in range(half)]
    return tree[0]


@pytest.mark.parametrize("width", (1, 31, 32, 33, 65, 257))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_order_of_additions(dtype: torch.dtype, width: int):
    x = features("smooth", 12, width, dtype, seed=7)
    by_hand, dots = [], [dot_by_hand(a, b) for a, b in zip(x, x[1:], strict=False)]
    squares = [dot_by_hand(a, a) for a in x]
    for t, dot in enumerate(dots):
        by_hand.append(1 - dot / (max(math.sqrt(squares[t]), EPS) * max(math.sqrt(squares[t + 1]), EPS)))
    expected = torch.tensor(by_hand, dtype=torch.float64).to(fc.adjacent_distance(x).dtype)
    assert_same_bits(fc.adjacent_distance(x)[:-1], expected, "op")
    assert_same_bits(reference(x, {})[:-1], expected, "reference")


@pytest.mark.parametrize("lag", (1, 3))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_distance_depends_on_its_pair_alone(dtype: torch.dtype, lag: int):
    batch = packed("iid", 33, dtype)
    d = fc.adjacent_distance(batch.x, **batch.layout, lag=lag)
    for t in pairs(batch, lag).tolist():
        alone = fc.adjacent_distance(torch.stack([batch.x[t], batch.x[t + lag]]))
        assert_same_bits(alone[0], d[t], f"frame {t}")


# Values


def tolerance(width: int, dtype: torch.dtype) -> float:
    """Bound of |d - exact| for cosines of ordinary numbers.

    A lane adds k = ceil(D / 32) products with at most k roundings (the first addition is exact). With u = 2^-24, the
    error of the dot product is at most k u |a| |b|. Each squared norm has a factor of at most 1 + k u, which the root
    halves. The error of the cosine is therefore at most 2 k u, and rounding d, which is at most 2, adds 2 u. (Products
    of half types are exact, and the error of the fp64 tree is negligible.) For fp64, u = 2^-53, and the tree of 5
    levels, two roots, a product, a quotient and the subtraction count as well: 2 (k + 5) + 6. The oracle is also in
    fp64, in any order of additions, and adds 2 D + 6.
    """
    k = math.ceil(width / 32)
    if dtype == torch.float64:
        return (2 * (k + 5) + 6 + 2 * width + 6) * 2.0**-53
    return (2 * k + 2) * 2.0**-24


# Kinds: cosines near 0, close to 1, and equal to 1.
@pytest.mark.parametrize(
    ("width", "kind"),
    [*((width, "iid") for width in WIDTHS), *((width, k) for width in (33, 257) for k in ("smooth", "repeated"))],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_close_to_the_exact_cosine(dtype: torch.dtype, width: int, kind: str):
    batch = packed(kind, width, dtype)
    index = pairs(batch, 1)
    d = fc.adjacent_distance(batch.x, **batch.layout)
    exact = plain_cosine(batch.x.double()[index], batch.x.double()[index + 1])
    error = (d[index].double() - exact).abs().max().item()
    assert error <= tolerance(width, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_result_dtype_and_shape(dtype: torch.dtype):
    for batch in distance_batches(3, dtype):
        d = fc.adjacent_distance(batch.x, **batch.layout)
        assert d.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert d.shape == batch.x.shape[:-1]
        assert not d.requires_grad


@pytest.mark.parametrize("width", (1, 33, 257))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zero_rows(dtype: torch.dtype, width: int):
    zero, one = torch.zeros(width, dtype=dtype), torch.ones(width, dtype=dtype)
    x = torch.stack([zero, zero, one, zero, -zero, one])
    assert fc.adjacent_distance(x)[:-1].tolist() == [0, 1, 1, 0, 1]
    # A pair of two zero rows gives no gradient. Norms below eps are eps, so a zero row next to y gets -y / (eps |y|).
    grad = gradient(x, {}, torch.tensor([1.0, 0, 0, 0, 0, 0], dtype=fc.adjacent_distance(x).dtype))
    assert not grad.any()
    grad = gradient(x, {}, torch.tensor([0, 1.0, 0, 0, 0, 0], dtype=fc.adjacent_distance(x).dtype))
    assert not grad[[0, 2, 3, 4, 5]].any()
    expected = torch.full((width,), -1 / (EPS * math.sqrt(width)), dtype=torch.float64).to(dtype)  # inf in fp16
    torch.testing.assert_close(grad[1], expected, rtol=2 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize(("dtype", "value"), [(torch.float32, 1e-25), (torch.bfloat16, 1e-25), (torch.float64, 1e-170)])
def test_rows_whose_square_is_zero_count_as_zero(dtype: torch.dtype, value: float):
    x = torch.full((3, 4), value, dtype=dtype)
    x[1] *= -1
    x = torch.cat([x, torch.ones(1, 4, dtype=dtype)])
    assert fc.adjacent_distance(x)[:2].tolist() == [0, 0]
    assert fc.adjacent_distance(x)[2] == 1 - torch.tensor(4 * value / (EPS * 2)).item()


@pytest.mark.parametrize("lag", LAGS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_exactly_where_no_pair_is(dtype: torch.dtype, lag: int):
    for batch in distance_batches(7, dtype):
        expected = torch.ones(batch.x.shape[:-1], dtype=torch.bool).view(-1)
        expected[pairs(batch, lag)] = False
        assert torch.equal(fc.adjacent_distance(batch.x, **batch.layout, lag=lag).isnan().view(-1), expected), batch


@pytest.mark.parametrize("width", (1, 7, 64))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_non_finite_frames_give_nan_on_both_sides_only(dtype: torch.dtype, width: int):
    batch = packed("nonfinite", width, dtype)
    bad = ~batch.x.isfinite().all(-1)
    expected = torch.ones(len(batch.x), dtype=torch.bool)
    index = pairs(batch, 1)
    expected[index] = bad[index] | bad[index + 1]
    assert not expected.all() and bad.any()
    assert torch.equal(fc.adjacent_distance(batch.x, **batch.layout).isnan(), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_without_elements_are_zero_rows(dtype: torch.dtype):
    x = torch.zeros(5, 0, dtype=dtype)
    d = fc.adjacent_distance(x, cu_seqlens=torch.tensor([0, 3, 5]))
    assert_same_bits(d, torch.tensor([0, 0, math.nan, 0, math.nan], dtype=d.dtype))
    assert_same_bits(reference(x, {"cu_seqlens": torch.tensor([0, 3, 5])}), d)
    assert gradient(x, {}, d.nan_to_num()).shape == (5, 0)


HUGE_LAGS = [2**31, 2**32 + 1, 2**62, 2**63 - 1]


@pytest.mark.parametrize("lag", HUGE_LAGS)
@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_huge_lag_leaves_no_pair(layout: str, lag: int):
    batch = (packed if layout == "packed" else padded)("iid", 3, torch.float32)
    d = fc.adjacent_distance(batch.x, **batch.layout, lag=lag)
    assert d.isnan().all() and reference(batch.x, batch.layout, lag).isnan().all()
    ones = torch.ones_like(d)
    assert not gradient(batch.x, batch.layout, ones, lag).any()
    assert not reference_backward(ones, batch.x, batch.layout, lag).any()


# Gradient


@pytest.mark.parametrize("lag", (1, 2))
@pytest.mark.parametrize("layout", ["packed", "padded", "one sequence", "full"])
def test_gradcheck(layout: str, lag: int):
    lengths = (0, 1, 2, 4, 3)
    batch = {
        "packed": packed("iid", 5, torch.float64, lengths),
        "padded": padded("iid", 5, torch.float64, lengths),
        "one sequence": Batch("", features("iid", 6, 5, torch.float64), {}),
        "full": Batch("", features("iid", 8, 5, torch.float64).view(2, 4, 5), {}),
    }[layout]
    x = torch.where(batch.x.isnan(), 0, batch.x).requires_grad_()  # finite differences of NaN are NaN
    index = pairs(batch, lag)
    assert len(index)

    def distances(x: Tensor) -> Tensor:
        return fc.adjacent_distance(x, **batch.layout, lag=lag).flatten()[index]

    assert torch.autograd.gradcheck(distances, (x,))


@pytest.mark.parametrize(("width", "lag"), [*((width, 1) for width in (1, 3, 32, 65, 257)), (65, 3)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_is_that_of_the_plain_expression(dtype: torch.dtype, width: int, lag: int):
    batch = padded("iid", width, dtype)
    index = pairs(batch, lag)
    d = fc.adjacent_distance(batch.x, **batch.layout, lag=lag)
    grad = random_grad(d)
    actual = gradient(batch.x, batch.layout, grad, lag).double().flatten(0, 1)

    rows = batch.x.detach().double().flatten(0, 1).requires_grad_()
    exact = plain_cosine(rows[index], rows[index + lag])
    (expected,) = torch.autograd.grad(exact, rows, grad.flatten()[index].double())

    # A row's gradient is a sum of four terms: of two pairs, the term of the row itself and that of its partner. Each is
    # at most g = |grad| / |x|, since |cos| <= 1. The error of the cosine is 2 k u (see `tolerance`), that of the
    # coefficients 2 k u, of their rounding u, and of products and sums 4 u. In fp64 the tree, the epilogue and the
    # oracle add 2 D + 32. Rounding to the
    # type adds its unit u' of the result and at most its smallest subnormal.
    size = grad.flatten()[index].abs().double()
    share = torch.zeros(len(rows), dtype=torch.float64)
    share.index_add_(0, index, size).index_add_(0, index + lag, size)
    share = share / rows.detach().norm(dim=-1)
    k = math.ceil(width / 32)
    if dtype == torch.float64:
        bound = 2 * share[:, None] * (4 * k + 5 + 2 * width + 32) * 2.0**-53
    else:
        info = torch.finfo(dtype)
        last = info.eps / 2 * expected.abs() + info.smallest_normal * info.eps
        bound = 2 * share[:, None] * (4 * k + 5) * 2.0**-24 + last
    touched = share.isfinite() & (share > 0)
    assert touched.any()
    assert ((actual - expected).abs() <= bound)[touched].all()
    assert not actual[~touched].any(), "rows without a pair have gradient 0"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_at_rows_without_a_pair_is_not_used(dtype: torch.dtype):
    for batch in (packed("iid", 9, dtype), padded("iid", 9, dtype)):
        grad = random_grad(fc.adjacent_distance(batch.x, **batch.layout))
        expected = gradient(batch.x, batch.layout, grad)
        assert expected.isfinite().all()
        spoiled = torch.full_like(grad, torch.nan).flatten()
        spoiled[pairs(batch, 1)] = grad.flatten()[pairs(batch, 1)]
        assert_same_bits(gradient(batch.x, batch.layout, spoiled.view_as(grad)), expected, str(batch))


def test_sequences_do_not_mix():
    """The gradient of one sequence is that of the sequence alone."""
    batch = packed("smooth", 33, torch.float32)
    grad = random_grad(fc.adjacent_distance(batch.x, **batch.layout))
    whole = gradient(batch.x, batch.layout, grad)
    for begin, end in batch.sequences():
        assert_same_bits(gradient(batch.x[begin:end], {}, grad[begin:end]), whole[begin:end], f"{begin}:{end}")


def test_no_gradient_where_none_is_needed():
    x = features("iid", sum(RAGGED), 4, torch.float32).requires_grad_()
    with torch.no_grad():
        assert not fc.adjacent_distance(x, cu_seqlens=offsets(RAGGED)).requires_grad
    assert fc.adjacent_distance(x, cu_seqlens=offsets(RAGGED)).requires_grad


@pytest.mark.filterwarnings("ignore:.*autograd kernel was not registered")
def test_second_derivatives_are_refused():
    """The op has first derivatives only. A second derivative raises an error and is not silently zero."""
    x = features("iid", 5, 4, torch.float64).requires_grad_()
    d = fc.adjacent_distance(x)[:-1].square()
    with pytest.raises(RuntimeError):
        (grad,) = torch.autograd.grad(d.sum(), x, create_graph=True)
        torch.autograd.grad(grad.square().sum(), x)

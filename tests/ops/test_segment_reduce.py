"""``segment_reduce`` and ``segment_expand``: equal bits, exact sums, derivatives."""

from __future__ import annotations

import functools
from itertools import accumulate

import numpy as np
import pytest
import torch
from torch import Tensor

import fastcompress as fc
from fastcompress.ops.segment_reduce import REDUCTIONS
from fastcompress.reference import OPS
from tests.support.sample_inputs import DTYPES, FEATURES, WIDE, WIDTHS, assert_same_bits, expanded, features, strided

LENGTHS = (1, 2, 0, 3, 5, 8, 63, 64, 0, 65, 127, 128, 129, 1)
GAPS = (0, 2, 0, 1, 0, 0, 3, 0, 0, 0, 1, 0, 4, 0)  # number of rows in no segment before each segment
HALVES = (torch.float16, torch.bfloat16)
LINEAR = ("mean", "sum", "first", "last", "middle")


def make(lengths: tuple[int, ...] = LENGTHS, gaps: tuple[int, ...] | None = GAPS, tail: int = 2) -> fc.Segments:
    """Return segments of one sequence, with gaps before them and ``tail`` rows after them."""
    ends = list(accumulate(a + b for a, b in zip(lengths, gaps or (0,) * len(lengths), strict=True)))
    starts = [end - length for end, length in zip(ends, lengths, strict=True)]
    rows = (ends[-1] if ends else 0) + tail
    offsets = [torch.tensor([0, count], dtype=torch.int32) for count in (len(lengths), rows)]
    return fc.Segments(torch.tensor(starts).long(), torch.tensor(lengths).long(), *offsets, rows)


def slices(segments: fc.Segments) -> list[slice]:
    return [slice(a, a + n) for a, n in zip(segments.starts.tolist(), segments.lengths.tolist(), strict=True)]


def weights_of(rows: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(rows, generator=torch.Generator().manual_seed(2), dtype=dtype) + 0.1


def accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def gradients(run, *inputs: Tensor) -> tuple[Tensor, ...]:
    """Return the gradients of ``run`` for a random cotangent, and the cotangent."""
    inputs = tuple(i.detach().requires_grad_() for i in inputs)
    y = run(*inputs)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(y.dtype)
    return *torch.autograd.grad(y, inputs, grad), grad


def sum_error(length: int, dtype: torch.dtype) -> float:
    """Return the error bound relative to sum |x|: the additions on the longest path, within and over blocks of 64."""
    unit = 2.0**-53 if dtype == torch.float64 else 2.0**-24
    return max(min(length, 64) - 1 + -(-length // 64) - 1, 0) * unit


# The same bits as the definition


# Widths: all strips, units and tails of a row, for means. Other reductions need fewer widths: sums are means without
# the division, maxima are another instance of the same template (33: a unit and a tail, 257: strips and a tail), and
# the others copy a row.
@pytest.mark.parametrize(
    ("width", "reduce"),
    [
        *((width, "mean") for width in (*WIDTHS, *WIDE)),
        *((width, reduce) for width in (33, 257) for reduce in REDUCTIONS if reduce != "mean"),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_as_reference(dtype: torch.dtype, width: int, reduce: str):
    segments = make() if width in WIDTHS else make((1, 0, 2, 9), (0, 1, 0, 0), 1)
    x, args = features("iid", segments.num_rows, width, dtype), (segments.starts, segments.lengths)
    y = fc.segment_reduce(x, segments, reduce)
    assert_same_bits(y, OPS["segment_reduce"](x, *args, reduce), "values")
    grad_x, grad = gradients(lambda x: fc.segment_reduce(x, segments, reduce), x)
    backward = OPS["segment_max_backward" if reduce == "max" else "segment_expand"]
    inputs = (grad, x, y, *args) if reduce == "max" else (grad, *args, segments.num_rows, reduce)
    assert_same_bits(grad_x, backward(*inputs), "gradient")


@pytest.mark.parametrize("width", (*WIDTHS, *WIDE))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_as_reference_with_weights(dtype: torch.dtype, width: int):
    segments = make() if width in WIDTHS else make((1, 0, 2, 9), (0, 1, 0, 0), 1)
    x, w = features("iid", segments.num_rows, width, dtype), weights_of(segments.num_rows, accumulator(dtype))
    args = (segments.starts, segments.lengths)
    y = fc.segment_reduce(x, segments, weights=w)
    assert_same_bits(y, OPS["segment_weighted_mean"](x, w, *args), "values")
    grad_x, grad_w, grad = gradients(lambda x, w: fc.segment_reduce(x, segments, weights=w), x, w)
    expected_x, expected_w = OPS["segment_weighted_mean_backward"](grad, x, y, w, *args)
    assert_same_bits(grad_x, expected_x, "gradient of x")
    assert_same_bits(grad_w, expected_w, "gradient of weights")


@pytest.mark.parametrize(("width", "kind"), [*((width, "iid") for width in WIDTHS), (33, "nonfinite")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_expand(dtype: torch.dtype, width: int, kind: str):
    segments = make()
    y, ids = features(kind, len(segments.starts), width, dtype), segments.ids()
    assert_same_bits(fc.segment_expand(y, segments), torch.where(ids[:, None] >= 0, y[ids], 0), "values")
    grad_y, grad = gradients(lambda y: fc.segment_expand(y, segments), y)
    assert_same_bits(grad_y, OPS["segment_reduce"](grad, segments.starts, segments.lengths, "sum"), "gradient")


# Means and maxima depend on all values. Sums are means without the division, and the other reductions copy a row.
@pytest.mark.parametrize(
    ("kind", "reduce"),
    [
        *((kind, reduce) for kind in FEATURES for reduce in ("mean", "max")),
        *(("nonfinite", reduce) for reduce in REDUCTIONS if reduce not in ("mean", "max")),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_as_reference_on_odd_values(dtype: torch.dtype, kind: str, reduce: str):
    segments = make()
    x = features(kind, segments.num_rows, 33, dtype)
    x[::5] *= -1  # includes zeros of both signs
    args = (x, segments.starts, segments.lengths, reduce)
    assert_same_bits(fc.segment_reduce(x, segments, reduce), OPS["segment_reduce"](*args), "values")


@pytest.mark.parametrize(
    ("width", "reduce"), [*((33, reduce) for reduce in (*REDUCTIONS, "weighted")), (1, "mean"), (128, "mean")]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides_do_not_matter(dtype: torch.dtype, width: int, reduce: str):
    segments = make()
    x, w = features("iid", segments.num_rows, width, dtype), weights_of(segments.num_rows, accumulator(dtype))
    kind = "mean" if reduce == "weighted" else reduce

    def run(x: Tensor, w: Tensor) -> Tensor:
        return fc.segment_reduce(x, segments, kind, w if reduce == "weighted" else None)

    expected = run(x, w)
    expected_grad, grad = gradients(lambda x: run(x, w), x)
    strided_weights = dict(strided(w[:, None]))
    for name, other in strided(x):
        assert_same_bits(run(other, strided_weights[name][:, 0]), expected, name)
        assert_same_bits(gradients(lambda x: run(x, w), other)[0], expected_grad, f"{name}: gradient")
    for name, other in strided(grad):
        leaf = x.detach().requires_grad_()
        assert_same_bits(torch.autograd.grad(run(leaf, w), leaf, other)[0], expected_grad, f"{name}: strided gradient")
    for name, other in strided(expected):
        assert_same_bits(fc.segment_expand(other, segments), fc.segment_expand(expected, segments), f"{name}: expand")


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_expanded_input(dtype: torch.dtype, reduce: str):
    segments = make()
    args = segments.starts, segments.lengths, reduce
    for width in (1, 33, 64):
        for name, x in expanded(segments.num_rows, width, dtype):
            assert_same_bits(fc.segment_reduce(x, segments, reduce), OPS["segment_reduce"](x.contiguous(), *args), name)
        for name, y in expanded(len(segments.starts), width, dtype):
            assert_same_bits(fc.segment_expand(y, segments), fc.segment_expand(y.contiguous(), segments), name)


def sum_by_hand(rows: np.ndarray) -> np.ndarray:
    """Compute the sum as docs/numerics.md defines it: blocks of 64 rows from the first row, then the blocks."""
    blocks = [functools.reduce(np.add, rows[first : first + 64]) for first in range(0, len(rows), 64)]
    return functools.reduce(np.add, blocks)


@pytest.mark.parametrize("reduce", ("sum", "mean", "weighted"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_order_of_additions(dtype: torch.dtype, reduce: str):
    segments = make((1, 2, 63, 64, 65, 200), None, 0)
    x, w = features("smooth", segments.num_rows, 5, dtype), weights_of(segments.num_rows, accumulator(dtype))
    # Weights of 1 change no bit of a mean.
    factors = w.numpy()[:, None] if reduce == "weighted" else np.ones_like(w.numpy())[:, None]
    terms = x.to(w.dtype).numpy() * factors
    for m, part in enumerate(slices(segments)):
        total = sum_by_hand(terms[part]) / (1 if reduce == "sum" else sum_by_hand(factors[part]))
        assert total.dtype == terms.dtype
        actual = fc.segment_reduce(x, segments, *(("mean", w) if reduce == "weighted" else (reduce,)))
        assert_same_bits(actual[m], torch.from_numpy(total).to(dtype), f"{part}")


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_padded_input_is_its_rows(reduce: str):
    segments = make((3, 4, 0, 5), (1, 0, 0, 5), 2)
    x = features("iid", segments.num_rows, 5, torch.float32)
    padded = x.view(4, 5, 5)
    assert_same_bits(fc.segment_reduce(padded, segments, reduce), fc.segment_reduce(x, segments, reduce))
    w = weights_of(20)
    actual = fc.segment_reduce(padded, segments, weights=w.view(4, 5))
    assert_same_bits(actual, fc.segment_reduce(x, segments, weights=w))
    grad, _ = gradients(lambda x: fc.segment_reduce(x, segments, reduce), padded)
    assert_same_bits(grad.flatten(0, 1), gradients(lambda x: fc.segment_reduce(x, segments, reduce), x)[0])


# Oracles


@pytest.mark.parametrize("reduce", ("mean", "sum", "max"))
@pytest.mark.parametrize("kind", ("iid", "smooth", "repeated"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_torch_segment_reduce(dtype: torch.dtype, kind: str, reduce: str):
    lengths = tuple(n for n in LENGTHS if n)
    segments = make(lengths, None, 0)
    x = features(kind, segments.num_rows, 9, dtype)
    y = fc.segment_reduce(x, segments, reduce)
    expected = torch.segment_reduce(x, reduce, lengths=segments.lengths, axis=0)
    if reduce == "max":
        assert_same_bits(y, expected)
        return
    for row, other, part in zip(y, expected, slices(segments), strict=True):
        # torch adds n values one by one, with n - 1 roundings of the running sum. The mean adds a division to both.
        n = part.stop - part.start
        unit = torch.finfo(dtype).eps / 2
        size = x[part].abs().sum(0) / (n if reduce == "mean" else 1)
        bound = size * (sum_error(n, dtype) + (n - 1) * unit + 2 * unit)
        assert ((row - other).abs() <= bound).all()


@pytest.mark.parametrize("reduce", (*REDUCTIONS, "weighted"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_numpy(dtype: torch.dtype, reduce: str):
    segments = make()
    x, w = features("iid", segments.num_rows, 33, dtype), weights_of(segments.num_rows, accumulator(dtype))
    weighted = reduce == "weighted"
    y = fc.segment_reduce(x, segments, "mean" if weighted else reduce, w if weighted else None)
    assert y.dtype == dtype
    for row, part in zip(y.double().numpy(), slices(segments), strict=True):
        frames, wide = x[part].double().numpy(), w[part].double().numpy()[:, None]
        n = len(frames)
        if n == 0:
            assert not row.any()
        elif reduce == "max":
            assert (row == frames.max(0)).all()
        elif reduce in ("first", "last", "middle"):
            assert (row == frames[{"first": 0, "last": n - 1, "middle": (n - 1) // 2}[reduce]]).all()
        else:
            # The error of NumPy's fp64 sums is n units of 2^-53. The mean adds the rounding of its division. Weights
            # add the rounding of the products and the error of their own sum.
            unit = torch.finfo(accumulator(dtype)).eps / 2
            scale = {"sum": 1, "mean": n, "weighted": wide.sum()}[reduce]
            terms = frames * wide if weighted else frames
            exact, size = terms.sum(0) / scale, np.abs(terms).sum(0) / scale
            bound = size * ((2 if weighted else 1) * sum_error(n, dtype) + 2 * unit + 2 * n * 2.0**-53)
            if dtype in HALVES:  # plus half a unit in the last place of the result
                info = torch.finfo(dtype)
                bound += np.maximum(np.abs(exact), info.smallest_normal) * info.eps / 2
            assert (np.abs(row - exact) <= bound * 1.001).all()  # second-order terms


@pytest.mark.parametrize("reduce", ("mean", "sum", "weighted"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_long_segments(dtype: torch.dtype, reduce: str):
    """For 5,000 frames near 1, the error is the final rounding and 2^-24 for each of 63 + 78 additions."""
    n = 5000
    segments = make((n, 1, n), (0, 3, 0), 0)
    x = (features("iid", segments.num_rows, 3, torch.float64) * 0.1).tanh().add(1).to(dtype)
    w = weights_of(segments.num_rows, accumulator(dtype)) if reduce == "weighted" else None
    scaled = x / 8 if reduce == "sum" else x  # the sum, 625, does not overflow in fp16
    y = fc.segment_reduce(scaled, segments, "sum" if reduce == "sum" else "mean", w)
    for row, part in zip(y.double(), slices(segments), strict=True):
        frames = scaled[part].double()
        wide = torch.ones(len(frames)).double() if w is None else w[part].double()
        exact = (frames * wide[:, None]).sum(0) / (1 if reduce == "sum" else wide.sum())
        # One more unit is for the division and one for the products with the weights; the oracle adds n units of fp64.
        bound = (2 if w is not None else 1) * sum_error(n, dtype) + torch.finfo(accumulator(dtype)).eps + n * 2.0**-52
        error = (row - exact).abs() / exact
        if dtype in HALVES:
            ulp = 2 ** exact.log2().floor() * torch.finfo(dtype).eps / exact
            assert (error < ulp).all()
            bound = bound + ulp / 2
        assert (error <= bound * 1.001).all()  # second-order terms


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_empty_inputs(dtype: torch.dtype):
    for reduce in REDUCTIONS:
        assert fc.segment_reduce(torch.ones(4, 3, dtype=dtype), make((), None, 4), reduce).shape == (0, 3)
        assert fc.segment_reduce(torch.ones(0, 3, dtype=dtype), make((0, 0), None, 0), reduce).tolist() == [[0] * 3] * 2
        assert fc.segment_reduce(torch.ones(4, 0, dtype=dtype), make((3,), None, 1), reduce).shape == (1, 0)
    assert fc.segment_expand(torch.ones(0, 3, dtype=dtype), make((), None, 4)).tolist() == [[0] * 3] * 4


# Exact sums and adjoints: values are small integers, and divisors are powers of two


@pytest.mark.parametrize("reduce", LINEAR)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reduce_and_its_gradient_are_adjoint(dtype: torch.dtype, reduce: str):
    segments = make((1, 2, 0, 4, 8, 64, 128), (0, 2, 0, 1, 0, 0, 3))
    g = torch.Generator().manual_seed(0)
    x = torch.randint(-4, 5, (segments.num_rows, 7), generator=g).to(dtype)
    y = torch.randint(-4, 5, (len(segments.starts), 7), generator=g).to(dtype) * 128  # divisible by each length
    reduced = fc.segment_reduce(x.double(), segments, reduce)
    leaf = x.requires_grad_()
    fc.segment_reduce(leaf, segments, reduce).backward(y)
    assert torch.equal((reduced * y).sum(), (x.double() * leaf.grad.double()).sum())
    if reduce == "sum":
        assert torch.equal(leaf.grad, fc.segment_expand(y, segments))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_are_preserved(dtype: torch.dtype):
    segments = make()
    x = torch.randint(-1, 2, (segments.num_rows, 7), generator=torch.Generator().manual_seed(0)).to(dtype)
    inside = segments.ids() >= 0
    assert int(inside.sum()) == sum(LENGTHS) < segments.num_rows
    total = fc.segment_reduce(x, segments, "sum").sum(0)
    assert torch.equal(total, x[inside].sum(0))
    assert torch.equal(fc.segment_reduce(torch.ones_like(x), segments, "sum")[:, 0], segments.lengths.to(dtype))


@pytest.mark.parametrize("reduce", [reduce for reduce in REDUCTIONS if reduce != "sum"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_shift_of_the_frames_shifts_the_result(dtype: torch.dtype, reduce: str):
    """Results are exact, since sums are integers and divisors are powers of two."""
    segments = make((1, 2, 0, 4, 8, 64, 128), (0, 2, 0, 1, 0, 0, 3))
    x = torch.randint(-1, 2, (segments.num_rows, 7), generator=torch.Generator().manual_seed(0)).double()
    expected = fc.segment_reduce(x, segments, reduce) + 2
    expected[segments.lengths == 0] = 0
    assert_same_bits(fc.segment_reduce((x + 2).to(dtype), segments, reduce), expected.to(dtype))


# Weights


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_are_normalized(dtype: torch.dtype):
    segments = make()
    x, w = features("iid", segments.num_rows, 9, dtype), weights_of(segments.num_rows, accumulator(dtype))
    y = fc.segment_reduce(x, segments, weights=w)
    assert_same_bits(fc.segment_reduce(x, segments, weights=w * 2**-10), y, "a power of two")
    assert_same_bits(fc.segment_reduce(x, segments, weights=-w), y, "sign")
    mean = fc.segment_reduce(x, segments)
    for ones in (torch.ones(segments.num_rows, dtype=other) for other in DTYPES):
        assert_same_bits(fc.segment_reduce(x, segments, weights=ones), mean, "equal weights")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_that_add_to_zero_give_zero(dtype: torch.dtype):
    segments = make((2, 3, 0, 2), (0, 1, 0, 0), 1)
    x = features("iid", 9, 5, dtype)
    for weights_dtype in DTYPES:
        w = torch.tensor([1, -1, 7, 0, 0, 0, 2, 1, 9], dtype=weights_dtype)
        y = fc.segment_reduce(x, segments, weights=w)
        assert not y[:3].any() and y[3].all()
        grad_x, grad_w, _ = gradients(lambda x, w: fc.segment_reduce(x, segments, weights=w), x, w)
        assert grad_w.dtype == weights_dtype
        for grad in (grad_x, grad_w):
            assert not grad[[0, 1, 2, 3, 4, 5, 8]].any() and grad[6:8].all()


# Maximum


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_max_gradient_goes_to_the_first_of_equals(dtype: torch.dtype):
    nan = torch.nan
    columns = [[1, 3, 3, 0, 3], [2, 2, 2, 2, 2], [1, nan, 5, nan, 9], [nan, nan, 0, 0, 0], [0, -0.0, 0, -1, 0]]
    x = torch.tensor(columns, dtype=dtype).T.contiguous()
    for segments, offset in ((make((5,), None, 0), 0), (make((5, 0), (2, 0), 1), 2)):
        rows = torch.nn.functional.pad(x, (0, 0, offset, segments.num_rows - 5 - offset), value=99)
        leaf = rows.requires_grad_()
        y = fc.segment_reduce(leaf, segments, "max")
        y[0].backward(torch.tensor([1, 2, 3, 4, 5], dtype=dtype))
        expected = torch.zeros_like(rows)
        for column, row in enumerate((1, 0, 1, 0, 0)):
            expected[offset + row, column] = column + 1
        assert_same_bits(y[0], torch.tensor([3, 2, nan, nan, 0], dtype=dtype))
        assert torch.equal(leaf.grad, expected)


# Derivatives

SMALL = make((1, 2, 0, 3, 4), (0, 1, 0, 2, 0), 1)


@pytest.mark.parametrize("reduce", (*LINEAR, "expand"))
def test_gradcheck_of_any_order(reduce: str):
    rows = len(SMALL.starts) if reduce == "expand" else SMALL.num_rows
    x = features("iid", rows, 2, torch.float64).requires_grad_()

    def run(x: Tensor) -> Tensor:
        return fc.segment_expand(x, SMALL) if reduce == "expand" else fc.segment_reduce(x, SMALL, reduce)

    assert torch.autograd.gradcheck(run, (x,))
    assert torch.autograd.gradgradcheck(lambda x: run(x) ** 3, (x,))  # cubed, so that it is not linear
    assert torch.autograd.gradgradcheck(run, (x,))  # with respect to the cotangent


def test_gradient_of_weights_alone():
    segments = fc.segments_from_starts(torch.tensor([0, 2]), 5)
    weights = torch.rand(5, requires_grad=True)
    out = fc.segment_reduce(torch.randn(5, 3), segments, weights=weights)
    assert out.requires_grad and torch.autograd.grad(out.sum(), weights)[0].abs().sum() > 0


def test_gradcheck_of_max_and_weights():
    x = torch.randperm(2 * SMALL.num_rows).double().view(-1, 2).requires_grad_()  # no ties within a step
    w = weights_of(SMALL.num_rows, torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: fc.segment_reduce(x, SMALL, "max"), (x,))
    assert torch.autograd.gradcheck(lambda x, w: fc.segment_reduce(x, SMALL, weights=w), (x, w))


@pytest.mark.filterwarnings("ignore:.*autograd kernel was not registered")
@pytest.mark.parametrize("reduce", ("max", "weighted"))
def test_second_derivatives_are_refused(reduce: str):
    """``max`` and weights have first derivatives only. A second derivative raises an error and is not silently zero."""
    x = features("iid", SMALL.num_rows, 2, torch.float64).requires_grad_()
    weights = weights_of(SMALL.num_rows, torch.float64) if reduce == "weighted" else None
    y = fc.segment_reduce(x, SMALL, "mean" if weights is not None else "max", weights)
    with pytest.raises(RuntimeError):
        (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        torch.autograd.grad(grad.square().sum(), x)

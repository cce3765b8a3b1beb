"""Continuous integrate-and-fire against a loop over frames: tokens, the frames in which they fire, gradients."""

from __future__ import annotations

import importlib
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastcompress as fc
from fastcompress.ops.integrate_and_fire import integrate_rows
from fastcompress.reference import OPS
from fastcompress.reference.integrate_and_fire import integrate_and_fire as reference
from tests.support.sample_inputs import DTYPES, TOKEN_ROWS, TOKENS, WIDTHS, assert_same_bits, features, strided

RAGGED = (7, 0, 1, 30, 0, 2, 13)


def weights(kind: str, rows: int, seed: int = 0) -> Tensor:
    """Return weights that are multiples of 1/64, whose sums are exact."""
    g = torch.Generator().manual_seed(seed)
    a = torch.randint(0, 33, (rows,), generator=g).double() / 64
    if kind == "bursts":  # several tokens per frame
        return torch.where(torch.rand(rows, generator=g) < 0.3, a * 12, a)
    if kind == "silence":
        return torch.where(torch.rand(rows, generator=g) < 0.7, 0.0, a)
    if kind == "exact":  # sums that reach the threshold exactly
        return torch.full((rows,), 0.25, dtype=torch.float64)
    if kind == "zero":
        return torch.zeros(rows, dtype=torch.float64)
    return a


def by_loop(
    x: Tensor, alpha: Tensor, spans: list[tuple[int, int]], beta: float, targets, tail
) -> tuple[Tensor, list, list]:
    tokens, ends, counts = [], [], []
    for i, (a, b) in enumerate(spans):
        target = None if targets is None else int(targets[i])
        found, fired = reference(x[a:b], alpha[a:b], beta, target, tail)
        tokens += found
        ends += [a + t for t in fired]
        counts.append(len(found))
    return torch.stack(tokens) if tokens else x[:0], ends, counts


def assert_same_slopes(found: Tensor, wanted: Tensor, inputs: tuple[Tensor, ...], tolerance: float) -> None:
    grad = torch.randn(wanted.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    pairs = zip(torch.autograd.grad(found, inputs, grad), torch.autograd.grad(wanted, inputs, grad), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# Tails: the remainder at the end becomes a token never, always, from half a token on, or only if it is a whole token.
@pytest.mark.parametrize(("beta", "tail"), [(1.0, None), (1.0, 0.0), (1.0, 0.5), (1.0, 1.0), (0.5, 0.5)])
@pytest.mark.parametrize("kind", ("plain", "bursts", "silence", "exact", "zero"))
def test_packed(kind: str, beta: float, tail: float | None):
    rows = sum(RAGGED)
    cu = torch.tensor([0, *np.cumsum(RAGGED)], dtype=torch.int32)
    spans = list(zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True))
    x = torch.randn(rows, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    alpha = weights(kind, rows).requires_grad_()
    fired = fc.integrate_and_fire(x, alpha, cu_seqlens=cu, beta=beta, tail=tail)
    wanted, ends, counts = by_loop(x, alpha, spans, beta, None, tail)
    assert fired.cu_seqlens.diff().tolist() == counts and fired.ends.tolist() == ends
    torch.testing.assert_close(fired.values, wanted, rtol=1e-12, atol=1e-12)
    sums = torch.stack([alpha[a:b].sum() for a, b in spans])
    torch.testing.assert_close(fired.total, sums)
    assert ((fired.remainder >= 0) & (fired.remainder < beta)).all()
    if not len(wanted):
        return
    assert_same_slopes(fired.values, wanted, (x, alpha), 1e-9)


@pytest.mark.parametrize("kind", ("plain", "bursts", "silence", "zero"))
def test_padded_with_targets(kind: str):
    lengths = torch.tensor([9, 20, 1, 0, 15])
    targets = torch.tensor([3, 11, 2, 0, 1])
    alpha = weights(kind, 100).view(5, 20).clone()
    if kind != "zero":
        alpha[2, 0] = 0.75
    alpha[:, -1] += 0.5  # in padding, except for one sequence
    alpha.requires_grad_()
    x = torch.randn(5, 20, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).requires_grad_()
    spans = [(20 * i, 20 * i + n) for i, n in enumerate(lengths.tolist())]
    fired = fc.integrate_and_fire(x, alpha, lengths=lengths, target_lengths=targets)
    sums = [float(alpha[i, :n].sum().detach()) for i, n in enumerate(lengths.tolist())]
    assert fired.cu_seqlens.diff().tolist() == [int(t) if s > 0 else 0 for t, s in zip(targets, sums, strict=True)]
    wanted, ends, _ = by_loop(x.flatten(0, 1), alpha.flatten(), spans, 1.0, targets, None)
    torch.testing.assert_close(fired.values, wanted, rtol=1e-9, atol=1e-9)
    padded, counts = fired.to_padded()
    assert counts.tolist() == fired.cu_seqlens.diff().tolist() and padded.shape[:2] == (5, max(counts.tolist()))
    if (
        kind == "silence"
    ):  # by rounding, a sum can be just below the threshold: another frame fires, with another one-sided derivative
        return
    assert all(abs(a - b) <= 1 for a, b in zip(fired.ends.tolist(), ends, strict=True))
    assert_same_slopes(fired.values, wanted, (x, alpha), 1e-6)


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.integers(0, 200), min_size=0, max_size=30),
    st.sampled_from([0.25, 1.0, 1.5]),
    st.sampled_from([None, 0.0, 0.5, 1.0]),
)
def test_every_weight_is_spent_once(sixtyfourths: list[int], beta: float, tail: float | None):
    """For frames of ones each token sums to beta, and the remainder is what is left of the weights."""
    alpha = torch.tensor(sixtyfourths, dtype=torch.float64) / 64
    x = torch.cat([torch.ones(len(alpha), 1), torch.arange(len(alpha))[:, None]], 1).double()
    fired = fc.integrate_and_fire(x, alpha, beta=beta, tail=tail)
    torch.testing.assert_close(fired.values[:, 0], torch.full_like(fired.values[:, 0], beta), rtol=1e-15, atol=0)
    wanted, ends, _ = by_loop(x, alpha, [(0, len(alpha))], beta, None, tail)
    torch.testing.assert_close(fired.values, wanted, rtol=1e-12, atol=1e-12)
    assert fired.ends.tolist() == ends
    count = len(wanted) - int(bool(len(wanted)) and beta * len(wanted) > float(alpha.sum()))
    assert abs(float(alpha.sum()) - beta * count - float(fired.remainder.sum())) < 1e-12


def test_gradients_numerically():
    g = torch.Generator().manual_seed(5)
    x = torch.randn(12, 3, dtype=torch.float64, generator=g, requires_grad=True)
    alpha = (torch.rand(12, dtype=torch.float64, generator=g) * 1.7 + 0.01).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, a: fc.integrate_and_fire(x, a).values, (x, alpha))
    targets = torch.tensor([5])
    assert torch.autograd.gradcheck(lambda x, a: fc.integrate_and_fire(x, a, target_lengths=targets).values, (x, alpha))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_other_dtypes_round_once(dtype: torch.dtype):
    g = torch.Generator().manual_seed(6)
    x, alpha = torch.randn(60, 9, generator=g).to(dtype), torch.rand(60, generator=g)
    exact = fc.integrate_and_fire(x.double(), alpha.double())
    found = fc.integrate_and_fire(x, alpha)
    assert found.values.dtype == dtype and found.ends.tolist() == exact.ends.tolist()
    error = (found.values.double() - exact.values).abs() / exact.values.abs().clamp_min(1e-2)
    assert error.max() <= {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-10}[dtype]
    half = fc.integrate_and_fire(x, alpha.to(dtype))
    assert half.total.dtype == torch.float64 and half.total == alpha.to(dtype).double().sum()


def test_long_sums_are_exact():
    """After an hour of audio the error of a sum in fp32 is several tokens."""
    count = 90_000
    alpha = torch.full((count,), 0.3)
    x = torch.zeros(count, 1)
    fired = fc.integrate_and_fire(x, alpha, tail=None)
    exact = int(np.floor(count * np.float64(np.float32(0.3))))
    assert len(fired.values) == exact
    assert int(np.cumsum(alpha.numpy())[-1]) != exact  # sequential sum in fp32
    assert (fired.ends.diff() >= 3).all() and (fired.ends.diff() <= 4).all()


def test_tokens_do_not_depend_on_the_order_of_a_batch():
    g = torch.Generator().manual_seed(7)
    x, alpha = torch.randn(3, 40, 6, generator=g), torch.rand(3, 40, generator=g)
    lengths = torch.tensor([40, 23, 31])
    fired = fc.integrate_and_fire(x, alpha, lengths=lengths)
    parts = fired.values.split(fired.cu_seqlens.diff().tolist())
    for i, n in enumerate(lengths.tolist()):
        alone = fc.integrate_and_fire(x[i, :n], alpha[i, :n])
        torch.testing.assert_close(alone.values, parts[i], rtol=1e-6, atol=1e-6)
    flipped = fc.integrate_and_fire(x.flip(0), alpha.flip(0), lengths=lengths.flip(0))
    torch.testing.assert_close(flipped.values.split(flipped.cu_seqlens.diff().tolist())[2], parts[0])


@pytest.mark.parametrize("beta", (1.0, 0.9, 0.3))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_any_beta_in_any_default_dtype(beta: float, dtype: torch.dtype):
    """The number of tokens times beta is computed in fp64, not in the default dtype."""
    alpha = torch.rand(20_000, dtype=torch.float64, generator=torch.Generator().manual_seed(8)) * 0.7
    x = torch.ones(len(alpha), 1, dtype=torch.float64)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        fired = fc.integrate_and_fire(x, alpha, beta=beta)
        scaled = fc.integrate_and_fire(x, alpha, beta=beta, target_lengths=torch.tensor([4001]))
    finally:
        torch.set_default_dtype(before)
    assert len(scaled.values) == 4001
    for values in (fired.values, scaled.values):
        torch.testing.assert_close(values, torch.full_like(values, beta), rtol=0, atol=1e-10)
    leaves = [t[:60].clone().requires_grad_() for t in (torch.randn(60, 3, dtype=torch.float64), alpha)]
    wanted, ends, _ = by_loop(*leaves, [(0, 60)], beta, None, 0.5)
    found = fc.integrate_and_fire(*leaves, beta=beta)
    assert found.ends.tolist() == ends
    assert_same_slopes(found.values, wanted, tuple(leaves), 1e-12)


@pytest.mark.parametrize("tail", (None, 0.5))
def test_a_sequence_does_not_depend_on_the_rest_of_the_batch(tail: float | None):
    """Weights are tenths, whose sums miss the threshold by rounding. One other sequence has weights of 1e8."""
    g = torch.Generator().manual_seed(9)
    for trial in range(30):
        sizes = [int(n) for n in torch.randint(1, 9, (5,), generator=g)]
        parts = [torch.randint(0, 11, (n,), generator=g).double() / 10 for n in sizes]
        if trial == 0:
            parts[0] = torch.full((sizes[0],), 1e8, dtype=torch.float64)
        x = torch.randn(sum(sizes), 2, generator=g)
        cu = torch.tensor([0, *np.cumsum(sizes)])
        targets = torch.randint(0, 5, (5,), generator=g) if trial % 2 and tail is None else None
        options = {"tail": tail, "beta": 1.0 if trial else 1e7}
        together = fc.integrate_and_fire(x, torch.cat(parts), cu_seqlens=cu, target_lengths=targets, **options)
        found = zip(together.values.split(together.cu_seqlens.diff().tolist()), together.total, strict=True)
        for i, (values, total) in enumerate(found):
            own = None if targets is None else targets[i : i + 1]
            alone = fc.integrate_and_fire(x[cu[i] : cu[i + 1]], parts[i], target_lengths=own, **options)
            assert_same_bits(alone.values, values, f"{trial} {i}")
            assert alone.total == total


def test_weights_too_small_to_scale_count_as_zero():
    for alpha in ([1e-50, 1e-50], [0.5, 0.5, 1e-45]):
        fired = fc.integrate_and_fire(torch.ones(len(alpha), 1), torch.tensor(alpha, dtype=torch.float64), tail=0.0)
        assert fired.values.isfinite().all() and len(fired.values) == int(sum(alpha))


def test_invalid_offsets_that_are_not_checked(monkeypatch: pytest.MonkeyPatch):
    """As on a GPU, the result has tokens of existing rows only."""
    module = importlib.import_module("fastcompress.ops.integrate_and_fire")
    monkeypatch.setattr(module, "_check_values", lambda *args: None)
    x, alpha = torch.ones(40, 2), torch.full((40,), 0.5)
    for cu in ([0, 50, 40], [5, 90], [-7, 40], [0, 30, 10, 40], [0, 2**31 - 1]):
        fired = fc.integrate_and_fire(x, alpha, cu_seqlens=torch.tensor(cu))
        assert (fired.values >= 0).all() and (fired.ends < 40).all()
    for lengths in ([20, 99], [-3, 5]):
        fired = fc.integrate_and_fire(x.view(2, 20, 2), alpha.view(2, 20), lengths=torch.tensor(lengths))
        assert (fired.ends < 40).all()
    cu = torch.tensor([0, 20, 40])
    fired = fc.integrate_and_fire(x, alpha, cu_seqlens=cu, target_lengths=torch.tensor([-5, 9]))
    assert fired.cu_seqlens.tolist() == [0, 0, 9]


@pytest.mark.parametrize(("layout", "trained"), [("packed", True), ("padded", False)])
def test_compiles(layout: str, trained: bool):
    def run(x: Tensor, alpha: Tensor, sizes: Tensor, targets: Tensor) -> Tensor:
        where = {"cu_seqlens" if layout == "packed" else "lengths": sizes}
        fired = fc.integrate_and_fire(x, alpha, target_lengths=targets if trained else None, **where)
        return fired.values.square().sum() + fired.total.sum()

    g = torch.Generator().manual_seed(3)
    x, alpha = torch.randn(2, 15, 4, generator=g).requires_grad_(), torch.rand(2, 15, generator=g).requires_grad_()
    sizes, targets = torch.tensor([15, 9]), torch.tensor([4, 3])
    arguments = (x, alpha, sizes)
    if layout == "packed":
        arguments = (x.flatten(0, 1), alpha.flatten(), torch.tensor([0, 11, 30]))
    torch._dynamo.reset()
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")(*arguments, targets)
    eager = run(*arguments, targets)
    assert torch.equal(compiled, eager)
    for a, b in zip(torch.autograd.grad(compiled, (x, alpha)), torch.autograd.grad(eager, (x, alpha)), strict=True):
        torch.testing.assert_close(a, b)


def test_quantity_loss():
    alpha = torch.tensor([[0.5, 0.5, 0.5], [1.0, 9.0, 9.0]], requires_grad=True)
    x = torch.zeros(2, 3, 1)
    targets = torch.tensor([2, 3])
    fired = fc.integrate_and_fire(x, alpha, lengths=torch.tensor([3, 1]), target_lengths=targets)
    loss = fc.quantity_loss(fired, targets)
    assert loss.item() == pytest.approx((0.5 + 2.0) / 2)
    (grad,) = torch.autograd.grad(loss, alpha)
    assert grad.tolist() == [[-0.5] * 3, [-0.5, 0.0, 0.0]]


def test_empty_input():
    for x, alpha, layout in (
        (torch.zeros(0, 3), torch.zeros(0), {}),
        (torch.zeros(2, 0, 3), torch.zeros(2, 0), {}),
        (torch.zeros(0, 5, 3), torch.zeros(0, 5), {}),
        (torch.zeros(0, 3), torch.zeros(0), {"cu_seqlens": torch.tensor([0])}),
        (torch.zeros(4, 3), torch.zeros(4), {"cu_seqlens": torch.tensor([0])}),
        (torch.zeros(2, 5, 3), torch.ones(2, 5), {"lengths": torch.tensor([0, 0])}),
    ):
        if "cu_seqlens" in layout and len(x):
            with pytest.raises(ValueError, match="cu_seqlens"):
                fc.integrate_and_fire(x, alpha, **layout)
            continue
        fired = fc.integrate_and_fire(x, alpha, **layout)
        assert fired.values.shape == (0, 3) and not fired.cu_seqlens.any() and fired.ends.shape == (0,)
        padded, counts = fired.to_padded()
        assert padded.shape == (len(fired.total), 0, 3) and not counts.any()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"alpha": torch.rand(6)}, ValueError, "alpha must have shape [5], one value per row, got [6]"),
        ({"alpha": torch.tensor([0.1, -0.5, 0.1, 0.1, 0.1])}, ValueError, "must be finite and not negative, got -0.5"),
        ({"alpha": torch.tensor([0.1, torch.nan, 0.1, 0.1, 0.1])}, ValueError, "not negative, got nan"),
        ({"alpha": torch.ones(5).long()}, TypeError, "alpha"),
        ({"beta": 0.0}, ValueError, "beta must be positive and finite, got 0.0"),
        ({"beta": float("inf")}, ValueError, "beta must be positive and finite, got inf"),
        (
            {"alpha": torch.full((5,), 1e30)},
            ValueError,
            "alpha must add up to fewer than 2**31 tokens of beta 1, got 5e+30",
        ),
        ({"tail": 1.5}, ValueError, "tail must lie in [0, 1], got 1.5"),
        ({"target_lengths": torch.tensor([1, 2])}, ValueError, "target_lengths must have shape [1], got [2]"),
        ({"target_lengths": torch.tensor([-1])}, ValueError, "target_lengths must not be negative, got -1"),
        ({"target_lengths": torch.tensor([1.0])}, TypeError, "target_lengths must be an int32 or int64 tensor"),
        (
            {"target_lengths": torch.tensor([2**40])},
            ValueError,
            "target_lengths must add up to fewer than 2**31 tokens, got 1099511627776",
        ),
        ({"cu_seqlens": torch.tensor([0, 9])}, ValueError, "cu_seqlens"),
        ({"x": torch.zeros(5)}, ValueError, "x must have shape [N, D] or [B, T, D], got [5]"),
    ],
)
def test_bad_input(change: dict, error: type[Exception], message: str):
    arguments = {"x": torch.randn(5, 2), "alpha": torch.rand(5)} | change
    with pytest.raises(error, match=re.escape(message)):
        fc.integrate_and_fire(arguments.pop("x"), arguments.pop("alpha"), **arguments)


# The op


def scalars(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return row weights, some of them 0, and the first weights and divisors of the tokens."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    first, divisors = features("iid", len(TOKENS[0]), 2, wide, 3).T
    return features("zeros", TOKEN_ROWS, 1, wide, 2)[:, 0], first, divisors


# Widths: all parts of a row that kernels treat separately. Kinds: special values, at a width with one unit and a tail.
@pytest.mark.parametrize(("width", "kind"), [*((width, "iid") for width in WIDTHS), (33, "nonfinite"), (33, "huge")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_as_reference(dtype: torch.dtype, width: int, kind: str):
    x, grad = features(kind, TOKEN_ROWS, width, dtype), features("iid", len(TOKENS[0]), width, dtype, 1)
    weights, first, divisors = scalars(dtype)
    for over in (None, divisors):
        expected = OPS["integrate_rows"](x, weights, first, over, *TOKENS)
        assert_same_bits(integrate_rows(x, weights, first, over, *TOKENS), expected)
    leaves = [t.clone().requires_grad_() for t in (x, weights, first)]
    found = torch.autograd.grad(integrate_rows(*leaves, None, *TOKENS), leaves, grad)
    for a, b in zip(found, OPS["integrate_rows_backward"](grad, x, weights, first, *TOKENS), strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_strides_and_threads(dtype: torch.dtype):
    x, (weights, first, _) = features("iid", TOKEN_ROWS, 1280, dtype), scalars(dtype)
    grad = features("iid", len(TOKENS[0]), 1280, dtype, 1)
    expected = integrate_rows(x, weights, first, None, *TOKENS)
    slopes = torch.ops.fastcompress.integrate_rows_backward(grad, x, weights, first, *TOKENS)
    for name, same in strided(x):
        assert_same_bits(integrate_rows(same, weights, first, None, *TOKENS), expected, name)
    for name, same in strided(grad):
        found = torch.ops.fastcompress.integrate_rows_backward(same, x, weights, first, *TOKENS)
        for a, b in zip(found, slopes, strict=True):
            assert_same_bits(a, b, name)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert_same_bits(integrate_rows(x, weights, first, None, *TOKENS), expected, f"{count} threads")
            found = torch.ops.fastcompress.integrate_rows_backward(grad, x, weights, first, *TOKENS)
            for a, b in zip(found, slopes, strict=True):
                assert_same_bits(a, b, f"{count} threads")
    finally:
        torch.set_num_threads(threads)


def test_op_against_a_product():
    """The op equals a matrix of weights times the rows, which autograd differentiates."""
    x = features("iid", TOKEN_ROWS, 7, torch.float64)
    leaves = [t.clone().requires_grad_() for t in (x, *scalars(torch.float64))]
    x, weights, first, divisors = leaves
    lines = []
    for m, (start, length) in enumerate(zip(*(part.tolist() for part in TOKENS), strict=True)):
        line = torch.cat([first[m : m + 1], weights[start + 1 : start + length]])
        lines.append(torch.nn.functional.pad(line, (start, TOKEN_ROWS - start - length)) / divisors[m])
    wanted = torch.stack(lines) @ x
    found = integrate_rows(*leaves, *TOKENS)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    assert_same_slopes(found, wanted, tuple(leaves), 1e-9)


@pytest.mark.parametrize(
    ("starts", "lengths", "message"),
    [
        ([0, 3], [2, 0], "lengths must be at least 1, got 0 at index 1"),
        ([0, 1], [3, 2], "starts must not lie before the last row of the previous token, 2, got 1 at index 1"),
        ([0, 3], [2, 3], "tokens must lie inside the input's 5 rows, got start 3 and length 3 at index 1"),
        ([-1, 3], [2, 2], "starts must not lie before the last row of the previous token, 0, got -1 at index 0"),
    ],
)
def test_wrong_tokens(starts: list[int], lengths: list[int], message: str):
    tokens = torch.tensor(starts), torch.tensor(lengths)
    with pytest.raises(ValueError, match=re.escape(message)):
        integrate_rows(torch.zeros(5, 2), torch.ones(5), torch.ones(2), None, *tokens)

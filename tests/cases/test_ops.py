"""Inputs that users of similar projects reported, with the right value, for the ops and modules."""

from __future__ import annotations

import ctypes
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

import fastcompress as fc

SCALAR_RULES = ("top-k:rate=2", "lookback:3,threshold=0.5", "peak-height", "local-max:normalize=True")


@pytest.mark.parametrize("module", [fc.nn.IterativeFusion(2), fc.nn.BipartiteMerge(4.0)], ids=["fusion", "merge"])
def test_a_batch_whose_lengths_are_all_0(module: torch.nn.Module):
    assert module(torch.zeros(2, 5, 4), lengths=torch.tensor([0, 0])).values.shape == (0, 4)


@pytest.mark.parametrize("rule", ["uniform:3", *SCALAR_RULES])
def test_export_keeps_the_length_dynamic(rule: str):
    program = torch.export.export(
        fc.nn.SegmentPool(rule), (torch.randn(40, 16),), dynamic_shapes={"x": {0: torch.export.Dim.DYNAMIC}}
    )
    other = torch.randn(57, 16)
    assert torch.equal(program.module()(other).values, fc.segment_pool(other, rule=rule).values)


@pytest.mark.parametrize(
    "module",
    [
        fc.nn.BipartiteMerge(2.0), fc.nn.BipartiteMerge(4.0, window=4), fc.nn.IterativeFusion(7),
        fc.nn.GreedySegments(0.9), fc.nn.NoveltyPool(0.9), fc.nn.LearnedBoundary(16), fc.nn.IntegrateAndFire(16),
    ],
    ids=str,
)  # fmt: skip
def test_export_of_a_module_keeps_the_length_dynamic(module: torch.nn.Module):
    module.eval()
    program = torch.export.export(module, (torch.randn(40, 16),), dynamic_shapes={"x": {0: torch.export.Dim.DYNAMIC}})
    other = torch.randn(57, 16)
    torch.testing.assert_close(program.module()(other).values, module(other).values)


def test_a_symbolic_trace_keeps_the_length_dynamic():
    def pool(x: torch.Tensor) -> torch.Tensor:
        return fc.segment_pool(x, rule="top-k:rate=2", compact=False).values

    traced = make_fx(pool, tracing_mode="symbolic")(torch.randn(40, 16))
    other = torch.randn(55, 16)
    assert traced(other).shape == pool(other).shape == (56, 16)


@pytest.mark.skipif("config.getoption('--device') or config.getoption('--emulated') is not None", reason="of the CPU")
@pytest.mark.parametrize(
    "how", ["threshold:1.9", "threshold:1.05", "threshold:0.95", "local-max", "local-max:order=3", "row_group"]
)
def test_a_result_holds_the_memory_it_needs(how: str):
    usable = ctypes.CDLL(None).malloc_usable_size
    usable.restype, usable.argtypes = ctypes.c_size_t, [ctypes.c_void_p]
    x, options = torch.randn(1500, 1280), {"rule": how}
    if how == "row_group":
        group = torch.full((1500,), -1, dtype=torch.int32)
        group[:300] = 1
        options = {"rule": "uniform:3", "row_group": group}
    values = fc.segment_pool(x, **options).values
    assert usable(values.data_ptr()) <= 1.1 * values.nbytes + 4096


def test_the_default_dtype_has_no_effect():
    x, module = torch.randn(1, 1500, 8), fc.nn.IntegrateAndFire(8, 3.0).train()
    counts = []
    try:
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            torch.set_default_dtype(dtype)
            counts.append(module(x).values.shape[0])
    finally:
        torch.set_default_dtype(torch.float32)
    assert counts == [500, 500, 500]


@pytest.mark.parametrize("module", [fc.nn.LearnedBoundary, fc.nn.IntegrateAndFire], ids=lambda m: m.__name__)
def test_a_loss_keeps_its_gradient_under_checkpointing_or_warns(module: Any):
    compressor, x = module(16).train(), torch.randn(40, 16, requires_grad=True)
    checkpoint(lambda t: compressor(t).values, x, use_reentrant=False)
    assert compressor.loss.requires_grad
    with pytest.warns(RuntimeWarning, match=f"loss of {module.__name__} has no gradient.*use_reentrant=False"):
        checkpoint(lambda t: compressor(t).values, x, use_reentrant=True)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        compressor.eval()(x)


def test_an_error_under_vmap_is_that_of_the_input():
    batch = torch.randn(3, 40, 16)
    assert torch.vmap(lambda x: fc.segment_pool(x, rule="uniform:4").values)(batch).shape == (3, 10, 16)
    with pytest.raises(ValueError, match="cu_seqlens must end at the number of rows, 40, got 99"):
        torch.vmap(lambda x: fc.segment_pool(x, rule="uniform:4", cu_seqlens=torch.tensor([0, 99])).values)(batch)


@pytest.mark.parametrize("case", range(5))
def test_numbers_of_numpy_are_taken(case: int):
    np, x = pytest.importorskip("numpy"), torch.randn(40, 16)
    calls = (
        lambda: fc.Uniform(np.int64(3)) == fc.Uniform(3),
        lambda: fc.Threshold(np.float32(0.25)) == fc.Threshold(0.25),
        lambda: torch.equal(fc.adjacent_distance(x, lag=np.int64(2))[:38], fc.adjacent_distance(x, lag=2)[:38]),
        lambda: torch.equal(fc.iterative_fusion(x, np.int64(3)).values, fc.iterative_fusion(x, 3).values),
        lambda: fc.segment_pool(x).segments.seconds(np.float32(25)).shape[1] == 2,
    )
    assert calls[case]()


def test_a_strided_nested_tensor_is_refused_with_the_fix():
    parts = [torch.randn(3, 4), torch.randn(2, 4)]
    nested = torch.nested.nested_tensor(parts, layout=torch.strided)
    with pytest.raises(TypeError, match="x must be a dense tensor, .*layout=torch.jagged") as error:
        fc.segment_pool(nested)
    fixed = eval(str(error.value).partition("make it jagged with ")[2], {"torch": torch, "x": nested})
    assert torch.equal(
        fc.segment_pool(fixed, "uniform:2").values,
        fc.segment_pool(nested.to_padded_tensor(0.0), "uniform:2", lengths=torch.tensor([3, 2])).values,
    )


@pytest.mark.slow  # it compiles C++
@pytest.mark.parametrize("rule", ["threshold:0.8", "threshold:inf", "local-max"])
def test_a_package_of_aot_inductor_loads(rule: str, tmp_path: Path):
    class Model(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return fc.segment_pool(x * 2, rule=rule).values + 1

    dim = torch.export.Dim("n", min=4)
    program = torch.export.export(Model(), (torch.randn(40, 16),), dynamic_shapes={"x": {0: dim}})
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    model, x = torch._inductor.aoti_load_package(package), torch.randn(57, 16)
    assert torch.equal(model(x), Model()(x))


@pytest.mark.parametrize("bad", [0.0, torch.nan, torch.inf])
@pytest.mark.parametrize("module", [fc.nn.LearnedBoundary, fc.nn.IntegrateAndFire], ids=lambda m: m.__name__)
def test_padding_has_no_effect_on_gradients(module: Any, bad: float):
    compressor, x = module(4), torch.randn(2, 10, 4)
    x[1, 4:] = bad
    x.requires_grad_()
    tokens = compressor(x, lengths=torch.tensor([10, 4]))
    (tokens.values.sum() + compressor.loss).backward()
    assert tokens.values.isfinite().all() and x.grad is not None and x.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in compressor.parameters())

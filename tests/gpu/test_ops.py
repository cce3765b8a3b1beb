"""Every op on a GPU against the kernels of the CPU, bit for bit; streams, CUDA graphs, large and invalid input.

Run ``pytest --device cuda --backend cuda tests/gpu/test_ops.py`` (or ``--backend triton``). ``--device cpu`` runs the
tests on any machine (tests/support/on_device.py), and ``--device cpu --emulated 0`` runs the CUDA kernels in the
emulator. ``-k short`` selects the tests that compute-sanitizer runs.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastcompress as fc
from benchmarks.harness import device as devices
from benchmarks.harness.device import delay, side_stream, synchronize
from fastcompress.ops.integrate_and_fire import integrate_rows
from fastcompress.ops.segment_reduce import REDUCTIONS
from tests.support.capturing import capturing
from tests.support.on_device import expected_results, moved
from tests.support.sample_inputs import (
    DTYPES,
    FEATURES,
    RAGGED,
    TOKENS,
    Batch,
    assert_same_bits,
    features,
    offsets,
    packed,
    padded,
)
from tests.support.sample_inputs import batches as every_batch

RULES = (fc.Uniform(3), fc.LocalMax(), fc.LocalMax(order=2, threshold=0.1), fc.Threshold(0.9, min_len=2, max_len=5))


@pytest.fixture(autouse=True)
def gpu(device: torch.device | None) -> torch.device:
    if device is None:
        pytest.skip("needs --device")
    return device


def to(value: Any, device: torch.device) -> Any:
    """Move tensors and layouts to a device, with their strides and offsets."""
    if isinstance(value, dict):
        return {name: to(part, device) for name, part in value.items()}
    return moved(value, device) if isinstance(value, Tensor) else value


def capture(call: Callable[[], Any], device: torch.device) -> tuple[Callable[[], None], Any]:
    """Capture a CUDA graph of ``call``; on the CPU, raise where a capture would. Return its replay and its result."""
    with capturing() if device.type == "cpu" else contextlib.nullcontext():
        return devices.capture(call, device)


def expected(call: Callable[[], Any]) -> Any:
    """Return the result of the CPU."""
    with expected_results():
        return call()


def parts(pooled: fc.Pooled) -> dict[str, Tensor]:
    s = pooled.segments
    return {
        "starts": s.starts,
        "lengths": s.lengths,
        "cu_segments": s.cu_segments,
        "frame_cu_seqlens": s.frame_cu_seqlens,
        "values": pooled.values.detach(),
    }


def same(actual: fc.Pooled, wanted: fc.Pooled, what: str = "") -> None:
    for (name, a), b in zip(parts(actual).items(), parts(wanted).values(), strict=True):
        assert_same_bits(a.cpu(), b, f"{what}: {name}")


def pool_and_gradient(x: Tensor, grad_seed: int = 7, **arguments: Any) -> tuple[fc.Pooled, Tensor]:
    x = x.detach().requires_grad_()
    pooled = fc.segment_pool(x, **arguments)
    grad = features("iid", len(pooled.values), x.shape[-1], x.dtype, grad_seed).to(x.device)
    return pooled, torch.autograd.grad(pooled.values, x, grad)[0]


def compare(batch: Batch, gpu: torch.device, **arguments: Any) -> None:
    actual, gradient = pool_and_gradient(to(batch.x, gpu), **arguments, **to(batch.layout, gpu))
    wanted, wanted_gradient = expected(lambda: pool_and_gradient(batch.x, **arguments, **batch.layout))
    assert actual.values.device.type == gpu.type
    same(actual, wanted, f"{batch}, {arguments}")
    assert_same_bits(gradient.cpu(), wanted_gradient, f"{batch}, {arguments}: gradient")


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_short(gpu: torch.device, dtype: torch.dtype, rule: fc.Rule):
    for batch in (packed("smooth", 72, dtype, (30, 0, 11)), padded("smooth", 33, dtype, (30, 0, 11))):
        for compact in (True, False):
            compare(batch, gpu, rule=rule, compact=compact)


def test_short_parts(gpu: torch.device):
    batch = packed("iid", 40, torch.float32, (30, 0, 100))
    every_op(to(batch.x, gpu), gpu, 1, (batch.x,))


@pytest.mark.parametrize("compact", [True, False])
@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_layout(gpu: torch.device, dtype: torch.dtype, rule: fc.Rule, compact: bool):
    for batch in every_batch(72, dtype):
        compare(batch, gpu, rule=rule, compact=compact)


@pytest.mark.parametrize("kind", FEATURES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_kind_of_features(gpu: torch.device, dtype: torch.dtype, kind: str):
    for width in (33, 1280):
        compare(packed(kind, width, dtype), gpu, rule=fc.LocalMax())


def every_op(x: Tensor, gpu: torch.device, lag: int, where: tuple[Tensor]) -> None:
    """Compare each part of the fused op and its gradients on ``x`` with the CPU."""

    def run(x: Tensor) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        leaf = x.detach().requires_grad_()
        d = fc.adjacent_distance(leaf, lag=lag)
        found["d"] = d.detach()
        found["d backward"] = torch.autograd.grad(d[:-lag].sum(), leaf)[0]
        found["greedy"] = torch.ops.fastcompress.greedy_boundaries(x, None, None, 0.3, 0)
        segments = fc.select_boundaries(d, fc.Threshold(0.9))
        found |= {"starts": segments.starts, "lengths": segments.lengths, "cu": segments.cu_segments}
        weights = features("iid", len(x), 1, torch.float32, 5)[:, 0].abs().to(x.device).requires_grad_()
        for reduce in REDUCTIONS:
            y = fc.segment_reduce(leaf, segments, reduce)
            found[reduce] = y.detach()
            found[f"{reduce} backward"] = torch.autograd.grad((y * y.detach()).sum(), leaf)[0]
        y = fc.segment_reduce(leaf, segments, weights=weights)
        found["weighted"] = y.detach()
        grads = torch.autograd.grad((y * y.detach()).sum(), (leaf, weights))
        found |= {"weighted backward": grads[0], "weights backward": grads[1]}
        found["expand"] = fc.segment_expand(y.detach(), segments)
        tokens = tuple(part[TOKENS[0] + TOKENS[1] <= len(x)].to(x.device) for part in TOKENS)
        first = features("iid", len(tokens[0]), 1, torch.float32, 6)[:, 0].to(x.device).requires_grad_()
        for divisors in (None, first.detach() + 9):
            y = integrate_rows(leaf, weights, first, divisors, *tokens)
            found[f"integrate, divided={divisors is not None}"] = y.detach()
        y = integrate_rows(leaf, weights, first, None, *tokens)
        grads = torch.autograd.grad((y * y.detach()).sum(), (leaf, weights, first))
        found |= {f"integrate backward {i}": grad for i, grad in enumerate(grads)}
        return found

    wanted = expected(lambda: run(*where))
    for name, a in run(x).items():
        assert_same_bits(a.cpu(), wanted[name], name)


@pytest.mark.parametrize("width", [1, 33, 320])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_op(gpu: torch.device, dtype: torch.dtype, width: int):
    for lag in (1, 3):
        x = features("smooth", 300, width, dtype)
        every_op(x.to(gpu), gpu, lag, (x,))


def packing(seed: int, width: int, dtype: torch.dtype) -> dict[str, Any]:
    """Return arguments of ``pack``: samples with and without audio, padded on the right."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 40, (5, 300), generator=g)
    audio = torch.rand(5, 300, generator=g) < 0.1
    mask = torch.arange(300) < torch.tensor([[300], [1], [0], [128], [250]])
    sizes = torch.randint(0, 30, (int((audio & mask).sum()),), generator=g)
    cu = torch.nn.functional.pad(sizes.cumsum(0), (1, 0))
    return {
        "input_ids": torch.where(audio, 99, ids),
        "embedding": features("iid", 40, width, dtype, seed),
        "audio": features("iid", int(cu[-1]), width, dtype, seed + 1),
        "audio_cu_seqlens": cu,
        "attention_mask": mask.long(),
        "labels": torch.arange(ids.numel()).view(ids.shape),
    }


def pack(arguments: dict[str, Any], compact: bool) -> dict[str, Tensor]:
    leaves = {name: arguments[name].detach().requires_grad_() for name in ("embedding", "audio")}
    packed = fc.pack(**(arguments | leaves), placeholder=99, placeholder_counts=1, compact=compact)
    loss = packed.inputs_embeds.square().sum()
    grads = torch.autograd.grad(loss, list(leaves.values()))
    names = ("inputs_embeds", "cu_seqlens", "position_ids", "labels", "source")
    return {name: getattr(packed, name).detach() for name in names} | {"audio gradient": grads[1]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_short_gradient_of_the_table(gpu: torch.device, dtype: torch.dtype):
    """PyTorch computes this gradient, in an order of additions that depends on the device but not on the run."""
    arguments = to(packing(3, 72, dtype), gpu)
    table = arguments["embedding"].requires_grad_()
    packed = fc.pack(**arguments, placeholder=99, placeholder_counts=1)
    grad = features("iid", len(packed.source), 72, dtype, 8).to(gpu)
    found = [torch.autograd.grad(packed.inputs_embeds, table, grad, retain_graph=True)[0] for _ in range(3)]
    assert_same_bits(found[0], found[1])
    assert_same_bits(found[0], found[2])
    ids = torch.cat([arguments["input_ids"].reshape(-1), torch.full((len(arguments["audio"]),), 99, device=gpu)])
    ids = ids[packed.source]
    exact = torch.zeros(100, 72, dtype=torch.float64, device=gpu)
    exact = exact.index_add(0, ids, grad.double())[:40]
    scale = torch.zeros_like(exact).index_add(0, ids.clamp_max(39), grad.double().abs()).max()
    assert float((found[0].double() - exact).abs().max()) <= 4 * torch.finfo(dtype).eps * float(scale)
    assert float(exact.abs().max()) > 1


@pytest.mark.parametrize("compact", [True, False])
@pytest.mark.parametrize("width, dtype", [(72, torch.bfloat16), (33, torch.float32), (1280, torch.float64)], ids=str)
def test_short_packing(gpu: torch.device, width: int, dtype: torch.dtype, compact: bool):
    for seed in (1, 2):
        arguments = packing(seed, width, dtype)
        wanted = expected(lambda a=arguments: pack(a, compact))
        for name, a in pack(to(arguments, gpu), compact).items():
            assert_same_bits(a.cpu(), wanted[name], name)


def test_packing_is_captured_and_replayed(gpu: torch.device):
    arguments = packing(1, 64, torch.bfloat16)
    on_gpu = to(arguments, gpu)
    replay, result = capture(lambda: pack(on_gpu, False), gpu)
    fresh = packing(1, 64, torch.bfloat16)
    fresh["input_ids"] = torch.where(fresh["input_ids"] == 99, 99, (fresh["input_ids"] + 7) % 40)
    fresh["audio"] = features("iid", len(fresh["audio"]), 64, torch.bfloat16, 9)
    for name in ("input_ids", "audio"):
        on_gpu[name].copy_(fresh[name])
    replay()
    synchronize(gpu)
    for name, a in expected(lambda: pack(fresh, False)).items():
        assert_same_bits(result[name].cpu(), a, name)


def test_short_hostile_packing(gpu: torch.device):
    for wrong in (
        {"input_ids": torch.full((5, 300), 2**62)},
        {"audio_cu_seqlens": torch.tensor([0, 2**62, -(2**62), 5])},
        {"audio_cu_seqlens": torch.tensor([0, 1])},
    ):
        arguments = to(packing(1, 64, torch.float32) | wrong, gpu)
        for compact in (True, False):
            try:
                fc.pack(**arguments, placeholder=99, placeholder_counts=1, compact=compact)
                synchronize(gpu)
            except (ValueError, RuntimeError) as error:
                assert "audio" in str(error) or "input_ids" in str(error)
            else:
                assert not compact, "no error"


@pytest.mark.parametrize("number", range(10))
def test_fresh_random_input(gpu: torch.device, number: int):
    seed = random.SystemRandom().randrange(1 << 30)
    choose = random.Random(seed)
    dtype, kind, rule = choose.choice(DTYPES), choose.choice(FEATURES), choose.choice(RULES)
    width = choose.choice((choose.randint(1, 200), 8 * choose.randint(1, 200)))
    lengths = tuple(choose.choice((0, 1, choose.randint(2, 300))) for _ in range(choose.randint(1, 8)))
    batch = Batch(f"seed {seed}", features(kind, sum(lengths), width, dtype, seed), {"cu_seqlens": offsets(lengths)})
    compare(batch, gpu, rule=rule, compact=choose.random() < 0.5)


def test_other_stream(gpu: torch.device):
    """A side stream writes the input with a delay, so that a kernel on another stream would read the old values."""
    batch = packed("smooth", 256, torch.float32)
    wanted, gradient = expected(lambda: pool_and_gradient(batch.x, **batch.layout))
    late, layout = batch.x.to(gpu), to(batch.layout, gpu)
    for compact in (True, False):
        x = torch.zeros_like(late)
        with side_stream(gpu):
            delay(gpu)
            x.copy_(late)
            pooled, grad = pool_and_gradient(x, **layout, compact=compact)
            grad = grad.cpu()
        synchronize(gpu)
        assert_same_bits(pooled.values[: len(wanted.values)].cpu(), wanted.values, f"compact={compact}")
        if compact:
            assert_same_bits(grad, gradient)


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_graph_capture_and_replay(gpu: torch.device, dtype: torch.dtype, rule: fc.Rule):
    batch = packed("smooth", 128, dtype)
    x, layout = batch.x.to(gpu).requires_grad_(), to(batch.layout, gpu)
    grad = features("iid", len(batch.x) + len(RAGGED), 128, dtype, 3)

    def run(x: Tensor, layout: dict[str, Tensor], grad: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        pooled = fc.segment_pool(x, rule=rule, compact=False, **layout)
        return parts(pooled), torch.autograd.grad(pooled.values, x, grad[: len(pooled.values)])[0]

    on_gpu = grad.to(gpu)
    replay, result = capture(lambda: run(x, layout, on_gpu), gpu)
    capture(lambda: fc.segment_pool(x, rule=rule, compact=False).values, gpu)  # one sequence, without offsets
    for seed in (1, 2, 3):
        fresh = features("iid", len(batch.x), 128, dtype, seed)
        lengths = random.Random(seed).sample(RAGGED, len(RAGGED))
        x.data.copy_(fresh)
        layout["cu_seqlens"].copy_(offsets(tuple(lengths)))
        replay()
        synchronize(gpu)
        leaf = fresh.clone().requires_grad_()
        wanted = expected(lambda: run(leaf, {"cu_seqlens": offsets(tuple(lengths))}, grad))  # noqa: B023
        for name, tensor in wanted[0].items():
            assert_same_bits(result[0][name].detach().cpu(), tensor, f"{seed}: {name}")
        assert_same_bits(result[1].cpu(), wanted[1], f"{seed}: gradient")


def test_compiled(gpu: torch.device):
    batch = packed("smooth", 64, torch.float32)
    x, layout = batch.x.to(gpu), to(batch.layout, gpu)

    def run(x: Tensor) -> Tensor:
        return fc.segment_pool(x, compact=False, **layout).values

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert_same_bits(compiled(x).cpu(), run(x).cpu())


@pytest.mark.parametrize("rows", [141, 142])
def test_compiled_results_are_used_in_the_graph(gpu: torch.device, rows: int):
    """Inductor's kernels require fresh and aligned tensors. Numbers of segments up to ``rows`` are odd and even."""
    x = features("smooth", rows, 64, torch.float32).to(gpu)

    def run(x: Tensor) -> tuple[Tensor, ...]:
        pooled = fc.segment_pool(x, rule=fc.Threshold(0.01), compact=False)
        s = pooled.segments
        return pooled.values * 2, s.starts + 1, s.lengths * 3, s.lengths.cumsum(0)

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="inductor" if gpu.type == "cuda" else "aot_eager")
    for a, b in zip(compiled(x), run(x), strict=True):
        assert_same_bits(a.cpu(), b.cpu())


@pytest.mark.parametrize("lengths", [(100_000,), (1,) * 20_000, (3, 60_000, 1, 0, 5)], ids=["one", "ones", "mixed"])
def test_extreme_segments(gpu: torch.device, lengths: tuple[int, ...]):
    """One segment is longer than every tile; others have one frame."""
    if gpu.type == "cpu":
        lengths = tuple(length // 100 for length in lengths[:200])
    batch = packed("iid", 16, torch.float32, lengths)
    for rule in (fc.Threshold(3.0), fc.Uniform(1)):  # every distance is at most 2
        compare(batch, gpu, rule=rule)


@pytest.mark.parametrize("dtype", [torch.bfloat16], ids=str)
def test_more_elements_than_32_bits_count(gpu: torch.device, dtype: torch.dtype):
    """The last sequence of a batch with more than 2^31 elements gives the same bits alone and in the batch."""
    width, last = 1280, 1000
    rows = (1 << 31) // width + 5000 if gpu.type == "cuda" else 3000
    if gpu.type == "cuda" and torch.cuda.mem_get_info(gpu)[0] < 24 << 30:
        pytest.skip("needs 24 GB of free memory on the device")
    x = torch.empty(rows, width, dtype=dtype, device=gpu)
    for part in x.split(100_000):
        part.normal_()
    x.requires_grad_()
    cu = torch.tensor([0, rows - last, rows], dtype=torch.int32, device=gpu)
    pooled = fc.segment_pool(x, cu_seqlens=cu)
    tail = x[-last:].detach().clone().requires_grad_()
    alone = fc.segment_pool(tail)
    count = len(alone.values)
    assert_same_bits(pooled.values[-count:].cpu(), alone.values.cpu())
    assert_same_bits(pooled.segments.starts[-count:].cpu() - (rows - last), alone.segments.starts.cpu())
    assert int(pooled.segments.lengths.sum()) == rows
    grad = torch.autograd.grad(pooled.values, x, pooled.values.detach())[0]
    assert_same_bits(grad[-last:].cpu(), torch.autograd.grad(alone.values, tail, alone.values.detach())[0].cpu())


HOSTILE = {
    "beyond the end": [0, 40, 10**9],
    "negative": [0, -50, 100],
    "falling": [0, 90, 20, 100],
    "late start": [7, 50, 100],
    "early end": [0, 50, 60],
    "extreme": [0, 2**62, -(2**62), 100],
}


@pytest.mark.parametrize("values", HOSTILE.values(), ids=list(HOSTILE))
@pytest.mark.parametrize("rule", [fc.Uniform(3), fc.LocalMax(), fc.LocalMax(prominence=0.1)], ids=str)
def test_short_hostile_offsets(gpu: torch.device, values: list[int], rule: fc.Rule):
    """No access is out of bounds, and reading the number of segments raises an error."""
    x = features("smooth", 100, 64, torch.float32).to(gpu)
    cu = torch.tensor(values, device=gpu)
    for compact in (True, False):
        try:
            fc.segment_pool(x, cu_seqlens=cu, rule=rule, compact=compact)
            synchronize(gpu)
        except ValueError as error:
            assert "cu_seqlens" in str(error)
        else:
            assert not compact, "no error"
    good = packed("smooth", 64, torch.float32)
    compare(good, gpu, rule=rule)  # later calls work


def test_short_hostile_segments(gpu: torch.device):
    x = features("smooth", 100, 64, torch.float32).to(gpu)
    for starts, lengths in (([0, 10**12], [4, 4]), ([-5, 3], [4, 4]), ([0, 3], [4, 10**15]), ([0, 3], [-4, 4])):
        segments = fc.Segments(
            torch.tensor(starts, device=gpu), torch.tensor(lengths, device=gpu), offsets((2,)), offsets((100,)), 100
        )
        for call in (
            lambda s: fc.segment_reduce(x, s),
            lambda s: fc.segment_reduce(x, s, "max"),
            lambda s: fc.segment_expand(x[:2], s),
        ):
            try:
                call(segments)
                synchronize(gpu)
            except ValueError as error:
                assert "segments" in str(error)


def test_tensors_of_two_devices_are_refused_without_the_wrappers(gpu: torch.device):
    """Without this check a kernel would read host memory, and the process could not use the device any more."""
    if gpu.type == "cpu":
        pytest.skip("needs two devices")
    ops, x, rule = torch.ops.fastcompress, torch.randn(5, 3, device=gpu), fc.LocalMax().op_args()
    with pytest.raises((RuntimeError, ValueError), match="device"):
        ops.segment_pool(x, None, torch.tensor([0, 5]), None, None, *rule, True)
    with pytest.raises((RuntimeError, ValueError), match="device"):
        ops.segment_reduce(x, torch.tensor([0]), torch.tensor([5]), "mean")

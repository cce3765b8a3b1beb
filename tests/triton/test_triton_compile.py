"""Every Triton kernel compiles for every GPU, with no spills, wide loads and sums that are not fused.

No GPU is needed. The tests record the launches of the ops, so that they compile the dtypes, constants and alignments
that would run.
"""

from __future__ import annotations

import functools
import importlib
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import fastcompress as fc
from fastcompress.triton import OPS
from fastcompress.triton.common import compile_options
from tests.support import ROOT
from tests.support.sample_inputs import DTYPES
from tests.support.slow import some

if triton.knobs.runtime.interpret:
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

TARGETS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")
NVIDIA = tuple(target for target in TARGETS if target.startswith("sm_"))
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
MODULES = tuple(
    importlib.import_module(f"fastcompress.triton.{name}")
    for name in (
        "adjacent_distance",
        "common",
        "greedy_segments",
        "integrate_and_fire",
        "min_variance",
        "pack",
        "segment_reduce",
        "select_boundaries",
        "tiles",
    )
)
POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float64: "*fp64",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
}
#: Instructions for fp32 arithmetic that round differently from the definition.
INEXACT = re.compile(r"fma\.rn\.f32|mad\.f32|div\.(?:full|approx)|r?sqrt\.approx|rcp\.approx|\.ftz")


@dataclass(frozen=True)
class Launch:
    """A kernel and its arguments, in the form of Triton's binder."""

    kernel: Any
    num_warps: int
    registers: int
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[int, ...]

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__


def describe(kernel: Any, args: tuple[Any, ...], constants: dict[str, Any], *options: int) -> Launch:
    values = {**dict(zip((p.name for p in kernel.params), args, strict=False)), **constants}
    signature, known, aligned = [], [], []
    for i, parameter in enumerate(kernel.params):
        name, value = parameter.name, values[parameter.name]
        one = isinstance(value, int) and value == 1 and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or one:
            signature.append((name, "constexpr"))
            known.append((name, value))
            continue
        if isinstance(value, torch.Tensor):
            signature.append((name, POINTERS[value.dtype]))
            multiple = value.data_ptr() % 16 == 0
        else:
            signature.append((name, parameter.annotation_type or ("i32" if -(2**31) <= value < 2**31 else "i64")))
            multiple = value % 16 == 0 and not parameter.do_not_specialize
        if multiple:
            aligned.append(i)
    return Launch(kernel, *options, tuple(signature), tuple(known), tuple(aligned))


@pytest.fixture(scope="module", autouse=True)
def fresh_cache(tmp_path_factory):
    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(tmp_path_factory.mktemp("triton"))
        yield


@pytest.fixture
def record(monkeypatch) -> Callable[..., list[Launch]]:
    """Return a function that calls other functions and returns their distinct launches, without running a kernel."""

    def run(*calls: Callable[[], Any]) -> list[Launch]:
        launches: dict[Launch, None] = {}

        def launch(kernel, grid, like, *args, num_warps=4, registers=0, **constants):
            launches[describe(kernel, args, constants, num_warps, registers)] = None

        for module in MODULES:
            monkeypatch.setattr(module, "launch", launch)
        for f in calls:
            f()
        return list(launches)

    return run


@functools.cache
def compiled(launch: Launch, target: str, fused: bool = False) -> Any:
    nvidia = target in NVIDIA
    gpu = GPUTarget("cuda", int(target[3:]), 32) if nvidia else GPUTarget("hip", target, 64)
    source = ASTSource(
        fn=launch.kernel,
        signature=dict(launch.signature),
        constexprs=dict(launch.constants),
        attrs={(i,): [["tt.divisibility", 16]] for i in launch.aligned},
    )
    options = compile_options(launch.num_warps, launch.registers, nvidia)
    return triton.compile(source, target=gpu, options={**options, "enable_fp_fusion": fused})


def calls(dtype: torch.dtype, rows: int, width: int, sequences: int, segments: int, thorough: bool) -> Iterator:
    """Yield calls of every op, on tensors of any values."""
    x, y = torch.zeros(rows, width, dtype=dtype), torch.zeros(segments, width, dtype=dtype)
    d = torch.zeros(rows, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    cu, group = torch.zeros(sequences + 1, dtype=torch.int32), torch.zeros(rows, dtype=torch.int32)
    given = torch.zeros(segments, dtype=torch.int64), torch.zeros(segments, dtype=torch.int64)

    def call(name: str, *args: Any) -> Callable[[], Any]:
        return lambda: OPS[name](*args)

    yield call("adjacent_distance", x, cu, None, 1)
    yield call("adjacent_distance_backward", d, x, cu, None, 1)
    yield call("greedy_boundaries", x, cu, None, 0.15, 9)
    yield call("min_variance_boundaries", d[:, None].expand(-1, 7), cu, None, group, 4.0, 8)
    for how in ("mean", "sum", "max", "first", "last", "middle") if thorough else ("mean", "max", "middle"):
        yield call("segment_reduce", x, *given, how)
        if how != "max":
            yield call("segment_expand", y, *given, rows, how)
    yield call("segment_weighted_mean", x, d, *given)
    yield call("segment_weighted_mean_backward", y, x, y, d, *given)
    yield call("segment_max_backward", y, x, y, *given)
    of_segments = torch.zeros(segments, dtype=d.dtype)
    yield call("integrate_rows", x, d, of_segments, of_segments, *given)
    yield call("integrate_rows_backward", y, x, d, of_segments, *given)
    yield call("pack_rows", x, y, torch.zeros(rows, dtype=torch.int64), torch.zeros(0, dtype=torch.int64), True)
    limited = fc.LocalMax(prominence=0.1, min_len=2)
    rules = [(fc.Uniform(3, tail="drop"), group), (fc.LocalMax(), None), (limited, group)]
    if thorough:
        every = [fc.Uniform(1), fc.Uniform(3), fc.Threshold(0.1), fc.LocalMax(), fc.LocalMax(order=16)]
        rules += [(rule, groups) for rule in (*every, fc.LocalMax(max_len=9)) for groups in (None, group)]
    for rule, groups in rules:
        yield call("segment_pool", x, None, cu, None, groups, *rule.op_args(), False)
        if thorough or not rule.fused:
            yield call("select_boundaries", d, cu, None, groups, *rule.op_args(), False)


def resources(launch: Launch, target: str) -> dict[str, int]:
    """Return the bytes of stack and of spilled registers."""
    kernel = compiled(launch, target)
    if target not in NVIDIA:
        found = re.findall(r"\.(vgpr_spill_count|private_segment_fixed_size):\s*(\d+)", kernel.asm["amdgcn"])
        return {name: int(value) for name, value in found}
    tool = TOOLS / "cuobjdump"
    if not tool.exists():
        pytest.skip(f"triton {triton.__version__} brings no cuobjdump")
    file = Path(triton.knobs.cache.dir) / "kernel.cubin"
    file.write_bytes(kernel.asm["cubin"])
    run = subprocess.run([tool, "-res-usage", file], capture_output=True, text=True, check=True)
    return {name: int(value) for name, value in re.findall(r"(STACK|LOCAL):(\d+)", run.stdout + run.stderr)}


def check_no_spills(launches: list[Launch], target: str) -> None:
    assert launches
    for launch in launches:
        used = resources(launch, target)
        assert len(used) == 2 and not any(used.values()), f"{launch.name} on {target}: {used}, {dict(launch.constants)}"


@pytest.mark.emulated  # takes 40 s; the other tests compile a third of the kernels
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])  # the slow test below covers all forms on all targets
def test_every_kernel_compiles_without_spills(record, target: str):
    launches = record(*calls(torch.bfloat16, 4096, 1280, 8, 1000, thorough=False))
    kernels = {launch.name for launch in launches}
    defined = {
        name
        for module in MODULES
        for name, value in vars(module).items()
        if name.endswith("_kernel") and value.fn.__module__ == module.__name__
    }
    assert kernels == defined
    check_no_spills(launches, target)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("target", TARGETS)
def test_every_form_compiles_without_spills(record, target: str, dtype: torch.dtype):
    check_no_spills(record(*calls(dtype, 4096, 1280, 8, 1000, thorough=True)), target)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_sizes_of_one_compile(record, target: str):
    """Triton treats an argument with value 1 as a constant."""
    for launch in record(*calls(torch.float32, 1, 1, 1, 1, thorough=True)):
        compiled(launch, target)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_kernel_compiles_with_the_oldest_triton(tmp_path: Path):
    """The oldest triton that pyproject.toml allows is installed in addition to the newer one."""
    oldest = re.search(r'"triton>=([\d.]+),', (ROOT / "pyproject.toml").read_text())[1] + ".0"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(tmp_path), f"triton=={oldest}"]
    try:
        done = subprocess.run(pip, capture_output=True, text=True, timeout=300)
    except subprocess.TimeoutExpired:
        pytest.skip(f"pip has not installed triton {oldest} in 300 s")
    if done.returncode:
        pytest.skip(f"pip cannot install triton {oldest}: {' '.join(done.stderr.split())[-300:]}")
    names = ("test_every_kernel_compiles_without_spills", "test_rows_are_read_16_bytes_at_a_time")
    nodes = [f"{__file__}::{name}[{target}]" for name in names for target in ("sm_90", "gfx942")]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment["PYTHONPATH"] = f"{tmp_path}{os.pathsep}{ROOT}"
    check = f"import sys, pytest, triton; assert triton.__version__ == {oldest!r}; sys.exit(pytest.main(sys.argv[1:]))"
    command = [sys.executable, "-c", check, "-q", "-x", "-p", "no:cacheprovider", "--run-emulated", *nodes]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)
    assert run.returncode == 0 and "4 passed" in run.stdout, run.stdout[-6000:] + run.stderr[-2000:]


def scoring(record, dtype: torch.dtype, width: int = 1280) -> list[Launch]:
    """The launches of the scoring path: distances, the fused op; norms and walk of greedy segments."""
    x, cu = torch.zeros(4096, width, dtype=dtype), torch.zeros(9, dtype=torch.int32)
    launches = record(
        lambda: OPS["adjacent_distance"](x, cu, None, 1),
        lambda: OPS["segment_pool"](x, None, cu, None, None, *fc.LocalMax().op_args(), False),
        lambda: OPS["greedy_boundaries"](x, cu, None, 0.15, 0),
    )
    return [launch for launch in launches if launch.name != "prepare_sequences_kernel"]


@pytest.mark.parametrize("target", some(NVIDIA, "sm_90"))  # PTX is one language for all of them
def test_scores_are_rounded_as_defined(record, target: str):
    launches = scoring(record, torch.float32)
    assert len(launches) == 4
    for launch in launches:
        ptx = compiled(launch, target).asm["ptx"]
        assert not INEXACT.findall(ptx), f"{launch.name}: {set(INEXACT.findall(ptx))}"
        # Rounding that is spelled out keeps the assembler from fusing.
        assert not re.findall(r"\b(?:mul|add|sub)\.f32", ptx)
        needed = ["mul.rn.f32", "add.rn.f32"]
        if launch.name != "greedy_walk_kernel":  # which is given the norms
            needed += ["sqrt.rn.f64", "div.rn.f64"]
        assert all(word in ptx for word in needed), launch.name


def test_scores_are_not_fused_on_amd(record):
    distances, _, *greedy = scoring(record, torch.float32)  # no division in fp32, which has its own fused steps
    assert [launch.name for launch in (distances, *greedy)] == [
        "adjacent_distance_fwd_kernel",
        "greedy_norms_kernel",
        "greedy_walk_kernel",
    ]
    fused = re.compile(r"v_(?:pk_)?(?:fma|fmac|mad|mac)_f32")
    for launch in (distances, *greedy):
        assert not fused.findall(compiled(launch, "gfx942").asm["amdgcn"]), launch.name


def test_the_gate_finds_fused_sums(record):
    distances, _, _, walk = scoring(record, torch.float32)
    for launch in (distances, walk):
        assert INEXACT.findall(compiled(launch, "sm_90", fused=True).asm["ptx"]), launch.name


def packing(width: int) -> tuple[Any, ...]:
    table, audio = torch.zeros(512, width).bfloat16(), torch.zeros(64, width).bfloat16()
    index = torch.zeros(4096, dtype=torch.int64)
    return table, audio, index, index[:0], True


@pytest.mark.parametrize("target", some(TARGETS, "sm_90", "gfx942"))
def test_rows_are_read_16_bytes_at_a_time(record, target: str):
    aligned, odd = scoring(record, torch.bfloat16), scoring(record, torch.bfloat16, 1279)
    if target in NVIDIA:
        kind, wide, store = "ptx", r"ld\.global\S*\.v4\.b32", r"st\.global\S*\.v4\.b32"
    else:
        kind, wide, store = "amdgcn", r"load_dwordx4", r"store_dwordx4"
    for launch in aligned:
        assert re.findall(wide, compiled(launch, target).asm[kind]), launch.name
    assert re.findall(store, compiled(aligned[1], target).asm[kind])
    (copy,) = record(lambda: OPS["pack_rows"](*packing(1280)))
    assert re.findall(wide, compiled(copy, target).asm[kind]) and re.findall(store, compiled(copy, target).asm[kind])
    # A width that allows none: the gate sees the difference.
    assert target != "sm_90" or not re.findall(wide, compiled(odd[0], target).asm[kind])


def test_ragged_batches_share_their_kernels(record):
    """Triton compiles a kernel again for an argument of 1 and for a multiple of 16, a second each time: not so for what
    differs from batch to batch."""
    rng = random.Random(0)

    def ops(lengths: list[int]) -> Iterator[Callable[[], Any]]:
        rows, segments = sum(lengths), sum(lengths) // rng.randint(2, 9)
        yield from calls(torch.bfloat16, rows, 72, len(lengths), segments, thorough=False)
        x, kept = torch.zeros(len(lengths), max(lengths), 72), torch.zeros(len(lengths), dtype=torch.int64)
        yield lambda: OPS["segment_pool"](x, None, None, kept, None, *fc.LocalMax().op_args(), False)

    batches = [[rng.randint(0, 60) for _ in range(rng.randint(2, 150))] for _ in range(200)]
    batches += [[1, 15], [16] * 16, [17], [64] * 128]
    first = record(*ops([3, 70, 20]))
    every = record(*(call for lengths in batches for call in ops(lengths)))
    extra = sorted(launch.name for launch in every if launch not in first)
    # One, of one word or eight a thread, for each layout.
    assert extra == ["prepare_sequences_kernel"] * 2

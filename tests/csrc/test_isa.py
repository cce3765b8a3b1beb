"""Results have the same bits for every instruction set, number of threads and content of fresh memory.

``print_digests`` runs in a separate process for each instruction set, since a process chooses it once.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fastcompress as fc
from fastcompress.dispatch.library import COMPILED
from tests.support import ROOT, processes
from tests.support.sample_inputs import DTYPES, FEATURES, TOKENS, WIDTHS, bits, features, packed, padded, row_groups
from tests.support.slow import some

pytestmark = [
    pytest.mark.skipif(not COMPILED, reason="no compiled library"),
    pytest.mark.xdist_group("isa"),  # one worker, so that tests share the cached output of the other processes
]

ISAS = ("avx512", "avx2", "portable")
CPU_FLAGS = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
SUPPORTED = [
    isa for isa, flag in (("avx512", "avx512vl"), ("avx2", "avx2"), ("portable", "")) if f" {flag}" in f"{CPU_FLAGS} "
]
HALVES = (torch.float16, torch.bfloat16)
OPS = torch.ops.fastcompress
# Lengths around blocks of 64, empty segments, and gaps.
STARTS = torch.tensor([0, 1, 3, 3, 70, 140, 205, 340])
SIZES = torch.tensor([1, 2, 0, 64, 63, 65, 129, 1])
ROWS = 345


# The code that runs in the other process


def outputs(width: int, dtype: torch.dtype, kinds: tuple[str, ...], rows: int = ROWS) -> Iterator[tuple[str, Tensor]]:
    """Yield all outputs of all ops on fixed inputs."""
    for kind in kinds:
        x = features(kind, rows, width, dtype)
        for lag in (1, 3):
            d = fc.adjacent_distance(x, lag=lag)
            yield f"distance {kind} {lag}", d
            grad = features("iid", rows, 1, d.dtype, seed=1)[:, 0]
            yield f"distance backward {kind} {lag}", OPS.adjacent_distance_backward(grad, x, None, None, lag)
        for threshold, max_len in ((0.15, 0), (0.9, 5)):
            yield f"greedy {kind} {threshold}", OPS.greedy_boundaries(x, None, None, threshold, max_len)
        band = fc.banded_distance(x, 7)
        yield f"band {kind}", band
        for rate in (1.5, 4.0):
            yield f"variance {kind}", OPS.min_variance_boundaries(band, None, None, row_groups(rows), rate, 8)
        d = fc.adjacent_distance(x)
        for rule in (fc.LocalMax(), fc.LocalMax(2, max_len=9), fc.LocalMax(prominence=0.1), fc.Threshold(0.9)):
            for compact in (True, False):
                segments = OPS.select_boundaries(d, None, None, row_groups(rows), *rule.op_args(), compact)
                yield from zip(("starts", "lengths", "cu"), segments, strict=True)
        grads = features("iid", len(STARTS), width, dtype, seed=2)
        weights = features("iid", rows, 1, d.dtype, seed=3)[:, 0].abs()
        args = STARTS, SIZES
        for reduce in ("mean", "sum", "max", "first", "last", "middle"):
            yield f"{reduce} {kind}", OPS.segment_reduce(x, *args, reduce)
        for reduce in ("mean", "sum", "first", "last", "middle"):
            yield f"expand {reduce} {kind}", OPS.segment_expand(x[:8], *args, rows, reduce)
        yield f"max backward {kind}", OPS.segment_max_backward(grads, x, OPS.segment_reduce(x, *args, "max"), *args)
        mean = OPS.segment_weighted_mean(x, weights, *args)
        yield f"weighted {kind}", mean
        yield from zip(
            ("weighted grad x", "weighted grad weights"),
            OPS.segment_weighted_mean_backward(grads, x, mean, weights, *args),
            strict=True,
        )
        first = features("iid", len(TOKENS[0]), 2, d.dtype, seed=4)
        grads = features("iid", len(TOKENS[0]), width, dtype, seed=5)
        yield f"integrate {kind}", OPS.integrate_rows(x, weights, first[:, 0], first[:, 1], *TOKENS)
        found = OPS.integrate_rows_backward(grads, x, weights, first[:, 0], *TOKENS)
        yield from zip(("integrate grad x", "integrate grad weights", "integrate grad first"), found, strict=True)


def pooled(width: int, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    for kind in ("smooth", "zeros", "nonfinite"):
        for batch in (packed(kind, width, dtype), padded(kind, width, dtype)):
            for rule in (fc.Uniform(3), fc.LocalMax(), fc.LocalMax(2, 0.1, min_len=2, max_len=70), fc.Threshold(0.15)):
                for compact in (True, False):
                    x = batch.x.clone().requires_grad_()
                    result = fc.segment_pool(x, rule=rule, compact=compact, **batch.layout)
                    s = result.segments
                    yield f"pool {kind} {rule}", result.values.detach()
                    yield from (("starts", s.starts), ("lengths", s.lengths), ("cu", s.cu_segments))
                    grad = features("iid", len(result.values), width, dtype, seed=4)
                    yield f"pool backward {kind} {rule}", torch.autograd.grad(result.values, x, grad)[0]


def conversions(dtype: torch.dtype) -> Iterator[tuple[str, bool]]:
    """Yield names of conversions of half types, and whether their results equal those of torch."""
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    for width in (1, 31, 32, 64, 65, 256):
        rows = -(-len(every) // width)
        x = torch.cat([every, every[: rows * width - len(every)]]).view(rows, width)
        one = torch.ones(rows, dtype=torch.int64)
        same = OPS.segment_reduce(x, torch.arange(rows), one, "sum")
        yield f"unchanged {dtype} {width}", torch.equal(bits(same), bits(x))
        # Random bits give means with every exponent, infinite means, and ties.
        seed = torch.Generator().manual_seed(5)
        pairs = torch.randint(-(2**15), 2**15, (2 * rows, width), generator=seed).to(torch.int16).view(dtype)
        pairs[: rows // 2] = (pairs[rows // 2 * 2 - rows // 2 :][: rows // 2].float() * 1.01).to(
            dtype
        )  # of close numbers
        a, b = pairs[::2].float(), pairs[1::2].float()
        for reduce, expected in (("mean", (a + b) / 2), ("sum", a + b)):
            rounded = OPS.segment_reduce(pairs, 2 * torch.arange(rows), 2 * one, reduce)
            yield f"rounded {reduce} {dtype} {width}", torch.equal(bits(rounded), bits(expected.to(dtype)))


def digest(tensors: Iterator[tuple[str, Tensor]]) -> str:
    total = hashlib.sha256()
    for name, tensor in tensors:
        total.update(f"{name} {list(tensor.shape)} {tensor.dtype}".encode())
        total.update(bits(tensor).contiguous().numpy().tobytes())
    return total.hexdigest()


def print_digests() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)  # the small cases do not use threads, and other tests run at the same time
    result = {"isa": OPS.cpu_isa(), "fill": torch.empty(1000, dtype=torch.uint8).tolist(), "checks": {}}
    if result["isa"] != os.environ.get("FASTCOMPRESS_CPU_ISA"):  # this CPU does not have it
        print(json.dumps(result))
        return
    result["small"] = {}
    for dtype in DTYPES:
        for width in (*WIDTHS, 320):
            kinds = FEATURES if width == 33 else ("smooth",)  # 33 has a unit and a tail
            result["small"][f"parts, {dtype}, {width} wide"] = digest(outputs(width, dtype, kinds))
        for width in (33, 288):
            result["small"][f"pool, {dtype}, {width} wide"] = digest(pooled(width, dtype))
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found = result[str(threads)] = {}
        for dtype in DTYPES:
            # The results have several megabytes, so that two threads share the work, and fresh memory is mapped.
            found[f"parts, {dtype}"] = digest(outputs(257, dtype, ("smooth",), 6000))
            x = features("smooth", 6000, 512, dtype).requires_grad_()
            large = fc.segment_pool(x)
            grad = torch.autograd.grad(large.values, x, large.values.detach())[0]
            found[f"pool, {dtype}"] = digest(
                iter([("", large.values.detach()), ("", large.segments.starts), ("", grad)])
            )
    torch.set_num_threads(1)
    for dtype in HALVES:
        result["checks"].update(conversions(dtype))
    print(json.dumps(result))


# The tests


@functools.cache
def run(isa: str, fill: int) -> tuple[dict, str]:
    """Return what ``print_digests`` prints in another process, and its warnings.

    Args:
        isa: Instruction set.
        fill: Byte that fills fresh memory, so that results with unwritten memory differ between two processes.
    """
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "passive", "FASTCOMPRESS_CPU_ISA": isa}
    # glibc fills heap blocks but not mapped blocks; with these thresholds it takes large blocks from the heap, too.
    env |= {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TOP_PAD_": str(64 << 20)}
    env["MALLOC_PERTURB_"] = str(fill ^ 255)
    code = "from tests.csrc.test_isa import print_digests; print_digests()"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


def run_isa(isa: str, fill: int = 90) -> dict:
    if isa not in SUPPORTED:
        pytest.skip(f"this CPU has no {isa}")
    result, errors = run(isa, fill)
    assert result["isa"] == isa and "FASTCOMPRESS_CPU_ISA" not in errors
    return result


def differences(a: dict[str, str], b: dict[str, str]) -> list[str]:
    assert a.keys() == b.keys()
    return [name for name in a if a[name] != b[name]]


# The portable kernels are compared with those of the other instruction sets, in whose process fresh memory has another
# content. On a machine without these, and in the slow tests, they are compared with themselves.
@pytest.mark.parametrize("isa", some(ISAS, *(ISAS if len(SUPPORTED) == 1 else ISAS[:2])))
def test_same_bits_on_every_instruction_set_and_no_unwritten_memory(isa: str):
    result, portable = run_isa(isa), run_isa("portable", 165)
    assert (len(result["small"]), len(result["1"])) == (len(DTYPES) * (len(WIDTHS) + 1 + 2), len(DTYPES) * 2)
    assert differences(result["small"], portable["small"]) == []
    assert differences(result["1"], portable["1"]) == []
    assert differences(result["2"], result["1"]) == []


@pytest.mark.parametrize("isa", ISAS)
def test_fresh_memory_is_filled(isa: str):
    """Otherwise the test above would not find unwritten memory."""
    fill = 165 if isa == "portable" else 90
    found = set(run_isa(isa, fill)["fill"])
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("only glibc fills fresh memory")
    assert found == {fill}


@pytest.mark.parametrize("isa", ISAS)
def test_half_types_are_converted_as_torch_does(isa: str):
    checks = run_isa(isa, 165 if isa == "portable" else 90)["checks"]
    assert len(checks) == len(HALVES) * 6 * 3
    assert [name for name, right in checks.items() if not right] == []


SHORT = "import torch, fastcompress; print(torch.ops.fastcompress.cpu_isa())"


@pytest.mark.parametrize(
    "value, warns",
    [
        ("pentium", True),
        ("AVX2", True),
        ("avx512", "avx512" not in SUPPORTED),
        ("", False),
        (None, False),
    ],
)
def test_an_unknown_instruction_set_warns_and_the_best_one_is_used(value: str | None, warns: bool):
    env = dict(os.environ)
    env.pop("FASTCOMPRESS_CPU_ISA", None)
    if value is not None:
        env["FASTCOMPRESS_CPU_ISA"] = value
    done = processes.run(["-c", SHORT], env=env, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    isa = done.stdout.strip()
    assert isa == SUPPORTED[0]
    message = f"fastcompress: FASTCOMPRESS_CPU_ISA={value} is unknown or not supported by this machine; using {isa}\n"
    assert done.stderr == (message if warns else "")

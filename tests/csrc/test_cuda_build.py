"""Tests of the CUDA build that need nvcc but no GPU. Other tests run the kernels on a GPU and in the emulator.

``make test`` compiles for one architecture, and the slow tests for those of a wheel. Registers, shared memory and
128-bit instructions are compared with tests/csrc/cuda_resources.json. After an intended change,
``python -m tests.support.cuda_build`` rewrites this table.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fastcompress
from tests.support import cuda_build
from tests.support.cuda_build import ARCHS, Kernel

PACKAGE = Path(fastcompress.__file__).parent
# Instructions for division, square root and reciprocal that do not round by IEEE 754, or that flush subnormals.
INEXACT = re.compile(r"\b(?:div\.full|div\.approx|sqrt\.approx|rsqrt\.approx|rcp\.approx|\w+(?:\.\w+)*\.ftz)\S*")
# Kernels that store rows 16 bytes at a time and single numbers besides: segments, offsets, counts, or gradients of
# weights. The table has the number of these instructions. Other kernels that store rows have none.
STORES_NUMBERS = ("segment_pool_fwd", "segment_weighted_mean_bwd", "integrate_rows_bwd")
# Kernels that divide by the number of frames, with two fused operations per element of a vector (csrc/cuda/divide.h).
DIVIDES = ("segment_expand_fwd", "segment_pool_fwd", "segment_reduce_fwd")
FUSED_DIVISIONS = {"float": 4, "BFloat16": 8}
FUSED = re.compile(r"\bfma\.\S+")

pytestmark = [
    pytest.mark.skipif(cuda_build.nvcc_version() is None, reason="no nvcc"),
    pytest.mark.timeout(1800),
    pytest.mark.slow,  # nvcc takes minutes
    pytest.mark.xdist_group("cuda-build"),  # one worker, so that there is one build
]
needs_cuobjdump = pytest.mark.skipif(cuda_build.cuobjdump() is None, reason="no cuobjdump and nvdisasm")


@pytest.fixture(scope="module")
def library() -> Path:
    return cuda_build.build(ARCHS)


@pytest.fixture(scope="module")
def kernels(library: Path) -> dict[str, dict[str, Kernel]]:
    return cuda_build.kernels(library)


def aligned(name: str) -> bool:
    """Return whether a kernel moves rows 16 bytes at a time, by its template arguments."""
    return bool(re.search(r"<\w+, true\b|<uint4>", name))


def test_loads_without_cuda(library: Path, tmp_path: Path):
    """The library also loads with a CPU build of torch. It initializes CUDA at the first call with a CUDA tensor."""
    shutil.copytree(PACKAGE, tmp_path / "fastcompress", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    shutil.copy(library, tmp_path / "fastcompress")
    env = {**os.environ, "PYTHONPATH": str(tmp_path), "FASTCOMPRESS_BACKEND": "cuda", "CUDA_VISIBLE_DEVICES": ""}

    def run(*command: str) -> str:
        done = subprocess.run([sys.executable, *command], env=env, cwd=tmp_path, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
        return done.stdout

    info = json.loads(run("-m", "fastcompress", "info", "--json"))
    assert info["library"]["cuda_archs"] == ";".join(ARCHS) + "+PTX"
    assert info["library"]["cuda_version"] == cuda_build.nvcc_version()
    assert {choice["cuda"]["backend"] for choice in info["ops"].values()} == {"cuda"}
    assert {choice["cpu"]["backend"] for choice in info["ops"].values()} == {"compiled"}
    pool = "import torch, fastcompress as fc; print(len(fc.segment_pool(torch.eye(6), rule=fc.Uniform(2)).values))"
    assert run("-c", pool).split() == ["3"]


def test_library_needs_no_cuda_library(library: Path):
    dynamic = subprocess.check_output(["readelf", "-d", library], text=True)
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", dynamic)
    assert "libtorch.so" in needed  # it loads libtorch_cuda in CUDA builds of torch
    assert [name for name in needed if "cuda" in name or "cudart" in name] == []
    symbols = subprocess.check_output(["nm", "-D", "--undefined-only", library], text=True).split("\n")
    pairs = [line.split() for line in symbols if line]
    # The function for the current stream is a weak symbol. The other one, in libtorch_cpu, returns the device type.
    assert ["w", "aoti_torch_get_current_cuda_stream"] in pairs
    strong = [name for kind, name in pairs if kind == "U" and "cuda" in name]
    assert set(strong) <= {"aoti_torch_device_type_cuda"}
    assert [name for _, name in pairs if name.startswith(("Py", "_Py"))] == []


def test_a_register_spill_fails_the_build(library: Path, tmp_path: Path):
    source = tmp_path / "spills.cu"
    source.write_text(
        "__global__ void __launch_bounds__(1024, 2) spills(float* x) {\n"
        "  float v[96];\n#pragma unroll\n  for (int i = 0; i < 96; ++i) v[i] = x[threadIdx.x * 96 + i];\n"
        "  __syncthreads();\n#pragma unroll\n  for (int i = 0; i < 96; ++i) x[threadIdx.x + 1024 * i] = v[95 - i];\n}\n"
    )
    ninja = (cuda_build.folder(ARCHS) / "build.ninja").read_text()
    nvcc = re.search(r"rule nvcc\n  command = (\S+)", ninja)[1]
    flags = re.search(r"\.cu\n  flags = (.+)", ninja)[1]
    done = subprocess.run(f"{nvcc} -c {source} -o {tmp_path / 'spills.o'} {flags}", shell=True, capture_output=True)
    assert done.returncode != 0 and b"spilled to local memory" in done.stderr


@needs_cuobjdump
def test_every_architecture_has_every_kernel(kernels: dict[str, dict[str, Kernel]]):
    assert set(kernels) == {f"sm_{arch}" for arch in ARCHS}
    names = [set(by_name) for by_name in kernels.values()]
    assert names[0] and all(other == names[0] for other in names)


@needs_cuobjdump
def test_resources_are_no_worse_than_in_the_table(kernels: dict[str, dict[str, Kernel]]):
    table = cuda_build.read_table()
    if table["nvcc"] != cuda_build.nvcc_version():
        pytest.skip(f"the table is for nvcc {table['nvcc']}, the installed one is {cuda_build.nvcc_version()}")
    problems = []
    for arch, by_name in kernels.items():
        expected = table["kernels"].get(arch, {})
        problems += [f"{arch} {name}: not in the table" for name in sorted(set(by_name) - set(expected))]
        problems += [f"{arch} {name}: only in the table" for name in sorted(set(expected) - set(by_name))]
        for name in sorted(set(expected) & set(by_name)):
            now, before = by_name[name], expected[name]
            for what in ("registers", "stack", "shared", "narrow"):
                if getattr(now, what) > getattr(before, what):
                    problems.append(f"{arch} {name}: {what} {getattr(before, what)} -> {getattr(now, what)}")
            if lost := set(before.wide) - set(now.wide):
                problems.append(f"{arch} {name}: lost 128-bit {', '.join(sorted(lost))}")
    assert not problems, "\n".join(["if the change is intended, run python -m tests.support.cuda_build", *problems])


@needs_cuobjdump
def test_worse_resources_are_detected(kernels: dict[str, dict[str, Kernel]]):
    arch, by_name = next(iter(kernels.items()))
    name = "adjacent_distance_fwd_kernel<float, true>"
    before = by_name[name]
    for now, message in (
        (dataclasses.replace(before, registers=before.registers + 50), f"{name}: registers {before.registers} ->"),
        (dataclasses.replace(before, stack=8), f"{name}: stack 0 -> 8"),
        (dataclasses.replace(before, wide=()), f"{name}: lost 128-bit LDG"),
    ):
        with pytest.raises(AssertionError, match=re.escape(message)):
            test_resources_are_no_worse_than_in_the_table({arch: {**by_name, name: now}})
    with pytest.raises(AssertionError, match="only in the table"):
        test_resources_are_no_worse_than_in_the_table({arch: {}})
    with pytest.raises(AssertionError, match="no 128-bit load"):
        test_aligned_kernels_move_16_bytes_at_a_time({arch: {name: dataclasses.replace(before, wide=())}})
    name = "segment_expand_fwd_kernel<BFloat16, true>"
    with pytest.raises(AssertionError, match="4 stores of less than 128 bits"):
        test_aligned_kernels_move_16_bytes_at_a_time({arch: {name: dataclasses.replace(by_name[name], narrow=4)}})


@needs_cuobjdump
def test_aligned_kernels_move_16_bytes_at_a_time(kernels: dict[str, dict[str, Kernel]]):
    checked, problems = 0, []
    for arch, by_name in kernels.items():
        for name, kernel in by_name.items():
            if not aligned(name):
                continue
            checked += 1
            if not {"LDG", "LDGSTS"} & set(kernel.wide):
                problems.append(f"{arch} {name}: no 128-bit load from global memory")
            # The kernels of distances, norms and boundaries store single numbers, not rows.
            if "STG" not in kernel.wide and not name.startswith(("adjacent_distance_fwd", "band_", "greedy_")):
                problems.append(f"{arch} {name}: no 128-bit store to global memory")
            if "STG" in kernel.wide and kernel.narrow > 0 and not name.startswith(STORES_NUMBERS):
                problems.append(f"{arch} {name}: {kernel.narrow} stores of less than 128 bits")
    assert not problems, "\n".join(problems)
    assert checked > 0


@needs_cuobjdump
def test_floats_are_computed_as_the_reference_does(library: Path, kernels: dict[str, dict[str, Kernel]]):
    """fp32 and fp64 products and sums are not fused; divisions and roots follow IEEE 754 (docs/numerics.md)."""
    found = cuda_build.ptx(library)
    assert set(found) == set(next(iter(kernels.values())))
    problems = []
    for name, text in found.items():
        wrong = set(INEXACT.findall(text))
        # Products of fp16 numbers are exact, so fusing does not change them. Products with the fp32 sum are not exact.
        fused = FUSED.findall(text)
        dtype = re.search(r"<(\w+)", name)
        divisions = 2 * FUSED_DIVISIONS.get(dtype[1], 0) if dtype and name.startswith(DIVIDES) else 0
        if (not re.search(r"<Half\b", name) or name.startswith("greedy_walk")) and len(fused) != divisions:
            wrong |= {f"{len(fused)} fused operations, expected {divisions}"}
        problems += [f"{name}: {instruction}" for instruction in sorted(wrong)]
    assert not problems, "\n".join(problems)
    scoring = "adjacent_distance_fwd_kernel<float, true>"
    assert all(word in found[scoring] for word in ("mul.rn.f32", "add.rn.f32"))


@needs_cuobjdump
def test_kernels_that_overlap_wait(library: Path):
    """Kernels that ``launch_dependent`` launches may start early. They wait before they use the sequences."""
    dependent = ("adjacent_distance_", "greedy_norms", "pack_map", "segment_pool_fwd", "select_flags")
    for name, text in cuda_build.ptx(library).items():
        assert ("griddepcontrol.wait" in text) == name.startswith(dependent), name
        assert ("griddepcontrol.launch_dependents" in text) == name.startswith("prepare"), name

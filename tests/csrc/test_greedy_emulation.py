"""The CUDA kernels of ``greedy_boundaries`` in the emulator. test_cuda_emulation.py tests those of the other ops."""

from __future__ import annotations

import os
import sys

import pytest
import torch

import fastcompress as fc
from tests.support.cuda_emulation import DEFAULT_DEVICE, SCHEDULES, build, emulated, load, run
from tests.support.sample_inputs import BAD_OFFSETS, DTYPES, assert_same_bits, features, packed, strided
from tests.support.slow import some

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux" or os.uname().machine != "x86_64", reason="the emulator is x86-64 code"),
    pytest.mark.emulated,
    pytest.mark.xdist_group("emulated"),  # one worker compiles
    pytest.mark.timeout(900),  # the first test includes the compilation
]

op = torch.ops.fastcompress.greedy_boundaries


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_in_shared_memory_and_elsewhere(dtype: torch.dtype):
    """One GPU has enough shared memory for the rows, the other does not. A thread has one vector, several or none."""
    for device in (DEFAULT_DEVICE, (4, 1 << 10, 1 << 10)):
        load().set_device(*device)
        try:
            for width, lengths in ((40, (30, 0, 1, 2, 17)), (2080, (9,)), (0, (3,))):
                batch = packed("smooth", width, dtype, lengths)
                cu = batch.layout["cu_seqlens"]
                expected = op(batch.x, cu, None, 0.3, 7)
                for seed, os_threads in SCHEDULES:
                    with emulated(seed, os_threads):
                        assert_same_bits(op(batch.x, cu, None, 0.3, 7), expected, f"{batch} on {device}, order {seed}")
        finally:
            load().set_device(*DEFAULT_DEVICE)


def test_strides():
    x = features("smooth", 40, 24, torch.bfloat16)
    expected = op(x, None, None, 0.3, 0)
    for name, same in strided(x):
        with emulated(5):
            assert_same_bits(op(same, None, None, 0.3, 0), expected, name)


@pytest.mark.parametrize("values", [*BAD_OFFSETS, [7]], ids=str)
def test_wrong_cu_seqlens(values: list[int], monkeypatch: pytest.MonkeyPatch):
    """All rows become one sequence. The error is raised when the count is read, or by the call if checks are on."""
    x = features("smooth", 60, 16, torch.float32)
    cu = torch.tensor(values, dtype=torch.int32)
    expected = op(x, None, None, 0.3, 0) if len(values) > 1 else torch.zeros(60, dtype=torch.bool)
    with emulated(7):
        assert_same_bits(op(x, cu, None, 0.3, 0), expected)
        with pytest.raises(ValueError, match="cu_seqlens must"):
            fc.greedy_segments(x, 0.3, cu_seqlens=cu)
        monkeypatch.setenv("FASTCOMPRESS_CHECK", "1")
        with pytest.raises(RuntimeError, match="cu_seqlens or lengths do not fit"):
            op(x, cu, None, 0.3, 0)


PROBE = """
import torch
from tests.support.cuda_emulation import emulated
from tests.support.sample_inputs import assert_same_bits, packed

op = torch.ops.fastcompress.greedy_boundaries
torch.set_num_threads(1)
for width in (64, 7):
    batch = packed("smooth", width, torch.float32, (40, 3, 20))
    arguments = batch.x, batch.layout["cu_seqlens"], None, 0.3, 0
    expected = op(*arguments)
    for seed in range(1, 4):
        with emulated(seed, 2):
            assert_same_bits(op(*arguments), expected)
print("no bug found")
"""
BUGS = {
    "no barrier before products are read": ("    __syncthreads();\n    const double dot", "    const double dot"),
    "a row that is read before its copy is complete": ("    if (kStaged) wait_for_copies();\n", ""),
    "the norm of the wrong frame": ("last_inverse = inverse;", "last_inverse = last_inverse;"),
}
RACES = {
    "no barrier before products are read": BUGS["no barrier before products are read"],
    "products overwritten before they are read": ("    __syncthreads();  // the rows are there", "    // the rows"),
}


def test_probe_passes_without_a_bug():
    done = run(["-c", PROBE], build())
    assert "no bug found" in done.stdout, done.stderr


@pytest.mark.parametrize("bug", some(BUGS, "no barrier before products are read"))
def test_seeded_bugs_are_found(bug: str):
    done = run(["-c", PROBE], build(change=("greedy_segments.cuh", *BUGS[bug])))
    assert done.returncode != 0
    assert "values differ" in done.stderr or "emulator:" in done.stderr, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("race", [None, *RACES])
def test_thread_sanitizer(race: str | None):
    done = run(["-c", PROBE], build("thread", ("greedy_segments.cuh", *RACES[race]) if race else None), "tsan")
    if race is None:
        assert "no bug found" in done.stdout and "ThreadSanitizer" not in done.stderr, done.stderr
    else:
        assert "ThreadSanitizer: data race" in done.stderr


@pytest.mark.sanitizer
@pytest.mark.timeout(1000)
def test_kernels_are_clean():
    """The tests above pass under AddressSanitizer."""
    command = ["-m", "pytest", "-q", "-x", "--capture=sys", "-p", "no:cacheprovider", __file__]
    done = run([*command, "-k", "rows or strides or wrong"], build("address"), "asan")
    assert done.returncode == 0 and "Sanitizer" not in done.stderr, (done.stdout[-2000:], done.stderr[-4000:])

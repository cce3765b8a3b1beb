"""An op that runs out of memory raises an error and leaks nothing, and later calls give correct results.

The tests limit the address space of another process while it calls ops. In this process every large block is mapped
separately, so that a few dozen limits make each allocation of an op fail.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastcompress as fc
from tests.support import ROOT
from tests.support.calls import Call
from tests.support.sample_inputs import assert_same_bits, features

pytestmark = [
    pytest.mark.skipif(
        "config.getoption('--emulated') is not None or config.getoption('--device')", reason="of the CPU"
    ),
    pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux"),
]

PAGE = resource.getpagesize()
ROWS, WIDTH = 4000, 64
#: Largest amount of memory that the limits leave. It is enough for every op, forward and backward.
MOST = 12 << 20


def work(dtype: torch.dtype) -> dict[str, Call]:
    x = features("smooth", ROWS, WIDTH, dtype)
    segments = fc.segment_pool(x).segments
    weights, alpha = torch.ones(ROWS), torch.full((ROWS,), 0.3)
    rows = torch.arange(ROWS)
    narrow = features("smooth", 20 * ROWS, 4, dtype)
    cu = torch.tensor([0, ROWS], dtype=torch.int32)
    return {
        "segment_pool": Call(fc.segment_pool, {"x": x}, ("x",)),
        "segment_pool, loose": Call(fc.segment_pool, {"x": x, "compact": False}, ("x",)),
        "segment_pool, scalar rule": Call(fc.segment_pool, {"x": x, "rule": fc.TopK(rate=3.0)}, ("x",)),
        "segment_pool, columns": Call(fc.segment_pool, {"x": x.T.contiguous().T}, ("x",)),
        "adjacent_distance": Call(fc.adjacent_distance, {"x": x}, ("x",)),
        "segment_reduce, max": Call(fc.segment_reduce, {"x": x, "segments": segments, "reduce": "max"}, ("x",)),
        "segment_reduce, weights": Call(
            fc.segment_reduce, {"x": x, "segments": segments, "weights": weights}, ("x", "weights")
        ),
        "segment_expand": Call(fc.segment_expand, {"y": x[: len(segments.starts)], "segments": segments}, ("y",)),
        "greedy_segments": Call(fc.greedy_segments, {"x": narrow, "threshold": 0.3}),
        "integrate_and_fire": Call(fc.integrate_and_fire, {"x": x, "alpha": alpha}, ("x", "alpha")),
        "pack": Call(
            fc.pack,
            {
                "input_ids": rows % 9,
                "embedding": x[:9],
                "row_group": (rows == 9).int(),
                "audio": x,
                "audio_cu_seqlens": cu,
            },
            ("embedding", "audio"),
        ),
    }


def pages(field: int) -> int:
    """Return the number of pages of this process; field 0 is its address space, field 1 its resident memory."""
    return int(Path("/proc/self/statm").read_text().split()[field])


def starve(name: str, call: Call, steps: int) -> tuple[int, int]:
    """Call with increasing address space, twice, and return how many calls failed and how many succeeded."""
    expected = call.gradients()
    failed = enough = resident = 0
    unlimited = resource.getrlimit(resource.RLIMIT_AS)
    for step in range(2 * steps):
        limit = pages(0) * PAGE + MOST * (step % steps) // steps
        resource.setrlimit(resource.RLIMIT_AS, (limit, unlimited[1]))
        try:
            found = call.gradients()
        except (RuntimeError, MemoryError):
            found = None
        finally:
            resource.setrlimit(resource.RLIMIT_AS, unlimited)
        if found is None:
            failed += 1
            if step % 4 == 0:  # without a limit, results are correct
                found = call.gradients()
        else:
            enough += 1
        for a, b in zip(expected, found or expected, strict=True):
            assert_same_bits(a, b, name)
        if step == steps:  # caches are filled by now
            resident = pages(1)
    grown = (pages(1) - resident) * PAGE
    # A leak of one block as large as x at each failure would exceed this bound; caches grow by up to 2.8 MB.
    assert grown < 4 << 20, f"{name}: {grown} bytes more are in memory after {steps} more calls"
    return failed, enough


def starve_all(dtype: str, threads: int, steps: int) -> None:
    torch.set_num_threads(threads)
    for name, call in work(getattr(torch, dtype)).items():
        failed, enough = starve(name, call, steps)
        print(f"{name}: failed {failed}, worked {enough}", flush=True)
        assert failed >= 3 and enough >= 3, "some limits must be below what the op needs, and some above"


@pytest.mark.timeout(280)
@pytest.mark.parametrize(
    ("dtype", "threads", "steps"),
    [
        # 0.6 MB apart: less than the blocks of 1 MB that the ops allocate.
        ("float32", 1, 20),
        pytest.param("float32", 1, 50, marks=pytest.mark.slow),
        pytest.param("bfloat16", 2, 50, marks=pytest.mark.slow),
    ],
)
def test_out_of_memory_in_the_middle(dtype: str, threads: int, steps: int):
    # glibc maps blocks of at least 64 KiB separately and returns them when they are freed.
    environment = os.environ | {
        "PYTHONPATH": os.environ.get("PYTHONPATH", str(ROOT)),
        "MALLOC_MMAP_THRESHOLD_": str(64 << 10),
        "MALLOC_ARENA_MAX": "1",
        "OMP_WAIT_POLICY": "passive",
    }
    code = f"import tests.ops.test_memory as t; t.starve_all({dtype!r}, {threads}, {steps})"
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert done.stdout.count("failed") == len(work(torch.float32)), done.stdout

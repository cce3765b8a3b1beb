"""The emulator of CUDA kernels finds seeded bugs.

Each bug is put into a copy of a source file, and a separate process runs the op.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.cuda_emulation import build, run
from tests.support.slow import some

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux" or os.uname().machine != "x86_64", reason="the emulator is x86-64 code"),
    pytest.mark.emulated,
    pytest.mark.xdist_group("emulated"),  # one worker compiles
    pytest.mark.timeout(900),  # the first test includes the compilation
]

PROBE = """
import torch
import fastcompress as fc
from tests.support.cuda_emulation import emulated
from tests.support.sample_inputs import assert_same_bits, packed

torch.set_num_threads(1)
for width, dtype in ((64, torch.float32), (7, torch.float32)):
    batch = packed("smooth", width, dtype, (90, 3, 40))
    expected = fc.segment_pool(batch.x, **batch.layout, compact=False).values
    for seed in range(1, 4):
        with emulated(seed, 2):
            actual = fc.segment_pool(batch.x, **batch.layout, compact=False).values
        assert_same_bits(actual, expected)
from tests.support.sample_inputs import packing

packings = [tuple(packing(seed).values()) for seed in (1, 2)]
expected = [torch.ops.fastcompress.pack_map(*arguments) for arguments in packings]
for seed in range(1, 4):
    with emulated(seed, 2):
        for arguments, outputs in zip(packings, expected):
            for actual, output in zip(torch.ops.fastcompress.pack_map(*arguments), outputs):
                assert_same_bits(actual, output)
print("no bug found")
"""
BUGS = {
    "a missing barrier": (
        "segment_pool.cuh",
        "  __syncthreads();\n  if (thread + 1 < rows)\n",
        "  if (thread + 1 < rows)\n",
    ),
    "a row off by one": (
        "segment_pool.cuh",
        "row(first + k < rows ? first + k : rows - 1)",
        "row(first + 2 * k < rows ? first + 2 * k : rows - 1)",
    ),
    "a copy that is not waited for": (
        "segment_pool.cuh",
        "    wait_for_copies();\n",
        "",
    ),
    "a tile that trusts its neighbour's count": (
        "tile.cuh",
        "(word & 3) == kCountSoFar",
        "(word & 3) != 0",
    ),
    "a missing barrier in packing": (
        "pack.cuh",
        "  __syncthreads();\n  const int64_t texts_before",
        "  const int64_t texts_before",
    ),
    "an audio's rows off by one": (
        "pack.cuh",
        "k < audio_begin(audio + 1)",
        "k + 1 < audio_begin(audio + 1)",
    ),
    "one halo row too few": (
        "params.h",
        "rule.needs_distance() ? 1 + rule.lookahead() : 0",
        "rule.needs_distance() ? rule.lookahead() : 0",
    ),
}
RACES = {
    "a missing barrier": BUGS["a missing barrier"],
    "a missing barrier in packing": BUGS["a missing barrier in packing"],
    "a plain store instead of an atomic one": (
        "device.h",
        "__atomic_store_n(p, value, __ATOMIC_RELAXED);",
        "*static_cast<volatile uint64_t*>(p) = value;",
    ),
    "no barrier before shared memory is written again": (
        "segment_pool.cuh",
        "  while (true) {\n    __syncthreads();\n    if (thread == 0) {\n      const uint64_t total",
        "  while (true) {\n    if (thread == 0) {\n      const uint64_t total",
    ),
}
OVERRUNS = {
    "a row after the last one": (
        "segment_pool.cuh",
        "length < rows - window.first ? window.first + length : rows",
        "window.first + length",
    ),
}
# The overflow wraps around to 0, so the result is the same.
OVERFLOWS = {
    "a product that overflows": (
        "params.h",
        "rule.needs_distance() ? 1 + rule.lookahead() : 0",
        "rule.needs_distance() ? 1 + rule.lookahead() + int(rule.lookahead()) * 65536 * 65536 : 0",
    ),
}


def probe(module: Path, sanitizer: str | None = None) -> subprocess.CompletedProcess[str]:
    return run(["-c", PROBE], module, sanitizer)


def test_probe_passes_without_a_bug():
    done = probe(build())
    assert "no bug found" in done.stdout, done.stderr


@pytest.mark.parametrize("bug", some(BUGS, "a missing barrier", "a missing barrier in packing"))
def test_seeded_bugs_are_found(bug: str):
    done = probe(build(change=BUGS[bug]))
    assert done.returncode != 0
    assert "values differ" in done.stderr or "emulator:" in done.stderr, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("race", [None, *RACES])
def test_thread_sanitizer(race: str | None):
    done = probe(build("thread", RACES[race] if race else None), "tsan")
    if race is None:
        assert "no bug found" in done.stdout and "ThreadSanitizer" not in done.stderr, done.stderr
    else:
        assert "ThreadSanitizer: data race" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("bug", [None, *OVERRUNS, *OVERFLOWS])
def test_address_sanitizer_and_ubsan(bug: str | None):
    done = probe(build("address", (OVERRUNS | OVERFLOWS)[bug] if bug else None), "asan")
    if bug is None:
        assert done.returncode == 0 and "no bug found" in done.stdout, done.stderr
    else:
        assert done.returncode != 0
        assert ("AddressSanitizer" if bug in OVERRUNS else "signed integer overflow") in done.stderr

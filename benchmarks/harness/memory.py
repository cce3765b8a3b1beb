"""Memory that a call needs beyond its outputs, as the high-water mark of a fresh process.

``python -m benchmarks.harness.memory FRAMES DIM DTYPE THREADS`` prints it as JSON.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.cases import cu_seqlens, features

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")

#: Frames and width measured: long enough for a page or a thread's scratch to vanish in the quotient.
FRAMES, DIM = 60_000, 1280


def _status(key: str) -> int:
    """Bytes of a line of the process status."""
    match = re.search(rf"^{key}:\s*(\d+) kB", _STATUS.read_text(), re.MULTILINE)
    if match is None:
        raise OSError(f"no {key} in {_STATUS}")
    return int(match[1]) << 10


def high_water(call: Callable[[], Any]) -> int:
    """Bytes by which the resident memory of this process grows at most during a call.

    Raises:
        OSError: the system does not tell.
    """
    with contextlib.suppress(AttributeError):  # glibc: memory it holds back would hide as much of the peak
        ctypes.CDLL(None).malloc_trim(0)
    _CLEAR.write_text("5")  # the high-water mark starts again from here
    before = _status("VmRSS")
    call()
    return _status("VmHWM") - before


def _pool_memory(frames: int, dim: int, dtype: torch.dtype, threads: int) -> dict[str, Any]:
    import fastcompress as fc

    torch.set_num_threads(threads)
    rule = fc.LocalMax()
    x, cu = features(frames, dim, dtype), cu_seqlens([1500] * (frames // 1500) + [frames % 1500] * (frames % 1500 > 0))
    with torch.no_grad():
        fc.segment_pool(x[:3000].clone(), cu_seqlens=cu_seqlens([1500, 1500]), rule=rule)  # code, threads, allocator
        results = []
        peak = high_water(lambda: results.append(fc.segment_pool(x, cu_seqlens=cu, rule=rule)))
    pooled = results[0]
    segments = pooled.segments
    outputs = sum(tensor.nbytes for tensor in (pooled.values, segments.starts, segments.lengths, segments.cu_segments))
    return {
        "frames": frames,
        "dim": dim,
        "dtype": str(dtype).removeprefix("torch."),
        "threads": threads,
        "tokens": pooled.values.shape[0],
        "input_bytes": x.nbytes,
        "output_bytes": outputs,
        "reserved_bytes": pooled.values.untyped_storage().nbytes(),
        "peak_bytes": peak,
        "extra_bytes": peak - outputs,
        "extra_bytes_per_frame": (peak - outputs) / frames,
    }


def measure_memory(dtype: torch.dtype, threads: int, frames: int = FRAMES, dim: int = DIM) -> dict[str, Any]:
    """The high-water mark of one call in a fresh process; ``{"error": ...}`` where the system does not tell."""
    name = str(dtype).removeprefix("torch.")
    command = [sys.executable, "-m", "benchmarks.harness.memory", str(frames), str(dim), name, str(threads)]
    root = Path(__file__).resolve().parents[2]
    result = subprocess.run(command, capture_output=True, text=True, cwd=root)
    if result.returncode:
        return {"error": (result.stderr.strip() or f"exit status {result.returncode}").splitlines()[-1]}
    found: dict[str, Any] = json.loads(result.stdout)
    return found


if __name__ == "__main__":
    _frames, _dim, _dtype, _threads = sys.argv[1:]
    print(json.dumps(_pool_memory(int(_frames), int(_dim), getattr(torch, _dtype), int(_threads))))

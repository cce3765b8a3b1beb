"""The memory floor: reading the input once and writing the output, nothing more; and the machine's ceilings.

Three kinds of output memory, because pages that the kernel has yet to give cost more than the traffic:

* ``fresh``: ``torch.empty``, as for every contender. The C library gives memory back to the system only above a size
  (32 MiB with glibc), so this is pages new to the process for large outputs and mostly recycled ones for small.
* ``huge``: the same and ``madvise(MADV_HUGEPAGE)``, as the library allocates its large outputs.
* ``warm``: memory written before.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

KINDS = ("fresh", "huge", "warm")
#: Bytes of a row of memory that is read or copied.
LINE = 4096

_SOURCE = Path(__file__).with_name("bandwidth_bound.cpp")
#: Bytes from which the library asks for huge pages.
_MIN_ADVISED = 4 << 20
_FLAGS = ("-O3", "-march=native", "-std=c++17", "-fPIC", "-fopenmp")


class FloorUnavailable(Exception):
    """The floor cannot be built here."""


def _openmp() -> list[str]:
    """Linker arguments for the OpenMP of torch: a second one would keep threads of its own spinning."""
    found = sorted(Path(torch.__file__).parent.glob("lib/libgomp*.so*"))
    return [str(found[0])] if found else ["-fopenmp"]


def build() -> Path:
    """Compiles ``floor.cpp`` unless a cached build fits, and returns the library."""
    compiler = os.environ.get("CXX", "g++")
    key = "\0".join((_SOURCE.read_text(), compiler, *_FLAGS, *_openmp(), platform.processor(), torch.__version__))
    user = os.getuid() if hasattr(os, "getuid") else 0
    folder = Path(tempfile.gettempdir()) / f"fastcompress-benchmarks-{user}"
    library = folder / f"floor-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    if library.exists():
        return library
    folder.mkdir(mode=0o700, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        target, built = Path(scratch) / "floor.o", Path(scratch) / "floor.so"
        try:
            subprocess.run([compiler, *_FLAGS, "-c", str(_SOURCE), "-o", str(target)], check=True, capture_output=True)
            subprocess.run(
                [compiler, "-shared", str(target), "-o", str(built), *_openmp()], check=True, capture_output=True
            )
        except FileNotFoundError as error:
            raise FloorUnavailable(f"no compiler {compiler!r}") from error
        except subprocess.CalledProcessError as error:
            raise FloorUnavailable(error.stderr.decode(errors="replace").strip()) from error
        built.replace(library)
    return library


class Floor:
    """The floor on this machine. Raises :class:`FloorUnavailable` without a compiler."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(str(build()))
        pointer, integer = ctypes.c_void_p, ctypes.c_int64
        for name in ("floor_pool", "floor_expand"):
            getattr(self._library, name).argtypes = (pointer, integer, pointer, integer, integer, ctypes.c_int)
            getattr(self._library, name).restype = None
        self._library.floor_advise.argtypes, self._library.floor_advise.restype = (pointer, integer), None
        self._library.floor_arithmetic.argtypes = (integer, ctypes.c_int, ctypes.c_int)
        self._library.floor_arithmetic.restype = integer

    def _output(self, kind: str, size: int, warm: Tensor | None) -> Tensor:
        if warm is not None:
            return warm
        memory = torch.empty(size, dtype=torch.uint8)
        if kind == "huge" and size >= _MIN_ADVISED:
            self._library.floor_advise(memory.data_ptr(), size)
        return memory

    def calls(
        self, kind: str, xs: list[Tensor], grads: list[Tensor], tokens: int, threads: int, backward: bool
    ) -> Callable[[int], object]:
        """The function to time; its argument is a running number that picks the buffers.

        Args:
            kind: of ``KINDS``.
            xs: inputs ``[N, D]`` to rotate through.
            grads: ``[>= M, D]``, what the backward pass reads.
            tokens: M.
            threads: threads.
            backward: the pass back too.
        """
        rows = xs[0].shape[0]
        row_bytes = xs[0].shape[1] * xs[0].itemsize
        if row_bytes % 64:
            raise ValueError(f"rows of xs must be a multiple of 64 bytes, got {row_bytes}")
        size, size_back = tokens * row_bytes, rows * row_bytes
        warm = [torch.zeros(size, dtype=torch.uint8) for _ in range(2)] if kind == "warm" else None
        warm_back = torch.zeros(size_back, dtype=torch.uint8) if kind == "warm" and backward else None
        pool, expand = self._library.floor_pool, self._library.floor_expand

        def call(i: int) -> object:
            out = self._output(kind, size, warm[i % 2] if warm else None)
            pool(xs[i % len(xs)].data_ptr(), rows, out.data_ptr(), tokens, row_bytes, threads)
            if not backward:
                return out
            grad_x = self._output(kind, size_back, warm_back)
            expand(grads[i % len(grads)].data_ptr(), tokens, grad_x.data_ptr(), rows, row_bytes, threads)
            return out, grad_x

        return call

    def read(self, memory: Tensor, threads: int) -> None:
        """Reads ``memory``, whose size is a multiple of ``LINE`` bytes, and writes nothing."""
        rows = memory.nbytes // LINE
        self._library.floor_pool(memory.data_ptr(), rows, memory.data_ptr(), 0, LINE, threads)

    def copy(self, source: Tensor, target: Tensor, threads: int) -> None:
        """Writes ``source`` to ``target``; both of one size, a multiple of ``LINE`` bytes."""
        rows = source.nbytes // LINE
        self._library.floor_expand(source.data_ptr(), rows, target.data_ptr(), rows, LINE, threads)

    def arithmetic(self, steps: int, fused: bool, threads: int) -> int:
        """Multiplies and adds fp32 in registers and returns how many operations these were.

        Args:
            steps: of each thread.
            fused: a multiplication and an addition in one instruction, else in two.
            threads: threads.
        """
        operations: int = self._library.floor_arithmetic(steps, int(fused), threads)
        return operations

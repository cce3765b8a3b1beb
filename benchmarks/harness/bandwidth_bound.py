"""The bandwidth bound: reading the input once and writing the output, nothing more; and the limits of the machine.

Three kinds of output memory, because pages that the kernel has yet to provide cost more than the traffic:

* ``fresh``: ``torch.empty``, as for every implementation. The C library returns memory to the system only above a size
  (32 MiB with glibc), so these are pages new to the process for large outputs and mostly recycled ones for small.
* ``huge``: the same with ``madvise(MADV_HUGEPAGE)``, as the library allocates its large outputs.
* ``warm``: memory written before.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

KINDS = ("fresh", "huge", "warm")
#: Bytes per row of memory that is read or copied.
LINE = 4096

#: Bytes from which the library asks for huge pages.
_MIN_ADVISED = 4 << 20


class BoundUnavailable(Exception):
    """The bandwidth bound cannot be built here."""


def _build() -> ctypes.CDLL:
    """Compile ``bandwidth_bound.cpp`` unless an earlier build fits."""
    # The OpenMP of torch: a second one would keep threads of its own spinning.
    openmp = sorted(Path(torch.__file__).parent.glob("lib/libgomp*.so*"))[:1]
    # -march=native: a build of another machine with the same home folder may not run here.
    name = f"fastcompress_bandwidth_bound_{torch.backends.cpu.get_cpu_capability().lower()}"
    source = str(Path(__file__).with_suffix(".cpp"))
    flags, linked = ["-O3", "-march=native", "-fopenmp"], [str(path) for path in openmp] or ["-fopenmp"]
    try:
        from torch.utils import cpp_extension  # needs setuptools

        return ctypes.CDLL(
            cpp_extension.load(name, source, extra_cflags=flags, extra_ldflags=linked, is_python_module=False)
        )
    except (ImportError, OSError, RuntimeError) as error:  # no setuptools, ninja or compiler, or an error of it
        raise BoundUnavailable(str(error)) from error


class BandwidthBound:
    """The compiled probe.

    Raises:
        BoundUnavailable: There is no compiler.
    """

    def __init__(self) -> None:
        self._library = _build()
        pointer, integer = ctypes.c_void_p, ctypes.c_int64
        for name in ("bound_pool", "bound_expand"):
            getattr(self._library, name).argtypes = (pointer, integer, pointer, integer, integer, ctypes.c_int)
            getattr(self._library, name).restype = None
        self._library.bound_advise.argtypes, self._library.bound_advise.restype = (pointer, integer), None
        self._library.bound_arithmetic.argtypes = (integer, ctypes.c_int, ctypes.c_int)
        self._library.bound_arithmetic.restype = integer

    def _output(self, kind: str, size: int) -> Tensor:
        memory = torch.empty(size, dtype=torch.uint8)
        if kind == "huge" and size >= _MIN_ADVISED:
            self._library.bound_advise(memory.data_ptr(), size)
        return memory

    def calls(
        self, kind: str, xs: Sequence[Tensor], grads: Sequence[Tensor], tokens: int, threads: int, backward: bool
    ) -> Callable[[int], object]:
        """Build the function to time, whose argument is a running number that picks the buffers.

        Args:
            kind: One of ``KINDS``.
            xs: Inputs, ``[N, D]``, to rotate through.
            grads: What the backward pass reads, ``[>= M, D]``.
            tokens: M.
            threads: Number of threads.
            backward: Whether to move the bytes of the backward pass too.
        """
        rows, row_bytes = xs[0].shape[0], xs[0][0].nbytes
        if row_bytes % 64:
            raise ValueError(f"rows of xs must be a multiple of 64 bytes, got {row_bytes}")
        size, size_back = tokens * row_bytes, rows * row_bytes
        warm = [torch.zeros(size, dtype=torch.uint8) for _ in range(2)] if kind == "warm" else None
        warm_back = torch.zeros(size_back, dtype=torch.uint8) if kind == "warm" and backward else None
        pool, expand = self._library.bound_pool, self._library.bound_expand

        def call(i: int) -> object:
            out = warm[i % 2] if warm else self._output(kind, size)
            pool(xs[i % len(xs)].data_ptr(), rows, out.data_ptr(), tokens, row_bytes, threads)
            if not backward:
                return out
            grad_x = self._output(kind, size_back) if warm_back is None else warm_back
            expand(grads[i % len(grads)].data_ptr(), tokens, grad_x.data_ptr(), rows, row_bytes, threads)
            return out, grad_x

        return call

    def read(self, memory: Tensor, threads: int) -> None:
        """Read ``memory``, whose size is a multiple of ``LINE`` bytes, and write nothing."""
        self._library.bound_pool(memory.data_ptr(), memory.nbytes // LINE, memory.data_ptr(), 0, LINE, threads)

    def copy(self, source: Tensor, target: Tensor, threads: int) -> None:
        """Write ``source`` to ``target``; both have one size, a multiple of ``LINE`` bytes."""
        rows = source.nbytes // LINE
        self._library.bound_expand(source.data_ptr(), rows, target.data_ptr(), rows, LINE, threads)

    def arithmetic(self, steps: int, fused: bool, threads: int) -> int:
        """Multiply and add fp32 in registers for some steps per thread, and return the number of operations.

        With ``fused`` a multiplication and an addition share one instruction.
        """
        operations: int = self._library.bound_arithmetic(steps, int(fused), threads)
        return operations

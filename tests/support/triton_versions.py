"""Whether the interpreter of the installed triton runs."""

from __future__ import annotations

import numpy
import triton


def no_interpreter(triton: str, numpy: str) -> str:
    """Return the reason if the interpreter does not run: up to triton 3.6 it is not compatible with NumPy 2.4."""

    def minor(version: str) -> tuple[int, ...]:
        return tuple(map(int, version.split(".")[:2]))

    broken = minor(triton) < (3, 7) and minor(numpy) >= (2, 4)
    return f"the interpreter of triton {triton} does not run with numpy {numpy}" if broken else ""


WHY_NOT = no_interpreter(triton.__version__, numpy.__version__)

"""A pytest plugin that counts the variants of Triton kernels that the tests of a run compile on a GPU.

``pytest -p tests.support.triton_variants`` prints the number at the end. A variant is a kernel with the dtypes of its
tensors, its constants, and which integers Triton specializes: those that are 1 or multiples of 16. Each one takes up
to 10 s of CPU time to compile (triton 3.6, sm_90). Triton's interpreter counts the same variants.
"""

from __future__ import annotations

import sys
from typing import Any

import pytest
from torch import Tensor

_variants: set[tuple[Any, ...]] = set()


def _kind(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.dtype, value.data_ptr() % 16 == 0
    if isinstance(value, int) and not isinstance(value, bool):
        return "1" if value == 1 else "16" if value % 16 == 0 else "int"
    return type(value).__name__


def pytest_configure(config: pytest.Config) -> None:
    from fastcompress.triton import common

    launch = common.launch

    def counting(kernel: Any, grid: tuple[int, ...], like: Tensor, *args: Any, **constants: Any) -> None:
        name = getattr(kernel, "fn", kernel).__name__
        _variants.add((name, *map(_kind, args), *sorted(map(repr, constants.items()))))
        launch(kernel, grid, like, *args, **constants)

    for module in list(sys.modules.values()):  # each file of fastcompress.triton imports the function
        if getattr(module, "launch", None) is launch:
            module.launch = counting  # type: ignore[attr-defined]


def pytest_terminal_summary(terminalreporter: Any) -> None:
    terminalreporter.write_line(f"{len(_variants)} variants of Triton kernels")

"""Run the ops of CPU tensors on another device, so that the unchanged test suite runs there (``pytest --device cuda``).

Inputs are moved with their storage, offset and strides, and results are moved back. ``--device cpu`` copies instead of
moving, and calls the kernels of the CUDA dispatch key with CPU tensors: those of ``--backend reference``, or those of
``--backend triton`` in Triton's interpreter.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import fastcompress
from fastcompress.dispatch.backends import override
from fastcompress.reference import OPS

_CUDA_KEY = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
_CPU_KEY = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
# The compiled kernels of the CPU, fetched when this module is imported: before a fixture overrides them.
_COMPILED: dict[str, Any] = {}
if hasattr(torch.library, "get_kernel"):  # torch 2.10 or later
    for _name in OPS:
        if torch._C._dispatch_has_kernel_for_dispatch_key(f"fastcompress::{_name}", "CPU"):
            _COMPILED[_name] = torch.library.get_kernel(getattr(torch.ops.fastcompress, _name).default, "CPU")


def moved(x: Tensor, device: torch.device) -> Tensor:
    """Return a copy of ``x`` on a device, with the strides and the storage offset of ``x``."""
    storage = x.untyped_storage().to(device=device) if device.type != "cpu" else x.untyped_storage().clone()
    return torch.empty(0, dtype=x.dtype, device=device).set_(storage, x.storage_offset(), x.shape, x.stride())


def _on(device: torch.device, name: str) -> Callable[..., Any]:
    op = getattr(torch.ops.fastcompress, name).default

    def run(*args: Any) -> Any:
        there = [moved(arg, device) if isinstance(arg, Tensor) else arg for arg in args]
        out = op(*there) if device.type != "cpu" else op.redispatch(_CUDA_KEY, *there)
        return out.cpu() if isinstance(out, Tensor) else tuple(part.cpu() for part in out)

    return run


@contextlib.contextmanager
def on_device(device: torch.device) -> Iterator[None]:
    """Run the ops of CPU tensors on ``device`` in this context."""
    library = override({name: _on(device, name) for name in OPS}, ("CPU",))
    try:
        yield
    finally:
        library._destroy()


@contextlib.contextmanager
def expected_results() -> Iterator[None]:
    """Compute what a test of a device expects: the ops run on the compiled kernels of the CPU in this context.

    Other tests prove these equal to the reference, bit for bit, and they are 100 times faster. Without the compiled
    library, the ops run on the reference.
    """
    if not _COMPILED:
        with fastcompress.backend("reference"):
            yield
        return

    def run(name: str) -> Callable[..., Any]:
        return lambda *args: _COMPILED[name].call_boxed(_CPU_KEY, *args)

    library = override({name: run(name) for name in _COMPILED}, ("CPU",))
    try:
        yield
    finally:
        library._destroy()

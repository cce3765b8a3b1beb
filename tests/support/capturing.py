"""A stand-in for the capture of a CUDA graph on the CPU: whatever a real capture forbids raises."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fastcompress import checks

#: Functions that read a tensor on the host. The functions of torch whose result has a size that depends on values read
#: the size.
READS = {
    Tensor.item,
    Tensor.tolist,
    Tensor.nonzero,
    Tensor.unique,
    Tensor.masked_select,
    torch.nonzero,
    torch.unique,
    torch.masked_select,
    *(getattr(Tensor, f"__{kind}__") for kind in ("bool", "int", "float", "index")),
}


class _NoReads(TorchFunctionMode):
    """Raise if the host reads a tensor, except one that ``torch.tensor`` creates with ``device="cpu"``."""

    def __init__(self) -> None:
        super().__init__()
        self._on_host: list[Tensor] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in READS and not any(args[0] is tensor for tensor in self._on_host):
            raise RuntimeError(f"operation not permitted when stream is capturing: {func.__name__}")
        result = func(*args, **kwargs)
        if func is torch.tensor and kwargs.get("device") == "cpu":
            self._on_host.append(result)
        return result


@contextlib.contextmanager
def capturing() -> Iterator[None]:
    """Treat the CPU like a GPU whose current stream is captured: the library must not read from it.

    In the emulator of the CUDA kernels, a copy to the host fails.
    """
    emulation = sys.modules.get("tests.support.cuda_emulation")
    module = emulation.load() if emulation is not None and emulation.load.cache_info().currsize else None
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(checks, "is_captured", lambda tensor: True))
        if module is not None:
            module.set_capturing(True)
            stack.callback(module.set_capturing, False)
        stack.enter_context(_NoReads())
        yield

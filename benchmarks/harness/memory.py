"""Peak memory of a call, as the high-water mark of a fresh process."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import re
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, TypeVar

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
T = TypeVar("T")


def _status(key: str) -> int:
    """Return the bytes on one line of the process status."""
    match = re.search(rf"^{key}:\s*(\d+) kB", _STATUS.read_text(), re.MULTILINE)
    if match is None:
        raise OSError(f"no {key} in {_STATUS}")
    return int(match[1]) << 10


def high_water(call: Callable[[], Any]) -> int:
    """Return the bytes by which the resident memory of this process grows at most during a call.

    Raises:
        OSError: The system does not report it.
    """
    with contextlib.suppress(AttributeError):  # glibc: memory that it holds back would hide as much of the peak
        ctypes.CDLL(None).malloc_trim(0)
    _CLEAR.write_text("5")  # resets the high-water mark
    before = _status("VmRSS")
    call()
    return _status("VmHWM") - before


def in_process(function: Callable[..., T], *arguments: object) -> T | None:
    """Call a function of a module in a fresh process; ``None`` if memory is not reported, or too small."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except (OSError, BrokenProcessPool):
            return None

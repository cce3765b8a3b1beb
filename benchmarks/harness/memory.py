"""Peak memory of a call, as the high-water mark of a fresh process."""

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

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def _status(key: str) -> int:
    """Bytes on one line of the process status."""
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


def in_process(module: str, *arguments: object) -> Any:
    """Run a module of the suites in a fresh process and return the JSON on its last line; ``None`` if it fails."""
    command = [sys.executable, "-m", f"benchmarks.suites.{module}", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).resolve().parents[2])
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None

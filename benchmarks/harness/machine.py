"""What a result was measured on and with."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

_CACHE = Path("/sys/devices/system/cpu/cpu0/cache")
_THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_ROOT = Path(__file__).resolve().parents[2]


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _cpu_model() -> str:
    match = re.search(r"^model name\s*:\s*(.+)$", _read(Path("/proc/cpuinfo")), re.MULTILINE)
    return match.group(1).strip() if match else platform.processor() or platform.machine()


def _caches() -> dict[str, int]:
    """Bytes of each data cache of the first core, such as ``{"L1": 32768, "L2": 1048576, "L3": 33554432}``."""
    caches = {}
    for index in sorted(_CACHE.glob("index*")):
        size = re.fullmatch(r"(\d+)([KMG]?)", _read(index / "size"))
        if size and _read(index / "type") != "Instruction":
            caches["L" + _read(index / "level")] = int(size[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[size[2]]
    return caches


def last_level_cache() -> int:
    """Bytes of the last-level cache, 32 MiB when the system does not tell."""
    return max(_caches().values(), default=32 << 20)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine() -> dict[str, Any]:
    """The hardware and the settings that matter to a memory-bound kernel."""
    memory = re.search(r"MemTotal:\s*(\d+)", _read(Path("/proc/meminfo")))
    huge = re.search(r"\[(\w+)\]", _read(_THP))
    return {
        "cpu": _cpu_model(),
        "cores": cores(),
        "caches": _caches(),
        "memory": int(memory[1]) << 10 if memory else None,
        "transparent_hugepages": huge[1] if huge else None,
        "isa": torch.backends.cpu.get_cpu_capability(),
        "system": f"{platform.system()} {platform.machine()}",
        "libc": " ".join(platform.libc_ver()).strip(),
    }


def slug(hardware: Mapping[str, Any] | None = None) -> str:
    """A file name for a machine as :func:`machine` describes it, this one if not told: its CPU, cores and instructions.

    Virtual machines call CPUs of several generations by one name; those without AVX-512 give other ratios.
    """
    hardware = hardware or machine()
    name = re.sub(r"\b(cpu|processor|with)\b|\((r|tm)\)|@.*", " ", hardware["cpu"].lower())
    isa = re.sub(r"\W", "", hardware["isa"].lower())
    return "-".join([*re.findall(r"[a-z0-9]+", name), f"{hardware['cores']}c", isa])


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _library() -> dict[str, Any]:
    """The library measured, which need not be installed."""
    import fastcompress

    version = getattr(fastcompress, "__version__", None)
    return {"fastcompress": version, "fastcompress_compiled": bool(getattr(_library, "COMPILED", False))}


def versions() -> dict[str, Any]:
    """Versions of what took part."""
    return {"python": platform.python_version(), "torch": torch.__version__, **_library()} | {
        name: _version(name) for name in ("numpy", "torch-scatter", "fbgemm-gpu-cpu")
    }


def commit() -> str | None:
    """The commit of the checkout, with ``-dirty`` when files differ from it."""
    command = ["git", "-C", str(_ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip() or None
    except (OSError, subprocess.CalledProcessError):
        return None


def now() -> str:
    """The time in UTC, ISO 8601."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")

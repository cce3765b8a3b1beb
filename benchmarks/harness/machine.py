"""The machine that measures, and the versions of what takes part."""

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

_ROOT = Path(__file__).resolve().parents[2]


def _find(pattern: str, path: str | Path) -> str:
    """Return the first group of a pattern in a file, or "" if there is no such file or text."""
    try:
        match = re.search(pattern, Path(path).read_text(), re.MULTILINE)
    except OSError:
        return ""
    return match[1].strip() if match else ""


def _caches() -> dict[str, int]:
    """Return the bytes of each data cache of the first core, such as ``{"L1": 32768, "L2": 1048576}``."""
    caches = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        size = _find(r"(\d+)K", index / "size")
        if size and _find("(.*)", index / "type") != "Instruction":
            caches["L" + _find("(.*)", index / "level")] = int(size) << 10
    return caches


def last_level_cache() -> int:
    """Return the bytes of the last-level cache; 32 MiB if the system does not report them."""
    return max(_caches().values(), default=32 << 20)


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _gpu() -> dict[str, Any]:
    """Describe the first GPU; empty without one, as in a dry run."""
    if not torch.cuda.is_available():
        return {}
    found = torch.cuda.get_device_properties(0)
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "gpu": found.name,
        "capability": f"{found.major}.{found.minor}",
        "multiprocessors": found.multi_processor_count,
        "gpu_memory": found.total_memory,
        "gpu_l2": found.L2_cache_size,
        "driver": driver.split("\n")[0] if driver else None,
    }


def machine(device: str = "cpu") -> dict[str, Any]:
    """Describe the hardware and the settings that matter to a memory-bound kernel."""
    memory = _find(r"MemTotal:\s*(\d+)", "/proc/meminfo")
    return {
        "cpu": _find(r"^model name\s*:(.+)$", "/proc/cpuinfo") or platform.processor() or platform.machine(),
        "cores": cores(),
        "caches": _caches(),
        "memory": int(memory) << 10 if memory else None,
        "transparent_hugepages": _find(r"\[(\w+)\]", "/sys/kernel/mm/transparent_hugepage/enabled") or None,
        "isa": torch.backends.cpu.get_cpu_capability(),
        "system": f"{platform.system()} {platform.machine()}",
        "libc": " ".join(platform.libc_ver()).strip(),
    } | (_gpu() if device == "cuda" else {})


def slug(hardware: Mapping[str, Any] | None = None) -> str:
    """Name a machine for a file: its GPU, or its CPU, cores and instruction set.

    Virtual machines call CPUs of several generations by one name; those without AVX-512 give other ratios.

    Args:
        hardware: A machine as ``machine`` describes it; by default this one.
    """
    hardware = hardware or machine()
    if "gpu" in hardware:
        return "-".join(re.findall(r"[a-z0-9]+", hardware["gpu"].lower()))
    name = re.sub(r"\b(cpu|processor|with)\b|\((r|tm)\)|@.*", " ", hardware["cpu"].lower())
    isa = re.sub(r"\W", "", hardware["isa"].lower())
    return "-".join([*re.findall(r"[a-z0-9]+", name), f"{hardware['cores']}c", isa])


def title(hardware: Mapping[str, Any]) -> str:
    """Name a machine for a heading."""
    if "gpu" in hardware:
        return f"{hardware['gpu']}, driver {hardware['driver']}"
    return f"{hardware['cpu']}, {hardware['cores']} cores, {hardware['isa']}"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, Any]:
    """Return the versions of what takes part, and whether the compiled library was loaded."""
    import fastcompress
    from fastcompress.dispatch.library import COMPILED, cuda_archs, cuda_version

    library = {"fastcompress": fastcompress.__version__, "fastcompress_compiled": COMPILED}
    if cuda_archs():
        library |= {"cuda": cuda_version(), "cuda_archs": cuda_archs()}
    return {"python": platform.python_version(), "torch": torch.__version__, **library} | {
        name: _version(name) for name in ("numpy", "triton", "torch-scatter", "fbgemm-gpu-cpu")
    }


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip() or None
    except (OSError, subprocess.CalledProcessError):
        return None


def commit() -> str | None:
    """Return the commit of the checkout, with ``-dirty`` if files differ from it."""
    return _output("git", "-C", str(_ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


def now() -> str:
    """Return the time in UTC, ISO 8601."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")

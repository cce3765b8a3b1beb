"""What the GPU benchmark prints and writes."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.harness import machine
from benchmarks.report import align
from fastcompress.cli import info

SCHEMA = 1


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def gpu() -> dict[str, Any] | None:
    """The GPU measured; ``None`` in a dry run on a machine without one."""
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory": properties.total_memory,
        "l2": properties.L2_cache_size,
        "driver": _driver(),
    }


def slug() -> str:
    """A file name for the GPU."""
    return "-".join(re.findall(r"[a-z0-9]+", (gpu() or {"name": "no gpu"})["name"].lower()))


def heading(copy_rate: float, dry: bool) -> str:
    """What was measured with, in two lines."""
    if dry:
        return "dry run on the CPU: no figure below means anything"
    device, found = gpu(), info.collect()
    assert device is not None
    return (
        f"{device['name']}, driver {device['driver']}, torch {torch.__version__}, "
        f"library: CUDA {found['library']['cuda_version']} for {found['library']['cuda_archs']}\n"
        f"device-to-device copy: {copy_rate / 1e9:.0f} GB/s, read and written"
    )


def document(
    rows: Sequence[dict[str, Any]],
    copy_rate: float,
    skipped: list[str],
    wrong: list[str],
    settings: dict[str, Any],
    energy: dict[str, Any],
) -> dict[str, Any]:
    """Everything, for JSON."""
    return {
        "schema": SCHEMA,
        "date": machine.now(),
        "commit": machine.commit(),
        "gpu": gpu(),
        "machine": machine.machine(),
        "info": info.collect(),
        "settings": settings,
        "copy_bytes_per_second": copy_rate,
        "rows": list(rows),
        "summary": summary(rows, copy_rate),
        "energy": energy,
        "skipped": skipped,
        "wrong": wrong,
    }


def summary(rows: Sequence[dict[str, Any]], copy_rate: float) -> list[dict[str, Any]]:
    """For each case, dtype and direction: ours, and the best of each group in multiples of it."""
    found = []
    for key in dict.fromkeys((row["case"], row["dtype"], row["direction"]) for row in rows):
        group = [row for row in rows if (row["case"], row["dtype"], row["direction"]) == key]
        best: dict[str, dict[str, Any]] = {}
        for row in sorted(group, key=lambda row: row["median"], reverse=True):
            best[row["group"]] = row
        ours = best.get("cuda") or best.get("triton")
        if ours is None:
            continue
        rate = ours["moved"] / ours["median"]
        found.append(
            dict(zip(("case", "dtype", "direction"), key, strict=True))
            | {"ours": ours["contender"], "how": ours["how"], "seconds": ours["median"], "call": ours["call"]}
            | {"bytes_per_second": rate, "share_of_copy": rate / copy_rate}
            | {"multiples": {name: row["median"] / ours["median"] for name, row in best.items() if row is not ours}}
        )
    return found


_GROUPS = ("triton", "eager", "scatter", "compile", "max-autotune")


def text(document: dict[str, Any]) -> str:
    """Who was left out, then one table: a line for each case, dtype and direction."""
    lines = [["case", "µs", "", "GB/s", "of copy", *(f"x {name}" for name in _GROUPS), "call µs"]]
    for row in document["summary"]:
        multiples = [f"{row['multiples'][name]:.2f}" if name in row["multiples"] else "" for name in _GROUPS]
        call = "" if row["call"] is None else f"{row['call'] * 1e6:.1f}"
        moves = row["bytes_per_second"] > 0  # what computes is not measured by its bytes
        rate = f"{row['bytes_per_second'] / 1e9:.0f}" if moves else ""
        share = f"{100 * row['share_of_copy']:.0f} %" if moves else ""
        name = f"{row['case']}, {row['dtype']}, {row['direction']}"
        lines.append([name, f"{row['seconds'] * 1e6:.1f}", row["how"], rate, share, *multiples, call])
    notes = [f"WRONG: {text}" for text in document["wrong"]]
    notes += [f"not measured: {text}" for text in document["skipped"]]
    for row in document["rows"]:
        if row.get("peak") is not None:
            name = f"{row['case']}, {row['direction']}: {row['contender']}"
            notes.append(f"{name}: {row['peak'] / 1e6:.0f} MB at most, {row['median'] * 1e3:.1f} ms")
    for name, joules in document["energy"].get("joules", {}).items():
        notes.append(f"{document['energy']['case']}: {name}: {joules:.3f} J of the board, idling included")
    if "error" in document["energy"]:
        notes.append(f"energy: not told by this machine ({document['energy']['error']})")
    notes.append("x: the best of a group, in multiples of our time; call: end to end, with launching and waiting")
    return "\n".join([*notes, "", align(lines)])

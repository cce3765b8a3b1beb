"""Results as a table, as JSON, and as the rows of the committed table tests/csrc/sass.json."""

from __future__ import annotations

from typing import Any

from scripts.sass.machines import MACHINES, Machine
from scripts.sass.measure import KernelMeasure, LoopMeasure, element_bytes, is_aligned
from scripts.sass.model import (
    FRAMES,
    ROWS,
    WIDTH,
    Cost,
    average_item,
    cost_of,
    instructions_per_pair,
    predict,
    resident_blocks,
    score_loops,
)


def narrow_row_stores(kernel: KernelMeasure) -> int:
    """Return how many instructions of an aligned kernel store less than 16 bytes of a row."""
    if not is_aligned(kernel.name):
        return 0
    return sum(a.count for a in kernel.stores if a.width < 16 and a.is_row)


def _loop(loop: LoopMeasure) -> dict[str, Any]:
    return {
        "instructions": loop.instructions,
        "elements": loop.elements,
        "per_element": round(loop.per_element, 2),
        "pipes": loop.pipes,
        "products": loop.products,
        "costly": loop.costly,
        "local": loop.local,
        "source": list(loop.source),
    }


def _prediction(kernel: KernelMeasure, cost: Cost, machine: Machine) -> dict[str, Any]:
    found = predict(kernel, cost, machine)
    threads, shared = (cost.plan.threads, cost.plan.shared_bytes) if cost.plan else (128, 0)
    return {
        "share_of_copy": round(found.share, 3),
        "limiter": found.limiter,
        "instructions_per_element": round(cost.instructions, 2),
        "parts": {part.name: round(part.instructions, 2) for part in cost.parts},
        "l2_reads_per_element": round(cost.plan.reads, 3) if cost.plan else 1.0,
        "bytes_in_flight": round(found.in_flight),
        "bytes_in_flight_needed": round(machine.bytes_in_flight * cost.read),
        "blocks_per_multiprocessor": resident_blocks(kernel, machine, threads, shared),
        "tile_rows": cost.plan.tile_rows if cost.plan else None,
    }


def as_json(kernel: KernelMeasure) -> dict[str, Any]:
    """Return all measurements and predictions of a kernel."""
    resources = kernel.kernel.resources
    costs = [(machine, cost_of(kernel, machine)) for machine in MACHINES]
    return {
        "source": kernel.kernel.source,
        "registers": resources.registers,
        "shared": resources.shared,
        "stack": resources.stack,
        "code_bytes": kernel.kernel.function.code_bytes,
        "local": kernel.local,
        "fences": kernel.fences,
        "loads": {str(width): count for width, count in kernel.widths("loads").items()},
        "stores": {str(width): count for width, count in kernel.widths("stores").items()},
        "narrow_row_stores": narrow_row_stores(kernel),
        "loops": {name: _loop(loop) for name, loop in kernel.hot.items()},
        "predictions": {machine.name: _prediction(kernel, cost, machine) for machine, cost in costs if cost},
    }


def committed(kernel: KernelMeasure) -> dict[str, Any]:
    """Return the row of a kernel in the committed table: the numbers for which an increase fails the tests."""
    found = as_json(kernel)
    row: dict[str, Any] = {
        name: found[name]
        for name in ("registers", "stack", "shared", "code_bytes", "local", "fences", "narrow_row_stores")
    }
    row["loops"] = {name: loop["per_element"] for name, loop in found["loops"].items()}
    if not row["loops"]:  # a kernel without loops over rows has no other number of its work
        row["stores"] = sum(found["stores"].values())
    if "H200" in found["predictions"]:
        row["per_element"] = found["predictions"]["H200"]["instructions_per_element"]
    size = element_bytes(kernel.name)
    if size and is_aligned(kernel.name):
        # These kernels do not compute one square per pair: their groups also square a last row, or share a first one.
        other = kernel.name.startswith(("adjacent_distance_fwd", "band_dots"))
        if not other and (scores := score_loops(kernel)):
            row["score_step"] = round(instructions_per_pair(scores[0], size), 1)
        if kernel.name.startswith(("segment_pool", "segment_reduce_fwd")) and (item := average_item(kernel)):
            row["average_item"] = len(item)
    return row


def _widths(found: dict[str, int]) -> str:
    return " ".join(f"{int(width) * 8}b:{count}" for width, count in found.items()) or "-"


def as_text(kernel: KernelMeasure) -> str:
    """Return the text that is printed for a kernel."""
    found = as_json(kernel)
    lines = [
        kernel.name,
        f"  {found['registers']} registers, {found['shared']} bytes of static shared memory, {found['stack']} of "
        f"stack, {found['code_bytes'] / 1024:.1f} KiB of code; {found['local']} accesses to local memory, "
        f"{found['fences']} fences",
        f"  global loads {_widths(found['loads'])}; stores {_widths(found['stores'])}; "
        f"{found['narrow_row_stores']} stores of less than 16 bytes of a row",
    ]
    for name, loop in found["loops"].items():
        pipes = ", ".join(f"{pipe} {count / loop['elements']:.2f}" for pipe, count in loop["pipes"].items())
        costly = " ".join(f"{name}:{count}" for name, count in loop["costly"].items())
        lines.append(
            f"    {name:<40} {loop['instructions']:>4} instructions for {loop['elements']:>3} elements: "
            f"{loop['per_element']:>6.2f} ({pipes}) {costly}".rstrip()
        )
    size = element_bytes(kernel.name)
    row = committed(kernel)
    if "score_step" in row:
        lines.append(f"    score {16 // size} elements of a pair of rows: {row['score_step']} instructions")
    if "average_item" in row:
        lines.append(f"    average {FRAMES} rows x {16 // size} columns: {row['average_item']} instructions")
    for machine, p in found["predictions"].items():
        parts = " + ".join(f"{name} {count}" for name, count in p["parts"].items())
        lines.append(
            f"  {machine}: predicted {100 * p['share_of_copy']:.0f} % of copy, limited by {p['limiter']}: "
            f"{p['instructions_per_element']} lane instructions per element ({parts}), "
            f"L2 reads {p['l2_reads_per_element']}, {p['blocks_per_multiprocessor']} blocks, "
            f"{p['bytes_in_flight'] / 1024:.0f} of {p['bytes_in_flight_needed'] / 1024:.0f} KiB in flight"
        )
    return "\n".join(lines)


def header(arch: str, nvcc: str) -> str:
    """Return the first lines of the table."""
    return (
        f"Machine code for sm_{arch} by nvcc {nvcc}. Predictions are for {ROWS:,} rows of {WIDTH} elements and "
        f"segments of {FRAMES} rows; docs/kernels.md explains the model.\n"
    )

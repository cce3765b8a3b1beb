"""Tables for people. What programs read is in ``record.py``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import energy
from benchmarks.harness import machine
from benchmarks.harness.bandwidth_bound import KINDS
from benchmarks.harness.clock import Disturbance
from benchmarks.harness.compare import Row, Table
from benchmarks.registry import OURS
from benchmarks.suites import decoder, methods, prefill, roofline, scaling
from benchmarks.suites import pack as packing
from benchmarks.suites import training_step as share
from benchmarks.targets import TARGETS, Outcome

#: The short name of a dtype.
DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def align(lines: Sequence[Sequence[str]]) -> str:
    """Columns: the first to the left, the others to the right."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    rows = []
    for first, *rest in lines:
        rows.append("  ".join([first.ljust(widths[0]), *map(str.rjust, rest, widths[1:])]))
    return "\n".join(rows)


def _multiple(row: Row, other: Row | None) -> str:
    return "" if other is None else f"{row.median / other.median:.2f}"


def _threads(threads: int) -> str:
    return f"{threads} thread" + ("s" if threads > 1 else "")


def table_text(table: Table) -> str:
    """One table, fastest first, with who was left out."""
    tiny = table.case.calls > 1
    unit, scale = ("µs", 1e6) if tiny else ("ms", 1e3)
    ours, floor = table.row(OURS), table.row("floor, fresh")
    lines = [["", unit, "p10", "p90", "reps", "GB/s", "x floor", "x ours", "other boundaries"]]
    for row in sorted(table.rows, key=lambda row: row.median):
        differing = "" if row.differing is None else f"{row.differing} of {table.tokens}"
        speed = "" if tiny else f"{table.moved / row.median / 1e9:.1f}"
        times = [f"{seconds * scale:.2f}" for seconds in (row.median, row.p10, row.p90)]
        ratios = [_multiple(row, floor), _multiple(row, ours)]
        lines.append([row.contender, *times, str(row.reps), speed, *ratios, differing])
    case = table.case
    text = [
        f"{case.name}, {DTYPES.get(table.dtype, table.dtype)}, {_threads(table.threads)}, {table.direction}: "
        f"{len(case.lengths)} sequences, {case.frames} x {case.dim} to {table.tokens} tokens, "
        f"{table.moved / 1e6:.1f} MB moved, {table.buffers} input buffers in turn",
        align(lines),
    ]
    if ours is not None and floor is not None:
        kinds = ", ".join(f"{_multiple(ours, table.row(f'floor, {kind}'))} {kind}" for kind in KINDS)
        text.append(f"{OURS} in multiples of the floor by output memory: {kinds}")
    text += [f"not timed: {name}: {reason}" for name, reason in table.skipped.items()]
    text.append(_disturbance_text(table.disturbance))
    return "\n".join(text)


def targets_text(found: Sequence[Outcome]) -> str:
    """The last table: a line a target, a column a setting."""
    if not found:
        return "no target applies to what was measured"
    settings = list(dict.fromkeys((one.case, one.threads) for one in found))
    cells = {(one.target.name, one.case, one.threads): one for one in found}
    lines = [["", "target", *(f"{case}, {threads} thr" for case, threads in settings)]]
    for target in TARGETS:
        if not any(one.target is target for one in found):
            continue
        sign = "<=" if target.at_most else ">" if target.strict else ">="
        line = [target.name, f"{sign} {target.goal:g}"]
        for case, threads in settings:
            one = cells.get((target.name, case, threads))
            line.append("" if one is None else f"{one.figure:.2f} {'reached' if one.reached else 'missed'}")
        lines.append(line)
    return align(lines)


def methods_text(tables: Sequence[methods.MethodTable]) -> str:
    """Tables of all methods in one setting: forward, then forward and backward."""
    parts = []
    for direction in dict.fromkeys(table.direction for table in tables):
        of_direction = [table for table in tables if table.direction == direction]
        one = of_direction[0]
        title = (
            f"published methods, {DTYPES.get(one.dtype, one.dtype)}, {_threads(one.threads)}, {direction}: "
            f"{len(one.case.lengths)} sequences, {sum(one.case.lengths)} x {one.case.dim}"
        )
        taken = sum(table.disturbance.samples for table in of_direction)
        kept = sum(table.disturbance.kept for table in of_direction)
        foot = f"{taken} samples, {kept} kept although other work disturbed them"
        parts.append("\n".join([title, align(methods.rows(of_direction)), foot]))
    return "\n\n".join(parts)


def packing_text(table: packing.PackTable) -> str:
    """One table of packing."""
    case = table.case
    title = (
        f"pack, {case.name}, {DTYPES.get(table.dtype, table.dtype)}, {_threads(table.threads)}, {table.direction}: "
        f"{len(case.text)} samples, {sum(case.audio)} rows of audio and {sum(case.text)} of text x {case.width}"
    )
    return "\n".join([title, align(packing.rows(table)), _disturbance_text(table.disturbance)])


def packing_targets_text(tables: Sequence[packing.PackTable]) -> str:
    """A line a target, a column a setting."""
    found = [table for table in tables if table.direction == "forward" and len(table.case.text) > 1]
    if not found:
        return ""
    lines = [["pack", "target", *(f"{t.case.name}, {DTYPES.get(t.dtype, t.dtype)}, {t.threads} thr" for t in found)]]
    for name, goal, others in packing.TARGETS:
        cells = [f"{t.ratio(*others):.2f} {'reached' if t.ratio(*others) >= goal else 'missed'}" for t in found]
        lines.append([name, f">= {goal:g}", *cells])
    return align(lines)


def decoder_text(table: decoder.DecoderTable) -> str:
    """One table of the decoder."""
    share = decoder.padding(table.sizes)
    title = (
        f"decoder, {_threads(table.threads)}, {table.direction}: {len(table.sizes)} samples of {min(table.sizes)} to "
        f"{max(table.sizes)} rows, {share:.0%} of the padded batch is padding ({1 / (1 - share):.2f}x the rows)"
    )
    return "\n".join([title, align(decoder.rows(table)), _disturbance_text(table.disturbance)])


def prefill_text(table: prefill.PrefillTable) -> str:
    """One table of the prefill."""
    size = table.size
    title = (
        f"prefill, {_threads(table.threads)}: {size.layers} layers x {size.width}, {size.count} prompts of "
        f"{size.seconds} s of audio and {prefill.TEXT} of text, to the first token"
    )
    return "\n".join([title, align(prefill.rows(table)), _disturbance_text(table.disturbance)])


def scaling_text(points: Sequence[scaling.Point]) -> str:
    """A table an axis."""
    axes = dict.fromkeys(axis for point in points for axis in point.axes)
    return "\n\n".join(align(scaling.rows(points, axis)) for axis in axes)


def ceilings_text(found: Sequence[roofline.Ceilings]) -> str:
    """A line a number of threads."""
    return "\n".join([align(roofline.rows(found)), *(_disturbance_text(one.disturbance) for one in found)])


def share_text(found: Sequence[share.Share]) -> str:
    """Of one number of threads: a line a rule."""
    return "\n".join([align(share.rows(found)), _disturbance_text(found[0].disturbance)])


def energy_text(found: Sequence[energy.Energy], reason: str | None) -> str:
    """A line a contender, or why there is none."""
    return align(energy.rows(found)) if reason is None else f"energy: not told by this machine ({reason})"


def _disturbance_text(disturbance: Disturbance) -> str:
    return (
        f"{disturbance.samples} samples, {disturbance.retried} taken again because of other load, "
        f"{disturbance.kept} kept although disturbed; other work took {disturbance.foreign:.2f} cores meanwhile"
    )


def memory_text(entries: Sequence[Mapping[str, Any]]) -> str:
    """A line a measurement of memory."""
    lines = []
    for entry in entries:
        if "error" in entry:
            lines.append(f"memory not measured: {entry['error']}")
            continue
        setting = f"{DTYPES.get(entry['dtype'], entry['dtype'])}, {_threads(entry['threads'])}"
        extra, output, reserved = (entry[f"{key}_bytes"] / 1e6 for key in ("extra", "output", "reserved"))
        lines.append(
            f"memory, {setting}, {entry['frames']} x {entry['dim']}: {entry['extra_bytes_per_frame']:.1f} bytes a frame"
            f" beyond the outputs ({extra:.2f} MB; outputs {output:.1f} MB, values reserve {reserved:.1f} MB)"
        )
    return "\n".join(lines)


def heading(settings: Mapping[str, Any]) -> str:
    """What it is measured on and with."""
    hardware, versions = machine.machine(), machine.versions()
    caches = ", ".join(f"{level} {size >> 10} KiB" for level, size in hardware["caches"].items())
    memory = f"{hardware['memory'] / (1 << 30):.0f} GiB" if hardware["memory"] else "memory unknown"
    used = ", ".join(f"{name} {version}" for name, version in versions.items() if isinstance(version, str))
    lines = [
        f"{hardware['cpu']}, {hardware['cores']} cores, {caches}, {memory}, "
        f"transparent huge pages: {hardware['transparent_hugepages']}",
        f"{used}, commit {machine.commit()}, {settings['reps']} rounds",
    ]
    if not versions["fastcompress_compiled"]:
        lines.append("NOTE: the compiled library is missing; this times the pure PyTorch reference of fastcompress.")
    return "\n".join(lines)

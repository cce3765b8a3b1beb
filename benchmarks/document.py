"""``python -m benchmarks.document``: writes ``benchmarks/report.md`` and its plots from the committed results.

A result file holds some parts of the benchmark, measured on one machine; of each part and machine the newest counts.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import registry
from benchmarks.harness import machine
from benchmarks.report import DTYPES
from benchmarks.suites import decoder, prefill, roofline, scaling
from benchmarks.suites import pack as packing

FOLDER = Path(__file__).parent
REPORT, PLOTS, RESULTS = FOLDER / "report.md", FOLDER / "plots", FOLDER / "results"
#: Keys of a result, one a part.
PARTS = (
    "tables", "memory", "methods", "packing", "decoder", "prefill", "scaling", "ceilings", "share", "energy",
    "no_energy",
)  # fmt: skip

#: Of those whose key is another, as the command knows them.
NAMES = {"tables": "pool", "ceilings": "roofline", "no_energy": "energy"}

#: Libraries that take part, as versions of a result name them.
PEERS = ("torch-scatter", "fbgemm-gpu-cpu")

Tables = Sequence[Mapping[str, Any]]


def read(folder: Path = RESULTS) -> dict[str, dict[str, Any]]:
    """The newest of each part, and under ``sources`` the document that it is from, by machine."""
    machines: dict[str, dict[str, Any]] = {}
    documents = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*-cpu.json"))]
    for document in sorted(documents, key=lambda document: str(document["date"])):
        name = machine.slug(document["machine"])
        parts = machines.setdefault(name, {"sources": {}})
        for part in PARTS:
            if document.get(part):
                parts[part] = document[part]
                parts["sources"][part] = document
    return dict(sorted(machines.items()))


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """A table: the first line its head, the first column to the left, the others to the right."""
    head, *body = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([head, "| --- |" + " ---: |" * (len(lines[0]) - 1), *body])


def figure(value: float) -> str:
    """Three digits, without an exponent."""
    return f"{value:,.0f}" if value >= 999.5 else f"{value:#.3g}".rstrip(".")


def setting(table: Mapping[str, Any]) -> str:
    """The head of a column: dtype, direction and threads, as far as the table has them."""
    direction = {"forward": "fwd", "forward+backward": "fwd + bwd"}.get(table.get("direction", ""), "")
    return ", ".join(filter(None, [DTYPES.get(table.get("dtype", ""), ""), direction, f"{table['threads']} thr"]))


def matrix(tables: Tables, first: str) -> str:
    """A column a table, a line a form: of the first its milliseconds, of the others the multiples of that time."""
    columns = [
        {row.get("contender", row.get("form")): row["seconds"]["median"] for row in table["rows"]} for table in tables
    ]
    multiples = {
        name: [column[name] / column[first] if name in column else None for column in columns]
        for name in dict.fromkeys(name for column in columns for name in column)
    }

    def middle(name: str) -> tuple[bool, float]:
        return name != first, statistics.median(value for value in multiples[name] if value is not None)

    lines = [["", *map(setting, tables)]]
    for name in sorted(multiples, key=middle):
        if name == first:
            cells = [f"**{figure(column[first] * 1e3)} ms**" for column in columns]
        else:
            cells = ["" if value is None else f"{figure(value)}x" for value in multiples[name]]
        lines.append([name, *cells])
    return markdown(lines)


def _by(tables: Tables, key: Callable[[Mapping[str, Any]], str]) -> dict[str, list[Mapping[str, Any]]]:
    found: dict[str, list[Mapping[str, Any]]] = {}
    for table in tables:
        found.setdefault(key(table), []).append(table)
    return found


def _sources(parts: Mapping[str, Any]) -> Iterable[str]:
    """What was measured when, with what, and how far other work got into it."""
    lines = [["part", "date", "commit", "torch", "rounds", "samples", "taken again", "kept though disturbed", "others"]]
    for part, document in parts["sources"].items():
        noted = [table["samples"] for table in document[part] if "samples" in table] if part != "no_energy" else []
        sums = [str(sum(one[key] for one in noted)) if noted else "" for key in ("samples", "retried", "kept")]
        foreign = f"{statistics.mean(one['foreign'] for one in noted):.2f} cores" if noted else ""
        version, rounds = document["versions"]["torch"], str(document["settings"]["reps"])
        commit, _, dirty = (document["commit"] or "unknown").partition("-")
        commit = f"`{'-'.join(filter(None, [commit[:8], dirty]))}`"
        lines.append([NAMES.get(part, part), document["date"][:10], commit, version, rounds, *sums, foreign])
    yield markdown(lines)
    yield (
        "*rounds*: as asked for; slow forms and slow parts take fewer. *taken again*: samples thrown away because our "
        "threads waited for a core. *kept though disturbed*: those that waited and count all the same, because there "
        "were no others. *others*: what other processes kept busy meanwhile, on average. Times taken beside other work "
        "are too long, ratios less so, since all forms of a table are timed in turn."
    )


def _pool(parts: Mapping[str, Any]) -> Iterable[str]:
    yield "## Segment pooling"
    yield (
        "`segment_pool` with local maxima against the same job in PyTorch and other libraries. `AvgPool1d` pools fixed "
        "windows of 3 of a padded batch and finds no segments. *floor* reads x once and writes the result, nothing "
        "else, into memory that is new (fresh), new in huge pages, or was written before (warm)."
    )
    for name, tables in _by(parts["tables"], lambda table: str(table["case"])).items():
        one = tables[0]
        sequences = f"{one['sequences']} sequence" + ("s" if one["sequences"] > 1 else "")
        yield f"### {name}: {sequences}, {one['frames']:,} x {one['dim']} to {one['tokens']:,} tokens"
        yield matrix(tables, registry.OURS)
    left_out = {
        f"`{name}` ({table['case']}, {setting(table)}), {reason}"
        for table in parts["tables"]
        for name, reason in table.get("not_timed", {}).items()
    }
    if left_out:
        yield f"Not timed: {'; '.join(sorted(left_out))}."
    versions = parts["sources"]["tables"]["versions"]
    peers = [f"{name} {versions[name]}" for name in PEERS if versions.get(name)]
    yield f"Other libraries: {', '.join(peers) or 'none'}."
    lines = [["peak memory", "bytes a frame beyond the outputs", "outputs"]]
    for entry in parts.get("memory", []):
        if "error" not in entry:
            name = f"{DTYPES[entry['dtype']]}, {entry['threads']} thr, {entry['frames']:,} x {entry['dim']}"
            lines.append([name, f"{entry['extra_bytes_per_frame']:.1f}", f"{entry['output_bytes'] / 1e6:.0f} MB"])
    if len(lines) > 1:
        yield markdown(lines)


def _methods(parts: Mapping[str, Any]) -> Iterable[str]:
    yield "## Published methods"
    yield "Each against the forms in which it is published; those give the same tokens."
    lines: list[str] = []
    for method, tables in _by(parts["methods"], lambda table: str(table["method"])).items():
        part = matrix(tables, registry.OURS).splitlines()
        lines += part[:2] if not lines else []
        lines += [line.replace("|", f"| {method}:", 1) for line in part[2:]]
    yield "\n".join(lines)


def _packing(parts: Mapping[str, Any]) -> Iterable[str]:
    yield "## Packing"
    yield "`pack` of text and audio, forward, and with the gradient of the audio."
    for _, tables in _by(parts["packing"], lambda table: str(table["case"]["name"])).items():
        case = tables[0]["case"]
        samples = f"{len(case['text'])} sample" + ("s" if len(case["text"]) > 1 else "")
        yield f"### {samples}, {sum(case['audio']):,} rows of audio and {sum(case['text']):,} of text x {case['width']}"
        yield matrix(tables, packing.OURS)


def _peaks(tables: Tables) -> str:
    lines = [["peak memory", *map(setting, tables)]]
    for form in tables[0]["peak_bytes"]:
        peaks = [table["peak_bytes"][form] for table in tables]
        lines.append([form, *("" if peak is None else f"{peak / 1e6:.0f} MB" for peak in peaks)])
    return markdown(lines)


def _decoder(parts: Mapping[str, Any]) -> Iterable[str]:
    yield "## A packed decoder"
    yield (
        f"{len(parts['decoder'][0]['lengths'])} samples, {parts['decoder'][0]['padding']:.0%} of whose padded batch is "
        "padding."
    )
    yield matrix(parts["decoder"], decoder.OURS)
    yield _peaks(parts["decoder"])


def _prefill(parts: Mapping[str, Any]) -> Iterable[str]:
    size, tokens = parts["prefill"][0]["size"], parts["prefill"][0]["tokens"]
    yield "## Prefill of an audio LLM"
    yield (
        f"{size['layers']} layers x {size['width']}, {size['count']} prompt of {size['seconds']} s of audio, to the "
        f"first token; rows of the prompt: {', '.join(f'{n} {form}' for form, n in tokens.items())}."
    )
    yield matrix(parts["prefill"], prefill.STOCK)
    yield _peaks(parts["prefill"])


def best(table: Mapping[str, Any], *groups: str) -> Mapping[str, Any] | None:
    """The fastest row of some groups."""
    rows = [row for row in table["rows"] if row["group"] in groups]
    return min(rows, key=lambda row: float(row["seconds"]["median"]), default=None)


def place(table: Mapping[str, Any], axis: str) -> float:
    """Where a table of the part ``scaling`` lies on an axis."""
    return scaling.value(axis, *(table[key] for key in ("frames", "dim", "tokens", "window", "threads")))


#: Lines of the tables and plots of scaling: a name, and the groups whose best it is.
LINES = (
    ("fastcompress", ("fastcompress",)),
    ("best torch.compile form", ("compile",)),
    ("best eager form", ("eager",)),
    ("AvgPool1d, fixed windows", ("less work",)),
    ("floor", ("floor",)),
)


def place_text(table: Mapping[str, Any], axis: str) -> str:
    """:func:`place` as a label: lengths of segments are fractions, all else is counted."""
    value = place(table, axis)
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def line(table: Mapping[str, Any], groups: Sequence[str]) -> float | None:
    """Seconds, at the 10th percentile, of the best of some groups; of the floor with fresh memory."""
    rows = [row for row in table["rows"] if row["group"] in groups]
    times = [float(row["seconds"]["p10"]) for row in rows if row["contender"] not in ("floor, huge", "floor, warm")]
    return min(times, default=None)


def _scaling(parts: Mapping[str, Any], slug: str) -> Iterable[str]:
    yield "## Scaling"
    yield (
        "Pooling while one thing changes: the number of frames, their width, the length of a segment (by a threshold; "
        "`AvgPool1d` has windows of as many frames), the window of uniform pooling, the threads. Otherwise 10 clips of "
        "1,000 frames of width 1280 at local maxima, about 3 frames a segment; clips are of one length, so that "
        "padding costs nobody anything. Bytes are the input read and the result written, and backward as much again. "
        "Times here are the 10th percentile, which other work on the machine moves least; on "
        f"{' and '.join(str(n) for n in sorted({table['threads'] for table in parts['scaling']}))} thread(s), axes but "
        "that of threads on the last."
    )
    most = parts["sources"]["scaling"]["settings"].get("most")
    if most is not None:
        yield f"Cases with more than {most:g} MB of input in fp32 were left out (`--most`), the machine being busy."
    for direction in dict.fromkeys(table["direction"] for table in parts["scaling"]):
        yield f"![GB/s of {direction}, by what changes](plots/{slug}-scaling-{direction}.png)"
    for axis in dict.fromkeys(axis for table in parts["scaling"] for axis in table["axes"]):
        on_axis = [table for table in parts["scaling"] if axis in table["axes"]]
        lines: list[list[str]] = []
        for tables in _by(on_axis, setting_of_axis).values():
            ordered = sorted(tables, key=lambda table: place(table, axis))
            lines = lines or [[axis, *(place_text(table, axis) for table in ordered)]]
            ours = [line(table, LINES[0][1]) for table in ordered]
            for form, groups in LINES:
                pairs = list(zip((line(table, groups) for table in ordered), ours, strict=True))
                if form == LINES[0][0]:
                    cells = [f"**{figure(own * 1e3)} ms**" for own in ours if own is not None]
                else:
                    cells = ["" if time is None or own is None else f"{figure(time / own)}x" for time, own in pairs]
                if any(cells):
                    lines.append([f"{setting_of_axis(ordered[0])}: {form}", *cells])
        if len(lines[0]) > 2:  # an axis of one place shows nothing
            yield markdown(lines)


def setting_of_axis(table: Mapping[str, Any]) -> str:
    """As :func:`setting`, but for the threads, which are an axis."""
    return setting(table).rpartition(", ")[0]


def _roofline(parts: Mapping[str, Any], slug: str) -> Iterable[str]:
    yield "## Roofline"
    yield (
        "Ceilings measured here: memory read, and copied; fp32 multiplications and additions in registers, as many of "
        "each. The definition of the distance rounds each product, so that a fused instruction, which would do both at "
        "once, is out of reach of fp32."
    )
    lines = [["", "read", "copy", "multiply and add", "fused"]]
    ceilings = {one["threads"]: one for one in parts["ceilings"]}
    for threads, one in ceilings.items():
        rates = [f"{one[f'{key}_bytes_per_second'] / 1e9:.1f} GB/s" for key in ("read", "copy")]
        work = [f"{one[f'{key}_per_second'] / 1e9:.0f} Gop/s" for key in ("operations", "fused_operations")]
        lines.append([f"{threads} thr", *rates, *work])
    yield markdown(lines)
    if "tables" in parts:
        yield (
            "Work of pooling N x D to M tokens: 2 multiplications and 2 additions an element of x to score it, 1 "
            "addition to average it, a division an element of the result, backward another; bytes as in scaling. "
            "*roof*: what the ceilings allow work of as many operations a byte."
        )
        yield f"![Roofline](plots/{slug}-roofline.png)"
        lines = [["fastcompress", "operations a byte", "GB/s", "Gop/s", "of the roof"]]
        for table in parts["tables"]:
            if table["threads"] in ceilings and best(table, "floor") is not None:
                intensity, rate = work_of(table, registry.OURS)
                roof = roof_at(ceilings[table["threads"]], intensity)
                cells = [f"{intensity:.2f}", f"{rate / intensity / 1e9:.1f}", f"{rate / 1e9:.1f}", f"{rate / roof:.0%}"]
                lines.append([f"{table['case']}, {setting(table)}", *cells])
        yield markdown(lines)
    if "packing" in parts:
        yield "Packing computes nothing: bytes are the packed rows, read and written."
        lines = [["pack", "GB/s", "of copy"]]
        for table in parts["packing"]:
            if table["direction"] == "forward" and table["threads"] in ceilings:
                rate = table["bytes_moved"] / seconds_of(table, packing.OURS)
                share = rate / ceilings[table["threads"]]["copy_bytes_per_second"]
                lines.append([f"{table['case']['name']}, {setting(table)}", f"{rate / 1e9:.1f}", f"{share:.0%}"])
        yield markdown(lines)


def seconds_of(table: Mapping[str, Any], name: str) -> float:
    """Of a form."""
    return next(
        float(row["seconds"]["median"]) for row in table["rows"] if name in (row.get("contender"), row.get("form"))
    )


def work_of(table: Mapping[str, Any], name: str) -> tuple[float, float]:
    """Operations a byte and operations a second of a form of the part ``pool``."""
    scores = next(row["group"] != "less work" for row in table["rows"] if row["contender"] == name)
    shape = table["frames"], table["dim"], table["tokens"], table["direction"]
    operations = roofline.operations(*shape, scores=scores)
    return operations / table["bytes_moved"], operations / seconds_of(table, name)


def roof_at(ceilings: Mapping[str, Any], intensity: float) -> float:
    """Operations a second that the ceilings allow at so many operations a byte."""
    bandwidth = max(ceilings["read_bytes_per_second"], ceilings["copy_bytes_per_second"])
    return float(min(ceilings["operations_per_second"], bandwidth * intensity))


def _share(parts: Mapping[str, Any]) -> Iterable[str]:
    yield "## Share of a training step"
    yield (
        "The small audio LLM of `fastcompress.training.recipes`, trained on the recordings in `assets/digits`, 8 in a "
        "batch: a step from features to updated weights, and what of it the profiler finds in fastcompress's ops, "
        "forward and backward. *busy*: the step without its waiting for a core."
    )
    lines = [["", "tokens a frame", "step", "10th to 90th percentile", "busy", "in fastcompress", "of busy"]]
    for one in parts["share"]:
        step, ops = one["step"], sum(one["ops"].values())
        times = [f"{step['median'] * 1e3:.0f} ms", f"{step['p10'] * 1e3:.0f} to {step['p90'] * 1e3:.0f} ms"]
        name = f"{one['rule']}, {one['threads']} thr"
        work = [f"{one['busy_seconds'] * 1e3:.0f} ms", f"{ops * 1e3:.2f} ms", f"{one['share']:.2%}"]
        lines.append([name, f"{one['tokens_per_frame']:.2f}", *times, *work])
    yield markdown(lines)


def _energy(parts: Mapping[str, Any]) -> Iterable[str]:
    yield "## Energy per hour of audio"
    if "energy" not in parts:
        yield f"Not told by this machine: {parts.get('no_energy', 'not asked')}."
        return
    yield "Joules of the CPU's packages, idling included, while an hour of frames (25 a second) is pooled, forward."
    lines = [["", *(setting(one) for one in parts["energy"])]]
    for name in parts["energy"][0]["joules"]:
        lines.append([name, *(f"{one['joules'][name]:.2f} J" for one in parts["energy"])])
    yield markdown(lines)


def _machine(slug: str, parts: Mapping[str, Any]) -> Iterable[str]:
    hardware = next(iter(parts["sources"].values()))["machine"]
    caches = ", ".join(f"{level} {size >> 10} KiB" for level, size in hardware["caches"].items())
    yield f"# {hardware['cpu']}, {hardware['cores']} cores, {hardware['isa']}"
    yield f"{caches}, {hardware['memory'] / (1 << 30):.0f} GiB, {hardware['system']}."
    yield from _sources(parts)
    for part, text in (
        ("tables", _pool),
        ("methods", _methods),
        ("packing", _packing),
        ("decoder", _decoder),
        ("prefill", _prefill),
        ("share", _share),
    ):
        if part in parts:
            yield from text(parts)
    if "scaling" in parts:
        yield from _scaling(parts, slug)
    if "ceilings" in parts:
        yield from _roofline(parts, slug)
    yield from _energy(parts)


def text(machines: Mapping[str, Mapping[str, Any]]) -> str:
    """The report."""
    paragraphs = [
        "<!-- Written by `python -m benchmarks.document` from the files in results/: change those, not this. -->",
        "Each form was found to give the right result before it was timed; forms of a table were timed in turn, in "
        "one process, and medians are given. The first line of a table is in milliseconds, the others are multiples "
        "of it: above 1 they are slower. `python -m benchmarks` measures, `make bench-check` compares ratios with "
        "those here.",
    ]
    for slug, parts in machines.items():
        paragraphs += _machine(slug, parts)
    return "\n\n".join(paragraphs) + "\n"


def main() -> int:
    """Writes the report and the plots."""
    from benchmarks import plots

    machines = read()
    REPORT.write_text(text(machines), encoding="utf-8")
    print(f"written: {REPORT}")
    for slug, parts in machines.items():
        for path in plots.write(PLOTS, slug, parts):
            print(f"written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

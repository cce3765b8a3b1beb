"""``make bench-report``: write ``benchmarks/report.md`` and its plots from the measurements in ``results/``."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks import aims, plots
from benchmarks.harness import machine
from benchmarks.measurement import BOUND, CLONE, DTYPES, FORWARD, OURS, RESULTS, TABLE, Results, read_all
from benchmarks.suites import decoder, memory, methods, pack, prefill, roofline, scaling, segment_pool, training_step
from benchmarks.tables import (
    FRESH,
    LINES,
    best,
    figure,
    limits,
    line,
    markdown,
    matrix,
    place_text,
    roof,
    setting,
    timed,
    with_places,
    work,
)  # fmt: skip

FOLDER = Path(__file__).parent
REPORT, PLOTS = FOLDER / "report.md", FOLDER / "plots"
#: Libraries that take part, as the versions of a run name them.
PEERS = ("torch-scatter", "fbgemm-gpu-cpu")


def _runs(results: Results) -> Iterator[str]:
    """What was measured when, with what, and how far other work got into it."""
    lines = [["suite", "date", "commit", "torch", "rounds", "samples", "retried", "kept", "others"]]
    for (suite, date), rows in results.rows.groupby(["suite", "run"], sort=False):
        run, once = results.runs[str(date)], rows.drop_duplicates(TABLE)
        known = "samples" in once and once["samples"].notna().any()
        sums = [f"{once[key].sum():.0f}" if known else "" for key in ("samples", "retried", "kept")]
        foreign = f"{once['foreign'].mean():.2f} cores" if known else ""
        commit, _, dirty = (run["commit"] or "unknown").partition("-")
        commit = f"`{'-'.join(filter(None, [commit[:8], dirty]))}`"
        rounds = str(run["settings"]["reps"])
        lines.append([str(suite), run["run"][:10], commit, run["versions"]["torch"], rounds, *sums, foreign])
    yield markdown(lines)
    yield (
        "*rounds*: as asked for; slow forms and slow suites take fewer. *retried*: samples discarded because our "
        "threads waited for a core. *kept*: samples that waited and count all the same, because there were no others. "
        "*others*: cores that other processes kept busy on average. Times taken next to other work are too long, "
        "ratios less so, since all forms of a table are timed in turn."
    )


def _pool(results: Results) -> Iterator[str]:
    all_rows = results.suite(segment_pool.NAME)
    yield (
        "`segment_pool` with local maxima against the same job in PyTorch and other libraries. `AvgPool1d` pools fixed "
        f"windows of 3 of a padded batch and finds no segments. The *{BOUND}* reads x once and writes the result, "
        "nothing else, into memory that is new (fresh), new in huge pages (huge), or was written before (warm). GB/s "
        "count the input read and the result written once, and twice with the backward pass."
    )
    rows = timed(all_rows)
    for case, table in rows.groupby("case", sort=False):
        one = table.iloc[0]
        sequences = f"{one.sequences} sequence" + ("s" if one.sequences > 1 else "")
        yield f"#### {case}: {sequences}, {one.frames:,} x {one.dim} to {one.tokens:,} tokens ({results.name})"
        yield matrix(table)
    if "not_timed" in all_rows:
        left = all_rows[all_rows["not_timed"].notna()]
        texts = {f"`{one.contender}` ({one.case}, {setting(one)}), {one.not_timed}" for one in left.itertuples()}
        yield f"Not timed: {'; '.join(sorted(texts))}."
    versions = results.runs[all_rows["run"].max()]["versions"]
    peers = [f"{name} {versions[name]}" for name in PEERS if versions.get(name)]
    yield f"Other libraries: {', '.join(peers) or 'none'}."
    yield from aims.tables(results.rows, segment_pool.NAME)


def _memory(results: Results) -> Iterator[str]:
    yield "Peak of one call of `segment_pool` in a fresh process, beyond its outputs."
    lines = [["", "bytes per frame beyond the outputs", "outputs"]]
    for one in results.suite(memory.NAME).itertuples():
        name = f"{DTYPES[one.dtype]}, {one.threads} thr, {one.frames:,.0f} x {one.dim:.0f}"
        extra = f"{(one.peak_bytes - one.output_bytes) / one.frames:.1f}"
        lines.append([name, extra, f"{one.output_bytes / 1e6:.0f} MB"])
    yield markdown(lines)


def _methods(results: Results) -> Iterator[str]:
    yield "Each published method against the forms in which it is published, which give the same tokens."
    rows = timed(results.suite(methods.NAME))
    lines: list[str] = []
    for method, table in rows.groupby("case", sort=False):
        part = matrix(table).splitlines()
        lines += [*([] if lines else part[:2]), *(re.sub(r"^\| ", f"| {method}: ", text) for text in part[2:])]
    yield "\n".join(lines)


def _pack(results: Results) -> Iterator[str]:
    yield "`pack` of text and audio, forward, and with the gradient of the audio. GB/s count the packed rows twice."
    for _, table in timed(results.suite(pack.NAME)).groupby("case", sort=False):
        one = table.iloc[0]
        samples = f"{len(one.text)} sample" + ("s" if len(one.text) > 1 else "")
        yield (
            f"#### {samples}, {sum(one.audio):,} rows of audio and {sum(one.text):,} of text x {one.width} "
            f"({results.name})"
        )
        yield matrix(table)
    yield from aims.tables(results.rows, pack.NAME)


def _peaks(rows: pd.DataFrame) -> Iterator[str]:
    if "peak_bytes" not in rows:
        return
    peaks = rows.pivot(index="contender", columns="setting", values="peak_bytes")[list(dict.fromkeys(rows["setting"]))]
    lines = [["peak memory", *peaks.columns]]
    for name, values in peaks.iterrows():
        lines.append([str(name), *("" if pd.isna(value) else f"{value / 1e6:.0f} MB" for value in values)])
    yield markdown(lines)


def _decoder(results: Results) -> Iterator[str]:
    rows = timed(results.suite(decoder.NAME))
    yield f"{len(rows['lengths'].iloc[0])} samples; {rows['padding'].iloc[0]:.0%} of their padded batch is padding."
    yield matrix(rows)
    yield from _peaks(rows)


def _prefill(results: Results) -> Iterator[str]:
    rows = timed(results.suite(prefill.NAME))
    one, tokens = rows.iloc[0], rows.drop_duplicates("contender").sort_values("tokens", ascending=False)
    counts = ", ".join(f"{row.tokens:.0f} {row.contender}" for row in tokens.itertuples())
    yield (
        f"{one.layers} layers x {one.width}, {one['count']} prompt of {one.seconds} s of audio, to the first token. "
        f"Rows of the prompt: {counts}."
    )
    yield matrix(rows, prefill.STOCK)
    yield from _peaks(rows)


def _training(results: Results) -> Iterator[str]:
    yield (
        "The small audio LLM of `fastcompress.training.recipes`, trained on the recordings in `assets/digits` in "
        "batches of 8: a step from features to updated weights, and the part of it that the profiler finds in "
        "fastcompress's ops, forward and backward. *CPU time* leaves out the waiting for a core."
    )
    lines = [
        ["", "tokens per frame", "step", "10th to 90th percentile", "CPU time", "in fastcompress", "share of CPU time"]
    ]
    for (rule, threads), rows in results.suite(training_step.NAME).groupby(["case", "threads"], sort=False):
        named = rows.set_index("contender")
        step, busy = named.loc[training_step.STEP], float(named.loc[training_step.BUSY, "median"])
        ops = float(rows.loc[rows["group"] == "op", "median"].sum())
        spread = f"{step['p10'] * 1e3:.0f} to {step['p90'] * 1e3:.0f} ms"
        times = [f"{step['median'] * 1e3:.0f} ms", spread, f"{busy * 1e3:.0f} ms", f"{ops * 1e3:.2f} ms"]
        lines.append([f"{rule}, {threads} thr", f"{step['tokens_per_frame']:.2f}", *times, f"{ops / busy:.2%}"])
    yield markdown(lines)


def _scaling(results: Results) -> Iterator[str]:
    rows = with_places(results.suite(scaling.NAME))
    threads = " and ".join(str(n) for n in sorted(set(rows["threads"])))
    yield (
        "Segment pooling while one thing changes: the number of frames, their width, the length of a segment (by a "
        "threshold; `AvgPool1d` has windows of the same length), the window of uniform pooling, the threads. Otherwise "
        "10 clips of 1,000 frames of width 1280 at local maxima, about 3 frames per segment; clips have one length, so "
        "that no form pays for padding. Times here are the 10th percentile, which other work on the machine moves "
        f"least; on {threads} thread(s), all axes but that of threads on the last."
    )
    most = results.runs[rows["run"].max()]["settings"].get("most")
    if most is not None:
        yield f"Cases with more than {most:g} MB of input in fp32 were left out (`--most`)."
    for direction in dict.fromkeys(rows["direction"]):
        yield f"![GB/s of {direction}, by what changes](plots/{results.name}-scaling-{direction}.png)"
    for axis, on_axis in rows.groupby("axis", sort=False):
        places = sorted(set(on_axis["place"])) if axis != scaling.LENGTH else []
        lines: list[list[str]] = []
        for _, some in on_axis.groupby(["dtype", "direction"], sort=False):
            tables = [table for _, table in some.groupby("place")]
            lines = lines or [[str(axis), *(place_text(table["place"].iloc[0]) for table in tables)]]
            ours = [float(table.loc[table["group"] == OURS, "p10"].iloc[0]) for table in tables]
            for name in LINES:
                found = [line(table, name) for table in tables]
                cells = [
                    "" if one is None else f"{figure(one['p10'] / own)}x" for one, own in zip(found, ours, strict=True)
                ]
                if name == OURS:
                    cells = [f"**{figure(own * 1e3)} ms**" for own in ours]
                if any(cells):
                    lines.append([f"{setting(some.iloc[0], threads=False)}: {name}", *cells])
        assert not places or len(lines[0]) == len(places) + 1
        yield markdown(lines)


def _roofline(results: Results) -> Iterator[str]:
    yield (
        "Limits measured on this machine: memory read, and copied; fp32 multiplications and additions in registers, as "
        "many of each. The definition of the distance rounds each product, so that fused instructions, which do both "
        "at once, cannot be used in fp32."
    )
    found = limits(results.rows)
    lines = [["", "read", "copy", roofline.SEPARATE, roofline.FUSED]]
    for threads, rates in found.items():
        rate = [f"{rates[name] / 1e9:.1f} GB/s" if name in rates else "" for name in (roofline.READ, roofline.COPY)]
        done = [
            f"{rates[name] / 1e9:.0f} Gop/s" if name in rates else "" for name in (roofline.SEPARATE, roofline.FUSED)
        ]
        lines.append([f"{threads} thr" if threads else "GPU", *rate, *done])
    yield markdown(lines)
    pooled = results.suite(segment_pool.NAME)
    pooled = pooled[pooled["threads"].isin(found) & (pooled["group"] == OURS)]
    pooled = pooled[[roofline.SEPARATE in found[threads] for threads in pooled["threads"]]]
    if not pooled.empty:
        yield (
            "Work of pooling N x D to M tokens: 2 multiplications and 2 additions per element of x to score it, 1 "
            "addition to average it, one division per element of the result, and another one backward. *share*: of "
            "what the limits allow at so many operations per byte."
        )
        yield f"![Roofline](plots/{results.name}-roofline.png)"
        lines = [["fastcompress", "operations per byte", "GB/s", "Gop/s", "share"]]
        for one in pooled[pooled["case"] != "tiny"].itertuples():
            intensity, speed = work(one)
            share = speed / roof(found[one.threads], intensity)
            cells = [f"{intensity:.2f}", f"{speed / intensity / 1e9:.1f}", f"{speed / 1e9:.1f}", f"{share:.0%}"]
            lines.append([f"{one.case}, {setting(one)}", *cells])
        yield markdown(lines)
    packed = results.suite(pack.NAME)
    packed = packed[packed["threads"].isin(found) & (packed["group"] == OURS) & (packed["direction"] == FORWARD)]
    if not packed.empty:
        yield "Packing computes nothing; bytes are the packed rows, read and written."
        lines = [["pack", "GB/s", "share of copy"]]
        for one in packed.itertuples():
            speed = one.moved / one.median
            share = speed / found[one.threads][roofline.COPY]
            lines.append([f"{one.case}, {setting(one)}", f"{speed / 1e9:.1f}", f"{share:.0%}"])
        yield markdown(lines)


#: Heading and text of each suite, in the order of the report.
SECTIONS: dict[str, tuple[str, Callable[[Results], Iterator[str]]]] = {
    segment_pool.NAME: ("Segment pooling", _pool),
    memory.NAME: ("Peak memory of segment pooling", _memory),
    pack.NAME: ("Packing", _pack),
    decoder.NAME: ("Packed decoder", _decoder),
    prefill.NAME: ("Prefill of an audio LLM", _prefill),
    methods.NAME: ("Published methods", _methods),
    training_step.NAME: ("Share of a training step", _training),
    scaling.NAME: ("Scaling", _scaling),
    roofline.NAME: ("Roofline", _roofline),
}


def _one(rows: pd.DataFrame, suite: str, case: str, dtype: str) -> pd.DataFrame:
    """One table, forward, on the most threads."""
    rows = rows[(rows["suite"] == suite) & (rows["case"] == case) & (rows["dtype"] == dtype)]
    rows = rows[(rows["direction"] == FORWARD) & rows["median"].notna()]
    return rows[rows["threads"] == rows["threads"].max()]


def _headlines(results: Results) -> dict[str, str]:
    """The most important figures of a machine, by name."""
    rows, found = results.rows, {}
    cases = [(segment_pool.NAME, "S1"), (segment_pool.NAME, "32 x 1500 x 1280"), (pack.NAME, "32 samples")]
    for suite, case in cases:
        for dtype in ("float32", "bfloat16"):
            table = _one(rows, suite, case, dtype)
            ours = best(table, OURS)
            if ours is None:
                continue
            name = f"`{suite}` {case}, {setting(ours, threads=False)}"
            found[name] = f"**{figure(ours['median'] * 1e3)} ms, {figure(ours['moved'] / ours['median'] / 1e9)} GB/s**"
            others: list[tuple[str, Any]] = [
                (f"the {BOUND}", best(table[table["contender"] == FRESH], BOUND)),
                (f"a {CLONE}", best(table[table["contender"] == CLONE], "clone")),
                ("best `torch.compile` form", best(table, "compile", "max-autotune")),
                ("best eager form", best(table, *aims.EAGER)),
                ("`masked_scatter` of transformers", best(table, "transformers")),
            ]
            for text, other in others:
                if other is not None:
                    found[f"{name}: {text}"] = f"{figure(other['median'] / ours['median'])}x"
    table = rows[(rows["suite"] == decoder.NAME) & (rows["direction"] == FORWARD)]
    table = table[table["threads"] == table["threads"].max()]
    ours, padded = best(table, OURS), best(table, "padded")
    if ours is not None and padded is not None:
        found["packed decoder, forward: the padded batch"] = f"{figure(padded['median'] / ours['median'])}x"
    table = rows[rows["suite"] == prefill.NAME]
    table = table[table["threads"] == table["threads"].max()].set_index("contender")
    if {prefill.STOCK, "uniform:3"} <= set(table.index):
        ratio = table.loc[prefill.STOCK, "median"] / table.loc["uniform:3", "median"]
        found["prefill with `uniform:3`: the stock model"] = f"{figure(ratio)}x"
    return found


def _summary(machines: Mapping[str, Results]) -> str:
    columns = [_headlines(results) for results in machines.values()]
    lines = [["", *machines]]
    for name in dict.fromkeys(name for column in columns for name in column):
        lines.append([name, *(column.get(name, "") for column in columns)])
    return markdown(lines)


def _anchor(heading: str) -> str:
    """The anchor that a heading gets."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def _contents(headings: Iterable[str]) -> str:
    lines = []
    for heading in headings:
        level, _, title = heading.partition(" ")
        if level in ("##", "###"):
            lines.append(f"{'  ' * (len(level) - 2)}* [{title}](#{_anchor(title)})")
    return "\n".join(lines)


def _machine(name: str, results: Results) -> Iterator[str]:
    hardware = results.machine
    caches = ", ".join(f"{level} {size >> 10} KiB" for level, size in hardware["caches"].items())
    yield f"## {machine.title(hardware)}"
    yield f"`{name}`: {caches}, {hardware['memory'] / (1 << 30):.0f} GiB, {hardware['system']}."
    yield from _runs(results)
    for suite, (title, text) in SECTIONS.items():
        if (results.rows["suite"] == suite).any():
            yield f"### {title} ({results.name})"
            yield from text(results)


def text(machines: Mapping[str, Results]) -> str:
    """The report."""
    parts = [part for name, results in machines.items() for part in _machine(name, results)]
    paragraphs = [
        "<!-- Written by `make bench-report` from the files in results/: change those, not this. -->",
        "# Benchmark report",
        "Every form was checked before it was timed. Forms of a table were timed in turn, in one process; medians are "
        "given. The form in bold is in milliseconds, the others are multiples of its time: above 1 they are slower. "
        "`python -m benchmarks` measures, `make bench-check` compares ratios with those here.",
        "## Summary",
        "Forward passes on the most threads measured; multiples of the time in bold, or of ours.",
        _summary(machines),
        "## Contents",
        _contents(part for part in parts if part.startswith("#")),
        *parts,
    ]
    return "\n\n".join(paragraphs) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Write the report and the plots."""
    argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__).parse_args(argv)
    machines = read_all(RESULTS)
    REPORT.write_text(text(machines), encoding="utf-8")
    print(f"written: {REPORT}")
    for results in machines.values():
        for path in plots.write(PLOTS, results):
            print(f"written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

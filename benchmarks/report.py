"""``make bench-report``: write ``benchmarks/report.md`` and its plots from the measurements in ``results/``."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from benchmarks import plots
from benchmarks.harness import machine
from benchmarks.harness.bandwidth_bound import KINDS
from benchmarks.results import BOTH, BOUND, CLONE, DTYPES, FORWARD, OURS, RESULTS, TABLE, Results, read_all
from benchmarks.suites import decoder, memory, methods, pack, prefill, roofline, scaling, segment_pool, training_step
from benchmarks.tables import (
    FRESH,
    LINES,
    fastest,
    figure,
    limits,
    markdown,
    matrix,
    place_text,
    roof,
    seconds,
    timed,
    with_places,
    with_work,
)  # fmt: skip

FOLDER = Path(__file__).parent
REPORT, PLOTS = FOLDER / "report.md", FOLDER / "plots"
#: Libraries that take part, as the versions of a run name them.
PEERS = ("torch-scatter", "fbgemm-gpu-cpu")
#: Groups without a compiler: what runs PyTorch or another library operation by operation.
EAGER = ("eager", "library", "loop")


# --- aims -------------------------------------------------------------------------------------------------------------


class Aim(NamedTuple):
    """What the library set out to reach, in each table of some cases.

    Attributes:
        name, dtype, direction: Name, and setting of the tables.
        sign, goal: What the figure must be: for ``<=`` our time over the other's, else the other's over ours.
        others: Groups or implementations of which the fastest is the other; without any, our microseconds count.
        cases: Names of the cases.
    """

    name: str
    dtype: str
    direction: str
    sign: str
    goal: float
    others: Sequence[str]
    cases: Sequence[str] = ("S1", "S2", "clip")


def _pool_aims() -> Iterator[Aim]:
    for dtype, compiled, eager, bound in (("float32", 3.2, 7.5, 1.25), ("bfloat16", 4.0, 6.5, 2.0)):
        name = f"{DTYPES[dtype]} forward"
        yield Aim(f"{name} against compile", dtype, FORWARD, ">=", compiled, ["compile"])
        yield Aim(f"{name} against eager", dtype, FORWARD, ">=", eager, EAGER)
        if dtype == "float32":
            yield Aim(f"{name} against AvgPool1d", dtype, FORWARD, ">", 1.0, ["less work"])
        for kind in KINDS:
            yield Aim(f"{name} / {BOUND}, {kind}", dtype, FORWARD, "<=", bound, [f"{BOUND}, {kind}"])
    for dtype, compiled in (("float32", 2.7), ("bfloat16", 3.2)):
        yield Aim(f"{DTYPES[dtype]} fwd + bwd against compile", dtype, BOTH, ">=", compiled, ["compile"])
        yield Aim(f"{DTYPES[dtype]} fwd + bwd against eager", dtype, BOTH, ">=", 6.0, EAGER)
    for dtype in ("float32", "bfloat16"):
        yield Aim(f"{DTYPES[dtype]} tiny call, µs", dtype, FORWARD, "<=", 20.0, [], ["tiny"])


def _pack_aims() -> Iterator[Aim]:
    for dtype in ("float32", "bfloat16"):
        for name, goal, others in (
            ("masked_scatter as in transformers", 5.0, ["transformers"]),
            ("the best packed form by hand", 1.4, ["eager"]),
            (f"a {CLONE}", 1.0, [CLONE]),
        ):
            yield Aim(f"{DTYPES[dtype]} against {name}", dtype, FORWARD, ">=", goal, others, ["32 samples"])


def _aims(rows: pd.DataFrame, aims: Iterable[Aim]) -> Iterator[str]:
    """Yield a table with a line per aim and a column per case and number of threads."""
    signs, lines, by = {"<=": operator.le, ">=": operator.ge, ">": operator.gt}, {}, ["case", "threads"]
    for aim in aims:
        table = rows[(rows["dtype"] == aim.dtype) & (rows["direction"] == aim.direction) & rows["case"].isin(aim.cases)]
        ours, others = (seconds(table, names, by) for names in ([OURS], aim.others))
        figures = (ours / others if aim.sign == "<=" else others / ours) if aim.others else ours * 1e6
        cells = {
            f"{case}, {threads} thr": f"**{value:.2f}**" if signs[aim.sign](value, aim.goal) else f"{value:.2f}"
            for (case, threads), value in figures.dropna().items()
        }
        if cells:
            lines[aim.name] = {"aim": f"{aim.sign} {aim.goal:g}"} | cells
    if lines:
        yield "Aims, and what was reached; those met are in bold."
        yield markdown(pd.DataFrame.from_dict(lines, orient="index"))


# --- sections ---------------------------------------------------------------------------------------------------------


def _several(count: int, thing: str) -> str:
    return f"{count} {thing}s" if count > 1 else f"{count} {thing}"


def _pool(results: Results) -> Iterator[str]:
    all_rows = results.suite(segment_pool.NAME)
    yield (
        "`segment_pool` with local maxima against the same job in PyTorch and other libraries. `AvgPool1d` pools fixed "
        f"windows of 3 of a padded batch and finds no segments. The *{BOUND}* reads x once and writes the result, "
        "nothing else, into memory that is new (fresh), new in huge pages (huge), or was written before (warm). GB/s "
        "count the input read and the result written once, and twice with the backward pass."
    )
    for case, table in timed(all_rows).groupby("case", sort=False):
        one = table.iloc[0]
        shape = f"{one['frames']:,} x {one['dim']} to {one['tokens']:,} tokens"
        yield f"#### {case}: {_several(one['sequences'], 'sequence')}, {shape} ({results.name})"
        yield markdown(matrix(table))
    if "not_timed" in all_rows:
        left = all_rows[all_rows["not_timed"].notna()]
        left = timed(left.assign(median=0.0))
        texts = {f"`{one.implementation}` ({one.case}, {one.setting}), {one.not_timed}" for one in left.itertuples()}
        yield f"Not timed: {'; '.join(sorted(texts))}."
    versions = results.runs[all_rows["run"].max()]["versions"]
    peers = [f"{name} {versions[name]}" for name in PEERS if versions.get(name)]
    yield f"Other libraries: {', '.join(peers) or 'none'}."
    yield from _aims(all_rows, _pool_aims())


def _memory(results: Results) -> Iterator[str]:
    yield "Peak of one call of `segment_pool` in a fresh process, beyond its outputs."
    rows = results.suite(memory.NAME).dropna(subset="peak_bytes")
    lines = {
        f"{DTYPES[one.dtype]}, {one.threads} thr, {one.frames:,} x {one.dim}": {
            "bytes per frame beyond the outputs": f"{(one.peak_bytes - one.output_bytes) / one.frames:.1f}",
            "outputs": f"{one.output_bytes / 1e6:.0f} MB",
        }
        for one in rows.itertuples()
    }
    yield markdown(pd.DataFrame.from_dict(lines, orient="index"))


def _pack(results: Results) -> Iterator[str]:
    yield "`pack` of text and audio, forward, and with the gradient of the audio. GB/s count the packed rows twice."
    rows = timed(results.suite(pack.NAME))
    for _, table in rows.groupby("case", sort=False):
        one = table.iloc[0]
        shape = f"{sum(one['audio']):,} rows of audio and {sum(one['text']):,} of text x {one['width']}"
        yield f"#### {_several(len(one['text']), 'sample')}, {shape} ({results.name})"
        yield markdown(matrix(table))
    yield from _aims(rows, _pack_aims())


def _peaks(rows: pd.DataFrame) -> Iterator[str]:
    if "peak_bytes" in rows:
        peaks = rows.pivot(index="implementation", columns="setting", values="peak_bytes")[rows["setting"].unique()]
        peaks.index.name, peaks.columns.name = "peak memory", None
        yield markdown(peaks.map(lambda size: "" if pd.isna(size) else f"{size / 1e6:.0f} MB"))


def _decoder(results: Results) -> Iterator[str]:
    rows = timed(results.suite(decoder.NAME))
    yield f"{len(rows['lengths'].iloc[0])} samples; {rows['padding'].iloc[0]:.0%} of their padded batch is padding."
    yield markdown(matrix(rows))
    yield from _peaks(rows)


def _prefill(results: Results) -> Iterator[str]:
    rows = timed(results.suite(prefill.NAME))
    one, tokens = rows.iloc[0], rows.drop_duplicates("implementation").sort_values("tokens", ascending=False)
    counts = ", ".join(f"{row.tokens} {row.implementation}" for row in tokens.itertuples())
    yield (
        f"{one['layers']} layers x {one['width']}, {one['count']} prompt of {one['seconds']} s of audio, to the first "
        f"token. Rows of the prompt: {counts}."
    )
    yield markdown(matrix(rows, prefill.STOCK))
    yield from _peaks(rows)


def _methods(results: Results) -> Iterator[str]:
    yield "Each published method against the forms in which it is published, which give the same tokens."
    tables = timed(results.suite(methods.NAME)).groupby("case", sort=False)
    found = {method: matrix(table) for method, table in tables}
    yield markdown(pd.concat([table.set_axis(f"{method}: " + table.index) for method, table in found.items()]))


def _training(results: Results) -> Iterator[str]:
    yield (
        "The small audio LLM of `fastcompress.training.recipes`, trained on the recordings in `assets/digits` in "
        "batches of 8: a step from features to updated weights, and the part of it that the profiler finds in "
        "fastcompress's ops, forward and backward. *CPU time* leaves out the waiting for a core."
    )
    lines = {}
    for (rule, threads), rows in results.suite(training_step.NAME).groupby(["case", "threads"], sort=False):
        named = rows.set_index("implementation")
        step, busy = named.loc[training_step.STEP], float(named.loc[training_step.BUSY, "median"])
        ops = float(rows.loc[rows["group"] == "op", "median"].sum())
        lines[f"{rule}, {threads} thr"] = {
            "tokens per frame": f"{step['tokens_per_frame']:.2f}",
            "step": f"{step['median'] * 1e3:.0f} ms",
            "10th to 90th percentile": f"{step['p10'] * 1e3:.0f} to {step['p90'] * 1e3:.0f} ms",
            "CPU time": f"{busy * 1e3:.0f} ms",
            "in fastcompress": f"{ops * 1e3:.2f} ms",
            "share of CPU time": f"{ops / busy:.2%}",
        }
    yield markdown(pd.DataFrame.from_dict(lines, orient="index"))


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
    for direction in rows["direction"].unique():
        yield f"![GB/s of {direction}, by what changes](plots/{results.name}-scaling-{direction}.png)"
    for axis, on_axis in fastest(rows, ["axis", "short", "place"], "p10").groupby("axis", sort=False):
        lines = {}
        for short, some in on_axis.groupby("short", sort=False):
            times = some.pivot(index="line", columns="place", values="p10").reindex(LINES)
            ours = times.loc[OURS]
            lines[f"{short}: {OURS}"] = (ours * 1e3).map(lambda ms: figure(ms, "**{} ms**"))
            for line, ratios in (times / ours).drop(OURS).dropna(how="all").iterrows():
                lines[f"{short}: {line}"] = ratios.map(lambda ratio: figure(ratio, "{}x"))
        table = pd.DataFrame(lines).T.rename(columns=place_text)
        yield markdown(table.rename_axis(str(axis)))


def _roofline(results: Results) -> Iterator[str]:
    yield (
        "Limits measured on this machine: memory read, and copied; fp32 multiplications and additions in registers, as "
        "many of each. The definition of the distance rounds each product, so that fused instructions, which do both "
        "at once, cannot be used in fp32."
    )
    rates = limits(results.rows)
    units = {roofline.READ: "{:.1f} GB/s", roofline.COPY: "{:.1f} GB/s"}
    shown = pd.DataFrame(
        {name: (rates[name] / 1e9).map(units.get(name, "{:.0f} Gop/s").format) for name in rates.dropna(axis="columns")}
    )
    yield markdown(shown.rename(index=lambda threads: f"{threads} thr" if threads else "GPU").rename_axis(None))
    pooled = with_work(timed(results.suite(segment_pool.NAME)), rates)
    pooled = pooled[(pooled["group"] == OURS) & (pooled["case"] != "tiny")]
    if not pooled.empty:
        yield (
            "Work of pooling N x D to M tokens: 2 multiplications and 2 additions per element of x to score it, 1 "
            "addition to average it, one division per element of the result, and another one backward. *share*: of "
            "what the limits allow at so many operations per byte."
        )
        yield f"![Roofline](plots/{results.name}-roofline.png)"
        lines = {
            f"{one.case}, {one.setting}": {
                "operations per byte": f"{one.intensity:.2f}",
                "GB/s": f"{one.speed / one.intensity / 1e9:.1f}",
                "Gop/s": f"{one.speed / 1e9:.1f}",
                "share": f"{one.speed / roof(rates.loc[one.threads], one.intensity):.0%}",
            }
            for one in pooled.itertuples()
        }
        yield markdown(pd.DataFrame.from_dict(lines, orient="index").rename_axis("fastcompress"))
    packed = timed(results.suite(pack.NAME))
    packed = packed[packed["threads"].isin(rates.index) & (packed["group"] == OURS) & (packed["direction"] == FORWARD)]
    if not packed.empty:
        yield "Packing computes nothing; bytes are the packed rows, read and written."
        speed = packed["moved"] / packed["median"]
        share = speed / packed["threads"].map(rates[roofline.COPY])
        cells = {"GB/s": (speed / 1e9).map("{:.1f}".format), "share of copy": share.map("{:.0%}".format)}
        yield markdown(pd.DataFrame(cells).set_axis(packed["case"] + ", " + packed["setting"]).rename_axis("pack"))


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


# --- the report -------------------------------------------------------------------------------------------------------


def _runs(results: Results) -> Iterator[str]:
    """Yield a table of when each suite was measured, with what, and how far other work disturbed it."""
    lines = []
    for (suite, date), rows in results.rows.groupby(["suite", "run"], sort=False):
        run, once = results.runs[str(date)], rows.drop_duplicates(TABLE)
        commit, _, dirty = (run["commit"] or "unknown").partition("-")
        line = {"suite": suite, "date": run["run"][:10], "commit": f"`{'-'.join(filter(None, [commit[:8], dirty]))}`"}
        line |= {"torch": run["versions"]["torch"], "rounds": str(run["settings"]["reps"])}
        if "samples" in once and once["samples"].notna().any():
            line |= {key: f"{once[key].sum():.0f}" for key in ("samples", "retried", "kept")}
            line |= {"others": f"{once['foreign'].mean():.2f} cores"}
        lines.append(line)
    yield markdown(pd.DataFrame(lines).set_index("suite"))
    yield (
        "*rounds*: as asked for; slow forms and slow suites take fewer. *retried*: samples discarded because our "
        "threads waited for a core. *kept*: samples that waited and count all the same, because there were no others. "
        "*others*: cores that other processes kept busy on average. Times taken next to other work are too long, "
        "ratios less so, since all forms of a table are timed in turn."
    )


#: What the summary compares our time with: groups or implementations of which the fastest counts.
_OTHERS = {
    f"the {BOUND}": [FRESH],
    f"a {CLONE}": [CLONE],
    "best `torch.compile` form": ["compile", "max-autotune"],
    "best eager form": EAGER,
    "`masked_scatter` of transformers": ["transformers"],
}


def _headlines(results: Results) -> dict[str, str]:
    """Return the most important figures of a machine, forward on the most threads, by name."""
    found, rows = {}, timed(results.rows[results.rows["direction"] == FORWARD])
    rows = rows[rows["threads"] == rows.groupby("suite")["threads"].transform("max")]

    def ratio(table: pd.DataFrame, others: Sequence[str], ours: Sequence[str] = (OURS,)) -> str:
        times = [seconds(table, names, ["suite"]).min() for names in (others, ours)]
        return figure(times[0] / times[1], "{}x")

    for suite, case in ((segment_pool.NAME, "S1"), (segment_pool.NAME, "32 x 1500 x 1280"), (pack.NAME, "32 samples")):
        for short in ("fp32, fwd", "bf16, fwd"):
            table = rows[(rows["suite"] == suite) & (rows["case"] == case) & (rows["short"] == short)]
            name, ours = f"`{suite}` {case}, {short}", table[table["group"] == OURS]
            if not ours.empty:
                time, moved = ours.iloc[0][["median", "moved"]]
                found[name] = f"**{figure(time * 1e3)} ms, {figure(moved / time / 1e9)} GB/s**"
            found |= {f"{name}: {text}": ratio(table, others) for text, others in _OTHERS.items()}
    found["packed decoder, forward: the padded batch"] = ratio(rows[rows["suite"] == decoder.NAME], ["padded"])
    table = rows[rows["suite"] == prefill.NAME]
    found["prefill with `uniform:3`: the stock model"] = ratio(table, [prefill.STOCK], ["uniform:3"])
    return found


def _anchor(heading: str) -> str:
    """Return the anchor of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def _contents(headings: Iterable[str]) -> str:
    parts = [heading.partition(" ") for heading in headings]
    levels = {"##": "", "###": "  "}
    return "\n".join(f"{levels[level]}* [{title}](#{_anchor(title)})" for level, _, title in parts if level in levels)


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
    """Return the report."""
    parts = [part for name, results in machines.items() for part in _machine(name, results)]
    summary = pd.DataFrame({name: _headlines(results) for name, results in machines.items()})
    paragraphs = [
        "<!-- Written by `make bench-report` from the files in results/: change those, not this. -->",
        "# Benchmark report",
        "Every form was checked before it was timed. Forms of a table were timed in turn, in one process; medians are "
        "given. The form in bold is in milliseconds, the others are multiples of its time: above 1 they are slower. "
        "`python -m benchmarks` measures, `make bench-check` compares ratios with those here.",
        "## Summary",
        "Forward passes on the most threads measured; multiples of the time in bold, or of ours.",
        markdown(summary[summary.fillna("").ne("").any(axis=1)]),
        "## Contents",
        _contents(part for part in parts if part.startswith("#")),
        *parts,
    ]
    return "\n\n".join(paragraphs) + "\n"


def main() -> int:
    """Write the report and the plots."""
    machines = read_all(RESULTS)
    REPORT.write_text(text(machines), encoding="utf-8")
    print(f"written: {REPORT}")
    for results in machines.values():
        for path in plots.write(PLOTS, results):
            print(f"written: {path}")
    return 0

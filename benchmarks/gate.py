"""``make bench-check``: compare ratios to the baselines with those that are committed.

Times differ from machine to machine and from hour to hour, so none is compared. For each table of both results the gate
takes the time of every other form as a multiple of ours, then and now, and the median of the changes over those forms:
one baseline that a new torch made faster does not move it, nor one whose temporaries cost twice as much in a process
that ran other forms before. Times are the 10th percentile, which other work on the machine moves least.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from tabulate import tabulate

from benchmarks.__main__ import main as measure
from benchmarks.harness import machine
from benchmarks.results import BOUND, DTYPES, OURS, RESULTS, TABLE, read
from benchmarks.suites.scaling import FORMS

#: Suites that are measured; none takes more than a few minutes. Those of ``--now`` are compared with ``scaling`` too.
MEASURED = ("segment_pool", "methods", "pack")
COMPARED = (*MEASURED, "scaling")
#: Case of ``segment_pool`` that is measured.
CASE = "S1"


def multiples(rows: pd.DataFrame) -> pd.Series[float]:
    """Time of each other form as a multiple of ours, by table and form."""
    rows = rows[rows["suite"].isin(COMPARED)].dropna(subset="p10")
    ours = rows[rows["group"] == OURS].groupby(TABLE, sort=False)["p10"].first()
    others = rows[~rows["group"].isin((OURS, BOUND))].set_index([*TABLE, "implementation"])["p10"]
    return (others / ours.reindex(others.index.droplevel("implementation")).to_numpy()).dropna()


def compare(then: pd.DataFrame, now: pd.DataFrame) -> pd.DataFrame:
    """Return a row per table of both results: the number of forms in both, and the median of now over then.

    Below 1 we have become slower next to the others.
    """
    change = (multiples(now) / multiples(then)).dropna()
    return change.groupby(TABLE, sort=False).agg(forms="size", factor="median")


def _title(table: Sequence[object]) -> str:
    suite, case, dtype, threads, direction = table
    return f"{suite}, {case}, {dtype}, {threads} thr, {direction}"


def text(changes: pd.DataFrame, least: float) -> str:
    """Return a line per table, the worst first."""
    lines = [
        [_title(one.Index), one.forms, one.factor, "lost ground" if one.factor < least else ""]
        for one in changes.sort_values("factor").itertuples()
    ]
    return tabulate(lines, ["", "forms", "now / then", ""], floatfmt=".2f")


def missing(then: pd.DataFrame, changes: pd.DataFrame, suites: Sequence[str], threads: Sequence[int]) -> list[str]:
    """List committed tables of the measured suites and threads for which there is no new measurement."""
    wanted = then[then["suite"].isin(suites) & then["threads"].isin(threads)]
    wanted = wanted[(wanted["suite"] != MEASURED[0]) | (wanted["case"] == CASE)]
    tables = multiples(wanted).index.droplevel("implementation").unique()
    return [_title(table) for table in tables.difference(changes.index, sort=False)]


def _measure(suites: Sequence[str], then: pd.DataFrame, threads: Sequence[int], folder: Path) -> int:
    """Measure the suites and return the status; of ``segment_pool`` against the fastest of each group."""
    for suite in suites:
        dtypes = sorted({DTYPES[dtype] for dtype in then.loc[then["suite"] == suite, "dtype"]})
        arguments = [suite, "--threads", *map(str, threads), "--reps", "9", "--no-bound", "--out", str(folder)]
        if suite == MEASURED[0]:
            arguments += ["--cases", CASE, "--baselines", *FORMS]
        if status := measure([*arguments, "--dtypes", *dtypes]):
            return status
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Return 1 if fastcompress is slower or a committed table was not measured, 2 if no table can be compared."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gate", description=__doc__)
    parser.add_argument("--committed", type=Path, help="results to compare with (default: those of this machine)")
    parser.add_argument("--now", type=Path, help="results of now (default: measures)")
    parser.add_argument("--least", type=float, default=0.8, help="smallest change that passes (default 0.8)")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2], help="default 1 2")
    parser.add_argument("--suites", nargs="+", choices=MEASURED, default=list(MEASURED), help="default: all")
    options = parser.parse_args(argv)
    committed = options.committed or RESULTS / f"{machine.slug()}-cpu.jsonl"
    if not committed.exists():
        known = ", ".join(path.stem for path in sorted(RESULTS.glob("*-cpu.jsonl"))) or "none"
        print(
            f"no committed results of this machine, {machine.slug()}, but of {known}: use --committed", file=sys.stderr
        )
        return 2
    then = read(committed).rows
    suites = [
        suite for suite in options.suites if (then["suite"] == suite).any()
    ]  # others have nothing to compare with
    with tempfile.TemporaryDirectory() as folder:
        if options.now is None and (status := _measure(suites, then, options.threads, Path(folder))):
            return status
        now = options.now or next(Path(folder).glob("*.jsonl"), None)
        changes = compare(then, read(now).rows) if now else pd.DataFrame()
    if changes.empty:
        print("no table is in both results", file=sys.stderr)
        return 2
    print(text(changes, options.least))
    gone = missing(then, changes, suites, options.threads) if options.now is None else []
    for name in gone:
        print(f"not measured any more: {name}", file=sys.stderr)
    return int(bool(gone) or bool((changes["factor"] < options.least).any()))


if __name__ == "__main__":
    sys.exit(main())

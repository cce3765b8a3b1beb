"""``make bench-check``: compare ratios to the baselines with those that are committed.

Times differ from machine to machine and from hour to hour, so none is compared. For each table of both results the gate
takes the time of every other form as a multiple of ours, then and now, and the median of the changes over those forms:
one baseline that a new torch made faster does not move it, nor one whose temporaries cost twice as much in a process
that ran other forms before. Times are the 10th percentile, which other work on the machine moves least.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from tabulate import tabulate

from benchmarks.__main__ import main as measure
from benchmarks.harness import machine
from benchmarks.measurement import BOUND, DTYPES, OURS, RESULTS, TABLE, Results, read, read_all
from benchmarks.suites.scaling import FORMS

#: Suites that are measured; none takes more than a few minutes. Those of ``--now`` are compared with ``scaling`` too.
MEASURED = ("segment_pool", "methods", "pack")
COMPARED = (*MEASURED, "scaling")
#: Case of ``segment_pool`` that is measured.
CASE = "S1"


@dataclass(frozen=True)
class Change:
    """Multiples of our time in one table, then and now, by form."""

    table: str
    then: Mapping[str, float]
    now: Mapping[str, float]

    @property
    def factor(self) -> float:
        """Median of now over then; below 1 we have become slower next to the others."""
        return statistics.median(self.now[name] / self.then[name] for name in self.then.keys() & self.now.keys())


def multiples(rows: pd.DataFrame) -> dict[str, dict[str, float]]:
    """Time of each other form as a multiple of ours, by table."""
    found = {}
    rows = rows[rows["suite"].isin(COMPARED)]
    for key, table in rows.groupby(TABLE, sort=False):
        p10 = table.dropna(subset="p10").set_index("contender")[["p10", "group"]]
        ours = p10.loc[p10["group"] == OURS, "p10"]
        others = p10.loc[~p10["group"].isin((OURS, BOUND)), "p10"]
        if len(ours) and len(others):
            suite, case, dtype, threads, direction = key
            name = f"{suite}, {case}, {dtype}, {threads} thr, {direction}"
            found[name] = {str(form): float(time / ours.iloc[0]) for form, time in others.items()}
    return found


def compare(then: pd.DataFrame, now: pd.DataFrame) -> list[Change]:
    """The tables of both results that have at least one form in common."""
    before, after = multiples(then), multiples(now)
    changes = [Change(name, before[name], after[name]) for name in before if name in after]
    return [change for change in changes if change.then.keys() & change.now.keys()]


def missing(then: pd.DataFrame, now: pd.DataFrame, suites: Sequence[str], threads: Sequence[int]) -> list[str]:
    """Committed tables of the suites and threads measured now that have nothing of now to be compared with."""
    wanted = then[then["suite"].isin(suites) & then["threads"].isin(threads)]
    wanted = wanted[(wanted["suite"] != MEASURED[0]) | (wanted["case"] == CASE)]
    after = multiples(now)
    return [name for name, forms in multiples(wanted).items() if not forms.keys() & after.get(name, {}).keys()]


def text(changes: Sequence[Change], least: float) -> str:
    """One line per table, the worst first."""
    lines = []
    for change in sorted(changes, key=lambda change: change.factor):
        shared = len(change.then.keys() & change.now.keys())
        lines.append([change.table, shared, change.factor, "lost ground" if change.factor < least else ""])
    return tabulate(lines, ["", "forms", "now / then", ""], floatfmt=".2f")


def _measured(suites: Sequence[str], then: pd.DataFrame, threads: Sequence[int]) -> tuple[int, Results | None]:
    """Status and results of the suites, measured now; of ``segment_pool`` against the fastest of each group."""
    with tempfile.TemporaryDirectory() as folder:
        for suite in suites:
            dtypes = sorted({DTYPES[dtype] for dtype in then.loc[then["suite"] == suite, "dtype"]})
            arguments = [suite, "--threads", *map(str, threads), "--reps", "9", "--no-bound", "--out", folder]
            if suite == MEASURED[0]:
                arguments += ["--cases", CASE, "--contenders", *FORMS]
            status = measure([*arguments, "--dtypes", *dtypes])
            if status:
                return status, None
        return 0, next(iter(read_all(Path(folder)).values()), None)


def main(argv: Sequence[str] | None = None) -> int:
    """1 where we have become slower or a committed table was not measured, 2 where there is nothing to compare with."""
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
    if options.now is not None:
        now = read(options.now)
    else:
        status, measured = _measured(suites, then, options.threads)
        if status:
            return status
        if measured is None:
            print(f"the committed results have none of {', '.join(options.suites)}", file=sys.stderr)
            return 2
        now = measured
    changes = compare(then, now.rows)
    if not changes:
        print("no table is in both results", file=sys.stderr)
        return 2
    print(text(changes, options.least))
    gone = missing(then, now.rows, suites, options.threads) if options.now is None else []
    for name in gone:
        print(f"not measured any more: {name}", file=sys.stderr)
    return int(bool(gone) or any(change.factor < options.least for change in changes))


if __name__ == "__main__":
    sys.exit(main())

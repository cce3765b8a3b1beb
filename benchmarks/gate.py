"""``make bench-check``: have we become slower beside the others? Ratios against those that are committed.

Times differ from machine to machine and from hour to hour, so none is compared. For each table that both documents
have, the gate takes the time of every other form as a multiple of ours, then and now, and the median of the changes
over those forms: one rival that a new torch made faster does not move it, nor one whose temporaries cost twice as much
in a process that ran other forms before. Times are the 10th percentile, which other work on the machine moves least.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import document, report
from benchmarks.__main__ import main as measure
from benchmarks.harness import machine
from benchmarks.registry import OURS
from benchmarks.report import DTYPES
from benchmarks.suites.pack import OURS as PACK
from benchmarks.suites.scaling import FORMS

RESULTS = Path(__file__).with_name("results")
#: Names of ours, whatever the part.
NAMES = (OURS, PACK)
#: Parts and the keys of their tables in a document. Those of ``scaling`` are compared if they are given (``--now``).
KEYS = {"pool": "tables", "methods": "methods", "packing": "packing", "scaling": "scaling"}
#: Parts that are measured: none takes more than a few minutes.
PARTS = ("pool", "methods", "packing")
#: Of the part ``pool``.
CASE = "S1"


@dataclass(frozen=True)
class Change:
    """Of a table: what the others take as a multiple of ours, then and now, by form."""

    table: str
    then: Mapping[str, float]
    now: Mapping[str, float]

    @property
    def factor(self) -> float:
        """Median of now over then; below 1 we have lost ground."""
        return statistics.median(self.now[name] / self.then[name] for name in self.then.keys() & self.now.keys())


def multiples(results: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Of each table of results of the benchmark, what the other forms take as a multiple of ours."""
    found = {}
    for part in KEYS.values():
        for table in results.get(part, []):
            case = table["case"] if isinstance(table["case"], str) else table["case"]["name"]
            key = (part, case, table.get("method", ""), table["dtype"], f"{table['threads']} thr", table["direction"])
            seconds = {row.get("contender", row.get("form")): row["seconds"]["p10"] for row in table["rows"]}
            ours = next((seconds[name] for name in NAMES if name in seconds), None)
            if ours is not None and len(seconds) > 1:
                others = {name: time / ours for name, time in seconds.items() if name not in NAMES}
                found[", ".join(filter(None, key))] = others
    return found


def missing(then: Mapping[str, Any], now: Mapping[str, Any], threads: Sequence[str]) -> list[str]:
    """Committed tables of the parts, cases and threads that were measured now, without one of now to compare with."""
    wanted = {
        key: [
            table
            for table in then.get(key, [])
            if str(table["threads"]) in threads and (key != KEYS["pool"] or table["case"] == CASE)
        ]
        for key in now
    }
    after = multiples(now)
    return [name for name, forms in multiples(wanted).items() if not forms.keys() & after.get(name, {}).keys()]


def compare(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    """The tables that both documents have, with at least one form in common."""
    before, after = multiples(then), multiples(now)
    changes = [Change(name, before[name], after[name]) for name in before if name in after]
    return [change for change in changes if change.then.keys() & change.now.keys()]


def text(changes: Sequence[Change], least: float) -> str:
    """A line a table, the worst first."""
    lines = [["", "forms", "now / then", ""]]
    for change in sorted(changes, key=lambda change: change.factor):
        shared = len(change.then.keys() & change.now.keys())
        verdict = "lost ground" if change.factor < least else ""
        lines.append([change.table, str(shared), f"{change.factor:.2f}", verdict])
    return report.align(lines)


def _measured(part: str, dtypes: Sequence[str], threads: Sequence[str], folder: Path) -> tuple[int, dict[str, Any]]:
    """The status and the document of a part, measured now; of ``segment_pool`` against the fastest of each group."""
    path = folder / f"{part}.json"
    arguments = ["--parts", part, "--dtypes", *dtypes, "--threads", *threads, "--reps", "9", "--json", str(path)]
    if part == "pool":
        arguments += ["--cases", CASE, "--contenders", *FORMS, "--no-floor", "--no-memory"]
    status = measure(arguments)
    return status, {} if status else json.loads(path.read_text(encoding="utf-8"))


def main(argv: Sequence[str] | None = None) -> int:
    """1 where we have lost ground or a committed table was not measured, 2 where there is nothing to compare with."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gate", description=__doc__)
    parser.add_argument("--committed", type=Path, help="results to compare with (default: this machine's)")
    parser.add_argument("--now", type=Path, help="results of now (default: measures)")
    parser.add_argument("--least", type=float, default=0.8, help="smallest change that passes (default 0.8)")
    parser.add_argument("--threads", nargs="+", default=["1", "2"], help="default 1 2")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="to measure (default: all)")
    options = parser.parse_args(argv)
    if options.committed is not None:
        then: Mapping[str, Any] = json.loads(options.committed.read_text(encoding="utf-8"))
    else:
        known = document.read(RESULTS)
        if machine.slug() not in known:
            print(
                f"no committed results of this machine, {machine.slug()}, but of {', '.join(known) or 'none'}: "
                "give --committed",
                file=sys.stderr,
            )
            return 2
        then = known[machine.slug()]
    now: dict[str, Any] = {}
    if options.now is not None:
        now = json.loads(options.now.read_text(encoding="utf-8"))
    else:
        with tempfile.TemporaryDirectory() as folder:
            for part in options.parts:
                key = KEYS[part]
                dtypes = sorted({DTYPES[table["dtype"]] for table in then.get(key, [])})
                if dtypes:  # else there is nothing to compare with
                    status, found = _measured(part, dtypes, options.threads, Path(folder))
                    if status:
                        return status
                    now[key] = found[key]
    changes = compare(then, now)
    if not changes:
        print("no table is in both results", file=sys.stderr)
        return 2
    print(text(changes, options.least))
    gone = missing(then, now, options.threads) if options.now is None else []
    for name in gone:
        print(f"not measured any more: {name}", file=sys.stderr)
    return int(bool(gone) or any(change.factor < options.least for change in changes))


if __name__ == "__main__":
    sys.exit(main())

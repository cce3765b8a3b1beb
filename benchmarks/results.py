"""Measurements as JSON lines: each is appended to the file of its machine and device as soon as it is taken.

A line with the key ``machine`` opens a run and holds what was measured on and with. Every other line is one flat
measurement, as ``Recorder.add`` writes it, with ``run``, the date of its run.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.harness import machine

RESULTS = Path(__file__).with_name("results")
FORWARD, BOTH = "forward", "forward+backward"
#: Group of the library's own form, which the other forms of a table are compared with.
OURS = "fastcompress"
#: Group, and start of the name, of the forms that only move the bytes.
BOUND = "bandwidth bound"
#: A copy by PyTorch of as many bytes.
CLONE = "clone of the same bytes"
#: Three reads for each write, as in pooling, by PyTorch: as many bytes. Only on a GPU.
MIX = "addcmul of the same bytes"
#: Short names of dtypes, as the command takes them.
DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
#: Measurements that agree in these fields were taken in turn, and make one table.
TABLE = ["suite", "case", "dtype", "threads", "direction"]


class Recorder:
    """Appends measurements to a file, and keeps them.

    Args:
        path: The file, which is created with its folders.
        settings: Options of the run.
        device: ``"cpu"`` or ``"cuda"``.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], device: str = "cpu") -> None:
        self.path, self.date = path, machine.now()
        self.measurements: list[dict[str, Any]] = []
        header = {"run": self.date, "commit": machine.commit(), "machine": machine.machine(device)}
        self._write(header | {"versions": machine.versions(), "settings": dict(settings)})

    def _write(self, line: Mapping[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def add(
        self, suite: str, case: str, implementation: str, group: str, direction: str = FORWARD, dtype: str = "float32",
        threads: int = 1, **fields: Any,
    ) -> dict[str, Any]:  # fmt: skip
        """Append one measurement and return it.

        Args:
            suite, case, direction, dtype, threads: Setting, one of each table; 0 threads on a GPU.
            implementation: What was measured: an implementation, a bound, or a part of a step.
            group: Kind of implementation: ``fastcompress``, ``compile``, ``eager``, ``bandwidth bound``, ...
            fields: ``median``, ``p10`` and ``p90`` in seconds per call and ``reps``, the samples they are of;
                ``moved``, the bytes read and written; or ``not_timed``, the reason; and what else the suite adds.
        """
        line = {"run": self.date, "suite": suite, "case": case, "implementation": implementation, "group": group}
        line |= {"direction": direction, "dtype": dtype, "threads": threads}  # type: ignore[dict-item]
        line |= {name: value for name, value in fields.items() if value is not None}
        self.measurements.append(line)
        self._write(line)
        return line


@dataclass(frozen=True)
class Results:
    """Measurements of one machine and device.

    Attributes:
        name: Name of the machine, as in the name of the file.
        rows: One row per measurement, one column per field; of each table the newest.
        runs: What opened each run, by its date.
    """

    name: str
    rows: pd.DataFrame
    runs: Mapping[str, Mapping[str, Any]]

    @property
    def machine(self) -> Mapping[str, Any]:
        """The machine of the last run."""
        found: Mapping[str, Any] = self.runs[max(self.runs)]["machine"]
        return found

    def suite(self, name: str) -> pd.DataFrame:
        """Return the rows of one suite, without columns that it does not have; whole numbers are integers."""
        rows = self.rows[self.rows["suite"] == name]
        rows = rows if rows.empty else rows.dropna(axis="columns", how="all")
        whole = [key for key in rows.select_dtypes("float") if rows[key].notna().all() and (rows[key] % 1 == 0).all()]
        return rows.astype(dict.fromkeys(whole, "int64"))


def parse(lines: Iterable[str], source: str) -> Results:
    """Read the lines of one file.

    Raises:
        ValueError: A line is damaged or names an unknown run, or runs are of different machines.
    """
    runs: dict[str, dict[str, Any]] = {}
    rows = []
    for number, text in enumerate(lines, start=1):
        try:
            line = json.loads(text)
            if "machine" in line:
                runs[line["run"]] = line
            else:
                runs[line["run"]]  # noqa: B018  (a KeyError without it)
                rows.append(line)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{source}, line {number}: {type(error).__name__}: {error}") from error
    names = sorted({machine.slug(run["machine"]) for run in runs.values()})
    if len(names) != 1:
        raise ValueError(f"{source} must hold runs of one machine, got {', '.join(names) or 'none'}")
    frame = pd.DataFrame(rows, columns=None if rows else [*TABLE, "run"])
    newest = frame.groupby(TABLE, dropna=False)["run"].transform("max")
    return Results(names[0], frame[frame["run"] == newest].reset_index(drop=True), runs)


def read(path: Path) -> Results:
    """Read one file."""
    with path.open(encoding="utf-8") as file:
        return parse(file, str(path))


def read_all(folder: Path = RESULTS) -> dict[str, Results]:
    """Read every file of a folder, by the name of the file without its suffix."""
    return {path.stem: read(path) for path in sorted(folder.glob("*.jsonl"))}

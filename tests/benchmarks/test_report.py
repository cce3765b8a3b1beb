"""The report, its plots and the gate. The committed report and plots match the committed measurements."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from benchmarks import gate, plots, report, tables
from benchmarks.harness import machine
from benchmarks.results import BOTH, FORWARD, OURS, RESULTS, Results, parse, read, read_all

MOST = 200_000  # maximum bytes of a plot
MACHINE = {
    "cpu": "Some CPU", "cores": 4, "caches": {"L1": 32 << 10}, "memory": 1 << 30, "isa": "AVX2", "system": "Linux"
}  # fmt: skip
Row = dict[str, Any]


def header(date: str, **fields: Any) -> Row:
    versions, settings = {"torch": "2.10", "torch-scatter": "2.1.2"}, {"reps": 3}
    run = {"run": date, "commit": "0123456789-dirty", "versions": versions, "settings": settings, "machine": MACHINE}
    return run | fields


def row(implementation: str, group: str, seconds: float, **fields: Any) -> Row:
    times = {"median": seconds, "p10": seconds / 2, "p90": 2 * seconds, "moved": 332_800}
    shape = {"sequences": 2, "frames": 1000, "dim": 64, "tokens": 300, "window": 3}
    noted = {"samples": 9, "retried": 1, "kept": 2, "foreign": 0.25}
    place = {"suite": "segment_pool", "case": "S1", "dtype": "float32", "threads": 1, "direction": FORWARD}
    return place | {"run": "2026", "implementation": implementation, "group": group} | times | shape | noted | fields


def results(*rows: Row) -> Results:
    return parse(map(json.dumps, [header("2026"), *rows]), "test")


def test_the_committed_report_matches_the_results():
    """If this fails, run `make bench-report`."""
    machines = read_all()
    text = report.REPORT.read_text(encoding="utf-8")
    assert text == report.text(machines)
    assert text.index("## Summary") < text.index("## Contents") < text.index("\n### ")
    anchors = [report._anchor(heading) for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE)]
    links = re.findall(r"\]\(#(.*?)\)", text)
    assert len(set(anchors)) == len(anchors) and set(links) < set(anchors)
    contents = text[text.index("## Contents") :]
    for name, one in machines.items():
        for suite in set(one.rows["suite"]):
            assert contents.count(f"[{report.SECTIONS[suite][0]} ({one.name})]") == 1
        assert f"`{name}`: L1" in text
    for case in ("S1", "S2", "clip", "tiny"):  # a table for every case, with a column for every setting
        assert text.count(f"#### {case}: ") == len(machines)
    for method in machines["amd-epyc-2c-avx512-cpu"].suite("methods")["case"].unique():
        assert f"| {method}: fastcompress, ms " in text


def test_the_committed_plots_are_drawn_from_the_results(tmp_path: Path):
    image = pytest.importorskip("PIL.Image")
    wanted = {name: rows for one in read_all().values() for name, rows in plots.sources(one).items()}
    assert {path.name for path in report.PLOTS.iterdir()} == set(wanted)
    for name, rows in wanted.items():
        assert (report.PLOTS / name).stat().st_size < MOST
        with image.open(report.PLOTS / name) as picture:
            assert picture.text["Source"] == plots.digest(rows), name
    shown = re.findall(r"!\[.*?\]\(plots/(.*?)\)", report.REPORT.read_text(encoding="utf-8"))
    assert sorted(shown) == sorted(wanted)
    for path in plots.write(tmp_path, read_all()["amd-epyc-2c-avx512-cpu"]):
        with image.open(path) as picture:
            assert len(set(picture.convert("L").get_flattened_data())) > 10
    rows = wanted[sorted(wanted)[0]]
    assert plots.digest(rows.assign(median=2 * rows["median"])) != plots.digest(rows)


def test_committed_measurements():
    """Times are positive and in order, and the gate passes when it compares the measurements with themselves."""
    found = 0
    for path in RESULTS.glob("*.jsonl"):
        for line in map(json.loads, path.read_text().splitlines()):
            if "p10" in line:
                assert 0 < line["p10"] <= line["median"] <= line["p90"], (path.name, line)
                found += 1
    assert found > 2000
    for one in read_all().values():
        changes = gate.compare(one.rows, one.rows)
        rows = one.rows[one.rows["suite"].isin(gate.COMPARED)]
        assert len(changes) == len(rows.drop_duplicates(gate.TABLE)) > 0
        assert changes["factor"].to_list() == pytest.approx([1] * len(changes))


def test_a_table_of_pooling():
    rows = [
        row("fastcompress", OURS, 0.002),
        row("a", "compile", 0.004),
        row("bandwidth bound, fresh", "bandwidth bound", 0.001),
    ]
    rows += [row("fastcompress", OURS, 1.5, threads=2), row("b", "eager", 0.75, threads=2)]
    rows += [
        {key: value for key, value in row("c", "library", 1).items() if key not in ("median", "p10", "p90")}
        | {"not_timed": "fails"}
    ]
    text = re.sub(" +", " ", report.text({"some": results(*rows)}))
    assert "| segment_pool | 2026 | `01234567-dirty` | 2.10 | 3 | 18 | 2 | 4 | 0.25 cores |" in text
    assert "| fastcompress, ms | **2.00** | **1,500** |" in text and "| fastcompress, GB/s | 0.166 | 0.000222 |" in text
    assert (
        "| bandwidth bound, fresh, GB/s | 0.333 | |" in text
        and "| a | 2.00x | |" in text
        and "| b | | 0.500x |" in text
    )
    assert "Not timed: `c` (S1, fp32, fwd, 1 thr), fails." in text and "Other libraries: torch-scatter 2.1.2." in text
    assert "| fp32 forward against compile | >= 3.2 | 2.00 | |" in text  # a missed target
    assert "| fp32 forward / bandwidth bound, fresh | <= 1.25 | 2.00 | |" in text


def test_scaling_is_by_what_changes():
    rows = []
    for width, ours, other in ((128, 0.004, 0.004), (64, 0.002, 0.006)):
        fields = {"suite": "scaling", "case": str(width), "dim": width, "axes": ["width", "threads"]}
        rows += [row("fastcompress", OURS, ours, **fields), row("a", "compile", other, **fields)]
    text = re.sub(" +", " ", "\n".join(report._scaling(results(*rows))))
    assert "| width | 64 | 128 |\n" in text and "| threads |" not in text and "MB of input" not in text
    assert "| fp32, fwd: fastcompress | **1.00 ms** | **2.00 ms** |" in text  # the 10th percentiles
    assert "| fp32, fwd: best torch.compile form | 3.00x | 1.00x |" in text


def test_the_roof_and_figures():
    rates = pd.Series({"read": 10e9, "copy": 8e9, "multiply and add": 50e9})
    assert tables.roof(rates, 2) == 20e9 and tables.roof(rates, 6) == 50e9
    one = results(row("fastcompress", OURS, 0.001), row("fastcompress", OURS, 0.001, direction=BOTH, moved=665_600))
    found = tables.with_work(one.rows, pd.DataFrame([rates], index=[1]))
    intensity, (rate, both) = found["intensity"].iloc[0], found["speed"]
    assert rate == (5 * 64_000 + 300 * 64) / 0.001 and intensity == rate * 0.001 / 332_800
    assert both == pytest.approx(rate + 300 * 64 / 0.001)
    found = [tables.figure(value) for value in (0.0123, 1.0, 150, 999.7, 8310)]
    assert found == ["0.0123", "1.00", "150", "1,000", "8,310"]
    aim = report.Aim("as fast", "float32", FORWARD, ">", 1.0, ["eager"])
    for seconds, shown in ((1.0, "1.00"), (1.01, "**1.01**")):
        rows = results(row("fastcompress", OURS, 1.0), row("a", "eager", seconds)).rows
        assert list(report._aims(rows, [aim]))[1].splitlines()[-1].split("|")[-2].strip() == shown


# The gate


def write(path: Path, change: Callable[[Row], Row | None] = lambda one: one) -> Path:
    """Write two tables of pooling and one of a method, with a change of each row."""
    rows = [
        row(name, OURS if i == 0 else "eager", s)
        for i, (name, s) in enumerate((("fastcompress", 1), ("a", 2), ("b", 8), ("c", 4)))
    ]
    rows += [row(name, group, s, case="S2") for name, group, s in (("fastcompress", OURS, 1), ("a", "eager", 3))]
    rows += [
        row(name, group, s, suite="methods", case="CIF")
        for name, group, s in (("fastcompress", OURS, 2), ("loop", "published", 20))
    ]
    lines = [header("2026", machine=machine.machine()), *filter(None, map(change, rows))]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def slower(one: Row) -> Row:
    """Return the measurement, with 1.5 times the time if it is of our method."""
    return one | {"p10": one["p10"] * 1.5} if (one["case"], one["group"]) == ("CIF", OURS) else one


def test_the_gate_compares_ratios_and_not_times(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    then = write(tmp_path / "then.jsonl")
    arguments = ["--committed", str(then), "--now"]
    now = write(tmp_path / "now.jsonl", lambda one: one | {"p10": one["p10"] * 3})  # a slower machine
    assert gate.compare(read(then).rows, read(now).rows)["factor"].to_list() == [1, 1, 1]
    write(now, lambda one: one | {"p10": one["p10"] / 1.5} if one["implementation"] == "b" else one)
    assert gate.main([*arguments, str(now)]) == 0  # a change of one baseline does not fail
    assert "lost ground" not in capsys.readouterr().out
    write(now, slower)
    assert gate.main([*arguments, str(now)]) == 1
    assert re.search(r"methods, CIF, float32, 1 thr, forward +1 +0.67 +lost ground", capsys.readouterr().out)
    assert gate.main([*arguments, str(now), "--least", "0.6"]) == 0
    write(now, lambda one: one | {"case": "other"})
    assert gate.main([*arguments, str(now)]) == 2
    assert "no table is in both" in capsys.readouterr().err


def test_the_gate_compares_with_this_machine_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys):
    monkeypatch.setattr(gate, "RESULTS", tmp_path)
    now = write(tmp_path / "now.jsonl", slower)
    write(tmp_path / "other-cpu.jsonl", slower)
    assert gate.main(["--now", str(now)]) == 2
    assert f"of this machine, {machine.slug()}, but of other-cpu" in capsys.readouterr().err
    write(tmp_path / f"{machine.slug()}-cpu.jsonl")
    assert gate.main(["--now", str(now)]) == 1


def test_the_gate_measures_and_misses(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys):
    """The gate measures the suites and dtypes of the committed tables. A table that is not measured again fails."""
    then, calls = write(tmp_path / "then.jsonl"), []
    missing: list[str] = []

    def measure(arguments: list[str]) -> int:
        suite, folder = arguments[0], Path(arguments[arguments.index("--out") + 1])
        calls.append((suite, arguments[arguments.index("--dtypes") + 1], arguments[arguments.index("--threads") + 1]))
        write(folder / "x.jsonl", lambda one: None if one["case"] in missing else one)
        return 0

    monkeypatch.setattr(gate, "measure", measure)
    assert gate.main(["--committed", str(then)]) == 0
    assert calls == [("segment_pool", "fp32", "1"), ("methods", "fp32", "1")]
    missing[:] = ["CIF"]
    assert gate.main(["--committed", str(then)]) == 1
    assert capsys.readouterr().err == "not measured any more: methods, CIF, float32, 1 thr, forward\n"
    missing[:] = ["S2"]  # this case is not requested
    assert gate.main(["--committed", str(then)]) == 0
    monkeypatch.setattr(gate, "measure", lambda arguments: 3)
    assert gate.main(["--committed", str(then)]) == 3

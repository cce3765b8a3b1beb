"""The gate on ratios: what it compares, and when it fails."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gate
from benchmarks.harness import machine


def rows(**seconds: float) -> list[dict[str, Any]]:
    return [{"contender": name, "seconds": {"p10": value}} for name, value in seconds.items()]


SETTING = {"dtype": "float32", "threads": 1, "direction": "forward"}
DOCUMENT: dict[str, Any] = {
    "tables": [
        {"case": "S1", **SETTING, "rows": rows(fastcompress=1, a=2, b=8, c=4)},
        {"case": "S2", **SETTING, "rows": rows(fastcompress=1, a=3)},
    ],
    "methods": [
        {
            "case": {"name": "8 clips"},
            "method": "CIF",
            **SETTING,
            "rows": [{"form": "fastcompress", "seconds": {"p10": 2}}, {"form": "loop", "seconds": {"p10": 20}}],
        }
    ],
    "packing": [],
}


def test_ratios_and_not_times():
    slower = copy.deepcopy(DOCUMENT)
    for part in ("tables", "methods"):
        for table in slower[part]:
            for row in table["rows"]:
                row["seconds"]["p10"] *= 3  # a slower machine
    changes = gate.compare(DOCUMENT, slower)
    assert [round(change.factor, 9) for change in changes] == [1, 1, 1]
    ours = next(row for row in slower["tables"][0]["rows"] if row["contender"] == "fastcompress")
    ours["seconds"]["p10"] *= 2
    del slower["tables"][1]
    changes = gate.compare(DOCUMENT, slower)
    assert [change.table for change in changes] == [
        "tables, S1, float32, 1 thr, forward",
        "methods, 8 clips, CIF, float32, 1 thr, forward",
    ]
    assert changes[0].factor == pytest.approx(0.5) and changes[1].factor == pytest.approx(1)


def test_one_rival_does_not_move_it():
    now = copy.deepcopy(DOCUMENT)
    now["tables"][0]["rows"] += rows(new=1.0)  # which was not there then
    now["tables"][0]["rows"][1]["seconds"]["p10"] /= 1.5
    assert gate.compare(DOCUMENT, now)[0].factor == 1


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    then, now = tmp_path / "then.json", tmp_path / "now.json"
    then.write_text(json.dumps(DOCUMENT))
    now.write_text(json.dumps(DOCUMENT))
    assert gate.main(["--committed", str(then), "--now", str(now)]) == 0
    assert "lost ground" not in capsys.readouterr().out
    slower = copy.deepcopy(DOCUMENT)
    slower["methods"][0]["rows"][0]["seconds"]["p10"] = 3
    now.write_text(json.dumps(slower))
    assert gate.main(["--committed", str(then), "--now", str(now)]) == 1
    assert "0.67  lost ground" in capsys.readouterr().out
    assert gate.main(["--committed", str(then), "--now", str(now), "--least", "0.6"]) == 0
    now.write_text(json.dumps({"tables": []}))
    assert gate.main(["--committed", str(then), "--now", str(now)]) == 2
    assert "no table is in both" in capsys.readouterr().err


def test_it_compares_with_the_newest_of_this_machine(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(gate, "RESULTS", tmp_path)
    here = machine.machine()
    elsewhere = here | {"isa": "other"}
    slower = copy.deepcopy(DOCUMENT)
    slower["methods"][0]["rows"][0]["seconds"]["p10"] = 3
    (tmp_path / "c-cpu.json").write_text(json.dumps({"date": "2026-03", "machine": elsewhere, **slower}))
    now = tmp_path / "now.json"
    now.write_text(json.dumps(slower))
    assert gate.main(["--now", str(now)]) == 2
    assert f"of this machine, {machine.slug()}, but of {machine.slug(elsewhere)}" in capsys.readouterr().err
    (tmp_path / "a-cpu.json").write_text(json.dumps({"date": "2026-01", "machine": here, **slower}))
    assert gate.main(["--now", str(now)]) == 0
    (tmp_path / "b-cpu.json").write_text(json.dumps({"date": "2026-02", "machine": here, **DOCUMENT}))
    assert gate.main(["--now", str(now)]) == 1


def test_it_measures_what_can_be_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Parts and dtypes of the committed tables, and no others."""
    then = tmp_path / "then.json"
    then.write_text(json.dumps(DOCUMENT))
    calls = []

    def measure(arguments: list[str]) -> int:
        names = ("--parts", "--dtypes", "--threads", "--json")
        *chosen, path = (arguments[arguments.index(name) + 1] for name in names)
        calls.append(tuple(chosen))
        Path(path).write_text(json.dumps(DOCUMENT))
        return 0

    monkeypatch.setattr(gate, "measure", measure)
    assert gate.main(["--committed", str(then)]) == 0
    assert calls == [("pool", "fp32", "1"), ("methods", "fp32", "1")]
    calls.clear()
    assert gate.main(["--committed", str(then), "--parts", "packing", "pool", "--threads", "2"]) == 0
    assert calls == [("pool", "fp32", "2")]
    monkeypatch.setattr(gate, "measure", lambda arguments: 3)  # the library is wrong
    assert gate.main(["--committed", str(then)]) == 3


def test_a_table_that_is_not_measured_any_more(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """Of the case and the threads that are measured; ``S2`` is not."""
    then = tmp_path / "then.json"
    now = copy.deepcopy(DOCUMENT)
    del now["tables"][1]
    two = [table | {"threads": 2} for table in DOCUMENT["tables"]]
    then.write_text(json.dumps(DOCUMENT | {"tables": DOCUMENT["tables"] + two}))

    def measure(arguments: list[str]) -> int:
        Path(arguments[arguments.index("--json") + 1]).write_text(json.dumps(now))
        return 0

    monkeypatch.setattr(gate, "measure", measure)
    assert gate.main(["--committed", str(then), "--threads", "1"]) == 0
    capsys.readouterr()
    assert gate.main(["--committed", str(then)]) == 1
    assert capsys.readouterr().err == "not measured any more: tables, S1, float32, 2 thr, forward\n"
    now["tables"][0]["rows"] = rows(fastcompress=1, renamed=2)
    assert gate.main(["--committed", str(then), "--threads", "1"]) == 1


def test_what_is_committed_can_be_compared():
    """Every table of the results in the repository is found again in itself."""
    documents = [json.loads(path.read_text()) for path in gate.RESULTS.glob("*-cpu.json")]
    assert documents
    for document in documents:
        changes = gate.compare(document, document)
        assert len(changes) == sum(len(document.get(part, [])) for part in gate.KEYS.values())
        assert all(change.factor == pytest.approx(1) for change in changes)

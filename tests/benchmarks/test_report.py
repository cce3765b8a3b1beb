"""The report and its plots: what is committed is what the results give."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks import document
from benchmarks.harness.compare import BOTH, FORWARD

MOST = 150_000  # bytes of a plot


def test_the_committed_report_is_what_the_results_give():
    """If it is not: `python -m benchmarks.document`."""
    assert document.REPORT.read_text(encoding="utf-8") == document.text(document.read())


def test_the_committed_plots_are_drawn_from_the_results():
    pytest.importorskip("matplotlib")
    from PIL import Image

    from benchmarks import plots

    wanted: dict[str, Any] = {}
    for slug, parts in document.read().items():
        wanted |= plots.sources(slug, parts)
    assert {path.name for path in document.PLOTS.iterdir()} == set(wanted)
    for name, drawn in wanted.items():
        path = document.PLOTS / name
        assert path.stat().st_size < MOST
        with Image.open(path) as image:
            assert image.text["Source"] == plots.digest(drawn), name
    shown = re.findall(r"!\[.*?\]\(plots/(.*?)\)", document.REPORT.read_text(encoding="utf-8"))
    assert sorted(shown) == sorted(wanted)


def test_plots_are_drawn(tmp_path: Path):
    pytest.importorskip("matplotlib")
    from PIL import Image

    from benchmarks import plots

    for slug, parts in document.read().items():
        paths = list(plots.write(tmp_path, slug, parts))
        assert {path.name for path in paths} == set(plots.sources(slug, parts))
        for path in paths:
            with Image.open(path) as image:
                assert len(set(image.convert("L").get_flattened_data())) > 10
        changed = json.loads(json.dumps(parts))
        changed["tables"][0]["tokens"] += 1
        name = f"{slug}-roofline.png"
        if name in plots.sources(slug, parts):
            assert plots.digest(plots.sources(slug, parts)[name]) != plots.digest(plots.sources(slug, changed)[name])


def result(date: str, **parts: Any) -> dict[str, Any]:
    return {
        "date": date, "commit": "0123456789-dirty", "versions": {"torch": "2.10"}, "settings": {"reps": 3},
        "machine": {"cpu": "Some CPU", "cores": 4, "caches": {"L1": 32 << 10}, "memory": 1 << 30, "isa": "AVX2",
                    "system": "Linux"},
    } | parts  # fmt: skip


def table(**seconds: float) -> dict[str, Any]:
    groups = {"fastcompress": "fastcompress", "a": "compile", "b": "eager", "floor, fresh": "floor"}
    return {
        "case": "S1",
        "sequences": 2,
        "frames": 1000,
        "dim": 64,
        "tokens": 300,
        "window": 3,
        "dtype": "float32",
        "threads": 1,
        "direction": FORWARD,
        "bytes_moved": 332_800,
        "samples": {"samples": 9, "retried": 1, "kept": 2, "foreign": 0.25},
        "rows": [
            {"contender": name, "group": groups[name], "seconds": {"median": s, "p10": s / 2, "p90": 2 * s}}
            for name, s in sorted(seconds.items(), key=lambda item: item[1])
        ],
    }


OLD = result("2026-01-01", tables=[table(fastcompress=0.001, a=0.9)], no_energy="no counter")
TABLES = [table(fastcompress=0.002, a=0.004), table(fastcompress=1.5, b=0.75) | {"threads": 2}]
NEW = result("2026-01-02", tables=TABLES)


def test_the_newest_of_a_part_counts(tmp_path: Path):
    (tmp_path / "b-cpu.json").write_text(json.dumps(OLD))
    (tmp_path / "a-cpu.json").write_text(json.dumps(NEW))
    machines = document.read(tmp_path)
    assert list(machines) == ["some-4c-avx2"]
    assert machines["some-4c-avx2"]["tables"] == NEW["tables"]
    text = document.text(machines)
    assert "Not told by this machine: no counter." in text
    assert "| pool | 2026-01-02 | `01234567-dirty` | 2.10 | 3 | 18 | 2 | 4 | 0.25 cores |" in text
    assert "| fastcompress | **2.00 ms** | **1,500 ms** |" in text
    assert "| a | 2.00x |  |" in text and "| b |  | 0.500x |" in text
    assert "Not timed" not in text and "Other libraries: none." in text


def test_what_took_no_part_is_told(tmp_path: Path):
    """And machines of one name with other instructions are two."""
    one = result("2026-01-01", tables=[table(fastcompress=1) | {"not_timed": {"b": "fails"}}])
    one["versions"] |= {"torch-scatter": "2.1.2", "fbgemm-gpu-cpu": None}
    (tmp_path / "a-cpu.json").write_text(json.dumps(one))
    text = document.text(document.read(tmp_path))
    assert "Not timed: `b` (S1, fp32, fwd, 1 thr), fails." in text and "Other libraries: torch-scatter 2.1.2." in text
    (tmp_path / "b-cpu.json").write_text(json.dumps(one | {"machine": one["machine"] | {"isa": "AVX512"}}))
    assert list(document.read(tmp_path)) == ["some-4c-avx2", "some-4c-avx512"]


def test_scaling_is_by_what_changes(tmp_path: Path):
    wide = table(fastcompress=0.004, a=0.004) | {"dim": 128}
    points = [one | {"axes": ["width"]} for one in (wide, table(fastcompress=0.002, a=0.006))]
    points.append(points[1] | {"axes": ["threads"]})  # one place, of which there is nothing to say
    (tmp_path / "a-cpu.json").write_text(json.dumps(result("2026-01-01", scaling=points)))
    text = document.text(document.read(tmp_path))
    assert "MB of input" not in text
    assert "| width | 64 | 128 |\n" in text and "| threads |" not in text
    assert "| fp32, fwd: fastcompress | **1.00 ms** | **2.00 ms** |" in text  # the 10th percentiles
    assert "| fp32, fwd: best torch.compile form | 3.00x | 1.00x |" in text


def test_the_roof():
    ceilings = {
        "threads": 1,
        "read_bytes_per_second": 10e9,
        "copy_bytes_per_second": 8e9,
        "operations_per_second": 50e9,
        "fused_operations_per_second": 90e9,
    }
    assert document.roof_at(ceilings, 2) == 20e9 and document.roof_at(ceilings, 6) == 50e9
    one = table(fastcompress=0.001, **{"floor, fresh": 0.0005})
    intensity, rate = document.work_of(one, "fastcompress")
    assert rate == (5 * 64_000 + 300 * 64) / 0.001 and intensity == rate * 0.001 / 332_800
    parts: dict[str, Any] = {"tables": [one], "ceilings": [ceilings], "sources": {}}
    assert f"| S1, fp32, fwd, 1 thr | {intensity:.2f} | 0.3 | 0.3 | {rate / 10e9 / intensity:.0%} |" in "\n".join(
        document._roofline(parts, "x")
    )
    both = one | {"direction": BOTH, "bytes_moved": 665_600}
    assert document.work_of(both, "fastcompress")[1] == pytest.approx(rate + 300 * 64 / 0.001)


def test_figures():
    found = [document.figure(value) for value in (0.0123, 1.0, 150, 999.7, 8310)]
    assert found == ["0.0123", "1.00", "150", "1,000", "8,310"]


def test_committed_times_are_possible():
    """Of every form of every table: positive, and in order."""
    found = 0
    for path in document.RESULTS.glob("*-cpu.json"):
        result = json.loads(path.read_text())
        for table in (table for part in document.PARTS for table in result.get(part) or () if part != "no_energy"):
            for row in table.get("rows", []):
                seconds = row["seconds"]
                assert 0 < seconds["p10"] <= seconds["median"] <= seconds["p90"], (path.name, row)
                found += 1
    assert found > 500

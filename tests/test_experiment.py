"""The experiment on a small budget: every row, what is not computed twice, table and plot."""

from __future__ import annotations

import dataclasses
import json
import pickle
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # part of the checkout, not of the package

pytest.importorskip("transformers")
pytest.importorskip("peft")

from experiments import report, share  # noqa: E402
from experiments.study import COMPRESSIONS, FROM_THE_START, METHODS, Budget, Study, spread  # noqa: E402
from tests.lalm_data import write_tones  # noqa: E402

pytestmark = [
    pytest.mark.skipif("config.getoption('--device') or config.getoption('--backend')", reason="of the CPU"),
    pytest.mark.xdist_group("training"),
]

BUDGET = Budget(steps=2, lora_steps=2, lora_utterances=8, scored=4, written=3, methods=())
OTHER = dataclasses.replace(
    BUDGET, compressions=COMPRESSIONS[:1], methods=METHODS, longer=COMPRESSIONS[:1], from_the_start=FROM_THE_START[:1]
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tones")
    for name, count in (("train", 16), ("dev", 4), ("test", 6), ("test-voice", 4)):
        write_tones(folder, count, name, seed=count)
    return folder


@pytest.fixture(scope="module")
def records(data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("study")
    return [Study("tones", data, folder, seed, budget).run() for seed, budget in enumerate((BUDGET, OTHER), 1)]


def test_every_row_is_there(records: list[Path]):
    rows = report.load(records)
    for seed, budget in enumerate((BUDGET, OTHER), 1):
        tuned = (*budget.compressions, *budget.methods)
        stages = {"zero-shot": tuned, "lora": tuned, "longer": budget.longer, "start": budget.from_the_start}
        for stage, wanted in stages.items():
            found = [row["compression"] for row in rows if row["seed"] == seed and row["stage"] == stage]
            assert sorted(found) == sorted(c.name for c in wanted)
        steps = {"zero-shot": 0, "lora": 2, "longer": 6, "start": 2}
        assert all(row["steps"] == steps[row["stage"]] for row in rows)
    for row in rows:
        assert set(row["scores"]) == {"dev", "test", "test-voice"}
        test = row["scores"]["test"]
        assert test["utterances"] == 4 and test["prefill_ms"] > 0 and 0 <= test["wer"]
        wanted = {"none": 1, "uniform:2": 2, "uniform:3": 3, "uniform:4": 4, "uniform:8": 8}.get(row["rule"])
        assert wanted is None or test["ratio"] == pytest.approx(wanted, rel=0.2)
    sampling = next(row for row in rows if row["compression"] == "uniform sampling 3x")
    assert sampling["reduce"] == "first"
    assert next(row for row in rows if row["compression"] == "CTC change")["keys"] == "ctc"
    for name, ratio in (("A-ToMe", 2), ("FastAdaSP", 3), ("CIF", 3)):
        for row in rows:
            if row["compression"] == name:
                assert row["scores"]["test"]["ratio"] == pytest.approx(ratio, rel=0.1), name


def test_what_is_there_is_not_computed_again(records: list[Path], data: Path, monkeypatch: pytest.MonkeyPatch):
    rows = json.loads(records[0].read_text())
    last = rows.pop()
    records[0].write_text(json.dumps(rows))
    trained = []
    monkeypatch.setattr(Study, "_train_from_nothing", lambda *arguments: trained.append(arguments))
    Study("tones", data, records[0].parent, 1, BUDGET).run()
    again = json.loads(records[0].read_text())
    assert not trained and again[:-1] == rows
    times = {"prefill_ms", "encode_ms", "written_per_second", "peak_bytes"}  # measured anew
    for name, score in again[-1]["scores"].items():
        assert {k: v for k, v in score.items() if k not in times} == {
            k: v for k, v in last["scores"][name].items() if k not in times
        }


def test_table_and_plot(records: list[Path], tmp_path: Path):
    rows = report.load(records)
    lines = report.table(rows).splitlines()
    assert "2 seeds" in lines[0]
    assert lines[2].startswith("|  |  | tokens/s | ratio | test | new voices | exact % | prefill ms |")
    assert len([line for line in lines if " ± " in line and line.startswith("|")]) == 2 * len(
        (*COMPRESSIONS, *METHODS)
    ) + len(FROM_THE_START) + len(OTHER.longer)
    for row in rows[1:]:
        row["scores"]["test-engine"] = row["scores"]["test"]
    lines = report.table(rows).splitlines()
    assert lines[2].startswith("|  |  | tokens/s | ratio | test | new voices | other engine | exact % | prefill ms |")
    assert sum("| – |" in line for line in lines) == 1
    for draw in (report.plot, report.plot_methods):
        draw(rows, tmp_path / "plot.png")
        assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
        (tmp_path / "plot.png").unlink()


def test_budgets_go_to_other_processes():
    text = pickle.loads(pickle.dumps(Budget())).methods[0].text
    assert text == METHODS[0].text == "BipartiteMerge(rate=2.0, window=0)"


def test_spread():
    assert spread([2.0]) == (2.0, 0.0)
    mean, deviation = spread([1.0, 2.0, 3.0])
    assert (mean, deviation) == (2.0, 1.0)


def test_compression_is_a_small_share_of_a_step(data: Path):
    times = share.measure(str(data / "train.jsonl"), "local-max")
    step = times.pop("step")
    assert {"fastcompress::segment_pool", "fastcompress::pack_rows"} <= times.keys()
    assert sum(times.values()) < 0.02 * step

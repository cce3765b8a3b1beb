"""The experiment with a small budget: its rows, resumption, table and plot."""

from __future__ import annotations

import dataclasses
import json
import pickle
from pathlib import Path

import pytest
import torch

from experiments import report
from experiments.__main__ import SHIPPED
from experiments.study import COMPRESSIONS, FROM_SCRATCH, METHODS, Budget, Compression, Study, spread
from fastcompress.decoder.generation import unwrap
from fastcompress.lalm.loading import load_model
from fastcompress.lalm.lora import add_lora
from fastcompress.training.examples import EncodedExamples, Examples
from fastcompress.training.manifest import read_manifest
from fastcompress.training.settings import TrainerSettings
from fastcompress.training.trainer import Training
from tests.support.lalm_data import write_tones

pytestmark = [
    pytest.mark.xdist_group("training"),
]

DIGITS = SHIPPED.parents[1] / "digits" / "test.jsonl"
BUDGET = Budget(steps=2, lora_steps=2, lora_utterances=8, scored=4, written=3, methods=())
#: Methods that run in a whole study, with their target of frames per token (the number of tokens of short audio is
#: rounded up in each round). The others are tested on the shipped model.
RATIOS = {"A-ToMe": 2, "FastAdaSP": 3, "CIF": 3, "LTBM": 3, "first-layer attention": 3}
TRIED = tuple(method for method in METHODS if method.name in RATIOS)
OTHER = dataclasses.replace(BUDGET, compressions=COMPRESSIONS[:1], methods=TRIED, from_scratch=FROM_SCRATCH[:1])


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
        stages = {"zero-shot": tuned, "lora": tuned, "start": budget.from_scratch}
        for stage, wanted in stages.items():
            found = [row["compression"] for row in rows if row["seed"] == seed and row["stage"] == stage]
            assert sorted(found) == sorted(c.name for c in wanted)
        steps = {"zero-shot": 0, "lora": 2, "start": 2}
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
    for name, ratio in RATIOS.items():
        for row in rows:
            if row["compression"] == name:
                assert row["scores"]["test"]["ratio"] == pytest.approx(ratio, rel=0.15), name


def test_existing_rows_are_not_computed_again(records: list[Path], data: Path, monkeypatch: pytest.MonkeyPatch):
    rows = json.loads(records[0].read_text())
    last = rows.pop()
    records[0].write_text(json.dumps(rows))
    trained = []
    monkeypatch.setattr(Study, "_train_from_scratch", lambda *arguments: trained.append(arguments))
    Study("tones", data, records[0].parent, 1, BUDGET).run()
    again = json.loads(records[0].read_text())
    assert not trained and again[:-1] == rows
    times = {"prefill_ms", "encode_ms", "written_per_second", "peak_bytes"}  # measured again
    for name, score in again[-1]["scores"].items():
        assert {k: v for k, v in score.items() if k not in times} == {
            k: v for k, v in last["scores"][name].items() if k not in times
        }


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_table_and_plot(records: list[Path], tmp_path: Path):
    rows = report.load(records)
    lines = report.table(rows).splitlines()
    assert "2 seeds" in lines[0]
    head = ["", "tokens/s", "ratio", "test", "95 %", "new voices", "exact %", "prefill ms"]
    assert [cells(line) for line in lines].count(head) == len(report.STAGES)
    assert len([line for line in lines if " ± " in line and line.startswith("|")]) == 2 * len(
        (*COMPRESSIONS, *TRIED)
    ) + len(FROM_SCRATCH)
    for row in rows[1:]:
        row["scores"]["test-engine"] = row["scores"]["test"]
    lines = report.table(rows).splitlines()
    head.insert(-2, "other engine")
    assert [cells(line) for line in lines].count(head) == len(report.STAGES)
    assert sum("–" in cells(line) for line in lines) == 1
    for draw in (report.plot, report.plot_methods):
        draw(rows, tmp_path / "plot.png")
        assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
        (tmp_path / "plot.png").unlink()


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_methods_on_the_shipped_model(method: Compression, tmp_path: Path):
    """Each method compresses at its ratio, trains only its own parameters, and generates."""
    model, processor = load_model(SHIPPED)
    examples = EncodedExamples(Examples(read_manifest(DIGITS)[:4], processor), model)
    batch = examples.batch(range(4), targets=False)
    frames, lengths = batch["frames"], batch["frame_lengths"]
    before = frames.clone()
    model.train_encoder(False)
    method.apply(model)
    tokens = model.compress(frames, lengths).cu_seqlens.diff()
    assert (tokens < lengths).all() and tokens.sum() > 0 and torch.equal(frames, before)
    head = model.ctc_head.weight.clone()
    model = add_lora(model, rank=4)
    settings = TrainerSettings(
        max_steps=2, per_device_train_batch_size=4, augment=False, save_steps=0, logging_steps=1, warmup_steps=0
    )
    rows: list[dict[str, float]] = []
    Training(model, examples, settings, tmp_path).run(lambda step, row: rows.append(row))
    assert len(rows) == 2 and all(0 < row["grad_norm"] < float("inf") for row in rows)
    assert 0 < rows[0]["audio_tokens"] < rows[0]["audio_frames"] == lengths.sum()
    changed = {name for name, p in model.named_parameters() if p.requires_grad}
    assert any("lora" in name for name in changed) and any("projector" in name for name in changed)
    assert not any("ctc_head" in name for name in changed) and torch.equal(unwrap(model).ctc_head.weight, head)
    model.eval()
    written = unwrap(model).generate(**batch, max_new_tokens=3)
    assert written.shape[0] == 4 and written.shape[1] > batch["input_ids"].shape[1]


def test_budgets_can_be_pickled():
    text = pickle.loads(pickle.dumps(Budget())).methods[0].text
    assert text == METHODS[0].text == "BipartiteMerge(rate=2.0, window=0)"


def test_spread():
    assert spread([2.0]) == (2.0, 0.0)
    mean, deviation = spread([1.0, 2.0, 3.0])
    assert (mean, deviation) == (2.0, 1.0)

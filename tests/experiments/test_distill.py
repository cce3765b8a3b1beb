"""Self-distillation with a tiny Whisper model: its loss, its adapter, its runs, resumption and report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from experiments import distill, distill_report, real
from experiments.distill import Distillation, Settings
from fastcompress.training.sweep.models import Variant
from tests.support import tiny_whisper
from tests.support.lalm_data import write_tones

pytestmark = [
    pytest.mark.xdist_group("training"),
]

NAME = "whisper-tiny.en"
UNIFORM = Variant("uniform:4", silence="keep")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("distill")
    tiny_whisper.write(found / NAME)
    path = write_tones(found / "speech", 12)
    lines = [json.loads(line) | {"speaker": f"s{i % 4}"} for i, line in enumerate(path.read_text().splitlines())]
    (found / "speech" / distill.TEST).write_text("".join(f"{json.dumps(line)}\n" for line in lines[:4]))
    lines = [{name: line[name] for name in ("audio_filepath", "speaker")} for line in lines]
    (found / "speech" / distill.TRAIN).write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return found


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distill, "NEW_TOKENS", 5)
    monkeypatch.setattr(distill, "HELD_OUT", 3)


@pytest.fixture
def distillation(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Distillation:
    # Random weights never end a text.
    monkeypatch.setattr(
        "fastcompress.training.sweep.whisper.written", lambda ids, ends: [(r, False) for r in ids.tolist()]
    )
    return Distillation(folder, NAME, tmp_path)


def test_targets_are_texts_of_every_frame(distillation: Distillation):
    row = distillation.train.row(Variant("none", silence="keep"))
    tokenizer = distillation.whisper.processor.tokenizer
    for i, answer in enumerate(row.answers):
        assert tokenizer.decode(distillation.ids[i][:-1]) == answer.text
        assert distillation.ids[i][-1] == tiny_whisper.END
    assert len(distillation.held_out) == 3 and len(distillation.trained) == 9
    assert not set(distillation.held_out) & set(distillation.trained)
    # What is written greedily is the most likely next token, so labels and prompt are where generation has them.
    with distillation.whisper.compressed(Variant("none", silence="keep")), torch.no_grad():
        logits, labels = distillation._forward([0, 1])
    best, text = logits.argmax(-1), (labels != -100) & (labels != tiny_whisper.END)
    assert torch.equal(best[text], labels[text])


def test_training_lowers_the_loss_and_leaves_the_model_as_it_was(distillation: Distillation):
    model = distillation.whisper.model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    untrained = distillation.held_out_loss(UNIFORM)
    with distillation.adapted(UNIFORM, 0, Settings(1e-2, steps=12, batch_size=3, rank=2)) as losses:
        assert len(losses) == 12 and distillation.held_out_loss(UNIFORM) < untrained
        trained = [name for name, value in model.named_parameters() if value.requires_grad]
        assert trained and all(".decoder." in name and "lora" in name for name in trained)
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert distillation.held_out_loss(UNIFORM) == untrained


def test_divergence_from_the_model_itself_is_zero(distillation: Distillation):
    distillation._learn_distributions()
    chosen = distillation.trained[:2]
    losses = {}
    for rule in ("none", "uniform:4"):
        with distillation.whisper.compressed(Variant(rule, silence="keep")), torch.no_grad():
            losses[rule] = float(distillation._loss(chosen, 1.0))
    assert losses["none"] == pytest.approx(0, abs=1e-3) and losses["uniform:4"] > 10 * abs(losses["none"])


def test_runs_and_report(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
):
    monkeypatch.setattr(
        "fastcompress.training.sweep.whisper.written", lambda ids, ends: [(r, False) for r in ids.tolist()]
    )
    monkeypatch.setattr(distill, "SETTINGS", Settings(1e-2, steps=2, batch_size=3, rank=2))
    monkeypatch.setattr(distill, "RULES", ("none", "uniform:4", real.min_variance(4)))
    monkeypatch.setattr(distill, "TRIED", (Settings(steps=1, rank=2), Settings(steps=1, rank=2, kl=1.0)))
    threads = torch.get_num_threads()
    request.addfinalizer(lambda: torch.set_num_threads(threads))
    arguments = [
        "distill",
        str(folder),
        "--out",
        str(tmp_path / "out"),
        "--results",
        str(tmp_path),
        "--seeds",
        "0",
        "1",
    ]
    monkeypatch.setattr("sys.argv", [*arguments, "--tune"])
    assert distill.main() == 0
    assert "whisper-base: not in" in capsys.readouterr().out
    tuned = json.loads((tmp_path / f"distill-tuning-{NAME}.json").read_text())["rows"]
    assert [row["settings"] and row["settings"]["kl"] for row in tuned] == [None, 0, 1]
    monkeypatch.setattr("sys.argv", arguments)
    assert distill.main() == 0
    rows = json.loads((tmp_path / f"distill-{NAME}.json").read_text())["rows"]
    assert [(row["seed"], row["rule"]) for row in rows] == [(s, r) for s in (0, 1) for r in distill.RULES]
    assert all(len(row["losses"]) == 2 and len(row["score"]["errors"]) == 4 for row in rows)
    monkeypatch.setattr(Distillation, "adapted", lambda *_: pytest.fail("trained again"))
    assert distill.main() == 0
    monkeypatch.setattr("sys.argv", ["report", "--results", str(tmp_path), "--write"])
    assert distill_report.main() == 0
    report = (tmp_path / "distill.md").read_text()
    line = next(line for line in report.splitlines() if line.startswith("| uniform:4 "))
    wers = [row["score"]["wer"]["value"] for row in rows if row["rule"] == "uniform:4"]
    assert f"{sum(wers) / 2:.2f}" in line

"""Several rules in one run, rates that rise, and distillation."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from fastcompress.cli.main import main
from fastcompress.lalm.loading import load_model
from fastcompress.training import logs
from fastcompress.training.distillation import Teacher, divergence
from fastcompress.training.parsing import read_record
from fastcompress.training.rate_schedule import RateSchedule, scaled
from fastcompress.training.runs import Run
from fastcompress.training.settings import SettingsError, TrainSettings
from tests.support import ROOT, reference_models
from tests.support.lalm_data import write_tones

pytestmark = [pytest.mark.xdist_group("training")]

DIGITS = str(ROOT / "assets" / "models" / "digits")
RULES = "uniform:2 min-variance:rate=3 none"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tones")
    write_tones(folder, 12)
    return folder / "train.jsonl"


def settings(data: Path, out: Path, **values: Any) -> TrainSettings:
    small: dict[str, Any] = {"max_steps": 6, "per_device_train_batch_size": 3, "logging_steps": 1, "save_steps": 3}
    return TrainSettings(output_dir=str(out), data=str(data), **(small | values))


def quiet(settings: TrainSettings, resume: bool = False) -> Run:
    return Run(settings, resume, say=lambda text: None)


def rows(folder: Path) -> list[dict[str, float]]:
    return logs.read(folder / "log.csv")


def test_rates_rise():
    assert [scaled("uniform:4", share / 4) for share in range(4)] == [
        "uniform:1",
        "uniform:2",
        "uniform:2",
        "uniform:3",
    ]
    assert scaled("min-variance:rate=4", 0.5) == "min-variance:rate=2.5"
    assert scaled("top-k:rate=3", 0.0) == "top-k:rate=1.0"
    assert scaled("none", 0.3) == "none"
    for rule in ("local-max", "top-k:count=3", "threshold:0.2"):
        with pytest.raises(ValueError, match="has no rate that could rise"):
            scaled(rule, 0.5)


def test_each_batch_draws_a_rule():
    model, _ = load_model(DIGITS, "uniform:2")
    model.positions = "compact"
    schedule = RateSchedule(model, RULES.split(), warmup_steps=10, seed=1)
    drawn = Counter(schedule.rule(20, batch) for batch in range(300))
    assert set(drawn) == {"uniform:2", "min-variance:rate=3", "none"} and min(drawn.values()) > 70
    assert [schedule.rule(20, b) for b in range(9)] == [
        RateSchedule(model, RULES.split(), 0, 1).rule(0, b) for b in range(9)
    ]
    assert {schedule.rule(5, batch) for batch in range(30)} == {"uniform:2", "min-variance:rate=2.0", "none"}
    for batch in range(6):
        schedule.set(20, batch)
        assert (model.rule or "none") in drawn
        assert model.proportional_attention and model.positions == "compact"  # as before the training
    schedule.finish()
    assert model.rule == "uniform:2"


def test_a_run_with_several_rules_resumes_to_the_same_weights(data: Path, tmp_path: Path):
    """The ratios in the log are those of the drawn rules, and the saved model has the first."""
    whole = settings(data, tmp_path / "whole", rule=RULES, rate_warmup_steps=2)
    quiet(whole).train()
    ratios = [row["audio_frames"] / row["audio_tokens"] for row in rows(tmp_path / "whole")]
    assert ratios[0] == 1 and max(ratios) > 1.8
    half = settings(data, tmp_path / "half", rule=RULES, rate_warmup_steps=2)

    def interrupt(step: int, row: dict[str, float]) -> None:
        if step == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quiet(half).train(interrupt)
    quiet(half, resume=True).train()
    assert [row["loss"] for row in rows(tmp_path / "half")][3:] == [row["loss"] for row in rows(tmp_path / "whole")][3:]
    models = [load_model(tmp_path / name)[0] for name in ("whole", "half")]
    assert models[0].rule == models[1].rule == "uniform:2"
    for a, b in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(a, b)


def test_distillation(data: Path, tmp_path: Path):
    """A student that equals its teacher has no divergence; with fewer tokens, the divergence falls."""
    lora = {"model": DIGITS, "lora_rank": 4, "augment": False, "teacher": DIGITS}
    quiet(settings(data, tmp_path / "same", rule="none", max_steps=1, **lora)).train()
    assert rows(tmp_path / "same")[0]["teacher_loss"] == pytest.approx(0, abs=1e-6)
    steps = {"rule": "uniform:3", "max_steps": 12, "warmup_steps": 1, "learning_rate": 3e-3, "encode_once": True}
    quiet(settings(data, tmp_path / "less", **lora, **steps, teacher_weight=20.0)).train()
    found = [row["teacher_loss"] for row in rows(tmp_path / "less")]
    assert found[0] > 0.01 and sum(found[-3:]) < 0.7 * sum(found[:3])
    for row in rows(tmp_path / "less"):
        assert row["loss"] == pytest.approx(row["lm_loss"] + 20 * row["teacher_loss"])


def test_the_divergence_is_that_of_torch():
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 1, 5, 7, generator=g)
    p, q = (torch.distributions.Categorical(logits=logits[0]) for logits in (b, a))
    expected = torch.distributions.kl_divergence(p, q).sum() / 9
    torch.testing.assert_close(divergence(a, b, 9), expected)


def test_errors(data: Path, tmp_path: Path):
    for values, message in (
        ({"rule": "none uniform:2"}, "the first of several must not be none"),
        ({"rule": "uniform:2 uniform:x"}, "`rule`: "),
        ({"rule": " "}, "`rule`: "),
        ({"rate_warmup_steps": 3}, "`rate_warmup_steps` needs a `rule`"),
        ({"teacher_weight": 0.0}, "`teacher_weight` must be more than 0"),
    ):
        with pytest.raises(SettingsError, match=message):
            settings(data, tmp_path, **values)
    for values, message in (
        ({"rule": "local-max", "rate_warmup_steps": 3}, "`rule`: rule local-max has no rate that could rise"),
        ({"teacher": str(tmp_path / "no")}, "`teacher`: "),
        ({"teacher": DIGITS}, "`teacher` .*number of ids"),
    ):
        with pytest.raises(SettingsError, match=message):
            quiet(settings(data, tmp_path / "run", **values))
        assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="label-change needs ctc_tokens"):
        RateSchedule(reference_models.build(), ["uniform:2", "label-change"])


def test_a_teacher_must_fit():
    """Equal numbers of ids are not enough: a permuted vocabulary would give a wrong loss."""
    (model, processor), (other, others) = load_model(DIGITS), load_model(DIGITS)
    with torch.no_grad():
        next(other.audio_tower.parameters()).add_(1)
    assert Teacher(DIGITS, model, processor, "cpu").has_encoder_of(model)
    assert not Teacher(DIGITS, other, processor, "cpu").has_encoder_of(other)
    others.feature_extractor.hop_length = 80
    with pytest.raises(SettingsError, match="its audio features differ"):
        Teacher(DIGITS, model, others, "cpu")
    vocabulary = dict(others.tokenizer.get_vocab())
    first, second = [word for word in vocabulary if word.isalpha()][:2]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    others.tokenizer.get_vocab = lambda: vocabulary
    with pytest.raises(SettingsError, match="its vocabulary differs"):
        Teacher(DIGITS, model, others, "cpu")


def test_rules_on_the_command_line(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    flags = ["--rule", "uniform:2", "--max-steps", "1", "--rule=min-variance:rate=3"]
    assert main(["train", "--output-dir", str(tmp_path / "run"), "--data", str(data), *flags]) == 0
    assert read_record(TrainSettings, tmp_path / "run").rules == ["uniform:2", "min-variance:rate=3"]
    base = ["--output-dir", str(tmp_path / "x"), "--data", str(data)]
    for command, wrong, message in (
        ("train", ["--rule", "uniform:2", "--rule"], "--rule"),
        ("train", ["--rule", "--max-steps", "1"], "expected one argument"),
        ("train", ["--rule", ""], "--rule"),
        ("finetune", ["--model", "none", "--rule", "uniform:2", "--rule", "uniform:x"], "size must be an integer"),
    ):
        assert main([command, *base, *wrong]) == 2
        assert message in capsys.readouterr().err


def test_spaces_inside_a_rule(data: Path, tmp_path: Path):
    assert settings(data, tmp_path, rule="local-max: order=2, min_len = 2").rules == ["local-max: order=2, min_len = 2"]
    assert settings(data, tmp_path, rule=" uniform:2  local-max: order=2 ").rules == ["uniform:2", "local-max: order=2"]

"""``fastcompress make-data``, ``train``, ``evaluate`` and ``transcribe`` on the command line."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import yaml

from fastcompress.cli import make_data as cli_make_data
from fastcompress.cli.main import main
from fastcompress.synthesis.data import DIRECTIONS
from fastcompress.synthesis.texts import TASKS
from fastcompress.training import logs
from fastcompress.training.manifest import read_manifest
from tests.support.command_line import fails, flags
from tests.support.lalm_data import write_lines, write_tones

pytestmark = [
    pytest.mark.xdist_group("training"),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tones")
    write_tones(folder, 60)
    write_tones(folder, 8, "test", seed=1)
    return folder


@pytest.fixture(scope="module")
def run(data: Path) -> Path:
    """Train a model on the tones with the command, and return its folder."""
    config = data / "run.yaml"
    config.write_text(yaml.safe_dump({"data": str(data / "train.jsonl"), "max-steps": 9, "learning_rate": 2e-3}))
    more = flags(max_steps=100, warmup_steps=10, rule="uniform:2", threads=1, save_steps=50)
    assert main(["train", "--output-dir", str(data / "run"), "--config", str(config), *more]) == 0
    return data / "run"


def test_flags_win_over_the_file(run: Path):
    settings = yaml.safe_load((run / "run.yaml").read_text())
    assert settings["max_steps"] == 100 and settings["learning_rate"] == 2e-3 and settings["rule"] == "uniform:2"
    assert logs.read(run / "log.csv")[-1]["step"] == 100
    assert list((run / "events").iterdir())  # TensorBoard is a development requirement
    command = json.loads((run / "environment.json").read_text())["command"]
    assert command


def test_evaluate(run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    report = tmp_path / "scores.json"
    manifests = [str(data / "test.jsonl"), str(data / "train.jsonl")]
    capsys.readouterr()
    assert main(["evaluate", str(run), *manifests, "--threads", "1", "--json", str(report)]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == f"{run}, rule uniform:2" and out[1].split()[:3] == ["utterances", "WER", "%"]
    found = json.loads(report.read_text())["manifests"][manifests[0]]
    assert out[2].split()[:3] == ["test", "8", f"{found['wer']:.1f}"]
    assert found["wer"] < 40 and found["wer_low"] <= found["wer"] <= found["wer_high"]
    assert found["ratio"] == pytest.approx(2, abs=0.05) and found["frames_per_second"] == pytest.approx(50, rel=0.02)
    assert found["tokens_per_second"] == pytest.approx(found["frames_per_second"] / found["ratio"])
    assert found["prefill_ms"] > 0 and found["encode_ms"] > 0 and found["written_per_second"] > 0
    assert [line["reference"] for line in found["lines"]] == [u.target for u in read_manifest(data / "test.jsonl")]
    exact = sum(line["reference"] == line["written"] for line in found["lines"])
    assert found["exact"] == pytest.approx(100 * exact / 8) and exact > 0
    # Another rule, and beams.
    arguments = ["evaluate", str(run), manifests[0], "--json", str(report), "--timed", "0"]
    assert main([*arguments, "--rule", "none", "--num-beams", "2"]) == 0
    found = json.loads(report.read_text())["manifests"][manifests[0]]
    assert found["ratio"] == 1 and found["prefill_ms"] == found["encode_ms"] == 0
    # Proportional attention and positions in time, which this model was not trained with.
    capsys.readouterr()
    assert main([*arguments, "--proportional-attention", "--positions", "time"]) == 0
    assert f"{run}, rule uniform:2, proportional attention, positions in time\n" in capsys.readouterr().out
    record = json.loads(report.read_text())
    assert (record["proportional_attention"], record["positions"]) == (True, "time")


def test_damaged_audio_is_not_scored(run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """A file with a valid header is damaged inside, which is found when it is decoded. It must not be scored."""
    good = [json.loads(line) for line in (data / "test.jsonl").read_text().splitlines()[:4]]
    for line in good:
        line["audio_filepath"] = str(data / line["audio_filepath"])
    soundfile.write(tmp_path / "nan.wav", np.full(8000, np.nan, np.float32), 16000, subtype="FLOAT")
    bad = good[1] | {"audio_filepath": "nan.wav", "duration": 0.5, "target": "low low low low"}
    write_lines(tmp_path, good[0], bad, good[2], good[3], good[0] | {"audio_filepath": "x"}, name="some")
    write_lines(tmp_path, good[0], good[2], good[3], name="good")
    found = {}
    for name in ("some", "good"):
        report = tmp_path / f"{name}.json"
        assert main(["evaluate", str(run), str(tmp_path / f"{name}.jsonl"), "--json", str(report)]) == 0
        found[name] = json.loads(report.read_text())["manifests"][str(tmp_path / f"{name}.jsonl")]
    assert found["some"]["skipped"] == 2 and found["good"]["skipped"] == 0
    for score in ("utterances", "words", "wer", "cer", "exact", "seconds", "ratio"):
        assert found["some"][score] == found["good"][score], score
    assert [line["written"] is None for line in found["some"]["lines"]] == [False, True, False, False]
    assert 50e6 < found["good"]["peak_bytes"] < 24e9
    write_lines(tmp_path, bad, name="all")
    capsys.readouterr()
    assert main(["evaluate", str(run), str(tmp_path / "all.jsonl")]) == 2
    skipped, error = capsys.readouterr().err.splitlines()
    assert skipped.startswith(f"skipped {tmp_path / 'all.jsonl'}:1: {tmp_path / 'nan.wav'}: contains NaN")
    assert error.startswith(f"fastcompress: error: {tmp_path / 'all.jsonl'}: no usable audio")


def test_choices_of_make_data_are_those_that_there_are():
    """The command repeats the choices, so that ``--help`` need not import the synthesis."""
    assert cli_make_data._TASKS == tuple(TASKS) and cli_make_data._DIRECTIONS == DIRECTIONS


def test_transcribe(run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    utterances = read_manifest(data / "train.jsonl")[:6]
    files = [str(u.audio_filepath) for u in utterances]
    capsys.readouterr()
    assert main(["transcribe", *files, "--model", str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(": ")[0] for line in lines] == files
    right = sum(line.partition(": ")[2] == u.text for line, u in zip(lines, utterances, strict=True))
    assert right >= 3
    assert main(["transcribe", files[0], "--model", str(run / "final")]) == 0
    assert capsys.readouterr().out == lines[0].partition(": ")[2] + "\n"
    (tmp_path / "text.wav").write_text("no audio")
    assert main(["transcribe", files[0], str(tmp_path / "text.wav"), "--model", str(run)]) == 1
    captured = capsys.readouterr()
    assert "text.wav: not an audio file" in captured.err and files[0] in captured.out
    assert main(["transcribe", str(tmp_path / "none.wav"), "--model", str(run)]) == 2


def test_training_that_cannot_start(run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    new = ["train", "--output-dir", str(tmp_path / "new")]
    train = [*new, "--data", str(data / "train.jsonl")]
    assert "already contains a run" in fails([*train, "--output-dir", str(run)], capsys)
    assert "no run to resume" in fails([*new, "--resume"], capsys)
    assert "--data is missing" in fails(new, capsys)
    assert "--rule: unknown rule 'nonsense'" in fails([*train, "--rule", "nonsense"], capsys)
    assert "nowhere.jsonl: no such file" in fails([*new, "--data", str(tmp_path / "nowhere.jsonl")], capsys)
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\nnonsense\n')
    assert "bad.jsonl:2: not JSON" in fails([*new, "--data", str(tmp_path / "bad.jsonl")], capsys)
    assert "must be a whole number from 1 on, got '0'" in fails([*train, "--threads", "0"], capsys)
    once = [*train, "--encode-once"]
    assert "--encode-once needs a frozen encoder" in fails([*once, "--no-augment"], capsys)
    assert "--encode-once excludes --augment" in fails(once, capsys)
    assert "keys must be one of frames, ctc, got 'x'" in fails([*train, "--keys", "x"], capsys)
    assert not (tmp_path / "new").exists()


def test_models_that_are_none(run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    manifest = str(data / "test.jsonl")
    assert "not a model folder" in fails(["evaluate", str(tmp_path), manifest], capsys)
    broken = tmp_path / "broken"
    shutil.copytree(run / "final", broken)
    (broken / "model.safetensors").write_bytes(b"nothing")
    assert "cannot load the model" in fails(["evaluate", str(broken), manifest], capsys)
    assert "--rule: unknown rule" in fails(["evaluate", str(run), manifest, "--rule", "x"], capsys)
    assert "must be a whole number from 1 on" in fails(["evaluate", str(run), manifest, "--num-beams", "0"], capsys)
    assert main(["evaluate", str(run), str(nothing(tmp_path))]) == 2
    error = capsys.readouterr().err
    assert "none.wav: no such file" in error and "has no usable utterance" in error


def nothing(folder: Path) -> Path:
    path = folder / "nothing.jsonl"
    path.write_text('{"audio_filepath": "none.wav", "text": "a"}\n')
    return path


def test_lora_by_flags(run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    given = flags(output_dir=tmp_path / "lora", data=data / "train.jsonl", model=run, lora_rank=4, rule="uniform:3")
    assert main(["train", *given, *flags(max_steps=3, encode_once=True, augment=False)]) == 0
    assert "trained: " in capsys.readouterr().out
    assert main(["evaluate", str(tmp_path / "lora"), str(data / "test.jsonl")]) == 0
    assert "rule uniform:3" in capsys.readouterr().out


def test_make_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("espeakng_loader")
    folder = str(tmp_path / "data")
    sizes = ["--train", "3", "--dev", "1", "--test", "1", "--jobs", "1"]
    assert main(["make-data", folder, "--task", "numbers", "--direction", "translation", *sizes]) == 0
    out = capsys.readouterr().out
    assert re.search(r"train\.jsonl: 3 utterances, 0\.00 h", out)
    assert len(read_manifest(tmp_path / "data" / "train.jsonl")) == 3
    assert "contains other data" in fails(["make-data", folder, "--task", "digits", *sizes], capsys)
    assert "needs a task with German" in fails(["make-data", folder, "--direction", "translation"], capsys)
    (tmp_path / "file").touch()
    assert "file" in fails(["make-data", str(tmp_path / "file"), *sizes], capsys)

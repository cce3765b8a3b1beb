"""``fastcompress sweep`` on the command line, with a tiny Whisper model and the shipped digits model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fastcompress.cli.main import main
from fastcompress.training.sweep.whisper import Whisper
from tests.support import ROOT, tiny_whisper
from tests.support.command_line import fails
from tests.support.lalm_data import write_lines, write_tones

pytestmark = [
    pytest.mark.xdist_group("training"),
]

DIGITS = str(ROOT / "assets" / "models" / "digits")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_whisper.write(tmp_path_factory.mktemp("whisper")))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tones")
    path = write_tones(folder, 4)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    (folder / "damaged.wav").write_bytes(b"RIFF")
    lines = [line | {"speaker": f"s{i % 2}"} for i, line in enumerate(lines)]
    return write_lines(folder, *lines, {"audio_filepath": "damaged.wav", "text": "low"})


def arguments(model: str, data: Path, out: Path, *more: str) -> list[str]:
    return ["sweep", "--model", model, "--data", str(data), "--out", str(out), "--new-tokens", "5", *more]


RULES = ("--rule", "uniform:4", "--rule", "min-variance:rate=4", "--normalize", "basic")


def test_sweep_writes_all_files(model: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "out"
    assert main(arguments(model, data, out, *RULES, "--ablate", "--silence", "pool")) == 0
    printed = capsys.readouterr()
    assert "skipped 1 of 5 utterances" in printed.err
    labels = ["none", "uniform:4", "uniform:4, proportional attention off"]
    labels += ["min-variance", "min-variance, proportional attention off"]
    found = json.loads((out / "sweep.json").read_text())
    assert [row["label"] for row in found["rows"]] == labels
    assert (found["resampled"], found["skipped"], found["normalize"], found["silence"]) == (
        "speaker",
        1,
        "basic",
        "pool",
    )
    table = [line for line in printed.out.splitlines() if line.startswith(tuple(labels))]
    assert len(table) == 5 and "resamples of the 2 speakers" in printed.out
    for row in found["rows"][1:]:
        assert row["keys"] == row["audio_frames_per_token"] * 0 + 13 and row["frames_per_token"] == pytest.approx(
            50 / 13
        )
        assert row["vs_none"]["against"] == "none" and len(row["errors"]) == row["utterances"] == 4
    assert [row["vs_uniform"] and row["vs_uniform"]["against"] for row in found["rows"]] == [None] * 3 + labels[1:3]
    assert "| none" in (out / "sweep.md").read_text() and "sweep.png" in (out / "sweep.md").read_text()
    assert (out / "sweep.png").read_bytes().startswith(b"\x89PNG")
    files = sorted((out / "hypotheses").iterdir())
    lines = [json.loads(line) for line in files[1].read_text().splitlines()]
    assert len(files) == 5 and files[1].name == "01-uniform-4.jsonl" and len(lines) == 4
    assert main(arguments(model, data, out, "--rule", "uniform:4", "--silence", "pool")) == 0
    assert [file.name for file in sorted((out / "hypotheses").iterdir())] == ["00-none.jsonl", "01-uniform-4.jsonl"]
    errors = [line["substitutions"] + line["deletions"] + line["insertions"] for line in lines]
    assert errors == found["rows"][1]["errors"] and all(line["hypothesis"] for line in lines)


def test_an_interrupted_sweep_continues(
    model: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    answer, calls = Whisper.answer, []

    def counted(self: Any, *args: Any) -> Any:
        calls.append(self.model.fastcompress_settings.compressor.rule)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return answer(self, *args)

    monkeypatch.setattr(Whisper, "answer", counted)
    command = arguments(model, data, tmp_path, *RULES)
    assert main(command) == 130
    assert "the same command continues after the last complete row" in capsys.readouterr().err
    assert [row["label"] for row in json.loads((tmp_path / "sweep.json").read_text())["rows"]] == ["none"]
    assert main(command) == 0 and len(calls) == 4
    first = (tmp_path / "sweep.json").read_text()
    assert main([*command[:-1], "none"]) == 0 and len(calls) == 4  # another normalization needs no row again
    assert main(command) == 0 and (tmp_path / "sweep.json").read_text() == first


def test_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    data = ROOT / "assets" / "digits" / "test.jsonl"
    assert main(arguments(DIGITS, data, tmp_path, "--rule", "uniform:4", "--new-tokens", "9")) == 0
    found = json.loads((tmp_path / "sweep.json").read_text())
    none, uniform = found["rows"]
    assert none["wer"]["value"] <= 6 and uniform["frames_per_token"] == pytest.approx(4, rel=0.02)
    assert found["resampled"] == "utterance"


def test_progress_bar_on_a_terminal(
    model: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    assert main(arguments(model, data, tmp_path, "--rule", "uniform:4")) == 0
    error = capsys.readouterr().err
    assert "encoding: 100%" in error and "uniform:4: 100%" in error


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--rule", "uniforn:4"], "--rule: "),
        (["--rule", "uniform:0"], "--rule: "),
        (["--silence", "loud"], "--silence: must be keep, pool or a number of seconds, got 'loud'"),
        (["--silence", "-1"], "must be keep, pool or a number of seconds, got '-1'"),
        (["--normalize", "whisker"], "unknown choice 'whisker'; did you mean whisper?"),
        (["--language", "de"], "--language must be en for this English-only Whisper model, got 'de'"),
        (["--new-tokens", "37"], "--new-tokens must be at most 36 for this model, got 37"),
        (["--batch-size", "0"], "--batch-size: must be a whole number from 1 on, got '0'"),
        (["--device", "gpu"], "must be cpu, cuda or cuda:N, got 'gpu'; did you mean cuda?"),
        (["--rule", "label-change"], "--rule label-change: "),
        (["--data", "none.jsonl"], "none.jsonl: no such file or directory"),
        (["--model", "/none/model"], "--model /none/model: no such folder"),
        (["--model", DIGITS, "--silence", "pool"], "--silence is supported for whisper only"),
        (["--out", "/proc/none"], "--out /proc/none: "),
    ],
)
def test_mistakes(
    more: list[str], message: str, model: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(arguments(model, data, tmp_path, *more)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("fastcompress: error: ") and message in error


def test_missing_options(capsys: pytest.CaptureFixture[str]):
    assert "the following arguments are required: --model, --data, --out" in fails(["sweep"], capsys)

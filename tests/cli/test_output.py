"""What commands print and keep: stdout that fails, interrupts, mistakes with a suggestion, completion."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from fastcompress.cli import completion, evaluate
from fastcompress.cli.main import main, make_parser
from fastcompress.training import evaluation
from fastcompress.training.normalization import NORMALIZERS, normalizer
from tests.support import ROOT, processes
from tests.support.command_line import fails, flags
from tests.support.forking import in_fork, write_to
from tests.support.lalm_data import write_lines

DIGITS, MODEL = ROOT / "assets" / "digits", str(ROOT / "assets" / "models" / "digits")
SHORT = ["--max-new-tokens", "8"]


def manifest(folder: Path, *names: str) -> str:
    return str(write_lines(folder, *({"audio": str(DIGITS / f"{name}.wav"), "text": "Three, nine."} for name in names)))


# Standard output


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["info"], ["inspect", str(DIGITS / "0.wav")]])
def test_a_full_disk_is_one_line(arguments: list[str], unbuffered: str):
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    with open("/dev/full", "wb") as full:
        done = processes.run(["-m", "fastcompress", *arguments], stdout=full, env=environment)
    assert (done.returncode, done.stderr) == (2, "fastcompress: error: standard output: no space left on device\n")


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_pipe_that_is_closed_is_silent(unbuffered: str):
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    end, pipe = os.pipe()
    os.close(end)  # before it writes
    with open(pipe, "wb") as closed:
        done = processes.run(["-m", "fastcompress", "info"], stdout=closed, env=environment)
    assert (done.returncode, done.stderr) == (2, "")


def test_an_error_of_another_file_is_not_taken_for_stdout(monkeypatch: pytest.MonkeyPatch):
    def broken(options: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fastcompress.cli.info.collect", lambda: broken(None))
    with pytest.raises(OSError, match="No space left"):
        main(["info"])


# Interrupts


@contextlib.contextmanager
def interrupt(monkeypatch: pytest.MonkeyPatch, name: str, call: int) -> Iterator[None]:
    """Press Ctrl-C at a call of a function of ``fastcompress.training.evaluation``."""
    whole, calls = getattr(evaluation, name), 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            raise KeyboardInterrupt
        return whole(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, name, counted)
        yield


def test_transcribe_keeps_what_is_done(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    files = [str(DIGITS / f"{i}.wav") for i in (0, 1, 0, 1, 0)]
    arguments = ["transcribe", *files, "--model", MODEL, "--batch-size", "2", *SHORT]
    assert main(arguments) == 0
    whole = capsys.readouterr().out.splitlines()
    assert [line.partition(": ")[0] for line in whole] == files and whole[0].endswith(": three nine four one")
    with interrupt(monkeypatch, "transcribe", 3):
        assert main(arguments) == 130
    out, err = capsys.readouterr()
    assert out.splitlines() == whole[:4] and "interrupted; 4 of 5 files are done" in err


def test_evaluate_keeps_what_is_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    first = manifest(tmp_path, "0")
    second = tmp_path / "second.jsonl"
    shutil.copy(first, second)
    report = tmp_path / "scores.json"
    with interrupt(monkeypatch, "evaluate", 2):
        assert main(["evaluate", MODEL, first, str(second), "--json", str(report), *SHORT]) == 130
    assert list(json.loads(report.read_text())["manifests"]) == [first]
    assert [line.split()[:2] for line in capsys.readouterr().out.splitlines()[2:]] == [["m", "1"]]


@pytest.mark.parametrize("steps", [1, 3])
def test_train_says_how_to_resume(
    steps: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    from fastcompress.training.trainer import Training

    update = Training.update

    def interrupted(self: Training) -> dict[str, float]:
        if self.step == steps:
            raise KeyboardInterrupt
        return update(self)

    folder = tmp_path / "my run"
    small = flags(max_steps=4, save_steps=2, logging_steps=1, per_device_train_batch_size=1)
    monkeypatch.setattr(Training, "update", interrupted)
    assert main(["train", "--output-dir", str(folder), "--data", manifest(tmp_path, "0"), *small]) == 130
    begin = "after step-00000002" if steps == 3 else "from the start, since there is no checkpoint yet"
    command = f"`fastcompress train --output-dir '{folder}' --resume`"
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == f"fastcompress: interrupted after step {steps}; {command} continues {begin}"
    monkeypatch.setattr(Training, "update", update)
    assert main(["train", "--output-dir", str(folder), "--resume"]) == 0


@pytest.mark.parametrize("step", [None, 4])
def test_finetune_says_how_to_resume(
    step: int | None, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """The run is recorded, and has a whole checkpoint or none, when the user interrupts it."""
    from fastcompress.training import finetuning
    from fastcompress.training.parsing import write_record

    folder = tmp_path / "run"

    def interrupted(settings: Any, *rest: Any) -> None:
        folder.mkdir()
        write_record(settings, folder)
        if step is not None:
            monkeypatch.setattr(finetuning, "_is_whole", lambda checkpoint: True)
            (folder / f"checkpoint-{step}").mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr(finetuning, "finetune", interrupted)
    arguments = ["--model", "m", "--data", manifest(tmp_path, "0"), "--output-dir", str(folder)]
    assert main(["finetune", *arguments]) == 130
    begin = "from the start, since there is no checkpoint yet" if step is None else f"after checkpoint-{step}"
    command = f"`fastcompress finetune --output-dir {folder} --resume`"
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == f"fastcompress: interrupted; {command} continues {begin}"


# Limits and warnings


def test_texts_that_were_cut_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    report = tmp_path / "scores.json"
    cut = ["--max-new-tokens", "2"]
    path = manifest(tmp_path, "0", "1")
    assert main(["evaluate", MODEL, path, "--json", str(report), *cut]) == 0
    assert capsys.readouterr().err == f"{path}: warning: 2 of 2 texts were cut at --max-new-tokens 2\n"
    assert json.loads(report.read_text())["manifests"][path]["clipped"] == 2
    assert main(["transcribe", str(DIGITS / "0.wav"), str(DIGITS / "1.wav"), "--model", MODEL, *cut]) == 0
    assert capsys.readouterr().err == "fastcompress: warning: 2 of 2 texts were cut at --max-new-tokens 2\n"
    for command in (["evaluate", MODEL, path], ["transcribe", str(DIGITS / "0.wav"), "--model", MODEL]):
        assert main([*command, *SHORT]) == 0
        assert capsys.readouterr().err == ""


def test_channels_that_cancel_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    samples = soundfile.read(DIGITS / "0.wav")[0]
    soundfile.write(tmp_path / "a.wav", np.stack([samples, -samples], 1), 16_000)
    assert main(["transcribe", str(tmp_path / "a.wav"), "--model", MODEL, *SHORT]) == 0
    err = capsys.readouterr().err
    assert (
        err.startswith(f"fastcompress: warning: {tmp_path / 'a.wav'}: the 2 channels cancel") and err.count("\n") == 1
    )


# Normalization


def test_normalization_of_scores(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert evaluate._NORMALIZERS == NORMALIZERS  # declared twice, so that --help needs no import
    report = tmp_path / "scores.json"
    path = str(write_lines(tmp_path, {"audio": str(DIGITS / "0.wav"), "text": "Three nine, four one!"}))
    found = {}
    for name in ("none", "basic"):
        assert main(["evaluate", MODEL, path, "--normalize", name, "--json", str(report), *SHORT]) == 0
        content = json.loads(report.read_text())
        assert content["normalize"] == name and ("normalized: basic" in capsys.readouterr().out) == (name == "basic")
        found[name] = content["manifests"][path]["wer"]
        assert content["manifests"][path]["lines"][0]["reference"] == "Three nine, four one!"
    assert found == {"none": 75, "basic": 0}


def test_normalizers():
    assert normalizer("none")("A, b.") == "A, b."
    assert normalizer("basic")(" Über, B! ") == "über b"
    with pytest.raises(ValueError, match="normalize must be one of none, basic, whisper, got 'x'"):
        normalizer("x")
    pytest.importorskip("whisper_normalizer")
    english = normalizer("whisper")
    assert english("Mr. Brown's colour isn't twenty-two, um.") == english("mister brown's color is not 22")


def test_a_missing_spelling_map_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "whisper_normalizer", None)
    error = fails(["evaluate", MODEL, manifest(tmp_path, "0"), "--normalize", "whisper"], capsys)
    assert "this needs whisper_normalizer: pip install 'fastcompress[normalize]'" in error


# Mistakes


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["trian"], "unknown command 'trian'; did you mean train? (see: fastcompress --help)"),
        (["xyz"], "unknown command 'xyz'; choose one of inspect, info, make-data, train, evaluate, transcribe"),
        (
            ["evaluate", "m", "x", "--bacth-size=3"],
            "unrecognized arguments: --bacth-size=3; did you mean --batch-size?",
        ),
        (["transcribe", "x", "--model", "m", "--steam"], "--steam; did you mean --stream?"),
        (["make-data", "x", "--task", "number"], "argument --task: unknown choice 'number'; did you mean numbers?"),
        (["evaluate", "m", "x", "--normalize", "wisper"], "did you mean whisper?"),
        (["evaluate", "m", "x", "--device", "gpu"], "must be cpu, cuda or cuda:N, got 'gpu'; did you mean cuda?"),
        (["transcribe", "x", "--model", "m", "--device", "cuda:x"], "must be cpu, cuda or cuda:N, got 'cuda:x'"),
        (["inspect", "x", "--rule", "unifrom:3"], "unknown rule 'unifrom'; did you mean uniform? The rules are "),
        (["inspect", "x", "--rule", "uniform"], "rule 'uniform' needs size, as in 'uniform:3'"),
        (["inspect", "x", "--rule", "threshold"], "rule 'threshold' needs threshold, as in 'threshold:0.15'"),
        (["evaluate", "m", "x", "--rule", "uniform"], "--rule: rule 'uniform' needs size, as in 'uniform:3'"),
        (["train", "--output-dir", "r", "--data", "d", "--rule", "uniform"], "--rule: rule 'uniform' needs size"),
        (["inspect", "x", "--png", "x.pdf"], "--png x.pdf: pictures are PNG files; name x.png, or a folder"),
        (["inspect", "x", "y", "--png", "x.SVG"], "--png x.SVG: pictures are PNG files"),
        (["completion", "bsh"], "unknown choice 'bsh'; did you mean bash?"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    assert message in fails(arguments, capsys)


@pytest.mark.parametrize("command", ["train", "finetune"])
def test_a_folder_that_cannot_be_written_is_reported_before_the_work(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "file").touch()
    arguments = ["--data", manifest(tmp_path, "0"), "--output-dir", str(tmp_path / "file" / "run")]
    arguments += ["--model", str(tmp_path / "no model")]
    error = fails([command, *arguments], capsys)
    assert error == f"fastcompress: error: --output-dir {tmp_path / 'file' / 'run'}: not a directory\n"


def test_names_are_printed_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path, nowhere = manifest(tmp_path, "0"), tmp_path / "nowhere"
    out = ["--output-dir", str(tmp_path / "run")]
    (tmp_path / "file").touch()
    for arguments, name in (
        (["finetune", "--model", MODEL, "--data", path, *out], MODEL),
        (["finetune", "--model", str(tmp_path), "--data", path, *out], f"{tmp_path}. "),
        (["train", "--config", str(nowhere), "--data", path, *out], str(nowhere)),
        (["make-data", str(tmp_path / "file" / "data"), "--jobs", "1"], str(tmp_path / "file")),
        (["inspect", str(nowhere)], str(nowhere)),
        (["transcribe", str(nowhere), "--model", MODEL], str(nowhere)),
    ):
        error = fails(arguments, capsys)
        assert error.count(name) == 1 and "[Errno" not in error, error


# Completion


@pytest.mark.parametrize("shell", completion._SHELLS)
def test_completion(shell: str, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("shtab")
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    for word in ("fastcompress", *make_parser().commands, "max-new-tokens", "gradient-accumulation-steps", "numbers"):
        assert word in script, word


def test_completion_in_bash(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("shtab")
    if shutil.which("bash") is None:
        pytest.skip("needs bash")
    main(["completion", "bash"])
    (tmp_path / "script").write_text(capsys.readouterr().out)

    def complete(*words: str) -> list[str]:
        typed = " ".join(f"'{word}'" for word in ("fastcompress", *words))
        line = f"source ./script; COMP_WORDS=({typed}); COMP_CWORD={len(words)}; _shtab_fastcompress"
        line += "; echo ${COMPREPLY[@]}"
        return subprocess.run(["bash", "-c", line], capture_output=True, text=True, cwd=tmp_path).stdout.split()

    assert complete("tra") == ["train", "transcribe"]
    assert complete("train", "--max-s") == ["--max-seconds", "--max-steps"]
    assert complete("finetune", "--mode", "") == ["dynamic", "budget"]
    assert complete("make-data", "x", "--task", "n") == ["numbers"]


# Progress


def test_transcribe_has_a_bar_on_a_terminal(tmp_path: Path):
    terminal, other_end = os.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))  # tqdm shows nothing on 0 columns
    files = [str(DIGITS / f"{i % 2}.wav") for i in range(4)]
    arguments = ["transcribe", *files, "--model", MODEL, "--batch-size", "1", *SHORT]
    out = tmp_path / "out"

    def task() -> None:
        torch.set_num_threads(1)  # threads do not survive a fork
        with out.open("wb") as file:
            write_to(file.fileno(), other_end)
        assert main(arguments) == 0
        sys.stdout.flush()

    assert in_fork(task) == 0
    os.close(other_end)
    shown = b""
    with contextlib.suppress(OSError):  # how Linux ends a terminal
        while part := os.read(terminal, 4096):
            shown += part
    os.close(terminal)
    assert out.read_text().count("\n") == 4
    assert b"0/4" in shown and b"file" in shown

"""Inputs that users of similar projects reported, with the right value, for manifests and commands.

Audio files of unusual kinds are in ``tests/test_audio.py``.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastcompress.cli import main as cli
from fastcompress.lalm.loading import load_model
from fastcompress.training.evaluation import evaluate
from fastcompress.training.examples import Examples
from fastcompress.training.manifest import ManifestError, from_hf_dataset
from fastcompress.training.usable import check_audio
from tests.support import ROOT, forking, processes
from tests.support.audio_llms import make, processor
from tests.support.forking import write_to

DIGITS, MODEL = ROOT / "assets" / "digits", str(ROOT / "assets" / "models" / "digits")
SAID = "three nine four one"
SHORT = ["--max-new-tokens", "8"]


def write(path: Path, *lines: dict[str, Any]) -> str:
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return str(path)


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    capsys.readouterr()
    code = cli.main(list(arguments))
    return code, *capsys.readouterr()


@pytest.mark.parametrize("key", ["audio_filename", "audio_path", "audio", "path", "wav"])
def test_other_keys_of_the_audio_are_taken_or_refused(key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    manifest = write(tmp_path / "m.jsonl", {key: str(DIGITS / "0.wav"), "duration": 1.6044, "text": SAID})
    scores = tmp_path / "scores.json"
    code, _, err = run(capsys, "evaluate", MODEL, manifest, "--json", str(scores), *SHORT)
    taken = code == 0 and json.loads(scores.read_text())["manifests"][manifest]["wer"] == 0
    assert taken or (code == 2 and "m.jsonl:1: " in err and key in err)


def test_a_file_that_does_not_decode_is_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    damaged = tmp_path / "damaged.wav"
    whole = (DIGITS / "0.wav").read_bytes()
    damaged.write_bytes(whole[: len(whole) // 2])
    manifest = write(
        tmp_path / "m.jsonl",
        {"audio_filepath": str(damaged), "text": SAID},
        {"audio_filepath": str(DIGITS / "0.wav"), "text": SAID},
    )
    code, _, err = run(capsys, "evaluate", MODEL, manifest, *SHORT)
    assert code == 0 and "damaged.wav" in err


@pytest.mark.parametrize("line", [{"duration": 9.0}, {"offset": 1.0, "duration": 5.0}], ids=["file", "segment"])
def test_audio_shorter_than_the_manifest_says_is_skipped(
    line: dict[str, float], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    good = {"audio_filepath": str(DIGITS / "1.wav"), "text": "five four five seven four six"}
    manifest = write(tmp_path / "m.jsonl", {"audio_filepath": str(DIGITS / "0.wav"), "text": SAID} | line, good)
    code, _, err = run(capsys, "evaluate", MODEL, manifest, *SHORT)
    assert code == 0 and "skipped 1" in err and "1.60" in err


def test_transcribe_prints_as_it_goes():
    files = [str(DIGITS / f"{i % 2}.wav") for i in range(24)]
    command = ["transcribe", *files, "--model", MODEL, "--batch-size", "1", *SHORT]
    receive, send = os.pipe()

    def task() -> None:
        torch.set_num_threads(1)
        write_to(send, 2)
        assert cli.main(command) == 0

    process = forking.start(task)
    os.close(send)
    with open(receive) as lines:
        times = [time.monotonic() for _ in lines]
    assert forking.wait(process) == 0 and len(times) == 24
    assert times[-1] - times[0] > 0.1


def test_every_manifest_is_read_before_the_first_is_scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    manifest = write(tmp_path / "a.jsonl", {"audio_filepath": str(DIGITS / "0.wav"), "text": SAID})
    monkeypatch.setattr("fastcompress.training.evaluation.evaluate", lambda *_, **__: pytest.fail("worked first"))
    try:
        code = cli.main(["evaluate", MODEL, manifest, str(tmp_path / "missing.jsonl")])
    except pytest.fail.Exception as failure:
        raise AssertionError(str(failure)) from None
    assert code == 2


def test_an_empty_text_is_scored(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    manifest = write(
        tmp_path / "a.jsonl",
        {"audio_filepath": str(DIGITS / "0.wav"), "text": SAID},
        {"audio_filepath": str(DIGITS / "1.wav"), "text": ""},
    )
    assert run(capsys, "evaluate", MODEL, manifest, *SHORT)[0] == 0


def test_a_full_stdout_is_one_line():
    with open("/dev/full", "wb") as full:
        done = processes.run(["-m", "fastcompress", "inspect", str(DIGITS / "0.wav"), "--no-noise"], stdout=full)
    assert done.returncode != 0 and done.stderr.count("\n") == 1 and "space" in done.stderr


@pytest.mark.parametrize("path", ["0.wav", None])
def test_rows_of_datasets_with_bytes(path: str | None):
    audio = {"bytes": (DIGITS / "0.wav").read_bytes(), "path": path}
    good, skipped = check_audio(from_hf_dataset([{"audio": audio, "text": SAID}]))
    assert len(good) == 1 and skipped == []


@pytest.mark.parametrize("text", [None, float("nan")], ids=str)
def test_a_missing_text_names_its_row(text: Any):
    audio = {"array": np.zeros(16_000, np.float32), "sampling_rate": 16_000}
    with pytest.raises(ManifestError, match="row 1"):
        rows = from_hf_dataset([{"audio": audio, "text": "three"}, {"audio": audio, "text": text}])
        evaluate(*(lambda m, p: (m, Examples(rows, p)))(*load_model(MODEL)), max_new_tokens=2)


def test_int16_samples_are_scaled_or_refused():
    _, speech = load_model(MODEL)
    samples = np.sin(np.arange(16_000) / 10, dtype=np.float32) / 2
    try:
        features = speech.features((samples * 32768).astype(np.int16), 16_000)
    except TypeError:
        return
    np.testing.assert_allclose(features, speech.features(samples, 16_000), atol=3e-2)  # of 16 bits


def test_a_manifest_may_begin_with_a_byte_order_mark(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    line = json.dumps({"audio_filepath": str(DIGITS / "0.wav"), "text": SAID})
    (tmp_path / "a.jsonl").write_text(line + "\n", encoding="utf-8-sig")
    assert run(capsys, "evaluate", MODEL, str(tmp_path / "a.jsonl"), *SHORT)[0] == 0


def test_a_manifest_may_be_a_json_array(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    lines = [{"audio_filepath": str(DIGITS / f"{i}.wav"), "text": SAID} for i in range(2)]
    (tmp_path / "a.json").write_text(json.dumps(lines, indent=1))
    assert run(capsys, "evaluate", MODEL, str(tmp_path / "a.json"), *SHORT)[0] == 0


def test_an_offset_after_the_end_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    manifest = write(
        tmp_path / "a.jsonl",
        {"audio_filepath": str(DIGITS / "0.wav"), "text": SAID},
        {"audio_filepath": str(DIGITS / "0.wav"), "text": "a", "offset": 5.0},
    )
    code, _, err = run(capsys, "evaluate", MODEL, manifest, *SHORT)
    assert code == 0 and "skipped 1" in err and "-3.39" not in err and "offset" in err


def test_a_rule_without_its_size_names_the_field(capsys: pytest.CaptureFixture[str]):
    code, _, err = run(capsys, "inspect", str(DIGITS / "0.wav"), "--rule", "uniform")
    assert code == 2 and "size" in err and "__init__" not in err


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    make("qwen2_audio").save_pretrained(tmp_path / "model")
    processor("qwen2_audio").save_pretrained(tmp_path / "model")
    manifest = write(tmp_path / "a.jsonl", {"audio_filepath": str(DIGITS / "0.wav"), "text": SAID})
    (tmp_path / "file").touch()
    arguments = ["--model", str(tmp_path / "model"), "--data", manifest, "--output-dir", str(tmp_path / "file" / "run")]
    code, _, err = run(capsys, "finetune", *arguments)
    assert code == 2 and err.count("\n") == 1 and "not a directory" in err.lower()

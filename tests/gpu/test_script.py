"""`make gpu DRY=1`: every step of `make gpu` on a machine without a GPU, so that a typo cannot break it."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch

from fastcompress.dispatch.backends import BACKENDS
from scripts import gpu
from tests.support import ROOT

pytestmark = [
    pytest.mark.skipif(shutil.which("make") is None, reason="no make"),
    pytest.mark.timeout(600),  # it may have to compile first
    pytest.mark.xdist_group("gpu-script"),
]


def make(*arguments: str) -> subprocess.CompletedProcess:
    command = ["make", "--no-print-directory", "gpu", f"PYTHON={sys.executable}", "VENV=none", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.slow
def test_dry_run():
    benchmark = ROOT / "build" / "gpu-dry" / "dry-cuda.jsonl"
    benchmark.unlink(missing_ok=True)
    done = make("DRY=1")
    assert done.returncode == 0, done.stdout + done.stderr
    for step in ("build", "info", "GPU tests", "suite"):
        assert any(line.startswith(f"{step} ") and line.endswith("passed") for line in done.stdout.splitlines()), step
    rows = [json.loads(line) for line in benchmark.read_text().splitlines()][1:]
    assert {row["suite"] for row in rows} == set(gpu.SUITES)
    assert {row["group"] for row in rows} >= {"fastcompress", "triton", "eager", "compile", "max-autotune", "clone"}
    assert all("is not installed" in row["not_timed"] for row in rows if "not_timed" in row)


def test_the_real_steps_name_what_is_there(monkeypatch: pytest.MonkeyPatch):
    """What a dry run replaces: the files, the options and the sanitizer of the commands for a GPU."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(gpu, "nvcc", lambda: "13.0")
    steps = gpu.gpu_steps(None)
    assert [step.name for step in gpu.gpu_steps(Path("a.whl"))] == [step.name for step in steps[1:]]
    assert steps[0].env == {"FASTCOMPRESS_CUDA": "13.0", "FASTCOMPRESS_CUDA_ARCHS": "90"}
    assert {"memcheck", "racecheck"} < {step.name for step in steps}
    suite = " ".join(next(step.command for step in steps if step.name == "suite, cuda"))
    assert all(f"tests/ops/test_{name}.py" in suite for name in ("segment_pool", "pack", "opcheck", "compile"))
    for step in steps:
        for word in step.command:
            if word.startswith("tests/"):
                assert (ROOT / word).exists()
        if "pytest" in step.command:
            words = list(step.command)
            assert words[words.index("--device") + 1] == "cuda" and words[words.index("--backend") + 1] in BACKENDS


def test_takes_the_library_of_a_wheel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as archive:
        archive.writestr("fastcompress/_C.so", b"library")
    (tmp_path / "fastcompress").mkdir()
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    gpu.take_library(tmp_path / "a.whl")
    assert (tmp_path / "fastcompress" / "_C.so").read_bytes() == b"library"


def test_what_fails_or_takes_too_long_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    steps = [
        gpu.Step("good", [sys.executable, "-c", "print('words')"]),
        gpu.Step("bad", [sys.executable, "-c", "raise SystemExit(3)"]),
        gpu.Step("slow", [sys.executable, "-c", "import time; time.sleep(60)"]),
        gpu.Step("absent", ["no-such-tool"], missing="there is no such tool"),
    ]
    for step in steps:
        gpu.run(step, tmp_path, 10.0 if step.name != "slow" else 1.0)
    assert [step.failed for step in steps] == [False, True, True, False]
    assert "words" in capsys.readouterr().out
    text = gpu.summary(steps)
    for words in ("FAILED with exit code 3", "FAILED: not done after 1 s", "not run: there is no such tool"):
        assert words in text


def test_what_a_step_started_ends_with_it(tmp_path: Path):
    beats = tmp_path / "beats"
    child = f"import time\nwhile True: open({str(beats)!r}, 'a').write('.'); time.sleep(0.05)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    step = gpu.Step("slow", [sys.executable, "-c", parent])
    gpu.run(step, tmp_path, 3.0)
    assert step.failed and beats.exists()
    size = beats.stat().st_size
    time.sleep(0.5)
    assert beats.stat().st_size == size


def test_every_step_leaves_time_to_the_later_ones(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(gpu, "nvcc", lambda: "13.0")
    steps = gpu.gpu_steps(None)
    assert gpu.SECONDS - gpu.BENCHMARK_SECONDS - sum(step.reserve for step in steps[1:]) > 120  # to build
    for step in steps:
        if "triton" in step.name:
            assert step.reserve >= 40 and step.limit >= 120


def test_what_is_missing_is_named_first(monkeypatch: pytest.MonkeyPatch):
    assert gpu.what_is_missing(build=True) == ""
    monkeypatch.setattr(gpu.importlib.metadata, "version", lambda name: "70.3.0")
    assert gpu.what_is_missing(build=True).endswith(" -m pip install 'setuptools>=77'")
    find, gone = importlib.util.find_spec, ("scipy", "ninja")
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None if name in gone else find(name))
    assert gpu.what_is_missing(build=False).endswith(" -m pip install scipy")
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--dry"])
    with pytest.raises(SystemExit, match="pip install scipy ninja 'setuptools>=77'"):
        gpu.main()


def test_without_a_gpu_it_says_so():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = make()
    assert done.returncode != 0 and "torch sees no CUDA device here; `make gpu DRY=1`" in done.stderr

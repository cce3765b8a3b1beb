"""`make gpu`: its dry form, which runs without a GPU, and steps that fail or cannot run."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from fastcompress.dispatch.backends import BACKENDS
from scripts import gpu
from tests.support import ROOT

pytestmark = [pytest.mark.timeout(600), pytest.mark.xdist_group("gpu-script")]
needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


def make(target: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["make", "--no-print-directory", target, f"PYTHON={sys.executable}", "VENV=none", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def results(out: Path) -> dict[str, str]:
    lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    return {line["command"]: line["result"] for line in lines if "command" in line}


@needs_make
@pytest.mark.slow
def test_dry_run(tmp_path: Path):
    """All steps run. The build step compiles the library."""
    done = make("gpu", "DRY=1", f"OUT={tmp_path}")
    assert done.returncode == 0, done.stdout + done.stderr
    names = ["build", "info", "driver", "check", "ceilings", "sweep", "memcheck", "cuda", "triton", "bench"]
    assert results(tmp_path) == dict.fromkeys(names, "passed")
    assert {f"{name}.log" for name in names} <= {path.name for path in tmp_path.iterdir()}
    assert done.stdout.splitlines()[-1].split() == ["bench", "passed"]


@needs_make
@pytest.mark.emulated
def test_dry_run_of_the_tests(tmp_path: Path):
    pytest.importorskip("triton")
    done = make("gpu-test", "DRY=1", f"OUT={tmp_path}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert results(tmp_path) == {"cuda": "passed", "triton": "passed"}
    for name, least in (("cuda", 15), ("triton", 2)):
        log = (tmp_path / f"{name}.log").read_text()
        assert log in done.stdout
        passed = re.search(r"(\d+) passed", log)
        assert passed is not None and int(passed[1]) >= least


def on_a_gpu(monkeypatch: pytest.MonkeyPatch, out: Path, wheel: Path | None = None) -> list[gpu.Command]:
    """Return the commands for a machine with a GPU and all tools."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(gpu.shutil, "which", lambda name, path=None: f"/bin/{name}")
    monkeypatch.setattr(gpu.subprocess, "check_output", lambda *args, **kwargs: "release 13.0, V13.0.88")
    return gpu.commands(False, out, wheel)


def test_commands_of_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """The files and options that the commands name exist."""
    commands = {command.name: command for command in on_a_gpu(monkeypatch, tmp_path)}
    driver = ["driver", "check", "ceilings", "sweep", "sweep-wide", "memcheck", "racecheck", "synccheck"]
    assert list(commands) == ["build", "info", *driver, "cuda", "triton", "bench"]
    assert {command.step for command in commands.values()} == set(gpu.STEPS)
    assert commands["build"].env == {"FASTCOMPRESS_CUDA": "13.0", "FASTCOMPRESS_CUDA_ARCHS": "90"}
    assert commands["bench"].words[1:] == ["-m", "benchmarks", "--device", "cuda", "--out", str(tmp_path)]
    assert commands["driver"].words[1:] == ["scripts/build_driver.py", "--arch", "90", "--jobs", "8"]
    for name in ("check", "memcheck", "racecheck", "synccheck"):
        assert commands[name].words[-2:] == ["build/gpu_driver", "check" if name == "check" else "sanitize"]
    for name in ("cuda", "triton"):
        words = commands[name].words
        files = [word for word in words if word.startswith("tests/")]
        assert files and all((ROOT / file).exists() for file in files)
        assert words[words.index("--device") + 1] == "cuda"
        assert words[words.index("--backend") + 1] == ("triton" if name == "triton" else "cuda") in BACKENDS
    for file in ("segment_pool", "pack", "opcheck", "compile"):
        assert f"tests/ops/test_{file}.py" in commands["cuda"].words
    assert commands["memcheck"].words[:3] == ["compute-sanitizer", "--tool", "memcheck"]


def run_main(monkeypatch: pytest.MonkeyPatch, out: Path, commands: list[gpu.Command], *arguments: str) -> int:
    monkeypatch.setattr(gpu, "commands", lambda dry, out, wheel: commands)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--dry", "--out", str(out), *arguments])
    return gpu.main()


def python(step: str, name: str, code: str, skip: str = "") -> gpu.Command:
    return gpu.Command(step, name, [sys.executable, "-c", code], skip)


def test_results(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    """A failed command does not stop later ones and makes the exit code 1; a skipped one does not.

    The result of each command is appended as soon as the command ends.
    """
    read = f"print(open({str(tmp_path / 'results.jsonl')!r}).read())"
    commands = [
        python("test", "bad", "import sys; print('one'); print('two', file=sys.stderr); sys.exit(3)"),
        python("test", "absent", "raise SystemExit(1)", skip="there is no such tool"),
        python("bench", "good", read),
    ]
    assert run_main(monkeypatch, tmp_path, commands) == 1
    expected = {"bad": "failed with exit code 3", "absent": "skipped: there is no such tool", "good": "passed"}
    assert results(tmp_path) == expected
    assert sorted((tmp_path / "bad.log").read_text().split()) == ["one", "two"]
    assert not (tmp_path / "absent.log").exists()
    meanwhile = [json.loads(line) for line in (tmp_path / "good.log").read_text().splitlines() if line]
    assert {line["command"]: line["result"] for line in meanwhile} == {n: expected[n] for n in ("bad", "absent")}
    assert all(line["seconds"] >= 0 for line in meanwhile)
    printed = capfd.readouterr().out
    assert "two" in printed and all(result in printed for result in expected.values())
    assert run_main(monkeypatch, tmp_path, commands, "bench") == 0
    assert run_main(monkeypatch, tmp_path, commands[1:]) == 0
    with pytest.raises(SystemExit):
        run_main(monkeypatch, tmp_path, commands, "tests")


def test_triton_is_tested_if_the_build_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    for build, code in (
        (python("build", "build", "", skip="nvcc is not found"), 0),
        (python("build", "build", "raise SystemExit(2)"), 1),
    ):
        others = [python("test", name, "") for name in ("cuda", "triton")]
        assert run_main(monkeypatch, tmp_path, [build, *others]) == code
        assert results(tmp_path)["cuda"] == "skipped: the build command gave no library"
        assert results(tmp_path)["triton"] == "passed"


def test_a_missing_tool_is_the_reason_for_skipping(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    commands = on_a_gpu(monkeypatch, tmp_path)
    assert not any(command.skip for command in commands if command.name not in ("build", "triton"))
    find, gone = gpu.importlib.util.find_spec, {"triton", "xdist", "ninja", "pandas"}
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None if name in gone else find(name))
    monkeypatch.setattr(gpu.shutil, "which", lambda name, path=None: None)
    found = {command.name: command for command in gpu.commands(False, tmp_path)}
    assert found["build"].skip == "not installed: ninja" and found["triton"].skip == "not installed: triton"
    assert found["bench"].skip == "not installed: pandas"
    assert found["check"].skip == found["memcheck"].skip == "nvcc is not found: set CUDA_HOME"
    monkeypatch.setattr(gpu.shutil, "which", lambda name, path=None: "nvcc" if name == "nvcc" else None)
    found |= {command.name: command for command in gpu.driver(False)}
    assert found["memcheck"].skip == found["racecheck"].skip == "compute-sanitizer is not on the PATH"
    assert not found["check"].skip
    monkeypatch.setattr(gpu.shutil, "which", lambda name, path=None: None)
    assert "-n" not in found["cuda"].words and not found["cuda"].skip
    gone.remove("ninja")
    assert gpu.build(False, None).skip.startswith("nvcc is not found")
    monkeypatch.setattr(gpu.importlib.metadata, "version", lambda name: "70.3.0")
    assert gpu.build(False, None).skip == "setuptools is older than 77"


def test_the_library_of_a_wheel_is_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as archive:
        archive.writestr("fastcompress/_C.so", b"library")
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    command = on_a_gpu(monkeypatch, tmp_path, tmp_path / "a.whl")[0]
    assert run_main(monkeypatch, tmp_path / "out", [command]) == 0
    assert (tmp_path / "fastcompress" / "_C.so").read_bytes() == b"library"


def test_a_missing_gpu_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="torch finds no CUDA device; `make gpu DRY=1`"):
        gpu.main()
    assert not (tmp_path / "out").exists()


def test_results_of_the_driver_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Lines of JSON are appended while the command runs, in the same file. Wrong kernels stop what measures them."""
    waits = f"""
import pathlib, sys, time
print('{{"ceiling": "copy", "GB_per_s": 1.5}}', flush=True)
print("text")
path, end = pathlib.Path({str(tmp_path / "results.jsonl")!r}), time.monotonic() + 60
while not (path.exists() and "ceiling" in path.read_text()):
    time.sleep(0.01)
    if time.monotonic() > end:
        sys.exit("the line is not in the file while the command runs")
"""
    commands = [
        python("driver", "ceilings", waits),
        python("driver", "check", "raise SystemExit(1)"),
        *(python("bench", name, "") for name in ("bench", "triton")),
    ]
    assert run_main(monkeypatch, tmp_path, commands) == 1
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert lines[0] == {"ceiling": "copy", "GB_per_s": 1.5} and lines[1]["command"] == "ceilings"
    assert results(tmp_path) == {
        "ceilings": "passed",
        "check": "failed with exit code 1",
        "bench": "skipped: a command of the driver has failed",
        "triton": "passed",
    }


@pytest.mark.emulated
def test_few_variants_of_triton_kernels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """The tests that run on the Triton kernels compile few variants: one takes up to 10 s of CPU time."""
    pytest.importorskip("triton")
    words = next(command.words for command in on_a_gpu(monkeypatch, tmp_path) if command.name == "triton")
    words = [*words, "-p", "tests.support.triton_variants"]
    words[words.index("--device") + 1] = "cpu"
    monkeypatch.undo()
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    variants = re.search(r"(\d+) variants", done.stdout)
    assert variants is not None and 10 < int(variants[1]) <= 48

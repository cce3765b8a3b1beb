"""What the build refuses, the version of a CUDA build, and the script of `make wheel-test`. No nvcc is needed.

The library itself with CUDA kernels: tests/test_cuda_build.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import fastcompress as fc
from scripts import wheel_test

ROOT = Path(__file__).parents[1]


@pytest.fixture
def toolkit(tmp_path: Path) -> Path:
    """A CUDA toolkit that knows its version, 13.0, and nothing else."""
    nvcc = tmp_path / "cuda" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text('#!/bin/sh\necho "Cuda compilation tools, release 13.0, V13.0.88"\n')
    nvcc.chmod(0o755)
    return nvcc.parents[1]


def setup(*arguments: str, **env: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "setup.py", "-q", *arguments]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True)


@pytest.mark.parametrize(
    "cuda, archs, home, message",
    [
        ("12.8", "90", True, "FASTCOMPRESS_CUDA=12.8, but {home}/bin/nvcc is 13.0"),
        ("yes", "90", True, "FASTCOMPRESS_CUDA must be none or a version such as 13.0, got 'yes'"),
        ("13.0", "80;9.0", True, "FASTCOMPRESS_CUDA_ARCHS must be such as 80;90;100;120, got '9.0' in it"),
        ("13.0", "90", False, "FASTCOMPRESS_CUDA=13.0 needs nvcc, but {home}/bin/nvcc (CUDA_HOME) does not exist"),
        ("13.0", "90", True, "libcudart_static.a is in none of {home}/lib64, {home}/lib"),
    ],
)
def test_what_cannot_be_built_says_why(cuda: str, archs: str, home: bool, message: str, toolkit: Path, tmp_path: Path):
    where = toolkit if home else tmp_path / "nowhere"
    env = {"FASTCOMPRESS_CUDA": cuda, "FASTCOMPRESS_CUDA_ARCHS": archs, "CUDA_HOME": str(where)}
    done = setup("build_ext", "--build-temp", str(tmp_path / "t"), "--build-lib", str(tmp_path / "l"), **env)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == f"fastcompress: {message.format(home=where)}"


@pytest.mark.parametrize("cuda, label", [("13.0", "+cu130"), ("none", ""), ("", "")])
def test_the_version_ends_in_the_toolkit(cuda: str, label: str, toolkit: Path, tmp_path: Path):
    done = setup("egg_info", "--egg-base", str(tmp_path), FASTCOMPRESS_CUDA=cuda, CUDA_HOME=str(toolkit))
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "fastcompress.egg-info" / "PKG-INFO").read_text().splitlines()
    assert f"Version: {fc.__version__}{label}" in lines


def test_a_source_distribution_has_no_cuda(toolkit: Path, tmp_path: Path):
    """Its name would say which toolkit it was built with, and it was built with none."""
    env = {"CUDA_HOME": str(toolkit)}
    arguments = "egg_info", "--egg-base", str(tmp_path), "sdist", "--dist-dir", str(tmp_path / "dist")
    done = setup(*arguments, FASTCOMPRESS_CUDA="13.0", **env)
    assert done.returncode == 1 and not (tmp_path / "dist").exists()
    message = "fastcompress: a source distribution is for any CUDA, or none: unset FASTCOMPRESS_CUDA"
    assert done.stderr.splitlines()[-1] == message
    done = setup(*arguments, FASTCOMPRESS_CUDA="none", **env)
    assert done.returncode == 0, done.stderr
    assert [file.name for file in (tmp_path / "dist").iterdir()] == [f"fastcompress-{fc.__version__}.tar.gz"]


def script(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "scripts/wheel_test.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_dry_run_of_the_wheel_test(tmp_path: Path):
    wheel = tmp_path / "fastcompress-0.1.0+cu130-py3-none-linux_x86_64.whl"
    wheel.touch()
    done = script(str(wheel), "--dry-run")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert len(wheel_test.specs()) == 3
    for spec in wheel_test.specs():
        assert f"== {wheel.name} with {spec}" in lines
        assert any(line.startswith("$ ") and line.endswith(f" install -q {spec}") for line in lines)
    assert sum(line.endswith(f"--no-deps {wheel}") for line in lines) == 3
    assert sum(line.endswith("fastcompress info") for line in lines) == 3
    assert "no wheel" in script().stderr


def test_a_wheel_that_is_not_what_its_name_says():
    name = "fastcompress-0.1.0{}-py3-none-linux_x86_64.whl"
    cases = ("+cu130", "13.0", True), ("", None, True), ("", "13.0", False), ("+cu128", None, False)
    for label, version, right in cases:
        problem = wheel_test.wrong_library(Path(name.format(label)), {"cuda_version": version})
        assert (problem is None) is right


def test_no_extra_pins_a_triton():
    """In an environment that sees the packages of another, a pinned one would hide the one that torch brings."""
    project = (ROOT / "pyproject.toml").read_text()
    assert '"triton>=' in project and '"triton==' not in project
    assert "triton==" in (ROOT / "requirements-triton.txt").read_text()

"""The errors of the build, the version of a CUDA build, and the scripts of `make wheels` and `make wheel-test`.

No nvcc is needed. tests/csrc/test_cuda_build.py tests a library with CUDA kernels.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest

import fastcompress as fc
from fastcompress.dispatch.library import LIBRARY_PATH
from scripts import symbols, wheel_test, wheels
from tests.support import ROOT, processes


@pytest.fixture
def toolkit(tmp_path: Path) -> Path:
    """Return a fake CUDA toolkit whose nvcc only prints its version, 13.0."""
    nvcc = tmp_path / "cuda" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text('#!/bin/sh\necho "Cuda compilation tools, release 13.0, V13.0.88"\n')
    nvcc.chmod(0o755)
    return nvcc.parents[1]


def setup(*arguments: str, **env: str) -> subprocess.CompletedProcess:
    return processes.run(["setup.py", "-q", *arguments], cwd=ROOT, env={**os.environ, **env})


@pytest.mark.parametrize(
    "cuda, archs, home, message",
    [
        ("12.8", "90", True, "FASTCOMPRESS_CUDA=12.8, but {home}/bin/nvcc is 13.0"),
        ("yes", "90", True, "FASTCOMPRESS_CUDA must be none or a version such as 13.0, got 'yes'"),
        ("13.0", "80;9.0", True, "FASTCOMPRESS_CUDA_ARCHS must be a list such as 80;90;100;120, got '9.0'"),
        ("11.4", "", True, "wheels.json has no CUDA 11.4: set FASTCOMPRESS_CUDA_ARCHS, such as 80;90"),
        ("13.0", "90", False, "FASTCOMPRESS_CUDA=13.0 needs nvcc, but {home}/bin/nvcc (CUDA_HOME) does not exist"),
        ("13.0", "90", True, "libcudart_static.a not found in {home}/lib64, {home}/lib"),
    ],
)
def test_build_errors_give_the_reason(cuda: str, archs: str, home: bool, message: str, toolkit: Path, tmp_path: Path):
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
    """Its name must not contain the label of a CUDA toolkit."""
    env = {"CUDA_HOME": str(toolkit)}
    arguments = "egg_info", "--egg-base", str(tmp_path), "sdist", "--dist-dir", str(tmp_path / "dist")
    done = setup(*arguments, FASTCOMPRESS_CUDA="13.0", **env)
    assert done.returncode == 1 and not (tmp_path / "dist").exists()
    message = "fastcompress: a source distribution does not depend on CUDA: unset FASTCOMPRESS_CUDA"
    assert done.stderr.splitlines()[-1] == message
    done = setup(*arguments, FASTCOMPRESS_CUDA="none", **env)
    assert done.returncode == 0, done.stderr
    assert [file.name for file in (tmp_path / "dist").iterdir()] == [f"fastcompress-{fc.__version__}.tar.gz"]


def script(name: str, *arguments: str, **env: str) -> subprocess.CompletedProcess:
    return processes.run([f"scripts/{name}.py", *arguments], cwd=ROOT, env={**os.environ, **env})


def test_dry_run_of_the_wheel_test(tmp_path: Path):
    made = [tmp_path / f"fastcompress-0.1.0{label}-py3-none-linux_x86_64.whl" for label in ("+cu130", "")]
    for wheel in made:
        wheel.touch()
    done = script("wheel_test", *map(str, made), "--dry-run")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert len(wheel_test.specs()) == 4
    for spec in wheel_test.specs():
        assert sum(line.startswith("$ ") and line.endswith(f" install -q --no-compile {spec}") for line in lines) == 1
        assert all(f"-- {wheel.name} with {spec}" in lines for wheel in made)
    for wheel in made:
        assert sum(line.endswith(f"--no-deps --force-reinstall {wheel}") for line in lines) == 4
    assert sum(line.endswith("fastcompress info") for line in lines) == 8
    assert f"no wheel: {tmp_path}/other.whl" in script("wheel_test", f"{tmp_path}/other.whl").stderr


def test_a_wheel_whose_name_is_wrong():
    name = "fastcompress-0.1.0{}-py3-none-{}_x86_64.whl"
    cases = ("+cu130", "13.0", True), ("", None, True), ("", "13.0", False), ("+cu128", None, False)
    for label, version, right in cases:
        library = {"cuda_version": version, "cuda_archs": "90+PTX" if version else None}
        problem = wheel_test.wrong_library(Path(name.format(label, "linux")), library)
        assert (problem is None) is right
    library = {"cuda_version": "13.0", "cuda_archs": "80;90;100;120+PTX"}
    released = Path(name.format("+cu130", "manylinux_2_34"))
    assert wheel_test.wrong_library(released, library) is None
    problem = wheel_test.wrong_library(released, {**library, "cuda_archs": "90+PTX"})
    assert problem == "the library is for 90+PTX, but wheels.json has 80;90;100;120+PTX"


def test_the_table_of_wheels():
    table = wheels.table()
    assert {"cpu", "12.6", "12.8", "13.0"} <= set(table) and table["cpu"].archs == ()
    for version, wheel in table.items():
        assert version == "cpu" or (wheel.archs and all(re.fullmatch(r"\d{2,3}", arch) for arch in wheel.archs))
        assert wheel.untested is None or not wheel.toolkit
        # README and docs/wheels.md name the wheels that were never built.
        for page in ("README.md", "docs/wheels.md"):
            said = re.search(rf"{version}.{{0,60}}untested", (ROOT / page).read_text(), re.DOTALL)
            assert wheel.untested is None or said, (page, version)
    matrix = json.loads(script("wheels", "--matrix").stdout)
    assert [line["version"] for line in matrix["include"]] == list(table)
    assert "9.9: not in wheels.json" in script("wheels", "9.9").stderr


def test_the_workflow_builds_the_matrix():
    yaml = pytest.importorskip("yaml")
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "wheels.yml").read_text())["jobs"]
    assert jobs["build"]["container"] == "${{ matrix.image }}" and jobs["build"]["needs"] == "matrix"
    commands = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    for name in re.findall(r"scripts/(\w+)\.py", "\n".join(commands)):
        usage = script(name, "--help").stdout
        flags = re.findall(rf"scripts/{name}\.py.*?(--[a-z]+)", "\n".join(commands))
        assert flags and all(flag in usage for flag in flags), name


def test_where_a_toolkit_is_found(toolkit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    table = wheels.table()
    monkeypatch.setattr(wheels, "TOOLKITS", tmp_path / "toolkits")
    monkeypatch.setenv("CUDA_HOME", str(toolkit))
    assert wheels.toolkit(table["13.0"]) == toolkit
    assert wheels.toolkit(table["13.2"], install=False) is None
    monkeypatch.delenv("CUDA_HOME")
    installed = tmp_path / "toolkits" / "13.2" / "nvidia" / "cu13"
    shutil.copytree(toolkit, installed)
    nvcc = installed / "bin" / "nvcc"
    nvcc.write_text(nvcc.read_text().replace("13.0", "13.2"))
    assert wheels.toolkit(table["13.2"], install=False) == installed
    shutil.rmtree(installed)
    monkeypatch.setattr(wheels.sys, "executable", shutil.which("false"))  # as on a machine without a network
    assert wheels.toolkit(table["13.2"]) is None


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_the_library_is_on_the_stable_abi(tmp_path: Path):
    if not LIBRARY_PATH.exists():
        pytest.skip("nothing is compiled")
    assert symbols.problems(LIBRARY_PATH) == []
    assert not any(name.startswith("_Z") for name in symbols.stable_functions())


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_symbols_outside_of_the_stable_abi_are_found(tmp_path: Path):
    source, library = tmp_path / "x.cpp", tmp_path / "_C.so"
    source.write_text(
        "namespace at { int get_num_threads(); }\n"
        'extern "C" { void Py_Initialize(); void aoti_torch_get_current_cuda_stream(); double sqrt(double);\n'
        "void torch_from_blob(); __attribute__((weak)) void torch_new_stable_ivalue();\n"
        "double use(double x) { Py_Initialize(); aoti_torch_get_current_cuda_stream(); torch_from_blob();\n"
        "if (torch_new_stable_ivalue) torch_new_stable_ivalue(); return at::get_num_threads() + sqrt(x); } }\n"
    )
    libraries = ["-Wl,--no-as-needed", "-l:libz.so.1", "-lm"]
    subprocess.check_call(["g++", "-shared", "-fPIC", "-o", library, source, *libraries])
    found = symbols.problems(library)
    assert "undefined symbol Py_Initialize" in found
    assert "undefined symbol _ZN2at15get_num_threadsEv" in found
    assert "undefined symbol aoti_torch_get_current_cuda_stream, which a torch without CUDA lacks" in found
    if "torch_from_blob" in symbols.stable_functions(oldest=False):  # declared since torch 2.11
        assert "undefined symbol torch_from_blob, which the oldest supported torch lacks" in found
    assert not any("torch_new_stable_ivalue" in problem for problem in found)  # it is weak
    assert any(problem.startswith("libtorch.so is not a needed library") for problem in found)
    assert [problem for problem in found if problem.startswith("needed library")] == ["needed library libz.so.1"]
    for name, members, message in (
        ("fastcompress-0.1.0-py3-none-linux_x86_64.whl", ["fastcompress/_C.so"], "undefined symbol Py_Initialize"),
        ("fastcompress-0.1.0-cp311-cp311-linux_x86_64.whl", ["fastcompress/_C.so"], "is not for every Python"),
        (
            "fastcompress-0.1.0-py3-none-linux_x86_64.whl",
            ["fastcompress/_C.so", "libx.so"],
            "must contain only fastcompress/_C.so",
        ),
        ("fastcompress-0.1.0-py3-none-linux_x86_64.whl", [], "must contain only fastcompress/_C.so"),
    ):
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            for member in members:
                archive.write(library, member)
        with pytest.raises(RuntimeError, match=message):
            wheels.check(tmp_path / name)


def test_an_sdist_is_built_with_the_pinned_torch():
    pinned = (ROOT / "requirements-torch.txt").read_text().strip()
    project = (ROOT / "pyproject.toml").read_text()
    assert f'"{pinned}"' in project.partition("[project]")[0]


def test_no_extra_pins_triton():
    """In an environment that sees the packages of another one, a pin would hide the triton that torch depends on."""
    project = (ROOT / "pyproject.toml").read_text()
    assert '"triton>=' in project and '"triton==' not in project
    assert "triton==" in (ROOT / "requirements-triton.txt").read_text()

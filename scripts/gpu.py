"""Everything that needs a GPU, in under eight minutes and without a network: build, test, sanitize, benchmark.

usage: python scripts/gpu.py [--wheel WHEEL] [--dry]

It runs in the Python that starts it, which needs torch with CUDA, triton, what the tests import (``PACKAGES``) and, to
build, nvcc, setuptools and ninja; pytest-xdist, if it is there, saves time. ``_C.so`` is built into the checkout for
the GPU at hand, or taken from a wheel. ``--dry`` takes every step on a machine without a GPU, on small pieces: on the
reference, in Triton's interpreter, without compute-sanitizer.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 470.0  # for everything
BENCHMARK_SECONDS = 170.0  # of these, kept for the benchmark
SUITE = [
    f"ops/{name}"
    for name in (
        "adjacent_distance",
        "select_boundaries",
        "segment_reduce",
        "segment_pool",
        "pack",
        "properties",
        "errors",
        "opcheck",
        "compile",
    )
]
PACKAGES = ("pytest", "numpy", "scipy", "hypothesis", "pandas", "tabulate")
#: Of the benchmark; `make gpu` leaves out those that take longer.
SUITES = ("roofline", "pack", "segment_pool", "decoder", "prefill")
SETUPTOOLS = 77  # the first that reads the license in pyproject.toml
PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]


@dataclass
class Step:
    """A command, and what came of it."""

    name: str
    command: Sequence[str]
    env: dict[str, str] = field(default_factory=dict)
    limit: float = 100.0
    reserve: float = 10.0  # seconds that the steps before it leave to it
    missing: str = ""  # why it cannot run
    result: str = ""
    seconds: float = 0.0

    @property
    def failed(self) -> bool:
        """Whether it went wrong."""
        return self.result not in ("passed", "") and not self.missing


def tests(files: Sequence[str], device: str, backend: str, *more: str) -> list[str]:
    paths = [f"tests/{folder}/test_{name}.py" for folder, name in (file.split("/") for file in files)]
    return [*PYTEST, *paths, "--device", device, "--backend", backend, *more]


def gpu_steps(wheel: Path | None) -> list[Step]:
    """For a machine with a GPU."""
    import torch

    major, minor = torch.cuda.get_device_capability()
    parallel = ["-n", "6"] if importlib.util.find_spec("xdist") else []
    no_triton = "" if importlib.util.find_spec("triton") else "triton is not installed"
    short = tests(["gpu/ops"], "cuda", "cuda", "-k", "short", "-p", "no:xdist")
    # Each tensor is an allocation of its own, so that one element too far is seen.
    exact = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    steps = [] if wheel else [build_step({"FASTCOMPRESS_CUDA": nvcc(), "FASTCOMPRESS_CUDA_ARCHS": f"{major}{minor}"})]
    # The Triton kernels leave what only a caller of the bare ops can get wrong to the checks of the wrappers.
    checked = ["-k", "not ops_refuse"]
    steps += [
        Step("info", [sys.executable, "-m", "fastcompress", "info"]),
        Step("GPU tests, cuda", tests(["gpu/ops"], "cuda", "cuda")),
        Step("attention", tests(["gpu/attention"], "cuda", "cuda")),
        Step("suite, cuda", tests(SUITE, "cuda", "cuda", *parallel)),
    ]
    # Triton compiles first, a second for each of some hundred variants; the suite finds most of them done.
    jobs = {"GPU tests, triton": tests(["gpu/ops"], "cuda", "triton", *parallel)}
    jobs["suite, triton"] = tests(SUITE, "cuda", "triton", *checked, *parallel)
    steps += [Step(name, job, limit=150.0, reserve=45.0, missing=no_triton) for name, job in jobs.items()]
    sanitizer = shutil.which("compute-sanitizer")
    for tool in ("memcheck", "racecheck"):
        command = [sanitizer or "", "--tool", tool, "--report-api-errors", "no", "--error-exitcode", "99", *short]
        why = "" if sanitizer else "there is no compute-sanitizer on the PATH"
        steps.append(Step(tool, command, exact if tool == "memcheck" else {}, missing=why))
    return steps


def dry_steps() -> list[Step]:
    """The same for a machine without a GPU."""
    interpreter = {"TRITON_INTERPRET": "1"}
    no_triton = "" if importlib.util.find_spec("triton") else "triton is not installed"
    some = "short_parts or packing or hostile_segments or stream or 32_bits or compiled or (graph and float32-uniform)"
    triton = tests(["gpu/ops"], "cpu", "triton", "-k", "short_parts")
    return [
        build_step({"FASTCOMPRESS_CUDA": "none"}, ROOT / "build" / "gpu-dry"),
        Step("info", [sys.executable, "-m", "fastcompress", "info"]),
        Step("GPU tests", tests(["gpu/ops"], "cpu", "reference", "-k", some)),
        Step("attention", tests(["gpu/attention"], "cpu", "reference", "-k", "on_request or qwen2")),
        Step("GPU tests, triton", triton, interpreter, missing=no_triton),
        Step("suite", tests(["ops/segment_pool"], "cpu", "reference", "-k", "test_module")),
    ]


def build_step(env: dict[str, str], target: Path | None = None) -> Step:
    where = ["--build-lib", str(target)] if target else ["--inplace"]
    return Step("build", [sys.executable, "setup.py", "-q", "build_ext", *where], env, limit=180.0)


def what_is_missing(build: bool) -> str:
    """What to install before anything can run."""
    packages = [*PACKAGES, *(["ninja"] if build else [])]
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if build:
        version = importlib.metadata.version("setuptools") if importlib.util.find_spec("setuptools") else "0"
        if int(version.split(".")[0]) < SETUPTOOLS:
            missing.append(f"'setuptools>={SETUPTOOLS}'")
    return f"{sys.executable} -m pip install {' '.join(missing)}" if missing else ""


def nvcc() -> str:
    """The version of the toolkit."""
    path = f"{os.environ['CUDA_HOME']}/bin/nvcc" if os.environ.get("CUDA_HOME") else shutil.which("nvcc")
    if not path:
        sys.exit("there is no nvcc on the PATH, and CUDA_HOME is not set: give a wheel, or install the CUDA toolkit")
    release = re.search(r"release (\d+\.\d+)", subprocess.check_output([path, "--version"], text=True))
    return release[1] if release else "none"


def take_library(wheel: Path) -> None:
    """Puts the wheel's library into the checkout."""
    with zipfile.ZipFile(wheel) as archive:
        (ROOT / "fastcompress" / "_C.so").write_bytes(archive.read("fastcompress/_C.so"))
    print(f"fastcompress/_C.so is from {wheel.name}")


def execute(command: Sequence[str], env: dict[str, str], seconds: float, output: IO[str] | None = None) -> int | None:
    """The exit code of a command; ``None``: it took too long. Whatever it started ends with it then, so that nothing
    shares the GPU with the next step."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), **env}
    errors = None if output is None else subprocess.STDOUT
    process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=output, stderr=errors, start_new_session=True)
    try:
        return process.wait(seconds)
    except BaseException as error:  # Ctrl-C too, which does not reach another session
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if isinstance(error, subprocess.TimeoutExpired):
            return None
        raise


def run(step: Step, logs: Path, seconds: float) -> None:
    """Runs a step, its output in a log file; prints the end of it."""
    print(f"\n== {step.name}: {step.missing or shlex.join(step.command)}", flush=True)
    if step.missing:
        step.result = f"not run: {step.missing}"
        return
    log = logs / f"{re.sub('[^a-z0-9]+', '-', step.name.lower())}.log"
    start = time.monotonic()
    with open(log, "w") as output:
        code = execute(step.command, step.env, max(1.0, seconds), output)
    step.result = "passed" if code == 0 else f"FAILED with exit code {code}"
    if code is None:
        step.result = f"FAILED: not done after {seconds:.0f} s"
    step.seconds = time.monotonic() - start
    lines = log.read_text(errors="replace").splitlines()
    print("\n".join(lines[-60 if step.failed else -3 if step.name != "info" else -40 :]), flush=True)


def summary(steps: Sequence[Step]) -> str:
    return "\n".join(f"{step.name:<24}{step.seconds:6.0f} s  {step.result}" for step in steps)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wheel", type=Path, help="take the library from this wheel instead of building it")
    parser.add_argument("--dry", action="store_true", help="every step, on a machine without a GPU")
    options = parser.parse_args()
    begin = time.monotonic()
    left: Callable[[], float] = lambda: SECONDS - (time.monotonic() - begin)  # noqa: E731
    if missing := what_is_missing(build=not options.wheel):
        sys.exit(f"something is missing here: {missing}")
    import torch

    if options.dry:
        steps, benchmark, env = dry_steps(), ["--dry", "--out", "build/gpu-dry"], {"TRITON_INTERPRET": "1"}
    elif torch.cuda.is_available():
        if options.wheel:
            take_library(options.wheel)
        steps, env = gpu_steps(options.wheel), {}
        benchmark = ["--save", "--budget", str(BENCHMARK_SECONDS - 20)]
    else:
        sys.exit("torch sees no CUDA device here; `make gpu DRY=1` takes every step without one")
    logs = ROOT / "build" / ("gpu-dry" if options.dry else "gpu")
    logs.mkdir(parents=True, exist_ok=True)
    for i, step in enumerate(steps):
        later = sum(other.reserve for other in steps[i + 1 :] if not other.missing)
        run(step, logs, min(step.limit, left() - BENCHMARK_SECONDS - later))
        if step.name == "build" and step.failed:
            return 1
    print(f"\n{summary(steps)}\n\n== benchmark", flush=True)
    command = [sys.executable, "-m", "benchmarks", *SUITES, "--device", "cuda", *benchmark]
    code = execute(command, env, max(30.0, left()))
    return 1 if code != 0 or any(step.failed for step in steps) else 0


if __name__ == "__main__":
    sys.exit(main())

"""Build, test, sanitize and benchmark on a machine with a GPU. No step needs a network.

A command is skipped, with the reason, if a program that it needs is missing, such as nvcc or compute-sanitizer. A
skipped command is not a failure. Output is written to the terminal and to OUT/<command>.log while a command runs.
Results are appended to OUT/results.jsonl as soon as they are known: one line per command, and the lines of the driver.
The benchmark appends to OUT/<machine>-cuda.jsonl. The exit code is 1 if a command failed.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
STEPS = ("build", "test", "sanitize", "bench")
OPS = "adjacent_distance select_boundaries segment_reduce segment_pool pack properties errors opcheck compile"
TESTS = ["tests/gpu/test_ops.py", *(f"tests/ops/test_{name}.py" for name in OPS.split())]
FEW = "hostile_segments"  # tests that Triton's interpreter runs in seconds


@dataclass
class Command:
    """A command of a step; ``skip`` is the reason why it cannot run."""

    step: str
    name: str
    words: list[str]
    skip: str = ""
    env: dict[str, str] = field(default_factory=dict)
    result: str = "not run"


def lacks(*packages: str) -> str:
    """Return the reason to skip a command that needs these packages, or "" if all are installed."""
    absent = [name for name in packages if importlib.util.find_spec(name) is None]
    return f"not installed: {', '.join(absent)}" if absent else ""


def build(dry: bool, wheel: Path | None) -> Command:
    """Return the command that writes _C.so into the checkout, or into build/gpu-dry."""
    target, skip, env = "build/gpu-dry" if dry else ".", lacks("setuptools", "ninja"), {"FASTCOMPRESS_CUDA": "none"}
    if wheel:
        code = f"import zipfile; zipfile.ZipFile({str(wheel.resolve())!r}).extract('fastcompress/_C.so', {target!r})"
        return Command("build", "build", [sys.executable, "-c", code])
    if not skip and int(importlib.metadata.version("setuptools").split(".")[0]) < 77:
        skip = "setuptools is older than 77"
    if not dry:
        nvcc = shutil.which("nvcc", path=f"{os.environ.get('CUDA_HOME', '')}/bin:{os.environ['PATH']}")
        text = subprocess.check_output([nvcc, "--version"], text=True) if nvcc else ""
        skip = skip or ("" if nvcc else "nvcc is not found: set CUDA_HOME, or give --wheel")
        archs = "{}{}".format(*torch.cuda.get_device_capability())
        env = {"FASTCOMPRESS_CUDA": text.partition("release ")[2].partition(",")[0], "FASTCOMPRESS_CUDA_ARCHS": archs}
    return Command("build", "build", [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", target], skip, env)


def commands(dry: bool, out: Path, wheel: Path | None = None) -> list[Command]:
    """Return the commands of every step. With ``dry``, return short forms that run on the CPU."""
    python, parallel = sys.executable, [] if dry or lacks("xdist") else ["-n", "6"]
    device, cuda, interpret = ("cpu", "reference", {"TRITON_INTERPRET": "1"}) if dry else ("cuda", "cuda", {})

    def test(backend: str, files: list[str], only: str) -> list[str]:
        return [python, "-m", "pytest", "-q", "-rs", *files, "-k", only, "--device", device, "--backend", backend]

    every = f"{FEW} or short_parts or test_module or on_request or other_stream" if dry else ""
    # A direct call of an op skips the checks of the wrappers. The compiled kernels repeat the checks; Triton's do not.
    triton = test("triton", TESTS, FEW if dry else "not ops_refuse") + parallel
    no_triton, no_pytest = lacks("pytest", "triton", *(["numpy"] if dry else [])), lacks("pytest")
    found = [
        build(dry, wheel),
        Command("build", "info", [python, "-m", "fastcompress", "info"]),
        Command("test", "cuda", test(cuda, [*TESTS, "tests/gpu/test_attention.py"], every) + parallel, no_pytest),
        Command("test", "triton", triton, no_triton, interpret),
    ]
    for tool in ("memcheck",) if dry else ("memcheck", "racecheck"):
        sanitizer = f"compute-sanitizer --tool {tool} --report-api-errors no --error-exitcode 99".split()
        skip = no_pytest or ("" if dry or shutil.which(sanitizer[0]) else "compute-sanitizer is not on the PATH")
        words = [*([] if dry else sanitizer), *test(cuda, TESTS[:1], f"short and {FEW}" if dry else "short")]
        # Each tensor has an allocation of its own, so that memcheck detects an access one element after its end.
        found.append(Command("sanitize", tool, words, skip, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}))
    bench = [python, "-m", "benchmarks", "--device", "cuda", "--out", str(out), *(["--dry"] if dry else [])]
    return [*found, Command("bench", "bench", bench, lacks("pandas", "tabulate"), interpret)]


def append(out: Path, line: dict[str, Any]) -> None:
    """Append a result to OUT/results.jsonl."""
    with (out / "results.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def run(command: Command, log: Path) -> None:
    """Run a command unless it is to be skipped, and set the result."""
    print(f"\n== {command.name}: {command.skip or shlex.join(command.words)}", flush=True)
    if command.skip:
        command.result = f"skipped: {command.skip}"
        return
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **command.env}
    shell = f"{shlex.join(command.words)} 2>&1 | tee {shlex.quote(str(log))}"
    code = subprocess.run(["bash", "-o", "pipefail", "-c", shell], cwd=ROOT, env=env).returncode
    command.result = f"failed with exit code {code}" if code else "passed"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps", nargs="*", metavar="STEP", help=f"of {', '.join(STEPS)}; default: all of them")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "gpu", help="folder of the logs and results")
    parser.add_argument("--wheel", type=Path, help="use the library of this wheel instead of building it")
    parser.add_argument("--dry", action="store_true", help="run a short form of each step on a machine without a GPU")
    options = parser.parse_args()
    if unknown := set(options.steps) - set(STEPS):
        parser.error(f"unknown step {', '.join(sorted(unknown))}; the steps are {', '.join(STEPS)}")
    if not options.dry and not torch.cuda.is_available():
        sys.exit("torch finds no CUDA device; `make gpu DRY=1` runs a short form of each step without one")
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    steps = {*(options.steps or STEPS), *(["build"] if options.wheel else [])}
    chosen = [command for command in commands(options.dry, out, options.wheel) if command.step in steps]
    for command in chosen:
        no_library = chosen[0].name == "build" and chosen[0].result.startswith(("failed", "skipped"))
        if no_library and command.name not in ("info", "triton"):
            command.skip = "the build command gave no library"
        begin = time.monotonic()
        run(command, out / f"{command.name}.log")
        seconds = round(time.monotonic() - begin, 1)
        append(out, {"step": command.step, "command": command.name, "result": command.result, "seconds": seconds})
    print("\n" + "\n".join(f"{command.name:<10} {command.result}" for command in chosen))
    return int(any(command.result.startswith("failed") for command in chosen))


if __name__ == "__main__":
    sys.exit(main())

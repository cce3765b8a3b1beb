"""Build, test, sanitize and benchmark on a machine with a GPU. No step needs a network.

A command is skipped, with the reason, if a program that it needs is missing, such as nvcc or compute-sanitizer. A
skipped command is not a failure. Output is written to the terminal and to OUT/<command>.log while a command runs.
Results are appended to OUT/results.jsonl as soon as they are known: one line per command, and the lines of the driver.
The benchmark appends to OUT/<machine>-cuda.jsonl. The exit code is 1 if a command failed.
"""

from __future__ import annotations

import argparse
import contextlib
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
STEPS = ("build", "driver", "sanitize", "test", "bench")
OPS = "adjacent_distance select_boundaries segment_reduce segment_pool pack properties errors opcheck compile"
TESTS = ["tests/gpu/test_ops.py", *(f"tests/ops/test_{name}.py" for name in OPS.split())]
FEW = "hostile_segments"  # tests that Triton's interpreter runs in seconds
#: Each variant of a Triton kernel takes up to 10 s of CPU time to compile (triton 3.6, sm_90), so only these tests of
#: tests/gpu/test_ops.py run on the Triton kernels: every kernel, in one dtype each.
FEW_VARIANTS = "short_parts or (test_short and float32 and local-max) or other_stream"
#: Seconds until a kernel that waits for another one for ever is stopped.
DRIVER_SECONDS = "600"


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


def find_nvcc() -> str | None:
    """Return the path of nvcc, or None."""
    return shutil.which("nvcc", path=f"{os.environ.get('CUDA_HOME', '')}/bin:{os.environ['PATH']}")


def build(dry: bool, wheel: Path | None) -> Command:
    """Return the command that writes _C.so into the checkout, or into build/gpu-dry."""
    target, skip, env = "build/gpu-dry" if dry else ".", lacks("setuptools", "ninja"), {"FASTCOMPRESS_CUDA": "none"}
    if wheel:
        code = f"import zipfile; zipfile.ZipFile({str(wheel.resolve())!r}).extract('fastcompress/_C.so', {target!r})"
        return Command("build", "build", [sys.executable, "-c", code])
    if not skip and int(importlib.metadata.version("setuptools").split(".")[0]) < 77:
        skip = "setuptools is older than 77"
    if not dry:
        nvcc = find_nvcc()
        text = subprocess.check_output([nvcc, "--version"], text=True) if nvcc else ""
        skip = skip or ("" if nvcc else "nvcc is not found: set CUDA_HOME, or give --wheel")
        archs = "{}{}".format(*torch.cuda.get_device_capability())
        env = {"FASTCOMPRESS_CUDA": text.partition("release ")[2].partition(",")[0], "FASTCOMPRESS_CUDA_ARCHS": archs}
    return Command("build", "build", [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", target], skip, env)


def driver(dry: bool) -> list[Command]:
    """Return the commands that build the driver without torch, check the kernels, and measure ceilings and plans."""
    program = "build/emulated_driver" if dry else "build/gpu_driver"
    how = ["--emulator"] if dry else ["--arch", "{}{}".format(*torch.cuda.get_device_capability()), "--jobs", "8"]
    skip = "" if dry or find_nvcc() else "nvcc is not found: set CUDA_HOME"
    skip = skip or ("g++ is not on the PATH" if dry and not shutil.which("g++") else "")
    found = [Command("driver", "driver", [sys.executable, "scripts/build_driver.py", *how], skip)]
    # A graph of commands that print JSON lines; the short forms show that the modes work.
    modes = [["sanitize"], ["ceilings", "65536"], ["sweep", "150", "64"]]
    modes = modes if dry else [["check"], ["ceilings"], ["sweep"], ["sweep", "24000", "3584"]]
    for name, words in zip(("check", "ceilings", "sweep", "sweep-wide"), modes, strict=False):
        found.append(Command("driver", name, ["timeout", DRIVER_SECONDS, program, *words], skip))
    for tool in ("memcheck",) if dry else ("memcheck", "racecheck", "synccheck"):
        sanitizer = f"compute-sanitizer --tool {tool} --error-exitcode 99".split()
        missing = skip or ("" if dry or shutil.which(sanitizer[0]) else "compute-sanitizer is not on the PATH")
        found.append(Command("sanitize", tool, [*([] if dry else sanitizer), program, "sanitize"], missing))
    return found


def commands(dry: bool, out: Path, wheel: Path | None = None) -> list[Command]:
    """Return the commands of every step. With ``dry``, return short forms that run on the CPU."""
    python, parallel = sys.executable, [] if dry or lacks("xdist") else ["-n", "6"]
    device, cuda, interpret = ("cpu", "reference", {"TRITON_INTERPRET": "1"}) if dry else ("cuda", "cuda", {})

    def test(backend: str, files: list[str], only: str) -> list[str]:
        return [python, "-m", "pytest", "-q", "-rs", *files, "-k", only, "--device", device, "--backend", backend]

    every = f"{FEW} or short_parts or test_module or on_request or other_stream" if dry else ""
    triton = test("triton", TESTS if dry else TESTS[:1], FEW if dry else FEW_VARIANTS)
    no_triton, no_pytest = lacks("pytest", "triton", *(["numpy"] if dry else [])), lacks("pytest")
    bench = [python, "-m", "benchmarks", "--device", "cuda", "--out", str(out), *(["--dry"] if dry else [])]
    return [
        build(dry, wheel),
        Command("build", "info", [python, "-m", "fastcompress", "info"]),
        *driver(dry),
        Command("test", "cuda", test(cuda, [*TESTS, "tests/gpu/test_attention.py"], every) + parallel, no_pytest),
        Command("test", "triton", triton, no_triton, interpret),
        Command("bench", "bench", bench, lacks("pandas", "tabulate"), interpret),
    ]


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
    rest = b""
    try:
        process = subprocess.Popen(command.words, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    except OSError as error:
        command.result = f"failed: {error}"
        return
    with process, log.open("wb") as file:
        assert process.stdout is not None
        while chunk := os.read(process.stdout.fileno(), 1 << 16):
            file.write(chunk)
            file.flush()
            sys.stdout.buffer.write(chunk)
            sys.stdout.flush()
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                if line.startswith(b'{"'):  # a result of the driver
                    with contextlib.suppress(ValueError):
                        append(log.parent, json.loads(line))
    command.result = f"failed with exit code {process.returncode}" if process.returncode else "passed"


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
    names = {"driver"} if "sanitize" in steps else set()  # the sanitizers run the driver
    chosen = [c for c in commands(options.dry, out, options.wheel) if c.step in steps or c.name in names]
    for command in chosen:
        no_library = chosen[0].name == "build" and chosen[0].result.startswith(("failed", "skipped"))
        if no_library and command.name in ("cuda", "bench"):
            command.skip = "the build command gave no library"
        if any(c.step == "driver" and c.result.startswith("failed") for c in chosen):  # no time for wrong kernels
            command.skip = command.skip or ("" if command.name == "triton" else "a command of the driver has failed")
        begin = time.monotonic()
        run(command, out / f"{command.name}.log")
        seconds = round(time.monotonic() - begin, 1)
        append(out, {"step": command.step, "command": command.name, "result": command.result, "seconds": seconds})
    print("\n" + "\n".join(f"{command.name:<10} {command.result}" for command in chosen))
    return int(any(command.result.startswith("failed") for command in chosen))


if __name__ == "__main__":
    sys.exit(main())

"""Builds the library with CUDA kernels and reads what nvcc made of them: for tests/csrc/test_cuda_build.py.

``python -m tests.support.cuda_build`` builds for every architecture and rewrites tests/csrc/cuda_resources.json, the
table that the kernels are held to; ``python -m tests.support.cuda_build 90`` builds for one. No GPU is needed.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.support import ROOT

TABLE = ROOT / "tests" / "csrc" / "cuda_resources.json"
ARCHS = tuple(json.loads((ROOT / "wheels.json").read_text())["13.0"]["archs"])
_WIDE = re.compile(r"\b(LDG|LDGSTS|STG|LDS|STS)(?:\.\w+)*\.128\b")


@dataclass(frozen=True)
class Kernel:
    """What a kernel takes on an architecture.

    Attributes:
        registers: of a thread.
        stack: bytes of local memory of a thread.
        shared: bytes of static shared memory of a block.
        wide: its 128-bit instructions that move memory: ``LDG``, ``STG``, ``LDGSTS`` (global to shared), ``LDS``,
            ``STS``.
    """

    registers: int
    stack: int
    shared: int
    wide: tuple[str, ...]


@functools.cache
def nvcc_version() -> str | None:
    """Such as ``"13.0"``; ``None`` where there is no nvcc."""
    home = os.environ.get("CUDA_HOME")
    nvcc = f"{home}/bin/nvcc" if home else shutil.which("nvcc")
    if nvcc is None or not Path(nvcc).exists():
        return None
    release = re.search(r"release (\d+\.\d+)", subprocess.check_output([nvcc, "--version"], text=True))
    return release[1] if release else None


def folder(archs: tuple[str, ...]) -> Path:
    """Where ``build`` builds; it stays there, so that the next build is short."""
    return ROOT / "build" / f"cuda-{'-'.join(archs)}"


@functools.cache
def build(archs: tuple[str, ...]) -> Path:
    """Builds ``_C.so`` with kernels for ``archs``, and returns its path."""
    target = folder(archs)
    environment = {**os.environ, "FASTCOMPRESS_CUDA": nvcc_version() or "", "FASTCOMPRESS_CUDA_ARCHS": ";".join(archs)}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-temp", target, "--build-lib", target / "lib"]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        output = f"{done.stdout[-6000:]}\n{done.stderr[-6000:]}"
        raise RuntimeError(f"the CUDA build for {', '.join(archs)} failed:\n{output}")
    return target / "lib" / "fastcompress" / "_C.so"


@functools.cache
def cuobjdump() -> Path | None:
    """From the package nvidia-cuda-cuobjdump, which needs nvidia-cuda-nvdisasm beside it, or from the toolkit."""
    try:
        files = importlib.metadata.files("nvidia-cuda-cuobjdump") or []
        importlib.metadata.version("nvidia-cuda-nvdisasm")
    except importlib.metadata.PackageNotFoundError:
        found = shutil.which("cuobjdump") if shutil.which("nvdisasm") else None
        return Path(found) if found else None
    return next((Path(file.locate()).resolve() for file in files if file.name == "cuobjdump"), None)


def _dump(library: Path, what: str) -> str:
    """The output of cuobjdump, with names as in the sources."""
    tool = cuobjdump()
    environment = {**os.environ, "PATH": f"{tool.parent}{os.pathsep}{os.environ['PATH']}"}
    text = subprocess.run([tool, what, library], env=environment, check=True, capture_output=True, text=True).stdout
    return subprocess.run(["c++filt"], input=text, check=True, capture_output=True, text=True).stdout


def _name(demangled: str) -> str:
    """``segment_pool_fwd_kernel<BFloat16, true>`` of the full name of a kernel."""
    name = demangled.replace("(anonymous namespace)::", "")
    depth = 0
    for end, letter in enumerate(name):  # up to the parameters
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            name = name[:end]
            break
    return re.sub(r"\b\w+::", "", name).removeprefix("void ").strip()


def kernels(library: Path) -> dict[str, dict[str, Kernel]]:
    """What each kernel takes, by architecture (``"sm_90"``) and name."""
    wide: dict[tuple[str, str], set[str]] = {}
    arch = name = ""
    for line in _dump(library, "-sass").splitlines():
        if match := re.match(r"arch = (\w+)", line):
            arch = match[1]
        elif match := re.match(r"\s*Function : (.+)", line):
            name = _name(match[1])
        elif match := _WIDE.search(line):
            wide.setdefault((arch, name), set()).add(match[1])
    found: dict[str, dict[str, Kernel]] = {}
    for line in _dump(library, "-res-usage").splitlines():
        if match := re.match(r"arch = (\w+)", line):
            arch = match[1]
        elif match := re.match(r"\s*Function (.+):$", line):
            name = _name(match[1])
        elif match := re.match(r"\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line):
            registers, stack, shared, local = map(int, match.groups())
            instructions = tuple(sorted(wide.get((arch, name), ())))
            found.setdefault(arch, {})[name] = Kernel(registers, stack + local, shared, instructions)
    return found


def ptx(library: Path) -> dict[str, str]:
    """The PTX of each kernel, by name."""
    parts = re.split(r"^(?:\.visible |\.weak )?\.entry ", _dump(library, "-ptx"), flags=re.MULTILINE)[1:]
    return {_name(part.splitlines()[0].rpartition("(")[0]): part for part in parts}


def read_table() -> dict:
    """The committed table: ``nvcc``, and ``kernels`` by architecture and name."""
    table = json.loads(TABLE.read_text())
    for by_name in table["kernels"].values():
        for name, (registers, stack, shared, wide) in by_name.items():
            by_name[name] = Kernel(registers, stack, shared, tuple(wide.split()))
    return table


def write_table(found: dict[str, dict[str, Kernel]]) -> None:
    """Write the table, one line per kernel: registers, stack, shared memory, 128-bit instructions."""
    lines = ["{", f' "nvcc": "{nvcc_version()}",', ' "kernels": {']
    for arch in sorted(found, key=lambda arch: int(arch.removeprefix("sm_"))):
        rows = [
            f"   {json.dumps(name)}: {json.dumps([k.registers, k.stack, k.shared, ' '.join(k.wide)])}"
            for name, k in sorted(found[arch].items())
        ]
        lines += [f'  "{arch}": {{', ",\n".join(rows), "  },"]
    lines[-1] = "  }"
    TABLE.write_text("\n".join([*lines, " }", "}"]) + "\n")


def main() -> int:
    if nvcc_version() is None or cuobjdump() is None:
        print("this needs nvcc, and cuobjdump with nvdisasm", file=sys.stderr)
        return 1
    found = kernels(build(tuple(sys.argv[1:]) or ARCHS))
    write_table(found)
    print(f"{TABLE}: {sum(map(len, found.values()))} rows")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Build the library with CUDA kernels and read the resources that nvcc reports, for tests/csrc/test_cuda_build.py.

``python -m tests.support.cuda_build`` builds for every architecture and rewrites tests/csrc/cuda_resources.json, the
table with which the test compares. ``python -m tests.support.cuda_build 90`` builds for one architecture. No GPU is
needed.
"""

from __future__ import annotations

import collections
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
_STORE = re.compile(r"\bSTG\.")


@dataclass(frozen=True)
class Kernel:
    """Resources of a kernel on an architecture.

    Attributes:
        registers: Registers per thread.
        stack: Bytes of local memory per thread.
        shared: Bytes of static shared memory per block.
        wide: The kinds of 128-bit load and store instructions that it contains: ``LDG``, ``STG``, ``LDGSTS`` (global
            to shared), ``LDS``, ``STS``.
        narrow: Number of instructions that store less than 128 bits to global memory.
    """

    registers: int
    stack: int
    shared: int
    wide: tuple[str, ...]
    narrow: int


@functools.cache
def nvcc_version() -> str | None:
    """Return the version of nvcc, such as ``"13.0"``, or ``None`` if it is not installed."""
    home = os.environ.get("CUDA_HOME")
    nvcc = f"{home}/bin/nvcc" if home else shutil.which("nvcc")
    if nvcc is None or not Path(nvcc).exists():
        return None
    release = re.search(r"release (\d+\.\d+)", subprocess.check_output([nvcc, "--version"], text=True))
    return release[1] if release else None


def folder(archs: tuple[str, ...]) -> Path:
    """Return the folder in which ``build`` builds. It is kept, so that later builds are short."""
    return ROOT / "build" / f"cuda-{'-'.join(archs)}"


@functools.cache
def build(archs: tuple[str, ...]) -> Path:
    """Build ``_C.so`` with kernels for ``archs``, and return its path."""
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
    """Return the path of cuobjdump.

    It is in the package nvidia-cuda-cuobjdump, which needs nvidia-cuda-nvdisasm in the same environment, or in the
    toolkit.
    """
    try:
        files = importlib.metadata.files("nvidia-cuda-cuobjdump") or []
        importlib.metadata.version("nvidia-cuda-nvdisasm")
    except importlib.metadata.PackageNotFoundError:
        found = shutil.which("cuobjdump") if shutil.which("nvdisasm") else None
        return Path(found) if found else None
    return next((Path(file.locate()).resolve() for file in files if file.name == "cuobjdump"), None)


def _dump(library: Path, what: str) -> str:
    """Return the output of cuobjdump, with demangled names."""
    tool = cuobjdump()
    environment = {**os.environ, "PATH": f"{tool.parent}{os.pathsep}{os.environ['PATH']}"}
    text = subprocess.run([tool, what, library], env=environment, check=True, capture_output=True, text=True).stdout
    return subprocess.run(["c++filt"], input=text, check=True, capture_output=True, text=True).stdout


def _name(demangled: str) -> str:
    """Return the short name of a kernel, such as ``segment_pool_fwd_kernel<BFloat16, true>``."""
    name = demangled.replace("(anonymous namespace)::", "")
    depth = 0
    for end, letter in enumerate(name):  # find the end of the name, where the parameters start
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            name = name[:end]
            break
    return re.sub(r"\b\w+::", "", name).removeprefix("void ").strip()


def kernels(library: Path) -> dict[str, dict[str, Kernel]]:
    """Return the resources of each kernel, by architecture (``"sm_90"``) and name."""
    wide: dict[tuple[str, str], set[str]] = {}
    narrow: collections.Counter[tuple[str, str]] = collections.Counter()
    arch = name = ""
    for line in _dump(library, "-sass").splitlines():
        if match := re.match(r"arch = (\w+)", line):
            arch = match[1]
        elif match := re.match(r"\s*Function : (.+)", line):
            name = _name(match[1])
        elif match := _WIDE.search(line):
            wide.setdefault((arch, name), set()).add(match[1])
        elif _STORE.search(line):
            narrow[arch, name] += 1
    found: dict[str, dict[str, Kernel]] = {}
    for line in _dump(library, "-res-usage").splitlines():
        if match := re.match(r"arch = (\w+)", line):
            arch = match[1]
        elif match := re.match(r"\s*Function (.+):$", line):
            name = _name(match[1])
        elif match := re.match(r"\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line):
            registers, stack, shared, local = map(int, match.groups())
            instructions = tuple(sorted(wide.get((arch, name), ())))
            stores = narrow[arch, name]
            found.setdefault(arch, {})[name] = Kernel(registers, stack + local, shared, instructions, stores)
    return found


def ptx(library: Path) -> dict[str, str]:
    """Return the PTX of each kernel, by name."""
    parts = re.split(r"^(?:\.visible |\.weak )?\.entry ", _dump(library, "-ptx"), flags=re.MULTILINE)[1:]
    return {_name(part.splitlines()[0].rpartition("(")[0]): part for part in parts}


def read_table() -> dict:
    """Return the committed table: ``nvcc``, and ``kernels`` by architecture and name."""
    table = json.loads(TABLE.read_text())
    for by_name in table["kernels"].values():
        for name, (registers, stack, shared, wide, narrow) in by_name.items():
            by_name[name] = Kernel(registers, stack, shared, tuple(wide.split()), narrow)
    return table


def write_table(found: dict[str, dict[str, Kernel]]) -> None:
    """Write the table, one line per kernel: registers, stack, shared memory, 128-bit instructions, narrower stores."""
    lines = ["{", f' "nvcc": "{nvcc_version()}",', ' "kernels": {']
    for arch in sorted(found, key=lambda arch: int(arch.removeprefix("sm_"))):
        rows = [
            f"   {json.dumps(name)}: {json.dumps([k.registers, k.stack, k.shared, ' '.join(k.wide), k.narrow])}"
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

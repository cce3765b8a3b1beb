"""Compile the kernels for one architecture and disassemble them. Results are kept in build/sass, by source."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from scripts.sass.disassembly import Function, parse

ROOT = Path(__file__).resolve().parents[2]
CUDA = ROOT / "csrc" / "cuda"
#: The flags of setup.py that change code, and line numbers, which do not.
FLAGS = ("-std=c++17", "-O3", "-fmad=false", "-Xcompiler", "-ffp-contract=off")
LINES = "-lineinfo"
_RESOURCES = re.compile(
    r"Compiling entry function '(\S+)' for.*?(\d+) bytes stack frame.*?Used (\d+) registers([^\n]*)", re.S
)


@dataclass(frozen=True)
class Resources:
    """What a kernel uses, as ptxas reports it: registers per thread, stack bytes per thread, shared bytes per block."""

    registers: int
    stack: int
    shared: int


@dataclass(frozen=True)
class Compiled:
    """A kernel: its demangled short name, source file, resources and code."""

    name: str
    source: str
    resources: Resources
    function: Function


@functools.cache
def find_nvcc() -> str | None:
    """Return the path of nvcc, or None."""
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=f"{home}/bin" if home else None)


@functools.cache
def find_nvdisasm() -> str | None:
    """Return the path of nvdisasm, or None: that of the toolkit, of nvidia-cuda-nvdisasm, or of triton."""
    if found := shutil.which("nvdisasm"):
        return found
    try:
        files = importlib.metadata.files("nvidia-cuda-nvdisasm") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    paths = [Path(str(file.locate())) for file in files if file.name == "nvdisasm"]
    if (triton := importlib.util.find_spec("triton")) and triton.origin:
        paths.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "nvdisasm")
    return next((str(path.resolve()) for path in paths if path.exists()), None)


def missing_tool() -> str:
    """Return which tool is missing and where it can be found, or ""."""
    if find_nvcc() is None:
        return "nvcc is not found: set CUDA_HOME"
    if find_nvdisasm() is None:
        return "nvdisasm is not found: install nvidia-cuda-nvdisasm"
    return ""


@functools.cache
def nvcc_release() -> str:
    """Return the version of nvcc, such as ``"13.0"``."""
    text = subprocess.check_output([find_nvcc() or "nvcc", "--version"], text=True)
    found = re.search(r"release (\d+\.\d+)", text)
    return found[1] if found else ""


def short_name(demangled: str) -> str:
    """Return the name of a kernel without namespaces and parameters: ``segment_pool_fwd_kernel<BFloat16, true>``."""
    name = demangled.replace("(anonymous namespace)::", "").replace("(bool)1", "true").replace("(bool)0", "false")
    depth = 0
    for end, letter in enumerate(name):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            name = name[:end]
            break
    return re.sub(r"\b\w+::", "", name).removeprefix("void ").strip()


def source_digest(source: Path, options: tuple[str, ...]) -> str:
    text = hashlib.sha256(f"{options} {nvcc_release()} {find_nvdisasm()}".encode())
    for path in sorted({source, *(ROOT / "csrc").rglob("*.h"), *source.parent.glob("*.cuh")}):
        text.update(f"{path.name}\0".encode() + path.read_bytes())
    return text.hexdigest()[:16]


def disassemble(source: Path, arch: str, lines: bool = True) -> tuple[str, str]:
    """Compile a source for an architecture, such as ``"90"``, and return the machine code and what ptxas reports."""
    options = (*FLAGS, *([LINES] if lines else []), f"-gencode=arch=compute_{arch},code=sm_{arch}")
    folder = ROOT / "build" / "sass" / f"sm_{arch}" / f"{source.stem}-{source_digest(source, options)}"
    code, report = folder / "code.txt", folder / "ptxas.txt"
    if not report.exists():
        for old in folder.parent.glob(f"{source.stem}-????????????????"):
            if lines:
                shutil.rmtree(old, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        cubin = folder / "code.cubin"
        command = [find_nvcc() or "nvcc", *options, "-cubin", "-Xptxas", "-v", "-o", str(cubin), str(source)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{source.name} does not compile for sm_{arch}:\n{done.stderr[-4000:]}")
        tool = [find_nvdisasm() or "nvdisasm", "-c", *(["-gi"] if lines else []), str(cubin)]
        text = subprocess.run(tool, capture_output=True, text=True, check=True).stdout
        code.write_text(text)
        report.write_text(done.stderr)  # written last: it marks the folder as complete
    return code.read_text(), report.read_text()


def kernels_of(source: Path, arch: str) -> list[Compiled]:
    """Compile a source and return its kernels."""
    text, report = disassemble(source, arch)
    resources = {}
    for name, stack, registers, rest in _RESOURCES.findall(report):
        shared = re.search(r"(\d+) bytes smem", rest)
        resources[name] = Resources(int(registers), int(stack), int(shared[1]) if shared else 0)
    functions = [function for function in parse(text) if function.name in resources]
    names = subprocess.run(
        ["c++filt"], input="\n".join(f.name for f in functions), capture_output=True, text=True, check=True
    ).stdout.split("\n")
    return [
        Compiled(short_name(name), source.name, resources[function.name], function)
        for name, function in zip(names, functions, strict=False)
    ]


def compile_kernels(arch: str, sources: list[Path] | None = None) -> list[Compiled]:
    """Compile the CUDA sources, two at a time, and return their kernels by name."""
    paths = sources or sorted(CUDA.glob("*.cu"), key=lambda path: -path.stat().st_size)
    paths.sort(key=lambda path: path.stem != "segment_pool")  # it takes the longest
    with ThreadPoolExecutor(2) as pool:
        found = [kernel for kernels in pool.map(lambda path: kernels_of(path, arch), paths) for kernel in kernels]
    return sorted(found, key=lambda kernel: kernel.name)

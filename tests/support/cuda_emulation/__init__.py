"""Build and load the CUDA ops as CPU ops whose kernels run in the emulator (``emulator.h``).

``load()`` compiles ``csrc/cuda`` and ``module.cpp`` with g++ and ninja into ``build/``, once for each kind of build,
and returns the pybind11 module. Inside ``with emulated():``, the ops of CPU tensors run in it.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pybind11
import torch

from fastcompress.dispatch.backends import override
from fastcompress.dispatch.schemas import SCHEMAS
from fastcompress.reference import OPS
from tests.support import ROOT

HERE = Path(__file__).parent
TORCH = Path(torch.__file__).parent
#: The imaginary GPU of module.cpp: multiprocessors, bytes of shared memory per multiprocessor, maximum bytes per block.
DEFAULT_DEVICE = (4, 100 << 10, 99 << 10)
#: Seeds of the order of threads, and numbers of resident blocks.
SCHEDULES = ((0, 1), (1, 1), (2, 2))
#: Compiler flags that each kind of build adds.
KINDS = {
    "plain": "-O2",
    # By default UBSan continues after an error, and the process exits with 0.
    "address": "-O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all",
    "thread": "-O1 -g -fsanitize=thread",
}
FLAGS = (
    "-std=c++17 -fPIC -fvisibility=hidden -ffp-contract=off -fno-math-errno -Wall -Wextra -Wno-unused-parameter "
    "-Wno-unknown-pragmas -Wno-maybe-uninitialized -DTORCH_TARGET_VERSION=0x020A000000000000"
)


def build(kind: str = "plain", change: tuple[str, str, str] | None = None) -> Path:
    """Compile the module and return its path.

    Args:
        kind: Key of ``KINDS``.
        change: Seeded bug: a file of ``csrc/cuda``, text that occurs in it once, and its replacement. With a change,
            only the op of that file is compiled: packing, greedy segments, or else the fused op.
    """
    csrc = ROOT / "csrc"
    folder = ROOT / "build" / f"emulated-{kind}"
    ops = [path for path in sorted((csrc / "cuda").glob("*.cpp")) if path.name != "runtime.cpp"]
    host = [*ops, csrc / "arguments.cpp", HERE / "module.cpp"]
    sources = [*sorted((csrc / "cuda").glob("*.cu")), *host]
    objects = [folder / f"{source.stem}.o" for source in sources]
    builds = dict(zip(objects, sources, strict=True))
    if change is not None:
        build(kind)
        name, old, new = change
        seeded = ROOT / "build" / f"emulated-{kind}-{hashlib.sha256(repr(change).encode()).hexdigest()[:12]}"
        shutil.rmtree(seeded, ignore_errors=True)
        shutil.copytree(csrc, seeded / "csrc")
        text = (csrc / "cuda" / name).read_text()
        assert text.count(old) == 1, f"{name} contains {old!r} {text.count(old)} times"
        (seeded / "csrc" / "cuda" / name).write_text(text.replace(old, new))
        unit = next((unit for unit in ("pack", "greedy_segments") if name.startswith(unit)), "segment_pool")
        objects = [seeded / f"{unit}.o" if path.stem == unit else path for path in objects]
        builds = {seeded / f"{unit}.o": seeded / "csrc" / "cuda" / f"{unit}.cu"}
        csrc, folder = seeded / "csrc", seeded
    includes = [csrc, HERE, pybind11.get_include(), sysconfig.get_paths()["include"]]
    flags = f"{FLAGS} {KINDS[kind]} -isystem {TORCH / 'include'} " + " ".join(f"-I{path}" for path in includes)
    lines = [
        "rule compile",
        f"  command = g++ -MD -MF $out.d {flags} -x c++ -c $in -o $out",
        "  depfile = $out.d",
        "rule link",
        f"  command = g++ {KINDS[kind]} -shared $in -o $out -L{TORCH / 'lib'} "
        "-Wl,--no-as-needed -ltorch -ltorch_cpu -pthread",
        *(f"build {output}: compile {source}" for output, source in builds.items()),
        f"build {folder / '_emulated.so'}: link {' '.join(map(str, objects))}",
        "",
    ]
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:  # several test processes may build at the same time
        fcntl.flock(lock, fcntl.LOCK_EX)
        (folder / "build.ninja").write_text("\n".join(lines))
        done = subprocess.run([sys.executable, "-m", "ninja", "-C", folder], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the emulated kernels do not compile:\n{done.stdout}{done.stderr}")
    return folder / "_emulated.so"


@functools.cache
def load() -> ModuleType:
    """Return the module, and build it if necessary. ``FASTCOMPRESS_EMULATED`` can name a module that is built."""
    path = os.environ.get("FASTCOMPRESS_EMULATED") or build()
    library = torch.library.Library("fastcompress_emulated", "DEF")
    for schema in SCHEMAS:
        if schema.split("(")[0] in OPS:
            library.define(schema)
    spec = importlib.util.spec_from_file_location("_emulated", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module._library = library  # type: ignore[attr-defined]  (destroyed with its last reference)
    return module


def has_kernel(op: str) -> bool:
    """Return whether there is a CUDA kernel of an op; without one the kernel of the CPU runs. Needs ``load``."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"fastcompress_emulated::{op}", "CPU")


@contextlib.contextmanager
def emulated(seed: int = 0, os_threads: int = 1) -> Iterator[ModuleType]:
    """Run the CUDA kernels for the ops of CPU tensors in this context, with the given schedule."""
    module = load()
    module.set_schedule(seed, os_threads)
    kernels = {name: getattr(torch.ops.fastcompress_emulated, name) for name in OPS if has_kernel(name)}
    library = override(kernels, ("CPU",))
    try:
        yield module
    finally:
        library._destroy()


def run(command: list[str], module: Path, sanitizer: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run Python with ``command`` on the kernels of ``module``, which may be built with a sanitizer."""
    environment = {**os.environ, "FASTCOMPRESS_EMULATED": str(module), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *command]
    if sanitizer is not None:
        paths = [
            subprocess.run(["gcc", f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
            for name in (f"lib{sanitizer}.so", "libstdc++.so")
        ]
        environment |= {
            "LD_PRELOAD": " ".join(paths),
            "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0:allocator_may_return_null=1",
            "OMP_NUM_THREADS": "1",  # torch's threads synchronize in ways that ThreadSanitizer does not see
        }
        command = ["setarch", "-R", *command]  # ThreadSanitizer does not support a randomized memory layout
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)

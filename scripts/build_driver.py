"""Build the driver of the CUDA kernels, which needs no torch: with nvcc for GPUs, or with g++ for the emulator.

``python scripts/build_driver.py`` writes build/gpu_driver for the architecture of ``--arch``; no GPU is needed, and
the CUDA runtime is linked statically. With ``--emulator`` it writes build/emulated_driver, which runs on the CPU.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"
# The flags of setup.py that decide the bits of the results.
HOST = "-std=c++17 -O2 -ffp-contract=off -fno-math-errno -Wno-maybe-uninitialized -Wno-uninitialized".split()
DEVICE = "-std=c++17 -O3 -fmad=false -cudart static -Xcompiler -ffp-contract=off,-Wno-unused-function".split()
ISA = {
    "row_kernels_avx2": "-mavx2 -mf16c",
    "row_kernels_avx512": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mf16c -mprefer-vector-width=512",
}
NEEDS_TORCH = {"ops", "segment_ops", "runtime"}


def sources() -> tuple[list[Path], list[Path]]:
    """Return the files for the host, and those with kernels or launches."""
    x86 = platform.machine() in ("x86_64", "AMD64")
    host = [path for path in sorted((CSRC / "cpu").glob("row_kernels*.cpp")) if x86 or path.stem not in ISA]
    device = [path for path in sorted((CSRC / "cuda").glob("*.c*")) if path.suffix in (".cu", ".cpp")]
    return host, [p for p in device if p.stem not in NEEDS_TORCH] + sorted((CSRC / "driver").glob("*.cu"))


def commands(compiler: str, arch: str, folder: Path, flags: list[str]) -> dict[Path, list[str]]:
    """Return the command that compiles each object file. An ``arch`` of "" compiles for the emulator."""
    host, device = sources()
    x86 = ["-DFASTCOMPRESS_X86_64"] if platform.machine() in ("x86_64", "AMD64") else []
    found = {}
    for path in host:
        command = ["g++", *HOST, *flags, *x86, *ISA.get(path.stem, "").split(), f"-I{CSRC}", "-c", str(path)]
        found[folder / f"{path.stem}.o"] = command
    emulation = ["-x", "c++", f"-I{ROOT / 'tests' / 'support' / 'cuda_emulation'}", "-Wno-unknown-pragmas"]
    gencode = f"-gencode=arch=compute_{arch},code=sm_{arch}"
    for path in device:
        how = [compiler, *DEVICE, gencode, "-x", "cu"] if arch else ["g++", *HOST, *flags, *emulation]
        found[folder / f"{path.parent.name}_{path.stem}.o"] = [*how, f"-I{CSRC}", "-c", str(path)]
    return found


def is_stale(target: Path) -> bool:
    """Return whether an object file is missing, or older than this script or a file that the compiler read for it."""
    rule = target.with_suffix(".d")
    if not target.exists() or not rule.exists():
        return True
    read = rule.read_text().replace("\\\n", " ").partition(":")[2].split()
    changed = [Path(path) for path in [*read, __file__]]
    return not all(p.exists() for p in changed) or target.stat().st_mtime < max(p.stat().st_mtime for p in changed)


def build(arch: str, jobs: int, flags: list[str] | None = None, name: str = "") -> Path:
    """Build the driver for an architecture such as ``"90"``, or ``""`` for the emulator, and return its path."""
    home = os.environ.get("CUDA_HOME")
    compiler = shutil.which("nvcc", path=f"{home}/bin" if home else None) if arch else "g++"
    if compiler is None:
        raise RuntimeError("nvcc is not found: set CUDA_HOME")
    program = ROOT / "build" / (name or ("gpu_driver" if arch else "emulated_driver"))
    folder = program.with_name(f"{program.name}-objects" + (f"-{arch}" if arch else ""))
    folder.mkdir(parents=True, exist_ok=True)

    def run(command: list[str], target: Path) -> None:
        done = subprocess.run([*command, "-o", str(target)], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")

    wanted = commands(compiler, arch, folder, flags or [])
    stale = {target: command for target, command in wanted.items() if is_stale(target)}

    def compile_one(item: tuple[Path, list[str]]) -> None:
        target, command = item
        run([*command, "-MD", "-MF", str(target.with_suffix(".d"))], target)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(compile_one, stale.items()))
    if stale or not program.exists():
        link = [compiler, "-cudart", "static"] if arch else ["g++", "-pthread", *(flags or [])]
        run([*link, *map(str, wanted)], program)
    return program


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="90", help="architecture to compile for (default: 90)")
    parser.add_argument("--emulator", action="store_true", help="build for the emulator instead of a GPU")
    parser.add_argument("--jobs", type=int, default=2, help="compilers that run at the same time (default: 2)")
    options = parser.parse_args()
    try:
        print(build("" if options.emulator else options.arch, options.jobs))
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Build the compiled library with ninja: one ``_C.so`` on torch's stable ABI, without a Python ABI.

torch is imported only for the paths of its headers and libraries. A CPU build of torch is enough, even for CUDA
kernels. Environment variables:
    CXX                      the C++ compiler (default g++)
    FASTCOMPRESS_CUDA        ``none`` (default), or the version of the CUDA toolkit for CUDA kernels, such as ``13.0``
    FASTCOMPRESS_CUDA_ARCHS  the GPUs to compile for, such as ``80;90;100;120`` (default: those of wheels.json); PTX of
                             the last one is included for later GPUs
    CUDA_HOME                the folder of the toolkit (default: that of the nvcc on the PATH)
    FASTCOMPRESS_SANITIZE    sanitizers to compile with, such as ``address,undefined``
    MAX_JOBS                 the number of compilers that run at the same time
"""

import functools
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.sdist import sdist

ROOT = Path(__file__).resolve().parent
TORCH = Path(torch.__file__).parent
TORCH_TARGET = "0x020A000000000000"  # torch 2.10: the library runs with this version and later ones
CXX = os.environ.get("CXX", "g++")

# Files compiled for one instruction set; all others must run on every machine of the platform.
ISA_FLAGS = {
    "row_kernels_avx2.cpp": "-mavx2 -mf16c",
    "row_kernels_avx512.cpp": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mf16c -mprefer-vector-width=512",
}
# gcc 12 does not know that a segment has at least one row, and warns about undefined registers in its own intrinsics.
ROW_KERNEL_FLAGS = "-Wno-maybe-uninitialized -Wno-uninitialized"
X86_64 = platform.machine() in ("x86_64", "AMD64")


@dataclass(frozen=True)
class Cuda:
    """A CUDA toolkit and the GPUs to compile for, as compute capabilities without the dot: ``("80", "90")``."""

    version: str
    home: Path
    archs: tuple[str, ...]

    @property
    def label(self) -> str:
        """The GPUs, in the form that the library reports."""
        return ";".join(self.archs) + "+PTX"

    @property
    def nvcc_flags(self) -> str:
        # -fmad=false: a fused multiply-add would round differently from the reference (docs/numerics.md). A register
        # spill is an error.
        codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in self.archs]
        codes.append(f"-gencode=arch=compute_{self.archs[-1]},code=compute_{self.archs[-1]}")
        return (
            "-std=c++17 -O3 -fmad=false -cudart static -Xptxas -warn-spills,-Werror "
            f"-Xcompiler -fPIC,-fvisibility=hidden,-ffp-contract=off -ccbin {CXX} {' '.join(codes)}"
        )

    @property
    def cxx_flags(self) -> str:
        """Flags for the host side of the kernels and for library.cpp, which registers them."""
        return (
            f"-isystem {quote(self.home / 'include')} -DFASTCOMPRESS_CUDA "
            f"""'-DFASTCOMPRESS_CUDA_VERSION="{self.version}"' '-DFASTCOMPRESS_CUDA_ARCHS="{self.label}"'"""
        )

    @property
    def link_flags(self) -> str:
        # The CUDA runtime is linked statically, so that the library loads without CUDA and with any build of torch.
        folders = [self.home / "lib64", self.home / "lib", *self.home.glob("targets/*/lib")]
        for folder in folders:
            if (folder / "libcudart_static.a").exists():
                return f"-L{quote(folder)} -lcudart_static -lrt -lpthread -ldl"
        sys.exit(f"fastcompress: libcudart_static.a not found in {', '.join(map(str, folders))}")


@functools.cache
def cuda() -> Cuda | None:
    """Return the CUDA build that the environment variables request, or None for a CPU build."""
    wanted = os.environ.get("FASTCOMPRESS_CUDA", "") or "none"
    if wanted == "none":
        return None
    if not re.fullmatch(r"\d+\.\d+", wanted):
        sys.exit(f"fastcompress: FASTCOMPRESS_CUDA must be none or a version such as 13.0, got {wanted!r}")
    wheels = json.loads((ROOT / "wheels.json").read_text(encoding="utf-8"))
    archs = os.environ.get("FASTCOMPRESS_CUDA_ARCHS", "").split(";")
    if archs == [""]:
        if wanted not in wheels:
            sys.exit(f"fastcompress: wheels.json has no CUDA {wanted}: set FASTCOMPRESS_CUDA_ARCHS, such as 80;90")
        archs = wheels[wanted]["archs"]
    for arch in archs:
        if not re.fullmatch(r"\d{2,3}[af]?", arch):
            sys.exit(f"fastcompress: FASTCOMPRESS_CUDA_ARCHS must be a list such as 80;90;100;120, got {arch!r}")
    home = os.environ.get("CUDA_HOME")
    nvcc = str(Path(home) / "bin" / "nvcc") if home else shutil.which("nvcc")
    if nvcc is None or not Path(nvcc).exists():
        where = f"{nvcc} (CUDA_HOME) does not exist" if home else "nvcc is not on the PATH, and CUDA_HOME is not set"
        sys.exit(f"fastcompress: FASTCOMPRESS_CUDA={wanted} needs nvcc, but {where}")
    release = re.search(r"release (\d+\.\d+)", subprocess.check_output([nvcc, "--version"], text=True))
    if release is None or release[1] != wanted:
        found = release[1] if release else "of an unknown version"
        sys.exit(f"fastcompress: FASTCOMPRESS_CUDA={wanted}, but {nvcc} is {found}")
    if home is None:  # the nvcc on the PATH may be a link or a script; it prints its folder
        plan = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
        top = re.search(r"^#\$ TOP=(.+)$", plan, re.MULTILINE)
        home = top[1].strip() if top else str(Path(nvcc).resolve().parents[1])
    return Cuda(wanted, Path(home).resolve(), tuple(archs))


def sources() -> list[str]:
    found = sorted((ROOT / "csrc").rglob("*.cpp"))
    gpu = sorted((ROOT / "csrc" / "cuda").glob("*.c*"))
    found = [path for path in found if path not in gpu and (X86_64 or path.name not in ISA_FLAGS)]
    if cuda():
        found += [path for path in gpu if path.suffix in (".cpp", ".cu")]
    return [str(path.relative_to(ROOT)) for path in found]


class NinjaBuildExt(build_ext):
    """Compile with ninja. The library has no ABI tag in its name and no ``PyInit``, since Python loads it by path."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []

    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp)
        build.mkdir(parents=True, exist_ok=True)
        output.parent.mkdir(parents=True, exist_ok=True)
        (build / "build.ninja").write_text(ninja_file(ext.sources, output))
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        verbose = ["-v"] if os.environ.get("VERBOSE") else []
        subprocess.check_call([sys.executable, "-m", "ninja", "-C", str(build), *jobs, *verbose])


def quote(path: Path) -> str:
    """Quote a path for a shell."""
    return shlex.quote(str(path))


def ninja_path(path: Path) -> str:
    """Escape a path for ninja, which quotes it for the shell."""
    return re.sub(r"([$ :])", r"$\1", str(path))


def ninja_file(sources: list[str], output: Path) -> str:
    """Return the text of the ninja file that builds the library ``output``."""
    # -ffp-contract=off: the order and rounding of sums are part of the contract (docs/numerics.md).
    cxxflags = (
        "-std=c++17 -O3 -g0 -fPIC -fvisibility=hidden -fvisibility-inlines-hidden "
        f"-ffp-contract=off -fno-math-errno -Wall -Wextra -Wno-unused-parameter "
        f"-DTORCH_TARGET_VERSION={TORCH_TARGET} "
        f"-isystem {quote(TORCH / 'include')} -I{quote(ROOT / 'csrc')}"
    )
    # --no-as-needed links libtorch although no symbol refers to it: in a CUDA build of torch it loads libtorch_cuda,
    # which defines the weak symbol that returns the current stream.
    ldflags = f"-shared -L{quote(TORCH / 'lib')} "
    ldflags += "-Wl,--no-as-needed -ltorch -ltorch_cpu -Wl,--as-needed -Wl,--exclude-libs,ALL"
    gpu = cuda()
    if gpu:
        ldflags += f" {gpu.link_flags}"
    if sanitizers := os.environ.get("FASTCOMPRESS_SANITIZE"):
        flag = f" -fsanitize={sanitizers} -fno-sanitize-recover=all -fno-omit-frame-pointer"
        cxxflags = cxxflags.replace("-O3 -g0", "-O1 -g") + flag
        ldflags += flag
        if "thread" in sanitizers:  # csrc/cpu/tensors.h
            cxxflags += " -DFASTCOMPRESS_STD_THREADS"
    if X86_64:
        cxxflags += " -DFASTCOMPRESS_X86_64"
    lines = [
        f"cxx = {CXX}",
        "rule compile",
        "  command = $cxx -MD -MF $out.d -c $in -o $out $flags",
        "  depfile = $out.d",
        "  description = compile $in",
        "rule link",
        f"  command = $cxx $in -o $out {ldflags}",
        "  description = link $out",
    ]
    if gpu:
        lines += [
            "rule nvcc",
            f"  command = {quote(gpu.home / 'bin' / 'nvcc')} -MD -MF $out.d -c $in -o $out $flags",
            "  depfile = $out.d",
            f"  description = nvcc {gpu.label} $in",
        ]
    objects = []
    for source in sources:
        objects.append(source.replace("/", "_") + ".o")
        if source.endswith(".cu"):
            lines += [f"build {objects[-1]}: nvcc {ninja_path(ROOT / source)}", f"  flags = {gpu.nvcc_flags}"]
            continue
        flags = f"{cxxflags} {ISA_FLAGS.get(Path(source).name, '')}"
        if "/row_kernels_" in source:
            flags += f" {ROW_KERNEL_FLAGS}"
        if gpu and (source.startswith("csrc/cuda/") or source == "csrc/library.cpp"):
            flags += f" {gpu.cxx_flags}"
        lines += [f"build {objects[-1]}: compile {ninja_path(ROOT / source)}", f"  flags = {flags}"]
    lines += [f"build {ninja_path(output)}: link {' '.join(objects)}", ""]
    return "\n".join(lines)


class AnyPythonWheel(bdist_wheel):
    """Tag the wheel for every Python, since the library has no Python ABI."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.root_is_pure = False

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


class SourceDistribution(sdist):
    """Raise an error instead of building a source distribution whose name has the label of a CUDA build."""

    def run(self) -> None:
        if cuda():
            sys.exit("fastcompress: a source distribution does not depend on CUDA: unset FASTCOMPRESS_CUDA")
        super().run()


# The version of a CUDA build ends in a local version label, such as +cu130.
LABEL = f"+cu{cuda().version.replace('.', '')}" if cuda() else ""

setup(
    ext_modules=[Extension("fastcompress._C", sources())],
    cmdclass={"build_ext": NinjaBuildExt, "bdist_wheel": AnyPythonWheel, "sdist": SourceDistribution},
    options={"egg_info": {"tag_build": LABEL}},
)

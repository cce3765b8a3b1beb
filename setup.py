"""Builds the compiled library: one ``_C.so`` on torch's stable ABI, with no Python ABI, by ninja.

torch is imported for its header and library paths only. Environment:
    CXX                     the C++ compiler (g++)
    FASTCOMPRESS_SANITIZE   sanitizers to build with, such as ``address,undefined``
"""

import os
import platform
import subprocess
import sys
from pathlib import Path

import torch
from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
TORCH = Path(torch.__file__).parent
TORCH_TARGET = "0x020A000000000000"  # torch 2.10: the library runs on every later one

# Files of one instruction set; everything else must run on any machine of the platform.
ISA_FLAGS = {
    "row_kernels_avx2.cpp": "-mavx2 -mf16c",
    "row_kernels_avx512.cpp": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mf16c -mprefer-vector-width=512",
}
# gcc 12 does not see that a segment has at least one row, and warns of its own intrinsics' undefined registers.
ROW_KERNEL_FLAGS = "-Wno-maybe-uninitialized -Wno-uninitialized"
X86_64 = platform.machine() in ("x86_64", "AMD64")


def sources() -> list[str]:
    found = sorted((ROOT / "csrc").rglob("*.cpp"))
    return [str(path.relative_to(ROOT)) for path in found if X86_64 or path.name not in ISA_FLAGS]


class NinjaBuildExt(build_ext):
    """Compiles through ninja, for a library that Python loads by path: no ABI tag in its name, no ``PyInit``."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []

    def build_extension(self, ext: Extension) -> None:
        # -ffp-contract=off: the order and rounding of sums are part of the contract (docs/numerics.md).
        cxxflags = (
            "-std=c++17 -O3 -g0 -fPIC -fvisibility=hidden -fvisibility-inlines-hidden "
            f"-ffp-contract=off -fno-math-errno -Wall -Wextra -Wno-unused-parameter "
            f"-DTORCH_TARGET_VERSION={TORCH_TARGET} "
            f"-isystem {TORCH / 'include'} -I{ROOT / 'csrc'}"
        )
        ldflags = (
            f"-shared -L{TORCH / 'lib'} -Wl,--no-as-needed -ltorch -ltorch_cpu -Wl,--as-needed -Wl,--exclude-libs,ALL"
        )
        if sanitizers := os.environ.get("FASTCOMPRESS_SANITIZE"):
            flag = f" -fsanitize={sanitizers} -fno-sanitize-recover=all -fno-omit-frame-pointer"
            cxxflags = cxxflags.replace("-O3 -g0", "-O1 -g") + flag
            ldflags += flag
        if X86_64:
            cxxflags += " -DFASTCOMPRESS_X86_64"
        lines = [
            f"cxx = {os.environ.get('CXX', 'g++')}",
            "rule compile",
            "  command = $cxx -MD -MF $out.d -c $in -o $out $flags",
            "  depfile = $out.d",
            "  description = compile $in",
            "rule link",
            f"  command = $cxx $in -o $out {ldflags}",
            "  description = link $out",
        ]
        objects = []
        for source in ext.sources:
            objects.append(source.replace("/", "_") + ".o")
            flags = f"{cxxflags} {ISA_FLAGS.get(Path(source).name, '')}"
            if "/row_kernels_" in source:
                flags += f" {ROW_KERNEL_FLAGS}"
            lines += [f"build {objects[-1]}: compile {ROOT.resolve() / source}", f"  flags = {flags}"]
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        lines += [f"build {output}: link {' '.join(objects)}", ""]

        build = Path(self.build_temp)
        build.mkdir(parents=True, exist_ok=True)
        output.parent.mkdir(parents=True, exist_ok=True)
        (build / "build.ninja").write_text("\n".join(lines))
        verbose = ["-v"] if os.environ.get("VERBOSE") else []
        subprocess.check_call([sys.executable, "-m", "ninja", "-C", str(build), *verbose])


class AnyPythonWheel(bdist_wheel):
    """One wheel for every Python: the library has no Python ABI."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.root_is_pure = False

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[Extension("fastcompress._C", sources())],
    cmdclass={"build_ext": NinjaBuildExt, "bdist_wheel": AnyPythonWheel},
)

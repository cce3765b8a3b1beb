"""Check that the compiled library needs only C functions of torch's stable ABI and the system's libraries.

With any other symbol a wheel would work only with one build of torch or one version of Python.
"""

from __future__ import annotations

import functools
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
#: Prefixes of the versioned symbols of the system, from which auditwheel derives the oldest supported system.
_SYSTEM = ("GLIBC_", "GLIBCXX_", "CXXABI_", "GCC_")
#: Weak symbols of the compiler that most systems lack.
_COMPILER = {"_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable", "__gmon_start__"}
#: Where torch declares the C functions of its stable ABI.
HEADERS = (
    "stable/c/shim.h",
    "inductor/aoti_torch/c/shim.h",
    "inductor/aoti_torch/generated/c_shim_aten.h",
    "inductor/aoti_torch/generated/c_shim_cpu.h",
    "inductor/aoti_torch/generated/c_shim_cuda.h",
)
_LIBRARIES = re.compile(r"lib(torch|torch_cpu|stdc\+\+|gcc_s|c|m|pthread|dl|rt)\.so.*|ld-linux.*")


@functools.cache
def stable_functions(oldest: bool = True) -> frozenset[str]:
    """Return the names that torch's headers declare for its stable ABI.

    Args:
        oldest: Return only those that the oldest supported torch has.
    """
    import torch

    include = Path(torch.__file__).parent / "include"
    target = re.search(r'^TORCH_TARGET = "(0x\w+)"', (ROOT / "setup.py").read_text(encoding="utf-8"), re.MULTILINE)
    assert target is not None
    source = "".join(f"#include <torch/csrc/{header}>\n" for header in HEADERS)
    # The headers hide newer functions from a library that targets an older torch.
    defined = ["-DUSE_CUDA", *([f"-DTORCH_TARGET_VERSION={target[1]}"] if oldest else [])]
    command = ["g++", "-std=c++17", "-E", "-P", "-x", "c++", *defined, f"-I{include}", "-"]
    text = subprocess.run(command, input=source, check=True, stdout=subprocess.PIPE, text=True).stdout
    return frozenset(re.findall(r"\b(?:aoti_)?torch_\w+", text))


def problems(library: Path) -> list[str]:
    """Return the undefined symbols and needed libraries that a wheel for every Python and torch must not have."""
    names = subprocess.check_output(["nm", "-D", "--undefined-only", "--with-symbol-versions", library], text=True)
    found = []
    for line in names.splitlines():
        kind, symbol = line.split()[-2:]
        name, _, version = symbol.partition("@")
        if version.lstrip("@").startswith(_SYSTEM) or (kind != "U" and name in _COMPILER):
            continue
        if kind == "w" and re.fullmatch(r"(aoti_)?torch_\w+", name):
            continue  # weak, for functions of newer torch versions and of CUDA builds; the library tests for it
        if name not in stable_functions():
            known = name in stable_functions(oldest=False)
            why = ", which the oldest supported torch lacks" if known else ""
            found.append(f"undefined symbol {symbol}{why}")
        elif "cuda" in name and name != "aoti_torch_device_type_cuda":
            found.append(f"undefined symbol {symbol}, which a torch without CUDA lacks")
    dynamic = subprocess.check_output(["readelf", "-d", library], text=True)
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", dynamic)
    if "libtorch.so" not in needed:
        found.append("libtorch.so is not a needed library, so that libtorch_cuda is not loaded")
    return found + [f"needed library {name}" for name in needed if not _LIBRARIES.fullmatch(name)]

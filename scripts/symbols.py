"""What the compiled library asks of others: C functions of torch's stable ABI and the system's libraries, nothing else.

A symbol beyond those ties a wheel to one build of torch, or to one Python.
"""

from __future__ import annotations

import functools
import re
import subprocess
from pathlib import Path

#: Versioned symbols come from these; auditwheel reads off them how old a system may be.
_SYSTEM = ("GLIBC_", "GLIBCXX_", "CXXABI_", "GCC_")
#: The compiler's own, absent from most systems, and weak.
_COMPILER = {"_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable", "__gmon_start__"}
_LIBRARIES = re.compile(r"lib(torch|torch_cpu|stdc\+\+|gcc_s|c|m|pthread|dl|rt)\.so.*|ld-linux.*")


@functools.cache
def stable_functions() -> frozenset[str]:
    """Names that torch's headers declare for its stable ABI."""
    import torch

    csrc = Path(torch.__file__).parent / "include" / "torch" / "csrc"
    headers = [
        *(csrc / "stable" / "c").glob("*.h"),
        *(csrc / "inductor" / "aoti_torch" / "c").glob("*.h"),
        *(csrc / "inductor" / "aoti_torch" / "generated").glob("*.h"),
    ]
    return frozenset(
        name for path in headers for name in re.findall(r"\b(?:aoti_)?torch_\w+", path.read_text(encoding="utf-8"))
    )


def problems(library: Path) -> list[str]:
    """Undefined symbols and needed libraries of ``library`` that a wheel for any Python and torch must not have."""
    names = subprocess.check_output(["nm", "-D", "--undefined-only", "--with-symbol-versions", library], text=True)
    found = []
    for line in names.splitlines():
        kind, symbol = line.split()[-2:]
        name, _, version = symbol.partition("@")
        if version.lstrip("@").startswith(_SYSTEM) or (kind != "U" and name in _COMPILER):
            continue
        if name not in stable_functions():
            found.append(f"undefined symbol {symbol}")
        elif "cuda" in name and name != "aoti_torch_device_type_cuda" and kind == "U":
            found.append(f"undefined symbol {symbol}, which a torch without CUDA has not")
    dynamic = subprocess.check_output(["readelf", "-d", library], text=True)
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", dynamic)
    if "libtorch.so" not in needed:
        found.append("libtorch.so is not needed: nothing brings libtorch_cuda along")
    return found + [f"needed library {name}" for name in needed if not _LIBRARIES.fullmatch(name)]

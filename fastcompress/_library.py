"""Loads the compiled library, ``_C.so``, which adds kernels to the ops of ``schemas.py``."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch

from fastcompress.reference import OPS
from fastcompress.schemas import LIBRARY

LIBRARY_PATH = Path(__file__).with_name("_C.so")


def _load() -> bool:
    if LIBRARY_PATH.exists():
        try:
            torch.ops.load_library(str(LIBRARY_PATH))
            return True
        except OSError as error:
            reason = f"{LIBRARY_PATH} does not load ({error})"
    else:
        reason = f"{LIBRARY_PATH} is missing"
    warnings.warn(
        f"fastcompress: {reason}; every op runs on the pure PyTorch reference, which is correct but slow. "
        "Install a wheel, or build from a checkout with `make build`.",
        RuntimeWarning,
        stacklevel=3,
    )
    return False


# The alias key covers every device; a kernel that the compiled library has for a device takes precedence.
for _name, _op in OPS.items():
    LIBRARY.impl(_name, _op, "CompositeExplicitAutograd")

#: Whether the compiled kernels are there.
COMPILED = _load()

"""Load the compiled library, ``_C.so``, which adds kernels to the ops of ``schemas.py``."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch

import fastcompress.dispatch.schemas  # noqa: F401  (defines the ops)

LIBRARY_PATH = Path(__file__).parents[1] / "_C.so"


def _load() -> str | None:
    """Load the library; return why that failed, or ``None``."""
    if not LIBRARY_PATH.exists():
        return f"{LIBRARY_PATH} is missing"
    try:
        torch.ops.load_library(str(LIBRARY_PATH))
    except OSError as error:
        return f"{LIBRARY_PATH} cannot be loaded ({error})"
    return None


#: Reason why the compiled library is not loaded, or ``None`` if it is.
PROBLEM = _load()

#: True if the compiled library is loaded.
COMPILED = PROBLEM is None

if not COMPILED:
    warnings.warn(
        f"fastcompress: {PROBLEM}; every op runs on the pure PyTorch reference, which is correct but slow. "
        "Install a wheel, or build from a checkout with `make build`.",
        RuntimeWarning,
        stacklevel=2,
    )


def cuda_archs() -> str:
    """Return the CUDA architectures of the library, such as ``"80;90;100;120+PTX"``; empty without CUDA kernels."""
    return torch.ops.fastcompress.cuda_archs() if COMPILED else ""


def cuda_version() -> str:
    """Return the CUDA toolkit version of the build, such as ``"13.0"``; empty without CUDA kernels."""
    return torch.ops.fastcompress.cuda_version() if COMPILED else ""

"""Loads the compiled library, ``_C.so``, which adds kernels to the ops of ``schemas.py``."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch

import fastcompress.dispatch.schemas  # noqa: F401  (the ops that it adds kernels to)

LIBRARY_PATH = Path(__file__).parents[1] / "_C.so"


def _load() -> str | None:
    if not LIBRARY_PATH.exists():
        return f"{LIBRARY_PATH} is missing"
    try:
        torch.ops.load_library(str(LIBRARY_PATH))
    except OSError as error:
        return f"{LIBRARY_PATH} does not load ({error})"
    return None


#: Why there are no compiled kernels; ``None``: there are.
PROBLEM = _load()

#: Whether the compiled kernels are there.
COMPILED = PROBLEM is None

if not COMPILED:
    warnings.warn(
        f"fastcompress: {PROBLEM}; every op runs on the pure PyTorch reference, which is correct but slow. "
        "Install a wheel, or build from a checkout with `make build`.",
        RuntimeWarning,
        stacklevel=2,
    )


def cuda_archs() -> str:
    """What the library's CUDA kernels were compiled for, such as ``"80;90;100;120+PTX"``; empty when it has none."""
    return torch.ops.fastcompress.cuda_archs() if COMPILED else ""


def cuda_version() -> str:
    """The CUDA toolkit that the library was built with, such as ``"13.0"``; empty when it has no CUDA kernels."""
    return torch.ops.fastcompress.cuda_version() if COMPILED else ""

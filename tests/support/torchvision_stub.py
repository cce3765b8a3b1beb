"""A stand-in for torchvision, which Qwen3-ASR and the Omni models of vLLM import and which audio does not need.

The published torchvision is built for CUDA and does not load beside the CPU build of torch that vLLM's CPU build needs.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from typing import Any


class _Module(types.ModuleType):
    """A module in which every name is an empty class."""

    __path__: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        return (
            importlib.machinery.ModuleSpec(name, self, is_package=True) if name.split(".")[0] == "torchvision" else None
        )

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def install() -> None:
    """Let torchvision be imported from here on if it is not installed."""
    from transformers.utils import is_torchvision_available

    if not is_torchvision_available():  # transformers keeps this answer
        sys.meta_path.append(_Finder())

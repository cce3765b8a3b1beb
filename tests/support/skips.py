"""Hooks by which the ``conftest.py`` of a folder declares the packages that its tests need."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Collection
from pathlib import Path

import pytest


class _SkippedModule(pytest.Module):
    """A test file that is reported as skipped and not imported."""

    reason: str

    def collect(self) -> list[pytest.Item]:
        pytest.skip(self.reason, allow_module_level=True)


def skip_without(
    *modules: str, files: Collection[str] | None = None
) -> Callable[[Path, pytest.Collector], pytest.Module | None]:
    """Return the hook ``pytest_pycollect_makemodule`` of a folder whose tests need packages.

    Args:
        modules: Names of the modules.
        files: Names of the test files that need them; ``None`` means every file of the folder.
    """
    missing = [module for module in modules if importlib.util.find_spec(module) is None]

    def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
        if not missing or (files is not None and module_path.name not in files):
            return None
        skipped: _SkippedModule = _SkippedModule.from_parent(parent, path=module_path)
        skipped.reason = f"needs {', '.join(missing)}"
        return skipped

    return pytest_pycollect_makemodule


def only_on_the_cpu(item: pytest.Item) -> None:
    """Skip a test if ``--device`` or ``--backend`` is given. This is the hook ``pytest_itemcollected`` of a folder."""
    if item.config.getoption("--device") or item.config.getoption("--backend"):
        item.add_marker(pytest.mark.skip(reason="runs only on the CPU"))

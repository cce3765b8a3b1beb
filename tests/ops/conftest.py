"""Skip the tests whose packages are not installed, for example on a machine that only runs `make gpu`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.skips import skip_without

_HOOKS = (
    skip_without("numpy", files=("test_adjacent_distance.py", "test_segment_reduce.py")),
    skip_without("numpy", "scipy", files=("test_select_boundaries.py",)),
    skip_without("numpy", "hypothesis", files=("test_integrate_and_fire.py", "test_scalar_rules.py")),
    skip_without("hypothesis", files=("test_concurrency.py", "test_memory.py", "test_properties.py")),
)


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    modules = (hook(module_path, parent) for hook in _HOOKS)
    return next((module for module in modules if module is not None), None)

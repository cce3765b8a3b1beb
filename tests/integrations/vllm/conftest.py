"""Skip the tests that need vLLM where it is not installed, and run the others as usual."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from tests.support.skips import skip_without

#: Files that need vLLM. The others run wherever the tests of the integrations do.
SERVED = ("test_processing.py", "test_models.py", "test_voxtral.py", "test_engine.py", "test_server.py")
INSTALLED = importlib.util.find_spec("vllm") is not None
_skip = skip_without("vllm", files=SERVED)


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    if INSTALLED:  # the environment of vLLM has no peft, which these tests do not need
        return pytest.Module.from_parent(parent, path=module_path)
    return _skip(module_path, parent)

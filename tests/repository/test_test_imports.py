"""No test module imports another one: what several tests use is in ``tests/support`` or in a ``conftest.py``."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import ROOT


def trees_of(source: str) -> Iterator[ast.AST]:
    """Yield the syntax tree of a file, and those of the scripts in its strings, which other processes run."""
    tree = ast.parse(source)
    yield tree
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and "import" in node.value:
            try:
                yield ast.parse(node.value)
            except (SyntaxError, ValueError):
                continue


def imported_tests(file: Path) -> Iterator[str]:
    """Yield the names of the test modules, other than itself, that a file imports."""
    for tree in trees_of(file.read_text(encoding="utf-8")):
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [f"{node.module or ''}.{alias.name}" for alias in node.names]
            else:
                continue
            for name in names:
                modules = [part for part in name.split(".") if part.startswith("test_") and part != file.stem]
                if modules and (name.startswith("tests.") or getattr(node, "level", 0)):
                    yield name


def test_no_test_module_imports_another_one():
    files = sorted((ROOT / "tests").rglob("*.py"))
    assert len(files) > 100
    assert {str(file.relative_to(ROOT)): found for file in files if (found := [*imported_tests(file)])} == {}


@pytest.mark.parametrize(
    ("text", "count"),  # the texts import this module, since the test above reads them as scripts
    [
        ("from tests.lalm.test_test_imports import build, batch\n", 2),
        ("from tests.lalm import test_test_imports\n", 1),
        ("import tests.lalm.test_test_imports\n", 1),
        ("def f():\n    from .test_test_imports import build\n", 1),
        ("SCRIPT = '''\nfrom tests.lalm.test_test_imports import build\n'''\n", 1),
        ("from tests.support.decoders import samples\nfrom torch.testing import test_utilities\n", 0),
        ("SCRIPT = 'from tests.lalm.test_other import f; f()'\n", 0),  # itself
        ("MESSAGE = 'import tests.lalm.test_test_imports fails'\n", 0),
    ],
)
def test_an_import_of_a_test_is_found(text: str, count: int, tmp_path: Path):
    file = tmp_path / "test_other.py"
    file.write_text(text)
    assert len([*imported_tests(file)]) == count

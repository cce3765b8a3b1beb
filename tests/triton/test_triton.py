"""Run the tests in ``tests/triton/interpreted`` in processes with ``TRITON_INTERPRET=1``."""

from __future__ import annotations

import ast
import os
import subprocess
import sys

import pytest
import triton

from fastcompress.dispatch import backends
from tests.support import ROOT, processes
from tests.support.triton_versions import WHY_NOT, no_interpreter

FILES = [ROOT / "tests" / "triton" / "interpreted" / f"{name}.py" for name in ("segment_ops", "pooling", "contracts")]


pytestmark = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)


def read_tests() -> tuple[list[str], list[str]]:
    """Return the names of the quick and of the slow tests in the files, without importing them."""
    quick, slow = [], []
    for file in FILES:
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                marked = any("slow" in ast.unparse(decorator) for decorator in node.decorator_list)
                (slow if marked else quick).append(f"{file}::{node.name}")
    return quick, slow


QUICK, SLOW = read_tests()
#: Number of processes for the quick tests; with more, starting them would take longer than is saved.
SHARES = 2


def in_process(command: list[str], timeout: float = 280) -> subprocess.CompletedProcess:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for name in list(environment):
        if name.startswith("PYTEST_"):  # of the outer pytest
            del environment[name]
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout
    )


def run_tests(nodes: list[str], *options: str, timeout: float = 280) -> None:
    run = in_process(["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *options, *nodes], timeout)
    assert run.returncode == 0 and "passed" in run.stdout, run.stdout[-6000:] + run.stderr[-2000:]


@pytest.mark.emulated
@pytest.mark.timeout(900)
@pytest.mark.parametrize("share", range(SHARES))
def test_in_the_interpreter(share: int):
    run_tests(QUICK[share::SHARES], timeout=880)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("share", range(SHARES))
def test_other_cases_in_the_interpreter(share: int):
    """The slow cases of the same tests."""
    run_tests(QUICK[share::SHARES], "--run-slow", "-m", "slow", "--timeout=1200", timeout=1180)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("node", SLOW, ids=lambda node: node.rpartition("::")[2])
def test_in_the_interpreter_in_full(node: str):
    run_tests([node], "--run-slow", "--timeout=1200", timeout=1180)


def test_only_the_kernels_import_triton():
    script = (
        "import sys, fastcompress; assert 'triton.language' not in sys.modules;"
        "from fastcompress.triton import OPS; from fastcompress.reference import OPS as DEFINITION;"
        "assert 'triton.language' in sys.modules;"
        "assert [op for op in DEFINITION if op not in OPS]"
        " == ['pack_map', 'pack_labels']"  # ops over scalars only
    )
    run = processes.run(["-c", script], env=os.environ | {"TRITON_INTERPRET": "1"})
    assert run.returncode == 0, run.stderr


def test_incompatible_versions_of_the_interpreter():
    assert no_interpreter("3.6.0", "2.4.6") == "the interpreter of triton 3.6.0 does not run with numpy 2.4.6"
    assert not no_interpreter("3.6.0", "2.3.5") and not no_interpreter("3.7.1", "2.4.6")
    assert not no_interpreter("3.10.0+git1", "2.10.0")


@pytest.mark.parametrize("word", ["1", "TRUE", "on", "Yes", "y", "0", "false", "", "2"])
def test_values_that_start_the_interpreter(word: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TRITON_INTERPRET", word)
    assert backends._covers_cpu("triton") == triton.knobs.runtime.interpret

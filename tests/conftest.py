"""Poisoned allocations, fixed seeds, and the `slow` marker."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable

import pytest
import torch

import fastcompress
from fastcompress.dispatch.backends import BACKENDS
from tests.support.on_device import on_device
from tests.support.skips import skip_without

pytest_pycollect_makemodule = skip_without("av", "soundfile", "soxr", files=("test_audio.py", "test_audio_file.py"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--run-slow", action="store_true", help="run the long forms of the tests as well")
    parser.addoption("--run-sanitizers", action="store_true", help="run the emulated kernels under sanitizers as well")
    parser.addoption(
        "--emulated",
        metavar="SEED",
        type=int,
        help="run the CUDA kernels, emulated, in place of the CPU's; 0: threads in their order",
    )
    parser.addoption("--device", help="run the ops of CPU tensors on this device, such as cuda")
    parser.addoption("--backend", choices=BACKENDS, help="run every op by this backend")
    parser.addoption("--fuzz-seconds", type=float, help="how long each test of tests/fuzz/test_ops.py looks")


def pytest_configure() -> None:
    """Share the cores among the workers of pytest-xdist: with too many threads tests take ten times as long."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    torch.set_num_threads(max(1, torch.get_num_threads() // workers))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for marker, option in (("slow", "--run-slow"), ("sanitizer", "--run-sanitizers")):
        if config.getoption(option):
            continue
        skip = pytest.mark.skip(reason=f"{marker}: needs {option}")
        for item in items:
            if marker in item.keywords:
                item.add_marker(skip)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Every uninitialized tensor is NaN, or the largest integer, also those that the compiled library allocates through
    torch: what a kernel leaves unwritten shows. (Its own output buffers are covered by tests/csrc/test_isa.py.)"""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True, scope="session")
def cuda_kernels(pytestconfig: pytest.Config):
    """With ``--emulated`` every op of a CPU tensor is the CUDA one. What kernels find wrong is raised at once."""
    seed = pytestconfig.getoption("--emulated")
    if seed is None:
        yield
        return
    from tests.support.cuda_emulation import emulated

    os.environ["FASTCOMPRESS_CHECK"] = "1"
    with emulated(seed):
        yield


@pytest.fixture(autouse=True, scope="session")
def device(pytestconfig: pytest.Config):
    """With ``--device`` every op of a CPU tensor runs there, with ``--backend`` by that backend. What kernels find
    wrong is raised at once. With ``--emulated`` the emulator is the device."""
    name, backend = pytestconfig.getoption("--device"), pytestconfig.getoption("--backend")
    device = torch.device(name) if name else None
    with contextlib.ExitStack() as stack:
        if backend:
            stack.enter_context(fastcompress.backend(backend))
        if device is not None and pytestconfig.getoption("--emulated") is None:
            os.environ["FASTCOMPRESS_CHECK"] = "1"
            stack.enter_context(on_device(device))
        yield device


@pytest.fixture
def fuzz(request: pytest.FixtureRequest) -> Callable[..., None]:
    """``fuzz(check, strategy)``, for as long as ``--fuzz-seconds`` says."""
    from tests.support.fuzzing import fuzz  # not above: hypothesis is not everywhere where the tests of a GPU run

    seconds = request.config.getoption("--fuzz-seconds")
    return functools.partial(fuzz, test=request.node.name, seconds=seconds)


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)

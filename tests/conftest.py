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
    parser.addoption("--run-slow", action="store_true", help="also run the slow tests")
    parser.addoption(
        "--run-emulated", action="store_true", help="run emulated CUDA and interpreted Triton kernels as well"
    )
    parser.addoption("--run-sanitizers", action="store_true", help="also run the emulated kernels under sanitizers")
    parser.addoption(
        "--emulated",
        metavar="SEED",
        type=int,
        help="run emulated CUDA kernels instead of the CPU kernels, with this seed of the order of threads",
    )
    parser.addoption("--device", help="run the ops of CPU tensors on this device, such as cuda")
    parser.addoption("--backend", choices=BACKENDS, help="run every op by this backend")
    parser.addoption("--fuzz-seconds", type=float, help="search time of each test in tests/fuzz/test_ops.py")


def pytest_configure() -> None:
    """Divide the cores among the workers of pytest-xdist: with too many threads tests take ten times as long."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    torch.set_num_threads(max(1, torch.get_num_threads() // workers))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for marker, option in (("slow", "--run-slow"), ("emulated", "--run-emulated"), ("sanitizer", "--run-sanitizers")):
        if config.getoption(option):
            continue
        skip = pytest.mark.skip(reason=f"{marker}: needs {option}")
        for item in items:
            if marker in item.keywords:
                item.add_marker(skip)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fill every uninitialized tensor with NaN or the largest integer, so that elements that a kernel does not write
    are detected. This includes tensors that the compiled library allocates through torch. (tests/csrc/test_isa.py
    covers its own output buffers.)"""
    # torch.use_deterministic_algorithms also imports the compiler, which takes 7 s and few tests need.
    torch._C._set_deterministic_algorithms(True, warn_only=True)
    yield
    torch._C._set_deterministic_algorithms(False)


@pytest.fixture(autouse=True, scope="session")
def cuda_kernels(pytestconfig: pytest.Config):
    """With ``--emulated`` run the CUDA kernels for every op of CPU tensors. The call raises errors of kernels."""
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
    """With ``--device`` run every op of CPU tensors on that device, and with ``--backend`` on that backend. Errors of
    kernels are raised by the call. With ``--emulated`` the emulator is the device."""
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
    """Return the function ``fuzz(check, strategy)``, which runs for ``--fuzz-seconds``."""
    from tests.support.fuzzing import fuzz  # imported here, since machines with a GPU may lack hypothesis

    seconds = request.config.getoption("--fuzz-seconds")
    return functools.partial(fuzz, test=request.node.name, seconds=seconds)


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)

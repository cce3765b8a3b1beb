"""Every op called from many threads at the same time, from forked processes, and from the workers of a DataLoader.

Each test has a time limit, so that a deadlock fails.
"""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import fastcompress as fc
from tests.support import ROOT, processes
from tests.support.calls import CALLS, Call, calls
from tests.support.forking import in_fork
from tests.support.fuzzing import examples
from tests.support.sample_inputs import assert_same_bits, features
from tests.support.slow import some

pytestmark = pytest.mark.skipif(
    "config.getoption('--emulated') is not None or config.getoption('--device')", reason="of the CPU"
)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def large_calls() -> list[Call]:
    """Return calls on megabytes, each of which runs on several threads."""
    x = features("smooth", 6000, 256, torch.float32)
    segments = fc.segment_pool(x).segments
    half = features("smooth", 12_000, 256, torch.bfloat16)
    return [
        Call(fc.segment_pool, {"x": x, "rule": fc.LocalMax()}, ("x",)),
        Call(fc.segment_pool, {"x": half, "rule": fc.Uniform(3)}, ("x",)),
        Call(fc.adjacent_distance, {"x": x}, ("x",)),
        Call(fc.segment_reduce, {"x": x, "segments": segments, "weights": torch.ones(6000)}, ("x", "weights")),
        Call(fc.segment_expand, {"y": x[: len(segments.starts)], "segments": segments}, ("y",)),
        Call(fc.integrate_and_fire, {"x": x, "alpha": torch.full((6000,), 0.3)}, ("x", "alpha")),
        Call(fc.greedy_segments, {"x": x, "threshold": 0.3}),
    ]


@pytest.mark.timeout(240)
def test_many_threads(threads):
    """Eight threads run all ops, forward and backward, in random order, and get the results of one thread."""
    threads(2)
    work = large_calls() + [call for name in CALLS for call in examples(calls(name), 4)]
    expected = [results(call) for call in work]
    order = list(range(len(work))) * 3
    random.Random(0).shuffle(order)
    with ThreadPoolExecutor(8) as pool:
        for i, found in zip(order, pool.map(lambda i: results(work[i]), order), strict=True):
            assert len(found) == len(expected[i])
            for a, b in zip(found, expected[i], strict=True):
                assert_same_bits(a, b, work[i].function.__name__)


def results(call: Call) -> list[Tensor]:
    try:
        return call.gradients()
    except ValueError:  # no row is left to pack
        return []


# Processes


def digest(seed: int) -> list[Tensor]:
    x = features("smooth", 3000, 256, torch.float32, seed).requires_grad_()
    pooled = fc.segment_pool(x, rule=fc.LocalMax())
    (grad,) = torch.autograd.grad(pooled.values.square().sum(), x)
    return [pooled.values.detach().sum(0), pooled.segments.starts, grad.sum(0)]


class Frames(Dataset):
    """A data set that compresses in ``__getitem__``."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> list[Tensor]:
        return digest(index)


def fork_while_threads_call() -> None:
    """Fork repeatedly while other threads are inside ops: no lock of the library may stay locked in the child.

    The child computes on one thread, as the workers of a DataLoader do, since the threads of OpenMP do not survive.
    """
    torch.set_num_threads(2)
    expected = [digest(seed) for seed in range(2)]
    stop = threading.Event()

    def call() -> None:
        while not stop.is_set():
            digest(7)

    def child() -> None:
        torch.set_num_threads(1)
        for seed, wanted in enumerate(expected):
            for a, b in zip(digest(seed), wanted, strict=True):
                assert_same_bits(a, b)
        with fc.backend("reference"):
            fc.segment_pool(features("smooth", 20, 8, torch.float32))

    busy = [threading.Thread(target=call) for _ in range(3)]
    for thread in busy:
        thread.start()
    try:
        for _ in range(6):
            assert in_fork(child) == 0
    finally:
        stop.set()
        for thread in busy:
            thread.join()


def load(start: str) -> None:
    """Assert that workers return what the parent computes, after the parent has started its threads."""
    torch.set_num_threads(2)
    data = Frames()
    expected = [data[i] for i in range(len(data))]
    loader = DataLoader(data, batch_size=None, num_workers=2, multiprocessing_context=start, timeout=100)
    for found, wanted in zip(loader, expected, strict=True):
        for a, b in zip(found, wanted, strict=True):
            assert_same_bits(a, b, start)


def in_another_process(code: str, seconds: float) -> None:
    """Run code in a new process, since this one has further threads, such as those of pytest."""
    code = f"import tests.ops.test_concurrency as t\nif __name__ == '__main__':\n    {code}\n    print('done')"
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    done = processes.run(["-c", code], cwd=ROOT, env=environment, seconds=seconds)
    assert done.returncode == 0 and "done" in done.stdout, done.stderr


@pytest.mark.timeout(240)
def test_fork_while_threads_call():
    in_another_process("t.fork_while_threads_call()", 200)


@pytest.mark.timeout(240)
@pytest.mark.parametrize("start", some(("fork", "forkserver", "spawn"), "fork"))
def test_workers_of_a_data_loader(start: str):
    in_another_process(f"t.load({start!r})", 200)

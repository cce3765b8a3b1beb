"""What the GPU benchmark and the GPU tests need from a device. On the CPU stand-ins take their place in a dry run."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from benchmarks.harness.clock import Samples


def synchronize(device: torch.device) -> None:
    """Wait for everything on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def side_stream(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Make a new stream the current one, after the work that is under way."""
    if device.type != "cuda":
        return contextlib.nullcontext()
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    return torch.cuda.stream(stream)


def delay(device: torch.device, cycles: int = 20_000_000) -> None:
    """Keep the current stream busy for some 10 ms, so that code that fails to wait for it reads too early."""
    if device.type == "cuda":
        torch.cuda._sleep(cycles)


def capture(call: Callable[[], Any], device: torch.device) -> tuple[Callable[[], None], Any]:
    """Capture a CUDA graph of ``call``; return what replays it, and the result that every replay writes.

    The graph is captured on the current stream, or on a new one when that is the default stream, which cannot be
    captured. On the CPU a replay is a call whose tensors are copied into the result.
    """
    if device.type != "cuda":
        result = call()

        def again() -> None:
            for old, new in zip(_tensors(result), _tensors(call()), strict=True):
                old.data.copy_(new)

        return again, result
    default = torch.cuda.current_stream(device) == torch.cuda.default_stream(device)
    with side_stream(device) if default else contextlib.nullcontext():
        for _ in range(3):  # what is set up at the first calls cannot be in a graph
            call()
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(device)
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream(device)):
            result = call()
    torch.cuda.synchronize(device)
    return graph.replay, result


def _tensors(result: Any) -> list[torch.Tensor]:
    leaves = torch.utils._pytree.tree_leaves(result)
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


class Flush:
    """Empties the second-level cache by writing more than it holds."""

    def __init__(self, device: torch.device) -> None:
        size = 1 << 16
        if device.type == "cuda":
            size = max(4 * torch.cuda.get_device_properties(device).L2_cache_size, 256 << 20)
        self._memory = torch.empty(size, dtype=torch.uint8, device=device)

    def __call__(self) -> None:
        self._memory.zero_()


def elapsed(call: Callable[[], Any], flush: Flush, device: torch.device) -> float:
    """Seconds that the device spends on ``call`` with a cold second-level cache, between two events.

    The first event is recorded when the flush has ended, some 100 µs after it was put on the stream, which hides the
    launch of a graph. An eager call that takes longer to launch than to run shows its launching.
    """
    if device.type != "cuda":
        return wall(call, flush, device)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    flush()
    start.record()
    call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def wall(call: Callable[[], Any], flush: Flush, device: torch.device) -> float:
    """Seconds from a call until the device is idle again, including the launch."""
    flush()
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def interleave(
    functions: Mapping[str, Callable[[], Any]],
    flush: Flush,
    device: torch.device,
    reps: int,
    max_seconds: float = 10.0,
    how: Callable[[Callable[[], Any], Flush, torch.device], float] = elapsed,
) -> dict[str, Samples]:
    """Time all functions in rounds, in a new random order in each round, after calls to warm up.

    A function that has used ``max_seconds`` is left out of later rounds, but not of the first three.
    """
    for function in functions.values():
        for _ in range(3 if device.type == "cuda" else 1):
            function()
    synchronize(device)
    order, generator = list(functions), random.Random(0)
    samples = {name: Samples() for name in functions}
    for rep in range(reps):
        generator.shuffle(order)
        for name in order:
            if rep < 3 or sum(samples[name].quiet) < max_seconds:
                samples[name].quiet.append(how(functions[name], flush, device))
    return samples


def peak(call: Callable[[], Any], device: torch.device) -> int | None:
    """Bytes that a call allocates at most; ``None`` on the CPU."""
    if device.type != "cuda":
        return None
    synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    return torch.cuda.max_memory_allocated(device) - before

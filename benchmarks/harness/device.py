"""What the GPU benchmark and the GPU tests need from a device. On the CPU stand-ins take their place in a dry run."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

from benchmarks.harness.clock import Call, Disturbance, Samples


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
            for old, new in zip(_pytree.tree_leaves(result), _pytree.tree_leaves(call()), strict=True):
                if isinstance(old, Tensor):
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


class DeviceClock:
    """Takes the seconds that the device spends on a call with a cold second-level cache, between two events.

    The first event is recorded when the flush of the cache has ended, some 100 µs after it was put on the stream, which
    hides the launch of a graph. An eager call that takes longer to launch than to run shows its launching.

    Args:
        device: Device to time.
        wall: Whether to time until the device is idle again instead, including the launch, as is done on the CPU.
    """

    def __init__(self, device: torch.device, wall: bool = False) -> None:
        size = 1 << 16
        if device.type == "cuda":
            size = max(4 * torch.cuda.get_device_properties(device).L2_cache_size, 256 << 20)
        self._memory = torch.empty(size, dtype=torch.uint8, device=device)
        self._device, self._wall = device, wall or device.type != "cuda"

    def __call__(self, call: Call, numbers: Iterator[int], samples: Samples, noted: Disturbance) -> None:
        number = next(numbers)
        self._memory.zero_()  # writes more than the cache holds
        if self._wall:
            synchronize(self._device)
            begin = time.perf_counter()
            call(number)
            synchronize(self._device)
            seconds = time.perf_counter() - begin
        else:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call(number)
            end.record()
            end.synchronize()
            seconds = float(start.elapsed_time(end)) / 1e3
        samples.quiet.append(seconds)
        noted.samples += 1


def peak(call: Callable[[], Any], device: torch.device) -> int | None:
    """Return the peak of the bytes that a call allocates; ``None`` on the CPU."""
    if device.type != "cuda":
        return None
    synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    return torch.cuda.max_memory_allocated(device) - before

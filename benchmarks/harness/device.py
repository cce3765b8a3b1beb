"""What the GPU benchmark and the GPU tests ask of a device. On the CPU stand-ins take part, so that both run there."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any

import torch


def synchronize(device: torch.device) -> None:
    """Waits for everything."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def side_stream(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """A stream that is not the default one, as the current one. It starts behind what is under way."""
    if device.type != "cuda":
        return contextlib.nullcontext()
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    return torch.cuda.stream(stream)


def delay(device: torch.device, cycles: int = 20_000_000) -> None:
    """Keeps the current stream busy, some 10 ms, so that whoever does not wait for it is early."""
    if device.type == "cuda":
        torch.cuda._sleep(cycles)


def capture(call: Callable[[], Any], device: torch.device) -> tuple[Callable[[], None], Any]:
    """A CUDA graph of ``call``: what replays it, and the result that every replay writes.

    Captured on the current stream, or on a new one when that is the default stream, which cannot be captured. On the
    CPU a replay is a call whose tensors are copied into the result.
    """
    if device.type != "cuda":
        result = call()

        def again() -> None:
            for old, new in zip(_tensors(result), _tensors(call()), strict=True):
                old.data.copy_(new)

        return again, result
    default = torch.cuda.current_stream(device) == torch.cuda.default_stream(device)
    with side_stream(device) if default else contextlib.nullcontext():
        for _ in range(3):  # whatever is set up at the first calls cannot be in a graph
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


def elapsed(call: Callable[[], Any], flush: Flush, device: torch.device, reps: int) -> list[float]:
    """Seconds that the device spends on ``call``, a number a repetition, each with a cold second-level cache.

    Between two events: the first comes when the flush has ended, some 100 µs after it was put on the stream, so a
    graph's launch is hidden behind it. An eager call that is slower to launch than to run shows its launching.
    """
    if device.type != "cuda":
        return [wall(call, flush, device) for _ in range(reps)]
    seconds = []
    for _ in range(reps):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush()
        start.record()
        call()
        end.record()
        end.synchronize()
        seconds.append(start.elapsed_time(end) / 1e3)
    return seconds


def wall(call: Callable[[], Any], flush: Flush, device: torch.device) -> float:
    """Seconds from a call until the device is idle again, launching included."""
    flush()
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start

"""The one harness: check every implementation, time those that are right in turn, record each measurement.

The directions are the forward pass, and forward and backward together. The CPU rotates through inputs that are in no
cache. On a GPU device times of replays of a CUDA graph are taken, each with a cold second-level cache; an
implementation that reads sizes from the device cannot be in a graph and is timed between events.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor

import fastcompress as fc
from benchmarks.harness import clock, device, machine
from benchmarks.harness.bandwidth_bound import BandwidthBound
from benchmarks.harness.cases import random_bytes, rotation
from benchmarks.results import BOTH, BOUND, CLONE, DTYPES, FORWARD, MIX, OURS, Recorder

TRITON = "triton"
#: Torch dtypes by the short names that the command takes.
TORCH_DTYPES: dict[str, torch.dtype] = {short: getattr(torch, name) for name, short in DTYPES.items()}

#: Takes the tensor that gets a gradient and the rest of the batch; returns a tensor, or an object whose ``values`` are.
Form = Callable[[Any, Any], Any]


class WrongResult(Exception):
    """An implementation that does not do the job."""


@dataclass(frozen=True)
class Implementation:
    """One way to do the job.

    Attributes:
        name: Name of the row.
        group: Kind of implementation; ``fastcompress`` for ours.
        form: What is timed.
        graph: A form for a CUDA graph, whose result has the size of an upper bound.
        backend: Backend of the library to run on.
        padded: Whether it takes the padded input.
        module: Package that it needs.
    """

    name: str
    group: str
    form: Form
    graph: Form | None = None
    backend: str | None = None
    padded: bool = False
    module: str | None = None

    @property
    def available(self) -> bool:
        """Whether its package is installed."""
        return self.module is None or importlib.util.find_spec(self.module) is not None

    @property
    def ours(self) -> bool:
        """Whether it is the library."""
        return self.group in (OURS, TRITON)


@dataclass
class Bench:
    """Options of a run, and where its measurements go.

    Attributes:
        device: Device of the tensors.
        threads: Numbers of threads; ``[0]`` on a GPU.
        dtypes: Short names of dtypes.
        cases: Names of cases; all when ``None``.
        baselines: Texts; a baseline takes part if its name has one of them. All when ``None``.
        quick: Whether to measure small cases only.
        dry: Whether the harness of the GPU runs on the CPU, on tiny shapes: nothing is measured.
        bound: Probe of the bandwidth bound; ``None`` leaves it out.
        cache: Bytes of the last-level cache.
    """

    recorder: Recorder
    device: torch.device = torch.device("cpu")
    threads: Sequence[int] = (1,)
    dtypes: Sequence[str] = ("fp32", "bf16")
    cases: Sequence[str] | None = None
    baselines: Sequence[str] | None = None
    quick: bool = False
    dry: bool = False
    reps: int = 15
    tries: int = clock.TRIES
    bound: BandwidthBound | None = None
    cache: int = field(default_factory=machine.last_level_cache)

    @property
    def on_gpu(self) -> bool:
        """Whether the harness of the GPU is used."""
        return self.device.type == "cuda" or self.dry

    def settings(self, dtypes: Sequence[str] | None = None) -> Iterator[tuple[torch.dtype, int]]:
        """Yield every dtype with every number of threads."""
        for dtype in dtypes or self.dtypes:
            for threads in self.threads:
                yield TORCH_DTYPES[dtype], threads

    def wants(self, implementation: Implementation) -> bool:
        """Return whether an implementation takes part."""
        wanted = self.baselines
        return implementation.ours or wanted is None or any(text in implementation.name for text in wanted)

    def rotation(self, x: Tensor) -> list[Tensor]:
        """Copy an input to rotate through; on a GPU, whose cache is emptied instead, return it alone."""
        return [x] if self.on_gpu else rotation(x, self.cache)


#: Checks the result of an implementation, by its name: takes the input, the result, and the gradient that goes in and
#: the one that comes out, if there are any. Returns fields to write with the measurements, or raises WrongResult.
Check = Callable[[str, Any, Any, Tensor | None, Tensor | None], dict[str, Any]]


@dataclass
class Job:
    """One table to measure.

    Attributes:
        suite, case, dtype, threads: Setting of the table.
        implementations: Who takes part, ours among them.
        check: Function that refuses wrong results.
        xs: Inputs of equal values in different memory, to rotate through.
        batch: What a form takes as the second argument.
        padded: The inputs of implementations that take padded ones.
        grads: Flat gradients to start backward passes from; empty to time the forward pass only.
        both: Runs a form on an input forward and backward; by default the gradient of the input is taken.
        moved: Bytes to read and write, by direction.
        bounds: Function that returns calls of the bandwidth bound on the CPU, by kind of memory.
        strict: Whether a wrong baseline stops the suite.
        calls: Calls per sample.
        recall: Bytes of new memory to make ready before a sample.
        reps, max_seconds: Most rounds, and seconds after which an implementation is left out of further rounds.
        wall: Whether a GPU is timed from the call until it is idle, for implementations that wait for it.
        peak: Function of an implementation's name and a direction that returns the peak memory of a call on the CPU.
        details: Fields written with every measurement.
    """

    suite: str
    case: str
    dtype: torch.dtype
    threads: int
    implementations: Sequence[Implementation]
    check: Check
    xs: Sequence[Any] = (None,)
    batch: Any = None
    padded: Sequence[Any] = ()
    grads: Sequence[Tensor] = ()
    both: Callable[[Form, Any], Any] | None = None
    moved: Mapping[str, int] = field(default_factory=dict)
    bounds: Callable[[BandwidthBound, bool], Mapping[str, Callable[[int], Any]]] | None = None
    strict: bool = False
    calls: int = 1
    recall: int = 0
    reps: int = 1 << 30
    max_seconds: float = 10.0
    wall: bool = False
    peak: Callable[[str, str], int | None] | None = None
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def directions(self) -> tuple[str, ...]:
        """What is timed."""
        return (FORWARD, BOTH) if self.grads or self.both else (FORWARD,)

    def run(self, form: Form, x: Any, i: int) -> tuple[Any, Tensor | None, Tensor | None]:
        """Run forward and backward; return the result, the gradient that goes in and the one that comes out."""
        if self.both:
            return self.both(form, x), None, None
        result = form(x, self.batch)
        values: Tensor = result if isinstance(result, Tensor) else result.values
        grad = self.grads[i % len(self.grads)][: values.numel()].view(values.shape)
        return result, grad, torch.autograd.grad(values, x, grad)[0]

    def function(self, implementation: Implementation, direction: str, graph: bool = False) -> Callable[[int], Any]:
        """Return what is timed, as a function of a running number that picks the buffers."""
        xs = self.padded if implementation.padded else self.xs
        form = implementation.graph if graph and implementation.graph else implementation.form
        leaves = [x.detach().requires_grad_() for x in xs if direction == BOTH and self.grads] or xs

        def function(i: int) -> Any:
            if direction == FORWARD:
                return form(xs[i % len(xs)], self.batch)
            return self.run(form, leaves[i % len(leaves)], i)

        return fc.backend(implementation.backend)(function) if implementation.backend else function


def _check(job: Job, implementation: Implementation, where: torch.device) -> dict[str, Any]:
    """Check an implementation and return its fields; raises whatever goes wrong."""
    details: dict[str, Any] = {}
    on_device = where if where.type == "cuda" else contextlib.nullcontext()  # the checks make their own tensors
    x = (job.padded if implementation.padded else job.xs)[0]
    for graph in (False, True) if implementation.graph else (False,):
        with torch.no_grad():
            result = job.function(implementation, FORWARD, graph)(0)
        with on_device:
            details |= job.check(
                f"{implementation.name}, in a graph" if graph else implementation.name, x, result, None, None
            )
    if BOTH in job.directions:
        result, grad, grad_x = job.function(implementation, BOTH)(0)
        with on_device:
            job.check(implementation.name, x, result, grad, grad_x)
    return details


def admit(bench: Bench, job: Job) -> dict[str, tuple[Implementation, dict[str, Any]]]:
    """Check the implementations, ours first, and record which are left out and why.

    Returns:
        The implementations that are right, and fields of their measurements, by name.

    Raises:
        WrongResult: Ours is wrong or fails, so that nothing can be compared; or another is wrong in a strict job.
    """
    admitted = {}
    for implementation in sorted(filter(bench.wants, job.implementations), key=lambda one: one.group != OURS):
        reason = "" if implementation.available else f"{implementation.module} is not installed"
        if not reason:
            try:
                admitted[implementation.name] = implementation, _check(job, implementation, bench.device)
            except Exception as error:  # code of others: name it and continue
                kind = "wrong" if isinstance(error, WrongResult) else f"fails: {type(error).__name__}"
                reason = f"{kind}: {error}".split("\n", 1)[0]
                if implementation.ours or (job.strict and isinstance(error, WrongResult)):
                    raise WrongResult(f"{job.suite}, {job.case}: {implementation.name}: {reason}") from error
        if reason:
            _record(bench, job, FORWARD, implementation.name, implementation.group, {"not_timed": reason})
    return admitted


def compare(bench: Bench, job: Job) -> list[dict[str, Any]]:
    """Measure one job in every direction.

    Raises:
        WrongResult: See ``admit``.
    """
    if job.threads:
        torch.set_num_threads(job.threads)
    admitted = admit(bench, job)
    found = []
    for direction in job.directions:
        with torch.set_grad_enabled(direction == BOTH):
            timed = _time(bench, job, [implementation for implementation, _ in admitted.values()], direction)
        table = []
        for name, fields in sorted(timed.items(), key=lambda item: float(item[1]["median"])):
            group = "clone" if name in (CLONE, MIX) else BOUND
            if name in admitted:
                group, fields = admitted[name][0].group, fields | admitted[name][1]
            table.append(_record(bench, job, direction, name, group, fields | {"moved": job.moved.get(direction)}))
        print(table_text(table), end="\n\n", flush=True)
        found += table
    return found


def _record(bench: Bench, job: Job, direction: str, name: str, group: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    dtype = str(job.dtype).removeprefix("torch.")
    fields = job.details | dict(fields)
    return bench.recorder.add(job.suite, job.case, name, group, direction, dtype, job.threads, **fields)


def _time(
    bench: Bench, job: Job, implementations: Sequence[Implementation], direction: str
) -> dict[str, dict[str, Any]]:
    """Time implementations and bounds in turn, and return the fields of each by name."""
    backward, moved, on_cuda = direction == BOTH, job.moved.get(direction), bench.device.type == "cuda"
    clocked: clock.Clock = clock.CpuClock(job.calls, bench.tries, job.recall)
    if bench.on_gpu:
        clocked = device.DeviceClock(bench.device, job.wall)
    details: dict[str, dict[str, Any]] = {}
    with device.side_stream(bench.device):  # a backward pass runs where its forward pass did, and can be captured there
        functions = {one.name: job.function(one, direction, graph=bench.on_gpu) for one in implementations}
        if bench.on_gpu:
            for one in implementations:
                functions[one.name], details[one.name] = _in_graph(bench, job, one, functions[one.name])
        if bench.bound is not None and job.bounds is not None:
            for kind, bound in job.bounds(bench.bound, backward).items():
                functions[f"{BOUND}, {kind}"] = bound
        if moved is not None and not backward and job.calls == 1:
            sources = bench.rotation(random_bytes(moved // 2, bench.device))
            functions[CLONE] = lambda i: sources[i % len(sources)].clone()
            if bench.on_gpu:
                parts = [random_bytes(moved // 16 * 4, bench.device, seed).view(torch.float32) for seed in range(3)]
                functions[MIX] = lambda _: torch.addcmul(*parts)
        warm, reps = 3 if on_cuda else 1, min(bench.reps, job.reps)
        samples, disturbance = clock.interleave(functions, reps, clocked, job.max_seconds, warm)
        timed = {name: sample.fields() | vars(disturbance) | details.get(name, {}) for name, sample in samples.items()}
        if job.peak is not None and not bench.dry:
            for name, fields in timed.items():
                on_gpu = device.peak(functools.partial(functions[name], 0), bench.device) if on_cuda else None
                fields["peak_bytes"] = on_gpu if on_cuda else job.peak(name, direction)
        if bench.on_gpu and not backward and not job.wall:  # end to end, including launch and wait
            calls = {one.name: job.function(one, direction) for one in implementations}
            until_idle = device.DeviceClock(bench.device, wall=True)
            for name, sample in clock.interleave(calls, reps, until_idle, job.max_seconds, warm)[0].items():
                timed[name]["call"] = sample.fields()["median"]
    return timed


def _in_graph(
    bench: Bench, job: Job, implementation: Implementation, function: Callable[[int], Any]
) -> tuple[Callable[[int], Any], dict[str, Any]]:
    """Return what to time on a GPU, a replay if the implementation can be in a graph, and how."""
    if implementation.graph is None:
        return function, {"how": "wall" if job.wall else "events"}
    try:
        replay, _ = device.capture(functools.partial(function, 0), bench.device)
    except RuntimeError as error:
        return function, {"how": "events", "no_graph": str(error).split("\n", 1)[0]}
    return lambda _: replay(), {"how": "graph" if bench.device.type == "cuda" else "no graph"}


def table_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Format a table for the terminal."""
    one = rows[0]
    title = [one["suite"], one["case"], one["dtype"], one["direction"], f"{one['threads']} thr"]
    ours = next((row["median"] for row in rows if row["group"] == OURS), None)
    lines = []
    for row in rows:
        median, moved = row["median"], row.get("moved")
        times = [row[key] * 1e3 if key in row else None for key in ("median", "p10", "p90")]
        rates = [moved / median / 1e9 if moved else None, median / ours if ours else None]
        lines.append([row["implementation"], *times, row.get("reps"), *rates])
    head = [", ".join(title), "ms", "p10", "p90", "reps", "GB/s", "x ours"]
    return tabulate(lines, head, floatfmt=("", ".3f", ".3f", ".3f", "", ".1f", ".2f"), missingval="")

"""The one harness: check every contender, time those that are right in turn, record each measurement.

On the CPU the directions are the forward pass, and forward and backward together. On a GPU they are forward and
backward on their own: device times of replays of a CUDA graph, each with a cold second-level cache. A contender that
reads sizes from the device cannot be in a graph and is timed between events.
"""

from __future__ import annotations

import contextlib
import importlib.util
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor

import fastcompress as fc
from benchmarks.harness import clock, device
from benchmarks.harness.bandwidth_bound import BandwidthBound
from benchmarks.harness.cases import Batch, buffer_count
from benchmarks.harness.clock import Disturbance, Samples
from benchmarks.measurement import BACKWARD, BOTH, BOUND, CLONE, DTYPES, FORWARD, OURS, Recorder

TRITON = "triton"
#: Group of the copy by PyTorch.
COPY = "clone"
#: Torch dtypes by the short names that the command takes.
TORCH_DTYPES: dict[str, torch.dtype] = {short: getattr(torch, name) for name, short in DTYPES.items()}


class WrongResult(Exception):
    """A contender that does not do the job."""


@dataclass(frozen=True)
class Contender:
    """One way to do the job.

    Attributes:
        name: Name of the row.
        group: Kind of contender; ``fastcompress`` for ours.
        build: Function that returns the call to time; called again in each setting. The call takes a batch and returns
            a tensor, or an object whose ``values`` are one.
        graph: A form for a CUDA graph, whose result has the size of an upper bound.
        both: Forward and backward in one call, for a contender whose gradient is not that of the batch's leaf.
        backend: Backend of the library to run on.
        padded: Whether it takes the padded batch.
        module: Package that it needs.
    """

    name: str
    group: str
    build: Callable[[], Callable[[Any], Any]]
    graph: Callable[[Any], Any] | None = None
    both: Callable[[Any], Any] | None = None
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
        cases, contenders: Names of cases, and texts of which names of contenders have one; all when ``None``.
        dry: Whether the harness of the GPU runs on the CPU, on tiny shapes: nothing is measured.
        deadline: Time, by ``time.monotonic``, from which contenders are left out.
        bound: Probe of the bandwidth bound; ``None`` leaves it out.
        most: Most bytes of input in fp32 of a case of ``scaling``.
    """

    recorder: Recorder
    device: torch.device = torch.device("cpu")
    threads: Sequence[int] = (1,)
    dtypes: Sequence[str] = ("fp32", "bf16")
    cases: Sequence[str] | None = None
    contenders: Sequence[str] | None = None
    quick: bool = False
    dry: bool = False
    reps: int = 15
    tries: int = clock.TRIES
    max_seconds: float = 10.0
    deadline: float = float("inf")
    bound: BandwidthBound | None = None
    cache: int = 32 << 20
    most: float | None = None

    @property
    def on_gpu(self) -> bool:
        """Whether the harness of the GPU is used."""
        return self.device.type == "cuda" or self.dry

    def settings(self, dtypes: Sequence[str] | None = None) -> Iterator[tuple[torch.dtype, int]]:
        """Every dtype with every number of threads."""
        for dtype in dtypes or self.dtypes:
            for threads in self.threads:
                yield TORCH_DTYPES[dtype], threads

    def wants(self, contender: Contender) -> bool:
        """Whether a contender takes part."""
        return contender.ours or self.contenders is None or any(text in contender.name for text in self.contenders)


@dataclass
class Job:
    """One table to measure. Suites override ``check`` and ``moved``.

    Attributes:
        suite, case, dtype, threads: Setting of the table.
        contenders: Who takes part, ours among them.
        batches, padded: Equal inputs in different memory, to rotate through.
        grads: Flat gradients to start backward passes from; empty to time the forward pass only.
        strict: Whether a contender other than ours that is wrong stops the suite.
        calls: Calls per sample.
        recall: Bytes of new memory to make ready before a sample.
        reps, max_seconds: Limits below those of the run.
        wall: Whether a GPU is timed from the call until it is idle, for contenders that wait for it.
        peak: Function of a contender's name and a direction that returns the peak memory of a call on the CPU.
        details: Fields written with every measurement.
    """

    suite: str
    case: str
    dtype: torch.dtype
    threads: int
    contenders: Sequence[Contender]
    batches: Sequence[Any]
    padded: Sequence[Any] = ()
    grads: Sequence[Tensor] = ()
    strict: bool = False
    calls: int = 1
    recall: int = 0
    reps: int = 1 << 30
    max_seconds: float = float("inf")
    wall: bool = False
    peak: Callable[[str, str], int | None] | None = None
    details: dict[str, Any] = field(default_factory=dict)

    def check(self, name: str, batch: Any, result: Any, grad: Tensor | None, grad_x: Tensor | None) -> dict[str, Any]:
        """Check a result, and a gradient if there is one; return fields to write with the contender's measurements.

        Raises:
            WrongResult: It is wrong.
        """
        raise NotImplementedError

    def moved(self, direction: str) -> int | None:
        """Bytes to read and write in a direction."""
        return None

    def bounds(self, bound: BandwidthBound, backward: bool) -> Mapping[str, Callable[[int], Any]]:
        """Calls of the bandwidth bound on the CPU, by kind of memory."""
        return {}


@dataclass
class Entry:
    """A contender whose result is right, on its inputs."""

    contender: Contender
    call: Callable[[Any], Any]
    inputs: Sequence[Batch]
    leaves: Sequence[Batch]
    details: dict[str, Any] = field(default_factory=dict)


def values_of(result: Any) -> Tensor:
    """The tensor of a result."""
    values: Tensor = result if isinstance(result, Tensor) else result.values
    return values


def _backward(call: Callable[[Any], Any], batch: Batch, grads: Tensor) -> tuple[Any, Tensor, Tensor]:
    """Result, the gradient that goes in, the gradient that comes out."""
    result = call(batch)
    values = values_of(result)
    grad = grads[: values.numel()].view(values.shape)
    return result, grad, torch.autograd.grad(values, batch.leaf, grad)[0]


def _on_backend(contender: Contender, call: Callable[..., Any]) -> Callable[..., Any]:
    """The call on the contender's backend, if it has one."""
    return fc.backend(contender.backend)(call) if contender.backend else call


def _enter(job: Job, contender: Contender, where: torch.device) -> Entry:
    """Build and check a contender; raises whatever goes wrong."""
    inputs = job.padded if contender.padded else job.batches
    differentiable = bool(job.grads) and contender.both is None
    leaves = [batch.differentiable() for batch in inputs] if differentiable else []
    entry = Entry(contender, _on_backend(contender, contender.build()), inputs, leaves)
    on_device = where if where.type == "cuda" else contextlib.nullcontext()  # the checks make their own tensors
    graph = contender.graph and _on_backend(contender, contender.graph)
    for name, call in ((contender.name, entry.call), (f"{contender.name}, in a graph", graph)):
        if call is not None:
            with torch.no_grad():
                result = call(inputs[0])
            with on_device:
                entry.details |= job.check(name, inputs[0], result, None, None)
    if differentiable:
        result, grad, grad_x = _backward(entry.call, leaves[0], job.grads[0])
        with on_device:
            job.check(contender.name, inputs[0], result, grad, grad_x)
    return entry


def admit(bench: Bench, job: Job) -> list[Entry]:
    """Build and check the contenders, ours first; record who is left out and why.

    Raises:
        WrongResult: Ours is wrong or fails, so that nothing can be compared; or another is wrong in a strict job.
    """
    entries = []
    for contender in sorted(filter(bench.wants, job.contenders), key=lambda one: one.group != OURS):
        reason = "" if contender.available else f"{contender.module} is not installed"
        if time.monotonic() > bench.deadline:
            reason = "out of time"
        if not reason:
            try:
                entries.append(_enter(job, contender, bench.device))
            except Exception as error:  # code of others: name it and continue
                kind = "wrong" if isinstance(error, WrongResult) else f"fails: {type(error).__name__}"
                reason = f"{kind}: {error}".split("\n", 1)[0]
                if contender.ours or (job.strict and isinstance(error, WrongResult)):
                    raise WrongResult(f"{job.suite}, {job.case}: {contender.name}: {reason}") from error
        if reason:
            _record(bench, job, FORWARD, contender.name, contender.group, {"not_timed": reason})
    return entries


def compare(bench: Bench, job: Job) -> list[dict[str, Any]]:
    """Measure one job in every direction.

    Raises:
        WrongResult: See ``admit``.
    """
    if not bench.on_gpu:
        torch.set_num_threads(job.threads)
    entries = admit(bench, job)
    if not any(entry.contender.ours for entry in entries):
        return []  # out of time
    directions = [FORWARD]
    if any(entry.contender.both for entry in entries):
        directions.append(BOTH)
    elif job.grads:
        directions.append(BACKWARD if bench.on_gpu else BOTH)
    groups = {entry.contender.name: entry.contender.group for entry in entries} | {CLONE: COPY}
    found = []
    for direction in directions:
        with torch.set_grad_enabled(direction != FORWARD):
            timed = (_on_gpu if bench.on_gpu else _on_cpu)(bench, job, entries, direction)
        own = {entry.contender.name: entry.details for entry in entries}
        moved = {"moved": job.moved(direction)}
        table = [
            _record(bench, job, direction, name, groups.get(name, BOUND), fields | moved | own.get(name, {}))
            for name, fields in sorted(timed.items(), key=lambda item: item[1]["median"])
        ]
        print(table_text(table), end="\n\n", flush=True)
        found += table
    return found


def _record(bench: Bench, job: Job, direction: str, name: str, group: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    dtype = str(job.dtype).removeprefix("torch.")
    fields = job.details | dict(fields)
    return bench.recorder.add(job.suite, job.case, name, group, direction, dtype, job.threads, **fields)


def fields_of(sample: Samples, disturbance: Disturbance | None = None) -> dict[str, Any]:
    """Times, and the disturbance of their table, as fields of a measurement."""
    times = {"median": sample.median, "p10": sample.p10, "p90": sample.p90, "reps": len(sample.seconds)}
    return times | (vars(disturbance) if disturbance else {})


#: Fields of each contender.
_Timed = dict[str, dict[str, Any]]


def _on_cpu(bench: Bench, job: Job, entries: Sequence[Entry], direction: str) -> _Timed:
    backward = direction != FORWARD

    def function(entry: Entry) -> Callable[[int], Any]:
        call, inputs, leaves, grads = entry.call, entry.inputs, entry.leaves, job.grads
        if backward and entry.contender.both is not None:
            call = entry.contender.both
        elif backward:
            return lambda i: _backward(call, leaves[i % len(leaves)], grads[i % len(grads)])
        return lambda i: call(inputs[i % len(inputs)])

    functions = {entry.contender.name: function(entry) for entry in entries}
    if bench.bound is not None:
        for kind, call in job.bounds(bench.bound, backward).items():
            functions[f"{BOUND}, {kind}"] = call
    moved = job.moved(direction)
    if moved is not None and not backward and job.calls == 1:
        size = moved // 2
        sources = [torch.ones(size, dtype=torch.uint8) for _ in range(buffer_count(size, bench.cache))]
        functions[CLONE] = lambda i: sources[i % len(sources)].clone()
    samples, disturbance = clock.interleave(
        functions,
        min(bench.reps, job.reps),
        job.calls,
        min(bench.max_seconds, job.max_seconds),
        bench.tries,
        job.recall,
    )
    timed = {name: fields_of(sample, disturbance) for name, sample in samples.items()}
    if job.peak is not None:
        for name, fields in timed.items():
            fields["peak_bytes"] = job.peak(name, direction)
    return timed


def _prepare(bench: Bench, entry: Entry, direction: str) -> tuple[Callable[[], Any], dict[str, Any]]:
    """What to time on a GPU, and how."""
    contender, batch = entry.contender, entry.inputs[0]
    call = contender.graph or entry.call
    if direction == FORWARD:

        def run() -> Any:
            return call(batch)

    elif contender.both is not None:
        both = contender.both

        def run() -> Any:
            return both(batch)

    else:
        leaf = entry.leaves[0]
        values = values_of(call(leaf))
        grad = torch.randn_like(values)
        device.synchronize(bench.device)

        def run() -> Any:
            return torch.autograd.grad(values, leaf.leaf, grad, retain_graph=True)

        run()
    ready = _on_backend(contender, run)
    if contender.graph is None:
        return ready, {"how": "events"}
    try:
        return device.capture(ready, bench.device)[0], {"how": "graph" if bench.device.type == "cuda" else "no graph"}
    except RuntimeError as error:
        return ready, {"how": "events", "no_graph": str(error).split("\n", 1)[0]}


def _on_gpu(bench: Bench, job: Job, entries: Sequence[Entry], direction: str) -> _Timed:
    reps, seconds, flush = (
        min(bench.reps, job.reps),
        min(bench.max_seconds, job.max_seconds),
        device.Flush(bench.device),
    )
    how = device.wall if job.wall else device.elapsed
    ready: dict[str, Callable[[], Any]] = {}
    details: dict[str, dict[str, Any]] = {}
    with device.side_stream(bench.device):  # a backward pass runs where its forward pass did, and can be captured there
        for entry in entries:
            name = entry.contender.name
            ready[name], details[name] = _prepare(bench, entry, direction)
            if job.wall:
                details[name]["how"] = "wall"
            if job.peak is not None:
                details[name]["peak_bytes"] = device.peak(ready[name], bench.device)
        moved = job.moved(direction)
        if moved is not None:
            ready[CLONE] = torch.ones(moved // 2, dtype=torch.uint8, device=bench.device).clone
        samples = device.interleave(ready, flush, bench.device, reps, seconds, how)
        if direction == FORWARD and not job.wall:  # end to end, including launch and wait
            calls = {entry.contender.name: lambda entry=entry: entry.call(entry.inputs[0]) for entry in entries}
            walls = device.interleave(calls, flush, bench.device, reps, seconds, device.wall)
            for name, sample in walls.items():
                details[name]["call"] = sample.median
    return {name: fields_of(sample) | details.get(name, {"how": "events"}) for name, sample in samples.items()}


def table_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table for the terminal."""
    one = rows[0]
    title = [one["suite"], one["case"], one["dtype"], one["direction"], f"{one['threads']} thr"]
    ours = next((row["median"] for row in rows if row["group"] == OURS), None)
    lines = []
    for row in rows:
        median, moved = row["median"], row.get("moved")
        times = [row[key] * 1e3 if key in row else None for key in ("median", "p10", "p90")]
        rates = [moved / median / 1e9 if moved else None, median / ours if ours else None]
        lines.append([row["contender"], *times, row.get("reps"), *rates])
    head = [", ".join(title), "ms", "p10", "p90", "reps", "GB/s", "x ours"]
    return tabulate(lines, head, floatfmt=("", ".3f", ".3f", ".3f", "", ".1f", ".2f"), missingval="")

"""The GPU benchmark: ``python -m benchmarks.gpu``.

``segment_pool`` with local maxima, forward and backward, ``pack`` and a packed decoder, against the same job in PyTorch
and against the rate at which the device copies memory. Correctness first. Device times are medians of replays of a CUDA
graph, each with a cold second-level cache; a contender that reads sizes from the device cannot be in a graph and is
timed between events. Bytes are the input read once and the output written once. ``--dry`` runs every line on the CPU,
on tiny shapes, and times nothing that means anything.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import json
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch._functorch.config
from torch import Tensor

import fastcompress as fc
from benchmarks import energy, gpu_packing, gpu_report
from benchmarks.gpu_run import BACKWARD, FORWARD, Run, timed
from benchmarks.harness.cases import Inputs, cu_seqlens, features
from benchmarks.harness.device import Flush, elapsed, side_stream, synchronize, wall
from benchmarks.suites import compiled
from benchmarks.suites import segment_pool as contenders
from benchmarks.suites.checks import Expected, exact_starts
from benchmarks.suites.segment_pool import Call, Tokens

ROOT = Path(__file__).resolve().parents[1]
COPY_BYTES = 1 << 30


@dataclass(frozen=True)
class GpuCase:
    """A shape of batch: ``count`` sequences of ``frames`` rows of width ``dim``."""

    count: int
    frames: int
    dim: int
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16,)

    @property
    def rows(self) -> int:
        """Rows of the batch."""
        return self.count * self.frames

    def __str__(self) -> str:
        return f"{self.count} x {self.frames} x {self.dim}"


BOTH_TYPES = (torch.bfloat16, torch.float32)
CASES = (
    GpuCase(1, 750, 1280, BOTH_TYPES),
    GpuCase(8, 750, 1280),
    GpuCase(32, 750, 1280),
    GpuCase(32, 1500, 1280, BOTH_TYPES),
    GpuCase(1, 90_000, 1280),  # an hour at 25 Hz
    GpuCase(32, 1500, 3584, BOTH_TYPES),
)
DRY_CASES = (GpuCase(2, 60, 48, BOTH_TYPES),)


@dataclass(frozen=True)
class GpuContender:
    """One way to do the job.

    Attributes:
        group: ``cuda``, ``triton``, ``eager``, ``scatter``, ``compile`` or ``max-autotune``. The groups are measured in
            this order, each on all cases, as far as the time goes.
        build: returns the function to time.
        graph: a form for a CUDA graph, of a result that has the size of an upper bound.
        backend: what ``segment_pool`` runs on.
    """

    name: str
    group: str
    build: Callable[[], Call]
    graph: Call | None = None
    backend: str | None = None


def padded_pool(inputs: Inputs) -> Tokens:
    """The library, without reading the number of segments."""
    pooled = fc.segment_pool(inputs.x, cu_seqlens=inputs.cu_seqlens, rule=fc.LocalMax(), compact=False)
    return Tokens(pooled.values, pooled.segments.starts)


def all_contenders(dry: bool) -> list[GpuContender]:
    """In the order in which they are measured."""

    def ours(backend: str, name: str | None) -> GpuContender:
        return GpuContender(
            f"fastcompress, {backend}", backend, lambda: contenders.fastcompress_pool, padded_pool, name
        )

    def eager(scores: str, pool: str, group: str = "eager") -> GpuContender:
        form = contenders.vectorised(getattr(contenders, f"{scores}_scores"), getattr(contenders, pool))
        return GpuContender(f"{scores} + {pool}", group, lambda: form)

    found = [ours("cuda", None if dry else "cuda")]
    if importlib.util.find_spec("triton") and (not dry or os.environ.get("TRITON_INTERPRET") == "1"):
        found.append(ours("triton", "triton"))
    found += [eager("cosine", "index_add"), eager("bmm", "index_add"), eager("bmm", "embedding_bag")]
    found += [eager("bmm", "scatter_reduce"), eager("bmm", "segment_reduce")]
    if importlib.util.find_spec("torch_scatter"):
        found.append(eager("bmm", "segment_csr", "scatter"))
    # Compiling for the CPU would take most of a dry run.
    inductor: dict[str, Any] = {"backend": "aot_eager"} if dry else {}
    tuned: dict[str, Any] = {"backend": "aot_eager"} if dry else {"mode": "max-autotune"}
    for group, how in (("compile", inductor), ("max-autotune", tuned)):
        found.append(GpuContender(f"{group}, plain", group, functools.partial(compiled.plain, **how)))
        found.append(GpuContender(f"{group}, tuned", group, functools.partial(compiled.tuned, "gather", **how)))
    return found


def measure_copy(run: Run, size: int) -> float:
    """Bytes read and written a second by a copy of ``size`` bytes on the device."""
    source = torch.zeros(size, dtype=torch.uint8, device=run.device)
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * size / statistics.median(elapsed(lambda: target.copy_(source), run.flush, run.device, run.reps))


def measure(
    run: Run, case: GpuCase, dtype: torch.dtype, contender: GpuContender, inputs: Inputs, wanted: Expected
) -> None:
    """Checks a contender, then times it; raises :class:`WrongResult` when it is wrong."""
    call, leaf = contender.build(), inputs.differentiable()
    with contextlib.ExitStack() as stack:
        if contender.backend:
            stack.enter_context(fc.backend(contender.backend))
        tokens = call(leaf)
        grad = torch.randn_like(tokens.values)
        (grad_x,) = torch.autograd.grad(tokens.values, leaf.x, grad)
        with run.device:  # the checks make their tensors on the default device
            wanted.check(contender.name, tokens, grad, grad_x)

        forward_graph = functools.partial(contender.graph, inputs) if contender.graph else None
        size = (forward_graph() if forward_graph else tokens).values.nbytes
        with torch.no_grad():
            found = timed(run, lambda: call(inputs), forward_graph)
            seconds = statistics.median(wall(lambda: call(inputs), run.flush, run.device) for _ in range(run.reps))
        run.add(case, dtype, FORWARD, contender.name, contender.group, found, inputs.x.nbytes + size, seconds)

        with side_stream(run.device):  # where the forward runs the backward will, so it can be captured there
            tokens = (contender.graph or call)(leaf)
            grad = torch.randn_like(tokens.values)
            synchronize(run.device)

            def backward() -> tuple[Tensor, ...]:
                return torch.autograd.grad(tokens.values, leaf.x, grad, retain_graph=True)

            backward()
            found = timed(run, backward, backward if contender.graph else None)
        run.add(case, dtype, BACKWARD, contender.name, contender.group, found, inputs.x.nbytes + grad.nbytes)


def batches(cases: Sequence[GpuCase], device: torch.device) -> Iterator[tuple[GpuCase, torch.dtype, Inputs]]:
    """The inputs of every case, on the device."""
    for case in cases:
        x = features(case.rows, case.dim, torch.float32).to(device)
        offsets = cu_seqlens((case.frames,) * case.count).to(device)
        for dtype in case.dtypes:
            yield case, dtype, Inputs(x.to(dtype), offsets)


def measure_all(run: Run, cases: Sequence[GpuCase], dry: bool) -> None:
    """Every contender on every case: the first groups first, on all cases, while there is time."""
    settings: list[tuple[GpuCase, torch.dtype, Inputs, Expected]] = []
    for case, dtype, inputs in batches(cases, run.device):
        with run.device:
            exact = Expected(inputs, exact_starts(inputs))
        settings.append((case, dtype, inputs, exact))
    for contender in all_contenders(dry):
        for number, (case, dtype, inputs, wanted) in enumerate(settings):
            what = f"{contender.name}, {case}, {dtype}"
            if time.monotonic() > run.deadline:
                run.skipped.append(f"{what}: out of time")
                continue
            torch._dynamo.reset()  # or the ninth shape would run uncompiled
            try:
                measure(run, case, dtype, contender, inputs, wanted)
            except Exception as error:  # a contender that fails must not stop the others; our own failing is an error
                text = f"{what}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
                (run.wrong if contender.name.startswith("fastcompress") else run.skipped).append(text)
                continue
            if contender.group == "cuda":  # the others are held to the segments of the library
                with torch.no_grad(), run.device:
                    starts = contenders.fastcompress_pool(inputs).starts
                    assert starts is not None
                    settings[number] = (case, dtype, inputs, Expected(inputs, starts))
        print(f"measured: {contender.name}", flush=True)


def measure_energy(run: Run, dry: bool) -> dict[str, Any]:
    """Joules of pooling an hour of audio, by contender; ``{"error": ...}`` where the GPU does not tell."""
    try:
        meter = energy.Nvml("no GPU" if dry else f"GPU-{torch.cuda.get_device_properties(run.device).uuid}")
    except energy.EnergyUnavailable as error:
        return {"error": str(error)}
    hour = next(case for case in CASES if case.rows == energy.HOUR.frames)
    _, dtype, inputs = next(batches((hour,), run.device))
    joules = {}
    for contender in all_contenders(dry):
        if contender.group in ("cuda", "eager") and time.monotonic() < run.deadline:  # compiling takes too long
            pool = functools.partial(contender.build(), inputs)
            with torch.no_grad(), fc.backend(contender.backend) if contender.backend else contextlib.nullcontext():
                wait = functools.partial(synchronize, run.device)
                joules[contender.name] = energy.joules_a_call(meter, pool, 1.0, wait)
    return {"case": str(hour), "dtype": str(dtype).removeprefix("torch."), "joules": joules}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; 1 when the library is wrong, 2 when there is no GPU."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description="The GPU benchmark.")
    parser.add_argument("--dry", action="store_true", help="on the CPU, tiny: nothing is measured")
    parser.add_argument("--budget", type=float, default=240.0, help="seconds for all of it (default 240)")
    parser.add_argument("--reps", type=int, default=50, help="repetitions (default 50)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="default: benchmarks/results/<gpu>-cuda.json")
    options = parser.parse_args(argv)
    if not options.dry and not torch.cuda.is_available():
        print("torch sees no CUDA device; --dry runs without one", file=sys.stderr)
        return 2
    warnings.filterwarnings("ignore", module="torch")
    torch._functorch.config.donated_buffer = False  # a compiled backward is timed again and again on one forward
    device = torch.device("cpu" if options.dry else "cuda")
    reps = 2 if options.dry else options.reps
    run = Run(device, reps, time.monotonic() + options.budget, Flush(device))
    run.copy_rate = measure_copy(run, 1 << 20 if options.dry else COPY_BYTES)
    print(gpu_report.heading(run.copy_rate, options.dry), flush=True)
    gpu_packing.measure_packing(run, options.dry)
    measure_all(run, DRY_CASES if options.dry else CASES, options.dry)
    gpu_packing.measure_decoder(run, options.dry)
    gpu_packing.measure_prefill(run, options.dry)
    rows = [asdict(row) for row in run.rows]
    settings, used = {"reps": reps, "dry": options.dry}, measure_energy(run, options.dry)
    document = gpu_report.document(rows, run.copy_rate, run.skipped, run.wrong, settings, used)
    path = options.json or ROOT / "benchmarks" / "results" / f"{gpu_report.slug()}-cuda.json"
    if options.dry and not options.json:
        path = ROOT / "build" / "gpu-dry" / "benchmark.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")
    print(f"written: {path}\n\n{gpu_report.text(document)}")
    return 1 if run.wrong else 0


if __name__ == "__main__":
    sys.exit(main())

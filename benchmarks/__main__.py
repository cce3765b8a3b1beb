"""The command: ``python -m benchmarks``."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.harness import clock, machine
from benchmarks.harness.bandwidth_bound import BandwidthBound, BoundUnavailable
from benchmarks.harness.compare import TORCH_DTYPES, Bench, WrongResult
from benchmarks.registry import CPU_ONLY, SUITES, text
from benchmarks.results import RESULTS, Recorder
from benchmarks.suites import scaling, segment_pool


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Times fastcompress against baselines and the bandwidth bound. An implementation is timed only "
        "after its result has been checked. Each measurement is appended to <machine>-<device>.jsonl as soon as it "
        "is taken.",
        epilog="suites:\n" + "\n".join(f"  {name:<14} {text(suite)}" for name, suite in SUITES.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("suites", nargs="*", metavar="SUITE", help="what to measure (default: everything)")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="default cpu")
    add("--dry", action="store_true", help="run the harness of the GPU on the CPU; measures nothing")
    add("--out", type=Path, default=Path("out/benchmarks"), metavar="DIR", help="default out/benchmarks")
    add("--save", action="store_true", help="write to benchmarks/results, which is committed")
    add("--report", action="store_true", help="write benchmarks/report.md and its plots, and stop")
    add("--quick", action="store_true", help="small cases and few rounds: a minute or two, for CI")
    add("--threads", nargs="+", type=int, help="default: 1 2, as far as there are cores")
    add("--dtypes", nargs="+", choices=TORCH_DTYPES, default=["fp32", "bf16"], help="default fp32 bf16")
    add("--cases", nargs="+", metavar="CASE", help="cases of segment_pool, axes of scaling")
    add("--baselines", nargs="+", metavar="TEXT", help="only those whose name has one of these in it")
    add("--reps", type=int, help="rounds (default 15, on a GPU 50)")
    add("--no-bound", action="store_true", help="leave out the bandwidth bound")
    options = parser.parse_args(argv)
    for name in options.suites:  # argparse refuses an empty list of choices
        if name not in SUITES:
            parser.error(f"SUITE must be one of {', '.join(SUITES)}, got {name!r}")
    known = [
        *(case.name for case in (*segment_pool.CASES, *segment_pool.GPU_CASES, segment_pool.UNIFORM)),
        *scaling.AXES,
    ]
    for name in options.cases or ():
        if name not in known:
            parser.error(f"--cases must be of {', '.join(known)}, got {name!r}")
    if options.dry and options.device != "cuda":
        parser.error("--dry needs --device cuda")
    if options.save and (options.quick or options.dry):
        parser.error("--save needs a full run, got --quick or --dry")
    if options.device == "cuda" and not options.dry and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device; --dry runs without one")
    return options


def _bound(options: argparse.Namespace) -> BandwidthBound | None:
    if options.device == "cuda" or options.no_bound:
        return None
    try:
        return BandwidthBound()
    except BoundUnavailable as error:
        print(f"no bandwidth bound: {error}")
        return None


def _bench(options: argparse.Namespace) -> Bench:
    gpu, small = options.device == "cuda", options.quick or options.dry
    threads = options.threads or ([1] if small else [n for n in (1, 2) if n <= machine.cores()])
    reps = options.reps or (3 if small else 50 if gpu else 15)
    settings = {"reps": reps, "quick": options.quick, "dry": options.dry, "threads": threads}
    name = "dry" if options.dry else machine.slug(machine.machine(options.device))
    path = (RESULTS if options.save else options.out) / f"{name}-{options.device}.jsonl"
    return Bench(
        Recorder(path, settings, options.device),
        torch.device("cuda" if gpu and not options.dry else "cpu"),
        threads=[0] if gpu else threads,
        dtypes=options.dtypes,
        cases=options.cases,
        baselines=options.baselines,
        quick=options.quick,
        dry=options.dry,
        reps=reps,
        tries=1 if small else clock.TRIES,
        bound=_bound(options),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the suites; 1 when the library is wrong."""
    options = _arguments(argv)
    if options.report:
        from benchmarks import report  # needs matplotlib

        return report.main()
    warnings.filterwarnings("ignore", module="torch")
    bench = _bench(options)
    versions = machine.versions()
    print(f"{machine.title(machine.machine(options.device))}; torch {versions['torch']}, commit {machine.commit()}")
    if not versions["fastcompress_compiled"]:
        print("the compiled library is missing: this times the reference in PyTorch")
    wrong = False
    for name in options.suites or SUITES:
        if options.device == "cuda" and name in CPU_ONLY:
            print(f"{name}: not measured on {options.device}")
            continue
        try:
            SUITES[name].run(bench)
        except WrongResult as error:
            print(f"{name}: wrong result, not timed: {error}", file=sys.stderr)
            wrong = True
    print(f"appended to {bench.recorder.path}")
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())

"""The command: ``python -m benchmarks``."""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.harness import clock, machine
from benchmarks.harness.bandwidth_bound import BandwidthBound, BoundUnavailable
from benchmarks.harness.compare import TORCH_DTYPES, Bench, WrongResult
from benchmarks.measurement import RESULTS, Recorder
from benchmarks.registry import SUITES
from benchmarks.suites import scaling, segment_pool

ROOT = Path(__file__).resolve().parents[1]


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Times fastcompress against baselines and the bandwidth bound. A contender is timed only after its "
        "result has been checked. Each measurement is appended to <machine>-<device>.jsonl as soon as it is taken.",
        epilog="suites:\n" + "\n".join(f"  {name:<14} {suite.text}" for name, suite in SUITES.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("suites", nargs="*", metavar="SUITE", help="what to measure (default: everything)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default cpu")
    parser.add_argument("--dry", action="store_true", help="run the harness of the GPU on the CPU; measures nothing")
    parser.add_argument(
        "--out", type=Path, default=Path("out/benchmarks"), metavar="DIR", help="default out/benchmarks"
    )
    parser.add_argument("--save", action="store_true", help="write to benchmarks/results, which is committed")
    parser.add_argument("--report", action="store_true", help="write benchmarks/report.md and its plots, and stop")
    parser.add_argument("--quick", action="store_true", help="small cases and few rounds: a minute or two, for CI")
    parser.add_argument("--threads", nargs="+", type=int, help="default: 1 2, as far as there are cores")
    parser.add_argument("--dtypes", nargs="+", choices=TORCH_DTYPES, default=["fp32", "bf16"], help="default fp32 bf16")
    parser.add_argument("--cases", nargs="+", metavar="CASE", help="cases of segment_pool, axes of scaling")
    parser.add_argument("--contenders", nargs="+", metavar="TEXT", help="only those whose name has one of these in it")
    parser.add_argument("--reps", type=int, help="rounds (default 15, on a GPU 50)")
    parser.add_argument("--max-seconds", type=float, default=10.0, help="per contender and table (default 10)")
    parser.add_argument("--no-bound", action="store_true", help="leave out the bandwidth bound")
    parser.add_argument("--budget", type=float, help="seconds after which contenders are left out")
    parser.add_argument("--most", type=float, metavar="MB", help="leave out larger cases of scaling, by input in fp32")
    options = parser.parse_args(argv)
    for name in options.suites:  # argparse refuses an empty list of choices
        if name not in SUITES:
            parser.error(f"SUITE must be one of {', '.join(SUITES)}, got {name!r}")
    known = [case.name for case in (*segment_pool.CASES, *segment_pool.GPU_CASES)] + [one.name for one in scaling.AXES]
    for name in options.cases or ():
        if name not in known:
            parser.error(f"--cases must be of {', '.join(known)}, got {name!r}")
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
    gpu = options.device == "cuda"
    small = options.quick or options.dry
    threads = options.threads or ([1] if small else [n for n in (1, 2) if n <= machine.cores()])
    reps = options.reps or (3 if small else 50 if gpu else 15)
    settings = {
        "reps": reps,
        "max_seconds": options.max_seconds,
        "quick": options.quick,
        "dry": options.dry,
        "threads": threads,
        "most": options.most,
    }
    name = "dry" if options.dry else machine.slug(machine.machine(options.device))
    path = (RESULTS if options.save else options.out) / f"{name}-{options.device}.jsonl"
    return Bench(
        Recorder(path, settings, options.device),
        torch.device("cuda" if gpu and not options.dry else "cpu"),
        threads=[0] if gpu else threads,
        dtypes=options.dtypes,
        cases=options.cases,
        contenders=options.contenders,
        quick=options.quick,
        dry=options.dry,
        reps=reps,
        tries=1 if small else clock.TRIES,
        max_seconds=options.max_seconds,
        deadline=float("inf") if options.budget is None else time.monotonic() + options.budget,
        bound=_bound(options),
        cache=machine.last_level_cache(),
        most=None if options.most is None else options.most * 1e6,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the suites; 1 when the library is wrong, 2 when there is no GPU or the options contradict each other."""
    options = _arguments(argv)
    if options.report:
        from benchmarks import report  # needs matplotlib

        return report.main([])
    if options.dry and options.device != "cuda":
        print("--dry needs --device cuda", file=sys.stderr)
        return 2
    if options.save and (options.quick or options.dry):
        print("--save needs a full run, got --quick or --dry", file=sys.stderr)
        return 2
    if options.device == "cuda" and not options.dry and not torch.cuda.is_available():
        print("torch sees no CUDA device; --dry runs without one", file=sys.stderr)
        return 2
    warnings.filterwarnings("ignore", module="torch")
    bench = _bench(options)
    versions = machine.versions()
    print(f"{machine.title(machine.machine(options.device))}; torch {versions['torch']}, commit {machine.commit()}")
    if not versions["fastcompress_compiled"]:
        print("the compiled library is missing: this times the reference in PyTorch")
    wrong = False
    for name in options.suites or SUITES:
        if options.device not in SUITES[name].devices:
            print(f"{name}: not measured on {options.device}")
            continue
        if time.monotonic() > bench.deadline:
            print(f"{name}: not measured, out of time")
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

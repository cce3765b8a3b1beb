"""The command: ``python -m benchmarks``."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import energy, report
from benchmarks.harness import machine
from benchmarks.harness.bandwidth_bound import Floor, FloorUnavailable
from benchmarks.harness.clock import TRIES
from benchmarks.harness.compare import measure
from benchmarks.harness.memory import FRAMES, measure_memory
from benchmarks.measurement import Record
from benchmarks.registry import CASES, CONTENDERS, OURS, case
from benchmarks.suites import decoder, methods, prefill, roofline, scaling
from benchmarks.suites import pack as packing
from benchmarks.suites import training_step as share
from benchmarks.suites.checks import WrongResult
from benchmarks.targets import outcomes

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_RESULTS = Path(__file__).with_name("results")


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Times fastcompress against the same job in PyTorch and against the memory floor, on the CPU. "
        "A contender is timed only after its result was found right.",
    )
    parser.add_argument("--parts", nargs="+", choices=_PARTS, default=list(_PARTS), help="default: all of them")
    parser.add_argument("--quick", action="store_true", help="one small case, few rounds: a minute or two, for CI")
    parser.add_argument("--cases", nargs="+", choices=[c.name for c in CASES], help="default: all but the optional")
    parser.add_argument("--dtypes", nargs="+", choices=_DTYPES, default=["fp32", "bf16"])
    parser.add_argument("--threads", nargs="+", type=int, help="default: 1 2, as far as there are cores")
    parser.add_argument("--contenders", nargs="+", metavar="TEXT", help="only those whose name has one of these in it")
    parser.add_argument("--reps", type=int, help="rounds (default 15)")
    parser.add_argument("--max-seconds", type=float, default=10.0, help="for a contender in a table (default 10)")
    parser.add_argument("--axes", nargs="+", choices=[a.name for a in scaling.AXES], help="of scaling; default: all")
    parser.add_argument("--most", type=float, metavar="MB", help="of input in fp32, of a case of scaling")
    parser.add_argument("--no-floor", action="store_true", help="leave out the memory floor")
    parser.add_argument("--no-memory", action="store_true", help="leave out the peak memory")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write everything there")
    parser.add_argument("--save", action="store_true", help="write it to benchmarks/results/<machine>-[parts-]cpu.json")
    options = parser.parse_args(argv)
    options.cases = options.cases or (["quick", "tiny"] if options.quick else [c.name for c in CASES if c.default])
    options.threads = options.threads or ([1] if options.quick else [n for n in (1, 2) if n <= machine.cores()])
    options.reps = options.reps or (3 if options.quick else 15)
    options.tries = 1 if options.quick else TRIES
    options.cache = machine.last_level_cache()
    options.floor = _floor(options)
    return options


def _floor(options: argparse.Namespace) -> Floor | None:
    if options.no_floor:
        return None
    try:
        return Floor()
    except FloorUnavailable as error:
        print(f"no memory floor: {error}")
        return None


def _print(text: str) -> None:
    print(text, end="\n\n", flush=True)


def _pool(options: argparse.Namespace, record: Record) -> None:
    texts = options.contenders or [""]
    wanted = [one for one in CONTENDERS if one.name == OURS or any(text in one.name for text in texts)]
    for name in options.cases:
        for dtype in options.dtypes:
            for threads in options.threads:
                new = measure(
                    case(name),
                    _DTYPES[dtype],
                    threads,
                    wanted,
                    options.floor,
                    options.reps,
                    options.cache,
                    options.max_seconds,
                    options.tries,
                )
                record.pool += new
                for table in new:
                    _print(report.table_text(table))
    if not options.no_memory:
        for dtype in options.dtypes:
            frames = 15_000 if options.quick else FRAMES
            record.memory.append(measure_memory(_DTYPES[dtype], options.threads[-1], frames))
        _print(report.memory_text(record.memory))
    _print(report.targets_text(outcomes(record.pool)))


def _methods(options: argparse.Namespace, record: Record) -> None:
    size, tries = (methods.QUICK, 1) if options.quick else (methods.CASE, 2)  # loops take seconds a call
    for dtype in options.dtypes:
        for threads in options.threads:
            new = methods.measure(size, _DTYPES[dtype], threads, min(options.reps, 7), options.cache, tries)
            record.methods += new
            _print(report.methods_text(new))


def _packing(options: argparse.Namespace, record: Record) -> None:
    for pack_case in (packing.QUICK,) if options.quick else packing.CASES:
        for dtype in options.dtypes:
            for threads in options.threads:
                new = packing.measure(pack_case, _DTYPES[dtype], threads, options.reps, options.cache, options.tries)
                record.packing += new
                for table in new:
                    _print(report.packing_text(table))
    _print(report.packing_targets_text(record.packing))


def _decoder(options: argparse.Namespace, record: Record) -> None:
    if not decoder.available():
        return _print("no decoder: transformers is not installed")
    for threads in options.threads:
        new = decoder.measure(threads, min(options.reps, 7), "quick" if options.quick else "cpu", options.tries)
        record.decoder += new
        for table in new:
            _print(report.decoder_text(table))


def _prefill(options: argparse.Namespace, record: Record) -> None:
    if not prefill.available():
        return _print("no prefill: transformers is not installed")
    for threads in options.threads:
        size = "quick" if options.quick else "cpu"
        record.prefill.append(prefill.measure(threads, min(options.reps, 7), size, options.tries))
        _print(report.prefill_text(record.prefill[-1]))


def _scaling(options: argparse.Namespace, record: Record) -> None:
    axes = [a for a in (scaling.QUICK if options.quick else scaling.AXES) if a.name in (options.axes or [a.name])]
    most = None if options.most is None else options.most * 1e6
    for (one, threads), on in scaling.plan(axes, options.threads, most).items():
        for dtype in options.dtypes:
            tables = measure(
                one,
                _DTYPES[dtype],
                threads,
                scaling.contenders(options.quick),
                options.floor,
                min(options.reps, 9),
                options.cache,
                min(options.max_seconds, 2.0),
                min(options.tries, 2),
            )
            record.scaling += [scaling.Point(on, table) for table in tables]
            print(f"{one.name}, {dtype}, {threads} thr: measured", flush=True)
    _print(report.scaling_text(record.scaling))


def _roofline(options: argparse.Namespace, record: Record) -> None:
    if options.floor is None:
        return _print("no roofline without the floor's kernels")
    rounds, steps = (options.reps, 1000) if options.quick else (roofline.ROUNDS, roofline.STEPS)
    for threads in options.threads:
        record.ceilings.append(roofline.measure(options.floor, threads, rounds, steps))
    _print(report.ceilings_text(record.ceilings))


def _share(options: argparse.Namespace, record: Record) -> None:
    if not share.available():
        return _print("no share of a training step: fastcompress[lalm] is not installed")
    for threads in options.threads:
        steps = 2 if options.quick else share.STEPS
        new = share.measure(threads, min(options.reps, 7), options.tries, steps=steps)
        record.share += new
        _print(report.share_text(new))


def _energy(options: argparse.Namespace, record: Record) -> None:
    try:
        meter = energy.Rapl()
    except energy.EnergyUnavailable as error:
        record.no_energy = str(error)
    else:
        for dtype in options.dtypes:
            for threads in options.threads:
                one = energy.QUICK if options.quick else energy.HOUR
                record.energy.append(energy.measure(meter, one, _DTYPES[dtype], threads, options.cache))
    _print(report.energy_text(record.energy, record.no_energy))


_PARTS = {
    "pool": _pool,
    "methods": _methods,
    "packing": _packing,
    "decoder": _decoder,
    "prefill": _prefill,
    "scaling": _scaling,
    "roofline": _roofline,
    "share": _share,
    "energy": _energy,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmarks; 1 when the library is wrong."""
    options = _arguments(argv)
    warnings.filterwarnings("ignore", module="torch")
    settings = {
        "reps": options.reps,
        "max_seconds": options.max_seconds,
        "quick": options.quick,
        "threads": options.threads,
        "most": options.most,
    }
    _print(report.heading(settings))
    record = Record()
    for part, run in _PARTS.items():
        if part not in options.parts:
            continue
        try:
            run(options, record)
        except WrongResult as error:
            print(f"{part}: wrong, so nothing is timed: {error}", file=sys.stderr)
            return 1
    paths = [options.json] if options.json else []
    if options.save:
        some = "" if set(options.parts) == set(_PARTS) else "-".join(options.parts) + "-"
        paths.append(_RESULTS / f"{machine.slug()}-{some}cpu.json")
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record.document(settings), indent=1) + "\n")
        print(f"written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

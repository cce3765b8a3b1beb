"""The command: ``python -m benchmarks``."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import decoder, machine, methods, packing, prefill, report
from benchmarks.checks import WrongResult
from benchmarks.floor import Floor, FloorUnavailable
from benchmarks.measure import Table, measure
from benchmarks.memory import FRAMES, measure_memory
from benchmarks.registry import CASES, CONTENDERS, OURS, case
from benchmarks.targets import outcomes
from benchmarks.timing import TRIES

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_PARTS = ("pool", "methods", "packing", "decoder", "prefill")
_RESULTS = Path(__file__).with_name("results")


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Times fastcompress against the same job in PyTorch and against the memory floor, on the CPU. "
        "A contender is timed only after its result was found right.",
    )
    parser.add_argument("--parts", nargs="+", choices=_PARTS, default=list(_PARTS), help="default: all of them")
    parser.add_argument("--quick", action="store_true", help="one small case, few rounds: under a minute, for CI")
    parser.add_argument("--cases", nargs="+", choices=[c.name for c in CASES], help="default: all but the optional")
    parser.add_argument("--dtypes", nargs="+", choices=_DTYPES, default=["fp32", "bf16"])
    parser.add_argument("--threads", nargs="+", type=int, help="default: 1 2, as far as there are cores")
    parser.add_argument("--contenders", nargs="+", metavar="TEXT", help="only those whose name has one of these in it")
    parser.add_argument("--reps", type=int, help="rounds (default 15)")
    parser.add_argument("--max-seconds", type=float, default=10.0, help="for a contender in a table (default 10)")
    parser.add_argument("--no-floor", action="store_true", help="leave out the memory floor")
    parser.add_argument("--no-memory", action="store_true", help="leave out the peak memory")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write everything there")
    parser.add_argument("--save", action="store_true", help="write it to benchmarks/results/<machine>-[parts-]cpu.json")
    options = parser.parse_args(argv)
    options.cases = options.cases or (["quick", "tiny"] if options.quick else [c.name for c in CASES if c.default])
    options.threads = options.threads or ([1] if options.quick else [n for n in (1, 2) if n <= machine.cores()])
    options.reps = options.reps or (3 if options.quick else 15)
    return options


def _floor(options: argparse.Namespace) -> Floor | None:
    if options.no_floor:
        return None
    try:
        return Floor()
    except FloorUnavailable as error:
        print(f"no memory floor: {error}")
        return None


def _methods(options: argparse.Namespace, cache: int) -> list[methods.MethodTable]:
    tables: list[methods.MethodTable] = []
    size, tries = (methods.QUICK, 1) if options.quick else (methods.CASE, 2)  # loops take seconds a call
    for dtype in options.dtypes:
        for threads in options.threads:
            new = methods.measure(size, _DTYPES[dtype], threads, min(options.reps, 7), cache, tries)
            tables += new
            print(report.methods_text(new), end="\n\n", flush=True)
    return tables


def _packing(options: argparse.Namespace, cache: int) -> list[packing.PackTable]:
    tables: list[packing.PackTable] = []
    tries = 1 if options.quick else TRIES
    for pack_case in (packing.QUICK,) if options.quick else packing.CASES:
        for dtype in options.dtypes:
            for threads in options.threads:
                new = packing.measure(pack_case, _DTYPES[dtype], threads, options.reps, cache, tries)
                tables += new
                for table in new:
                    print(report.packing_text(table), end="\n\n", flush=True)
    return tables


def _decoder(options: argparse.Namespace) -> list[decoder.DecoderTable]:
    if not decoder.available():
        print("no decoder: transformers is not installed")
        return []
    tables: list[decoder.DecoderTable] = []
    for threads in options.threads:
        new = decoder.measure(threads, min(options.reps, 7), *(("quick", 1) if options.quick else ("cpu", TRIES)))
        tables += new
        for table in new:
            print(report.decoder_text(table), end="\n\n", flush=True)
    return tables


def _prefill(options: argparse.Namespace) -> list[prefill.PrefillTable]:
    if not prefill.available():
        print("no prefill: transformers is not installed")
        return []
    tables = []
    for threads in options.threads:
        size, tries = ("quick", 1) if options.quick else ("cpu", TRIES)
        tables.append(prefill.measure(threads, min(options.reps, 7), size, tries))
        print(report.prefill_text(tables[-1]), end="\n\n", flush=True)
    return tables


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmarks; 1 when the library is wrong."""
    options = _arguments(argv)
    warnings.filterwarnings("ignore", module="torch")
    settings = {"reps": options.reps, "max_seconds": options.max_seconds, "quick": options.quick}
    print(report.heading(settings), end="\n\n", flush=True)
    texts = options.contenders or [""]
    wanted = [one for one in CONTENDERS if one.name == OURS or any(text in one.name for text in texts)]
    floor, cache = _floor(options), machine.last_level_cache()
    tables: list[Table] = []
    for name in options.cases if "pool" in options.parts else ():
        for dtype in options.dtypes:
            for threads in options.threads:
                try:
                    new = measure(
                        case(name),
                        _DTYPES[dtype],
                        threads,
                        wanted,
                        floor,
                        options.reps,
                        cache,
                        options.max_seconds,
                        tries=1 if options.quick else TRIES,
                    )
                except WrongResult as error:
                    print(f"{name}, {dtype}: {OURS} is wrong, so nothing is timed: {error}", file=sys.stderr)
                    return 1
                tables += new
                for table in new:
                    print(report.table_text(table), end="\n\n", flush=True)
    memory = []
    if not options.no_memory and "pool" in options.parts:
        for dtype in options.dtypes:
            memory.append(measure_memory(_DTYPES[dtype], options.threads[-1], 15_000 if options.quick else FRAMES))
        print(report.memory_text(memory), end="\n\n")
    try:
        published = _methods(options, cache) if "methods" in options.parts else []
        packed = _packing(options, cache) if "packing" in options.parts else []
        decoders = _decoder(options) if "decoder" in options.parts else []
        prefills = _prefill(options) if "prefill" in options.parts else []
    except WrongResult as error:
        print(f"nothing is timed: {error}", file=sys.stderr)
        return 1
    if "pool" in options.parts:
        print(report.targets_text(outcomes(tables)), end="\n\n")
    print(report.packing_targets_text(packed))
    document = report.document(tables, memory, settings, published, packed, decoders, prefills)
    paths = [options.json] if options.json else []
    if options.save:
        some = "" if set(options.parts) == set(_PARTS) else "-".join(options.parts) + "-"
        paths.append(_RESULTS / f"{machine.slug()}-{some}cpu.json")
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document, indent=1) + "\n")
        print(f"written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

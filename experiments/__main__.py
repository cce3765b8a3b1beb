"""Make data, train and score models, and write a table and a plot: ``python -m experiments``.

Several seeds run in parallel, each on one thread. A later run skips results that exist.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import multiprocessing
import platform
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DIRECTIONS = {"digits": "recognition", "numbers": "translation", "commands": "recognition"}
SEEDS = (1, 2, 3)  # not 0, with which the settings were chosen


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m experiments", description=__doc__)
    parser.add_argument("--tasks", nargs="+", choices=DIRECTIONS, default=["digits", "numbers"])
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--jobs", type=int, default=2, help="seeds that run in parallel (default %(default)s)")
    parser.add_argument("--train", type=int, default=12000, help="training utterances (default %(default)s)")
    parser.add_argument("--quick", action="store_true", help="train LoRA on the shipped digit model alone, in minutes")
    parser.add_argument(
        "--parts",
        action="store_true",
        help="train LoRA on the shipped digit model, with and without proportional attention and positions in time",
    )
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "experiment", help="folder (default out/experiment)")
    options = parser.parse_args()
    from experiments.study import BUDGETS, COMPRESSIONS, METHODS, PARTS, Budget, run_study

    budgets = BUDGETS
    if options.quick:
        options.tasks, options.seeds, options.train = ["digits"], [1, 2], 1500
        options.out = options.out / "quick"
        chosen = tuple(c for c in COMPRESSIONS if c.name in QUICK)
        small = Budget(
            lora_steps=200,
            lora_utterances=1500,
            scored=100,
            base=str(SHIPPED),
            compressions=chosen,
            methods=(),
            from_scratch=(),
        )
        budgets = {"digits": small}
    if options.parts:
        options.tasks, options.train = ["digits"], 6000
        options.out = options.out / "parts"
        budgets = {"digits": Budget(base=str(SHIPPED), compressions=PARTS, methods=(), from_scratch=())}
    since = time.monotonic()
    for task in options.tasks:
        _make_data(options.out / "data" / task, task, options.train, options.jobs)
    work = [
        (task, options.out / "data" / task, options.out, seed, budgets[task])
        for task in options.tasks
        for seed in options.seeds
    ]
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(options.jobs, mp_context=context) as pool:
        records = list(pool.map(run_study, *zip(*work, strict=True)))
    import torch

    from benchmarks.harness.machine import machine
    from experiments import report

    rows = report.load(records)
    text = report.table(rows)
    report.plot(rows, options.out / "report.png")
    methods = {method.name for method in METHODS}
    tried = {row["task"] for row in rows if row["compression"] in methods}
    if tried:
        report.plot_methods([row for row in rows if row["task"] in tried], options.out / "methods.png")
    (options.out / "report.md").write_text(text, encoding="utf-8")
    details = {"machine": machine(), "python": platform.python_version(), "torch": torch.__version__}
    details |= {"tasks": options.tasks, "seeds": options.seeds, "train": options.train, "quick": options.quick}
    (options.out / "report.json").write_text(json.dumps(details | {"rows": rows}, indent=1), encoding="utf-8")
    print(text)
    print(f"{options.out}: report.md, report.png, report.json, after {(time.monotonic() - since) / 60:.1f} minutes")
    return 0


#: Compressions that ``--quick`` trains.
QUICK = ("every frame", "uniform pooling 3x", "local maxima")
#: The shipped frame-level model.
SHIPPED = ROOT / "assets" / "models" / "digits"


def _make_data(folder: Path, task: str, train: int, jobs: int) -> None:
    from fastcompress.synthesis.data import make_data

    record = folder / "data.json"
    if record.exists() and json.loads(record.read_text()).get("utterances", {}).get("train") == train:
        return
    print(f"making {folder}", flush=True)
    make_data(folder, task, DIRECTIONS[task], train=train, jobs=jobs)


if __name__ == "__main__":
    sys.exit(main())

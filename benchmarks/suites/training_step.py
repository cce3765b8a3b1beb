"""Suite ``training_step``: the time of a training step, and the share of it in compression and packing.

A small audio LLM (``fastcompress.training.recipes.build_small``) trains on the recordings that are shipped. Runs on the
CPU only.
"""

from __future__ import annotations

import importlib.util
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.harness.clock import CpuClock, interleave
from benchmarks.harness.compare import Bench, WrongResult, table_text
from benchmarks.results import BOTH

NAME, STEP, BUSY = "training_step", "whole step", "whole step, CPU time per thread"
MANIFEST = Path(__file__).resolve().parents[2] / "assets" / "digits" / "test.jsonl"
#: The first keeps one token per frame.
RULES = ("uniform:1", "uniform:3", "local-max")
#: Start of the names of our ops.
_PREFIX = "fastcompress::"
#: Steps that are profiled.
STEPS = 20


def available() -> bool:
    """Return whether what trains is installed."""
    return all(importlib.util.find_spec(name) for name in ("accelerate", "av", "transformers"))


def _training(rule: str, folder: Path, steps: int) -> Any:
    from fastcompress.training.examples import Examples
    from fastcompress.training.manifest import read_manifest
    from fastcompress.training.recipes import build_small
    from fastcompress.training.settings import TrainerSettings
    from fastcompress.training.trainer import Training

    utterances = read_manifest(MANIFEST)
    model, processor = build_small(utterances, rule=rule)
    examples = Examples(utterances, processor, cache=True, phones=model.config.ctc_tokens)
    for index in range(len(examples)):  # a training computes them once, not in each step
        examples.features(index)
    return Training(model, examples, TrainerSettings(max_steps=steps), folder)


def _profiled(training: Any, steps: int) -> dict[str, float]:
    """Return the seconds per step in each op: calls per step times the median call, few of which are disturbed.

    Raises:
        WrongResult: No op ran.
    """
    with profile(activities=[ProfilerActivity.CPU]) as found:
        for _ in range(steps):
            training.update()
    calls: dict[str, list[float]] = {}
    for event in found.events() or ():
        if event.name.startswith(_PREFIX):
            calls.setdefault(event.name.removeprefix(_PREFIX), []).append(event.self_cpu_time_total / 1e6)
    if not calls:
        raise WrongResult("training_step: none of fastcompress's ops ran")
    return {name: statistics.median(seconds) * len(seconds) / steps for name, seconds in calls.items()}


def measure(bench: Bench, threads: int, rules: Sequence[str] = RULES, steps: int = STEPS) -> list[dict[str, Any]]:
    """Time the steps of all rules in turn, unprofiled; then profile each.

    The case of a measurement is the rule. Its CPU time leaves out the waiting for a core: steps are so long that on a
    busy machine none is undisturbed. The implementations of group ``op`` are seconds per step in each of our ops.

    Raises:
        WrongResult: A step ran none of the ops.
    """
    torch.set_num_threads(threads)
    reps = min(bench.reps, 7)
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        trainings = {rule: _training(rule, Path(folder) / str(i), reps + steps + 8) for i, rule in enumerate(rules)}
        functions = {rule: lambda _, training=training: training.update() for rule, training in trainings.items()}
        samples, disturbance = interleave(functions, reps, CpuClock(tries=bench.tries), warm=4)
        for rule, training in trainings.items():
            counts = training.update()
            fields = {"tokens_per_frame": counts["audio_tokens"] / counts["audio_frames"]}
            timed = [(STEP, "step", fields | samples[rule].fields() | vars(disturbance))]
            timed.append((BUSY, "step", {"median": statistics.median(samples[rule].busy) / threads}))
            timed += [(name, "op", {"median": seconds}) for name, seconds in _profiled(training, steps).items()]
            found += [
                bench.recorder.add(NAME, rule, name, group, BOTH, threads=threads, **fields)
                for name, group, fields in timed
            ]
    print(table_text(found), end="\n\n", flush=True)
    return found


def run(bench: Bench) -> None:
    """Measure every rule on every number of threads."""
    if not available():
        return print("training_step: fastcompress[lalm] is not installed")
    for threads in bench.threads:
        measure(bench, threads, steps=2 if bench.quick else STEPS)

"""What share of a training step compression and packing take, and how long a step is with fewer tokens.

A small audio LLM (``fastcompress.training.recipes.build_small``) trains on the recordings that are shipped.
"""

from __future__ import annotations

import contextlib
import importlib.util
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.harness.clock import Disturbance, Samples, interleave
from benchmarks.suites.checks import WrongResult

MANIFEST = Path(__file__).resolve().parents[2] / "assets" / "digits" / "test.jsonl"
#: The first has a token a frame.
RULES = ("uniform:1", "uniform:3", "local-max")
#: Of the names of our ops.
_PREFIX = "fastcompress::"
#: Steps that are profiled.
STEPS = 20


def available() -> bool:
    """Whether what trains is installed."""
    return all(importlib.util.find_spec(name) for name in ("accelerate", "transformers", "soundfile"))


@dataclass(frozen=True)
class Share:
    """Of a rule, on a number of threads.

    Attributes:
        tokens: audio tokens a frame of the encoder.
        samples: seconds a step, unprofiled.
        busy: likewise, without the time that it waited for a core: the median of its CPU time, a thread. Steps are so
            long that on a busy machine none is undisturbed.
        ops: seconds a step in each of fastcompress's ops, forward and backward, as the profiler has them: calls a step
            times the median of a call, few of which are disturbed.
    """

    rule: str
    threads: int
    tokens: float
    samples: Samples
    busy: float
    ops: dict[str, float]
    disturbance: Disturbance

    @property
    def share(self) -> float:
        """Of a step."""
        return sum(self.ops.values()) / self.busy


def _training(rule: str, folder: Path, manifest: Path, steps: int) -> Any:
    from fastcompress.training.examples import Examples
    from fastcompress.training.manifest import read_manifest
    from fastcompress.training.recipes import build_small
    from fastcompress.training.trainer import Training, TrainingArguments

    utterances = read_manifest(manifest)
    model, processor = build_small(utterances, rule=rule)
    examples = Examples(utterances, processor, cache=True, phones=model.config.ctc_tokens)
    for index in range(len(examples)):  # features are computed once in a training, not in each step
        examples.features(index)
    return Training(model, examples, TrainingArguments(steps=steps), folder)


def _profiled(training: Any, steps: int) -> dict[str, float]:
    """Seconds a step in each op.

    Raises:
        WrongResult: none ran.
    """
    with profile(activities=[ProfilerActivity.CPU]) as found:
        for _ in range(steps):
            training.update()
    calls: dict[str, list[float]] = {}
    for event in found.events() or ():
        if event.name.startswith(_PREFIX):
            calls.setdefault(event.name.removeprefix(_PREFIX), []).append(event.self_cpu_time_total / 1e6)
    if not calls:
        raise WrongResult("a training step: none of fastcompress's ops ran")
    return {name: statistics.median(seconds) * len(seconds) / steps for name, seconds in calls.items()}


def _timed(training: Any, busy: list[float]) -> Callable[[int], None]:
    """A step, whose CPU time is appended to ``busy``."""

    def step(_: int) -> None:
        start = time.process_time()
        training.update()
        busy.append((time.process_time() - start) / torch.get_num_threads())

    return step


def measure(
    threads: int, reps: int, tries: int, manifest: Path = MANIFEST, rules: Sequence[str] = RULES, steps: int = STEPS
) -> list[Share]:
    """Of each rule; their steps are timed interleaved.

    Raises:
        WrongResult: a step ran none of the ops.
        fastcompress.training.trainer.TrainingStopped: a loss is not finite.
    """
    torch.set_num_threads(threads)
    with contextlib.ExitStack() as stack:
        trainings = {}
        for rule in rules:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            trainings[rule] = _training(rule, folder, manifest, reps + steps + 8)
        for training in trainings.values():
            for _ in range(3):
                training.update()
        busy: dict[str, list[float]] = {rule: [] for rule in rules}
        functions = {rule: _timed(training, busy[rule]) for rule, training in trainings.items()}
        samples, disturbance = interleave(functions, reps, tries=tries)
        found = []
        for rule, training in trainings.items():
            counts = training.update()
            tokens = counts["audio_tokens"] / counts["audio_frames"]
            ops = _profiled(training, steps)
            seconds = statistics.median(busy[rule])
            found.append(Share(rule, threads, tokens, samples[rule], seconds, ops, disturbance))
    return found


def rows(found: Sequence[Share]) -> list[Sequence[str]]:
    """For ``report.align``."""
    head = ["training step", "tokens a frame", "ms", "p10", "p90", "reps", "busy ms", "in fastcompress"]
    lines: list[Sequence[str]] = [head]
    for one in found:
        sample = one.samples
        times = [f"{seconds * 1e3:.1f}" for seconds in (sample.median, sample.p10, sample.p90)]
        name = f"{one.rule}, {one.threads} thr"
        busy, share = f"{one.busy * 1e3:.1f}", f"{one.share:.2%}"
        lines.append([name, f"{one.tokens:.3f}", *times, str(len(sample.seconds)), busy, share])
    return lines

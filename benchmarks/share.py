"""What share of a training step compression and packing take, and how long a step is with fewer tokens.

A small audio LLM (``fastcompress.lalm.recipes.build_small``) trains on the recordings that are shipped.
"""

from __future__ import annotations

import contextlib
import importlib.util
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.checks import WrongResult
from benchmarks.timing import Disturbance, Samples, interleave

MANIFEST = Path(__file__).resolve().parents[1] / "assets" / "digits" / "test.jsonl"
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
        ops: seconds a step in each of fastcompress's ops, forward and backward, as the profiler has them.
    """

    rule: str
    threads: int
    tokens: float
    samples: Samples
    ops: dict[str, float]
    disturbance: Disturbance

    @property
    def share(self) -> float:
        """Of a step."""
        return sum(self.ops.values()) / self.samples.median


def _training(rule: str, folder: Path, manifest: Path, steps: int) -> Any:
    from fastcompress.lalm.examples import Examples
    from fastcompress.lalm.manifest import read_manifest
    from fastcompress.lalm.recipes import build_small
    from fastcompress.lalm.training import Training, TrainingArguments

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
    events = [event for event in found.key_averages() if event.key.startswith(_PREFIX)]
    if not events:
        raise WrongResult("a training step: none of fastcompress's ops ran")
    return {event.key.removeprefix(_PREFIX): event.self_cpu_time_total / 1e6 / steps for event in events}


def measure(
    threads: int, reps: int, tries: int, manifest: Path = MANIFEST, rules: Sequence[str] = RULES, steps: int = STEPS
) -> list[Share]:
    """Of each rule; their steps are timed interleaved.

    Raises:
        WrongResult: a step ran none of the ops.
        fastcompress.lalm.training.TrainingStopped: a loss is not finite.
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
        functions = {rule: lambda i, training=training: training.update() for rule, training in trainings.items()}
        samples, disturbance = interleave(functions, reps, tries=tries)
        found = []
        for rule, training in trainings.items():
            counts = training.update()
            tokens = counts["audio_tokens"] / counts["audio_frames"]
            ops = _profiled(training, steps)
            found.append(Share(rule, threads, tokens, samples[rule], ops, disturbance))
    return found


def rows(found: Sequence[Share]) -> list[Sequence[str]]:
    """For ``report.align``."""
    lines: list[Sequence[str]] = [["training step", "tokens a frame", "ms", "p10", "p90", "reps", "in fastcompress"]]
    for one in found:
        sample = one.samples
        times = [f"{seconds * 1e3:.1f}" for seconds in (sample.median, sample.p10, sample.p90)]
        name = f"{one.rule}, {one.threads} thr"
        lines.append([name, f"{one.tokens:.3f}", *times, str(len(sample.seconds)), f"{one.share:.2%}"])
    return lines

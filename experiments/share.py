"""``python -m experiments.share MANIFEST``: what share of a training step compression and packing take."""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from fastcompress.lalm.examples import Examples
from fastcompress.lalm.manifest import read_manifest
from fastcompress.lalm.recipes import build_small
from fastcompress.lalm.training import Training, TrainingArguments

STEPS = 20


def measure(manifest: str, rule: str) -> dict[str, float]:
    """Milliseconds a step, of all of it and of each of fastcompress's ops, forward and backward; on one thread."""
    torch.set_num_threads(1)
    utterances = read_manifest(manifest)[:400]
    model, processor = build_small(utterances, rule=rule)
    examples = Examples(utterances, processor, cache=True, phones=model.config.ctc_tokens)
    for index in range(len(examples)):
        examples.features(index)
    with tempfile.TemporaryDirectory() as folder:
        training = Training(model, examples, TrainingArguments(steps=2 * STEPS), Path(folder))
        for _ in range(5):
            training.update()
        with profile(activities=[ProfilerActivity.CPU]) as found:
            since = time.perf_counter()
            for _ in range(STEPS):
                training.update()
            total = time.perf_counter() - since
    ops = {
        e.key: e.self_cpu_time_total / 1e3 / STEPS for e in found.key_averages() if e.key.startswith("fastcompress::")
    }
    return {"step": 1e3 * total / STEPS} | ops


if __name__ == "__main__":
    for _rule in ("uniform:3", "local-max"):
        _times = measure(sys.argv[1], _rule)
        _step = _times.pop("step")
        print(f"{_rule}: {_step:.1f} ms a step, {100 * sum(_times.values()) / _step:.2f} % in fastcompress")
        for _name, _ms in _times.items():
            print(f"    {_name}: {_ms:.3f} ms")

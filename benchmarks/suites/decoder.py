"""A decoder on a packed batch against the same batch padded: time, and peak memory in a process of its own.

``python -m benchmarks.suites.decoder FORM DIRECTION THREADS SIZE`` prints the peak of one form as JSON.
"""

from __future__ import annotations

import importlib.util
import json
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastcompress as fc
from benchmarks.harness.clock import Disturbance, Samples, interleave
from benchmarks.harness.memory import high_water
from benchmarks.suites.checks import WrongResult

OURS = "packed, fastcompress"
#: Implementation of attention, and whether the batch is packed.
FORMS = {OURS: ("fastcompress", True), "padded, sdpa": ("sdpa", False), "packed, sdpa": ("sdpa", True)}
PADDED = "padded, sdpa"
DIRECTIONS = ("forward", "forward+backward")


def available() -> bool:
    """Whether transformers is installed."""
    return importlib.util.find_spec("transformers") is not None


@dataclass(frozen=True)
class Size:
    """Width and layers of the decoder, samples and the most rows of one."""

    width: int
    layers: int
    count: int
    longest: int


SIZES = {"quick": Size(64, 2, 4, 60), "cpu": Size(256, 4, 16, 700), "gpu": Size(2048, 8, 16, 2000)}


def lengths(size: Size) -> tuple[int, ...]:
    """Rows of each sample: short commands and long answers in one batch, log-normal as utterances are."""
    g = random.Random(3)
    count, longest = size.count, size.longest
    return tuple(max(8, min(longest, round(longest / 3.5 * g.lognormvariate(0, 0.6)))) for _ in range(count))


def padding(sizes: Sequence[int]) -> float:
    """Share of a padded batch that is padding."""
    return 1 - sum(sizes) / (len(sizes) * max(sizes))


def build(
    form: str, size: Size, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Callable[[bool], tuple[Tensor, Any]]:
    """A call of the decoder, with or without gradients: logits of all rows that are no padding, and the loss."""
    import transformers

    import fastcompress.decoder  # noqa: F401  (registers the implementation)

    implementation, is_packed = FORMS[form]
    heads = max(4, size.width // 128)
    config = transformers.Qwen2Config(
        vocab_size=2000,
        hidden_size=size.width,
        intermediate_size=4 * size.width,
        num_hidden_layers=size.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=implementation)
    model.to(device, dtype)
    sizes = lengths(size)
    embeds = torch.randn(len(sizes), max(sizes), size.width).to(device, dtype)
    mask = (torch.arange(max(sizes)) < torch.tensor(sizes)[:, None]).long().to(device)
    labels = torch.randint(0, 2000, mask.shape).to(device).masked_fill(mask == 0, -100)

    def call(backward: bool) -> tuple[Tensor, Any]:
        with torch.set_grad_enabled(backward):
            if is_packed:
                packed = fc.pack(inputs_embeds=embeds, attention_mask=mask, labels=labels)
                kwargs = packed.model_inputs()
                if implementation == "sdpa":  # as transformers packs: positions alone
                    kwargs = {k: kwargs[k] for k in ("inputs_embeds", "position_ids", "labels", "use_cache")}
                out = model(**kwargs)
                logits = out.logits[0]
            else:
                out = model(inputs_embeds=embeds, attention_mask=mask, labels=labels, use_cache=False)
                logits = out.logits
            if backward:
                model.zero_grad()
                out.loss.backward()
        return (logits if is_packed else logits.detach()[mask.bool()]), out.loss.detach()

    return call


def check(form: str, logits: Tensor, expected: Tensor, tolerance: float) -> None:
    """Whether each row's logits are those expected, by the norm of the worst row's error.

    Raises:
        WrongResult: they are not.
    """
    error = float(((logits - expected).norm(dim=-1) / expected.norm(dim=-1)).max())
    if not error <= tolerance:
        raise WrongResult(f"{form}: logits are off by {error:.2g} of their norm, of which {tolerance:g} is allowed")


@dataclass(frozen=True)
class DecoderTable:
    """Times in seconds and peaks in bytes, by form."""

    direction: str
    threads: int
    sizes: tuple[int, ...]
    samples: dict[str, Samples]
    peaks: dict[str, int | None]
    disturbance: Disturbance


def measure(threads: int, reps: int, size: str, tries: int) -> list[DecoderTable]:
    """Both directions.

    Raises:
        WrongResult: a form gives other logits than the padded batch.
    """
    torch.set_num_threads(threads)
    calls = {form: build(form, SIZES[size]) for form in FORMS}
    expected, loss = calls[PADDED](False)
    for form, call in calls.items():
        logits, its_loss = call(False)
        check(form, logits, expected, 1e-5)
        if not abs(its_loss - loss) <= 1e-4:
            raise WrongResult(f"{form}: the loss is off by {abs(its_loss - loss):.2g}")
    tables = []
    for direction in DIRECTIONS:
        functions = {form: lambda i, call=call: call(direction != "forward")[1] for form, call in calls.items()}  # noqa: B023
        samples, disturbance = interleave(functions, reps, max_seconds=60, tries=tries)
        peaks = {form: peak(form, direction, threads, size) for form in FORMS}
        tables.append(DecoderTable(direction, threads, lengths(SIZES[size]), samples, peaks, disturbance))
    return tables


def peak(form: str, direction: str, threads: int, size: str) -> int | None:
    """Bytes that a call needs at its peak, in a fresh process; ``None`` where the system does not tell."""
    command = [sys.executable, "-m", "benchmarks.suites.decoder", form, direction, str(threads), size]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).resolve().parents[2])
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None


def rows(table: DecoderTable) -> list[Sequence[str]]:
    """For ``report.align``: fastest first."""
    ours = table.samples[OURS].median
    lines: list[Sequence[str]] = [["", "ms", "p10", "p90", "reps", "peak MB", "x ours"]]
    for name, sample in sorted(table.samples.items(), key=lambda item: item[1].median):
        times = [f"{seconds * 1e3:.0f}" for seconds in (sample.median, sample.p10, sample.p90)]
        at_most = table.peaks[name]
        memory = "" if at_most is None else f"{at_most / 1e6:.0f}"
        lines.append([name, *times, str(len(sample.seconds)), memory, f"{sample.median / ours:.2f}"])
    return lines


if __name__ == "__main__":
    _form, _direction, _threads, _size = sys.argv[1:]
    torch.set_num_threads(int(_threads))
    _call = build(_form, SIZES[_size])
    print(json.dumps(high_water(lambda: _call(_direction != "forward"))))

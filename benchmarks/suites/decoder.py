"""Suite ``decoder``: a decoder on a packed batch against the same batch padded, in time and in peak memory."""

from __future__ import annotations

import functools
import importlib.util
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import fastcompress as fc
from benchmarks.harness.compare import Bench, Implementation, Job, WrongResult, compare
from benchmarks.harness.memory import high_water, in_process
from benchmarks.results import BOTH, OURS

NAME = "decoder"
PACKED, PADDED = "packed, fastcompress", "padded, sdpa"
#: Implementation of attention, whether the batch is packed, and the group.
FORMS = {
    PACKED: ("fastcompress", True, OURS),
    PADDED: ("sdpa", False, "padded"),
    "packed, sdpa": ("sdpa", True, "transformers"),
}
#: Largest error of the logits relative to their norm: in fp32, and of bf16 decoders that add in other orders; logits of
#: other rows differ by 1.4.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.03}


@dataclass(frozen=True)
class Size:
    """Width and layers of the decoder, number of samples and most rows of one."""

    width: int
    layers: int
    count: int
    longest: int


SIZES = {"quick": Size(64, 2, 4, 60), "cpu": Size(256, 4, 16, 700), "gpu": Size(2048, 8, 16, 2000)}


def lengths(size: Size) -> tuple[int, ...]:
    """Draw the rows of each sample: short commands and long answers, log-normal as utterances are."""
    g = random.Random(3)
    scale = size.longest / 3.5
    return tuple(max(8, min(size.longest, round(scale * g.lognormvariate(0, 0.6)))) for _ in range(size.count))


def padding(sizes: Sequence[int]) -> float:
    """Return the share of a padded batch that is padding."""
    return 1 - sum(sizes) / (len(sizes) * max(sizes))


def build(
    form: str, size: Size, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Callable[[], tuple[Tensor, Tensor]]:
    """Build a call that returns the logits of all rows but padding, and the loss; with gradients it runs backward."""
    import transformers

    import fastcompress.decoder  # noqa: F401  (registers the implementation)

    implementation, is_packed, _ = FORMS[form]
    heads = max(4, size.width // 128)
    config = transformers.Qwen2Config(
        vocab_size=2000, hidden_size=size.width, intermediate_size=4 * size.width, num_hidden_layers=size.layers,
        num_attention_heads=heads, num_key_value_heads=heads // 2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=implementation)
    model.to(device, dtype)
    sizes = lengths(size)
    embeds = torch.randn(len(sizes), max(sizes), size.width).to(device, dtype)
    mask = (torch.arange(max(sizes)) < torch.tensor(sizes)[:, None]).long().to(device)
    labels = torch.randint(0, 2000, mask.shape).to(device).masked_fill(mask == 0, -100)

    def call() -> tuple[Tensor, Tensor]:
        inputs = {"inputs_embeds": embeds, "attention_mask": mask, "labels": labels, "use_cache": False}
        if is_packed:
            inputs = fc.pack(inputs_embeds=embeds, attention_mask=mask, labels=labels).model_inputs()
            if implementation == "sdpa":  # as transformers packs: positions alone
                inputs = {k: inputs[k] for k in ("inputs_embeds", "position_ids", "labels", "use_cache")}
        out = model(**inputs)
        if torch.is_grad_enabled():
            model.zero_grad()
            out.loss.backward()
        logits = out.logits.detach()
        return logits[0] if is_packed else logits[mask.bool()], out.loss.detach()

    return call


def peak(form: str, direction: str, threads: int, size: Size) -> int:
    """Return the peak memory of one form in this process, which should be fresh."""
    torch.set_num_threads(threads)
    call = build(form, size)
    with torch.set_grad_enabled(direction == BOTH):
        return high_water(call)


def check_logits(name: str, logits: Tensor, expected: Tensor, tolerance: float) -> None:
    """Check the logits by the norm of the worst row's error.

    Raises:
        WrongResult: They differ.
    """
    logits, expected = logits.float(), expected.float()
    error = float(((logits - expected).norm(dim=-1) / expected.norm(dim=-1)).max())
    if not error <= tolerance:
        raise WrongResult(f"{name}: logits are off by {error:.2g} of their norm, of which {tolerance:g} is allowed")


def settings(bench: Bench, suite: str) -> Iterator[tuple[str, torch.dtype, int]]:
    """Yield the size of the model to measure, its dtype (fp32 on the CPU, bf16 on a GPU) and the threads."""
    if importlib.util.find_spec("transformers") is None:
        return print(f"{suite}: transformers is not installed")
    size = "quick" if bench.quick or bench.dry else "gpu" if bench.on_gpu else "cpu"
    for dtype, threads in bench.settings(("bf16",) if bench.on_gpu else ("fp32",)):
        yield size, dtype, threads


def job(bench: Bench, name: str, dtype: torch.dtype, threads: int) -> Job:
    """Make the job of one setting. The logits and the loss of the padded batch are what is expected."""
    size = SIZES[name]
    calls = {form: build(form, size, bench.device, dtype) for form in FORMS}
    implementations = [
        Implementation(form, FORMS[form][2], functools.partial(_run, call)) for form, call in calls.items()
    ]
    rows = lengths(size)
    with torch.no_grad():
        wanted, its_loss = calls[PADDED]()

    def check(name: str, x: Any, result: tuple[Tensor, Tensor], *_: Any) -> dict[str, Any]:
        logits, loss = result
        check_logits(name, logits, wanted, TOLERANCE[dtype])
        if dtype == torch.float32 and not abs(loss - its_loss) <= 1e-4:
            raise WrongResult(f"{name}: the loss is off by {abs(loss - its_loss):.2g}")
        return {}

    return Job(
        NAME, f"{len(rows)} samples", dtype, threads, implementations, check, both=lambda form, x: form(x, None),
        strict=True, reps=7, max_seconds=60,
        peak=lambda form, direction: in_process(peak, form, direction, threads, size),
        details={"width": size.width, "layers": size.layers, "lengths": rows, "padding": padding(rows)},
    )  # fmt: skip


def _run(call: Callable[[], Any], _x: Any, _batch: Any) -> Any:
    """Run a call that holds its input, and whose gradients are those of the weights."""
    return call()


def run(bench: Bench) -> None:
    """Measure one size."""
    for size, dtype, threads in settings(bench, NAME):
        compare(bench, job(bench, size, dtype, threads))

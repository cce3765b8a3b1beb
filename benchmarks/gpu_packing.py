"""Packing, a packed decoder against a padded one, and prefill, on a GPU: for ``python -m benchmarks.gpu``."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import fastcompress as fc
from benchmarks.gpu_run import BACKWARD, FORWARD, Run, timed
from benchmarks.harness.device import elapsed, side_stream, synchronize, wall
from benchmarks.suites import decoder, prefill
from benchmarks.suites import pack as packing
from benchmarks.suites.checks import WrongResult
from benchmarks.suites.pack import Batch, PackCase

#: Of the logits of bf16 decoders that add in other orders, relative to their norm; logits of other rows differ by 1.4.
HALF_ERROR = 0.03


def _bound(batch: Batch) -> Tensor:
    return packing.fastcompress_pack(batch, compact=False)


def _copy(batch: Batch) -> Tensor:
    return packing.fastcompress_pack(batch).clone()


def measure_packing(run: Run, dry: bool) -> None:
    """``pack`` on the backends, and what people write; bytes are each packed row read once and written once."""
    dtype = torch.bfloat16
    forms: list[tuple[str, str, Callable[[Batch], Tensor], Callable[[Batch], Tensor] | None, str | None]] = [
        ("fastcompress, cuda", "cuda", packing.fastcompress_pack, _bound, None if dry else "cuda")
    ]
    if importlib.util.find_spec("triton") and (not dry or os.environ.get("TRITON_INTERPRET") == "1"):
        forms.append(("fastcompress, triton", "triton", packing.fastcompress_pack, _bound, "triton"))
    forms += [(name, "eager", form, None, None) for name, form in packing.forms().items() if name != packing.OURS]
    for case in (packing.QUICK,) if dry else packing.CASES:
        batch = packing.batch(case, dtype, run.device)
        for name, group, form, graph, backend in forms:
            if time.monotonic() > run.deadline:
                run.skipped.append(f"{name}, pack {case.name}: out of time")
                continue
            try:
                with fc.backend(backend) if backend else contextlib.nullcontext():
                    _measure_form(run, case, batch, dtype, (name, group), form, graph)
            except Exception as error:  # our own failing is an error, another's must not stop us
                text = f"{name}, pack {case.name}: {type(error).__name__}: {error}".splitlines()[0]
                (run.wrong if name.startswith("fastcompress") else run.skipped).append(text)
        print(f"measured: pack, {case.name}", flush=True)


def _measure_form(
    run: Run,
    case: PackCase,
    batch: Batch,
    dtype: torch.dtype,
    who: tuple[str, str],
    form: Callable[[Batch], Tensor],
    graph: Callable[[Batch], Tensor] | None,
) -> None:
    name = f"pack {case.name} x {case.width}"
    moved = 2 * case.tokens * case.width * dtype.itemsize
    packing.check(who[0], batch, form(batch))
    if graph is not None:
        packing.check(who[0], batch, graph(batch))
    with torch.no_grad():
        found = timed(run, lambda: form(batch), graph and (lambda: graph(batch)))
        call = statistics.median(wall(lambda: form(batch), run.flush, run.device) for _ in range(run.reps))
    run.add(name, dtype, FORWARD, *who, found, moved, call)
    with side_stream(run.device):
        leaf = Batch(**(vars(batch) | {"audio": batch.audio.detach().requires_grad_()}))
        out = (graph or form)(leaf)
        grad = torch.randn_like(out)
        synchronize(run.device)

        def backward() -> tuple[Tensor, ...]:
            return torch.autograd.grad(out, leaf.audio, grad, retain_graph=True)

        backward()
        found = timed(run, backward, backward if graph else None)
    run.add(name, dtype, BACKWARD, *who, found, 2 * batch.audio.nbytes)


def measure_decoder(run: Run, dry: bool) -> None:
    """A decoder on a packed batch and padded, in bf16: time, and what it allocates at most."""
    if not decoder.available():
        run.skipped.append("decoder: transformers is not installed")
        return
    size, dtype = decoder.SIZES["quick" if dry else "gpu"], torch.bfloat16
    name = f"decoder, {size.layers} layers x {size.width}, {decoder.padding(decoder.lengths(size)):.0%} padding"
    expected = None
    for form in sorted(decoder.FORMS, key=lambda form: form != decoder.PADDED):  # which the others are checked against
        if time.monotonic() > run.deadline:
            run.skipped.append(f"{form}, {name}: out of time")
            continue
        try:
            call = decoder.build(form, size, run.device, dtype)
            logits = call(False)[0].float()
            expected = logits if form == decoder.PADDED else expected
            if expected is None:
                raise WrongResult(f"{decoder.PADDED} gave nothing to compare with")
            decoder.check(form, logits, expected, HALF_ERROR)
            for direction in decoder.DIRECTIONS:
                _time_decoder(run, name, direction, form, call)
        except Exception as error:  # our own failing is an error; another's, such as for memory, must not stop us
            text = f"{form}, {name}: {type(error).__name__}: {error}".splitlines()[0]
            (run.wrong if form == decoder.OURS else run.skipped).append(text)
    print(f"measured: {name}", flush=True)


def _time_decoder(run: Run, name: str, direction: str, form: str, call: Callable[[bool], Any]) -> None:
    backward = direction != "forward"
    call(backward)
    peak = None
    if run.device.type == "cuda":
        before = torch.cuda.memory_allocated(run.device)
        torch.cuda.reset_peak_memory_stats(run.device)
        call(backward)
        peak = torch.cuda.max_memory_allocated(run.device) - before
    seconds = sorted(elapsed(lambda: call(backward), run.flush, run.device, min(run.reps, 10)))
    group = "cuda" if form == decoder.OURS else "eager"
    run.add(name, torch.bfloat16, direction, form, group, ("events", seconds), 0, None, peak)


def measure_prefill(run: Run, dry: bool) -> None:
    """An audio LLM as large as Qwen2-Audio's decoder reads its prompt, stock and compressed, in bf16."""
    if not prefill.available():
        run.skipped.append("prefill: transformers is not installed")
        return
    size, dtype = prefill.SIZES["quick" if dry else "gpu"], torch.bfloat16
    try:
        stock, inputs = prefill.build(size, run.device, dtype)
    except (RuntimeError, ImportError) as error:  # memory, or another version of transformers
        run.skipped.append(f"prefill: {type(error).__name__}: {error}".splitlines()[0])
        return
    name = f"prefill, {size.layers} layers x {size.width}, {size.count} x {size.seconds} s"
    before: tuple[str, list[float], int | None] | None = (
        None  # of the stock model, the first: beside each of the others
    )
    for form in prefill.FORMS:
        if time.monotonic() > run.deadline:
            run.skipped.append(f"{form}, {name}: out of time")
            continue
        try:
            model = prefill.compressed(stock, form)
            tokens, cache = prefill.check(form, model, stock, inputs, HALF_ERROR)
            seconds, peak = _time_prefill(run, model, inputs)
        except Exception as error:  # our own failing is an error
            text = f"{form}, {name}: {type(error).__name__}: {error}".splitlines()[0]
            (run.skipped if form == prefill.STOCK else run.wrong).append(text)
            continue
        contender = f"{form}, {tokens} tokens, cache of {cache / 1e6:.1f} MB"
        if form == prefill.STOCK:
            before = contender, seconds, peak
            continue
        run.add(f"{name}, {form}", dtype, FORWARD, contender, "cuda", ("wall", seconds), 0, None, peak)
        if before is not None:
            run.add(f"{name}, {form}", dtype, FORWARD, before[0], "eager", ("wall", before[1]), 0, None, before[2])
    print("measured: prefill", flush=True)


def _time_prefill(run: Run, model: Any, inputs: dict[str, Tensor]) -> tuple[list[float], int | None]:
    """Seconds of each repetition in order, and bytes that one allocates at most."""
    peak = None
    if run.device.type == "cuda":
        before = torch.cuda.memory_allocated(run.device)
        torch.cuda.reset_peak_memory_stats(run.device)
        prefill.first_word(model, inputs)
        peak = torch.cuda.max_memory_allocated(run.device) - before
    reps = range(min(run.reps, 10))
    return sorted(wall(lambda: prefill.first_word(model, inputs), run.flush, run.device) for _ in reps), peak

"""Measures one setting: a case, a dtype, a number of threads; correctness first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness.bandwidth_bound import KINDS, Floor
from benchmarks.harness.cases import Case, Inputs, packed_buffers, padded_buffers
from benchmarks.harness.clock import TRIES, Disturbance, interleave
from benchmarks.registry import OURS, Contender
from benchmarks.suites import compiled
from benchmarks.suites.checks import Agreement, Expected, WrongResult, check_average_pool, exact_starts
from benchmarks.suites.segment_pool import Call, Tokens

#: Most bytes of new memory that are made ready before a sample.
_MAX_RECALL = 2 << 30

#: Gradients to rotate through.
_GRADIENTS = 8

FORWARD, BOTH = "forward", "forward+backward"


@dataclass(frozen=True)
class Row:
    """One line of a table. Times are medians and percentiles of a call, in seconds."""

    contender: str
    group: str
    median: float
    p10: float
    p90: float
    reps: int
    differing: int | None = None


@dataclass
class Table:
    """What was measured for a case, a dtype, a number of threads and a direction.

    Attributes:
        moved: bytes of the input read and the outputs written, what the floor moves.
        skipped: contender to the reason why it was not timed.
    """

    case: Case
    dtype: str
    threads: int
    direction: str
    tokens: int
    buffers: int
    moved: int
    rows: list[Row]
    skipped: dict[str, str]
    disturbance: Disturbance

    def best(self, *groups: str) -> Row | None:
        """The fastest row of some groups."""
        rows = [row for row in self.rows if row.group in groups]
        return min(rows, key=lambda row: row.median, default=None)

    def row(self, name: str) -> Row | None:
        """The row of a contender."""
        return next((row for row in self.rows if row.contender == name), None)


@dataclass
class Entrant:
    """A contender that is to be timed on its inputs."""

    contender: Contender
    call: Call
    inputs: Sequence[Inputs]
    leaves: Sequence[Inputs] = field(default_factory=list)
    agreement: Agreement | None = None

    def __post_init__(self) -> None:
        self.leaves = [inputs.differentiable() for inputs in self.inputs]


def _backward(call: Call, inputs: Inputs, grads: Tensor) -> tuple[Tokens, Tensor, Tensor]:
    """Result, the gradient put in, the gradient that came out."""
    tokens = call(inputs)
    grad = grads[: tokens.values.numel()].view(tokens.values.shape)
    return tokens, grad, torch.autograd.grad(tokens.values, inputs.x, grad)[0]


def _check(entrant: Entrant, expected: Expected, grads: Tensor, backward: bool) -> Agreement | None:
    name = entrant.contender.name
    with torch.no_grad():
        tokens = entrant.call(entrant.inputs[0])
    if entrant.contender.padded:
        check_average_pool(name, entrant.inputs[0], tokens)
        return None
    agreement = expected.check(name, tokens)
    if backward:
        expected.check(name, *_backward(entrant.call, entrant.leaves[0], grads))
    return agreement


@dataclass(frozen=True)
class Admitted:
    """Who takes part in a setting.

    Attributes:
        skipped: contender to the reason why it was left out.
        tokens: M.
        grads: what the backward pass starts from, to rotate through.
    """

    entrants: list[Entrant]
    skipped: dict[str, str]
    tokens: int
    grads: list[Tensor]


def admit(
    contenders: Sequence[Contender], case: Case, dtype: torch.dtype, threads: int, last_level_cache: int
) -> Admitted:
    """Sets the number of threads, builds inputs and calls of the case's contenders and checks every result.

    Raises:
        WrongResult: the library is wrong, so nothing can be compared.
    """
    torch.set_num_threads(threads)
    if case.contenders is not None:
        contenders = [contender for contender in contenders if contender.name in case.contenders]
    if any(contender.group == "compile" for contender in contenders):
        compiled.prepare(threads)
    packed = packed_buffers(case, dtype, last_level_cache)
    exact = Expected(packed[0], exact_starts(packed[0]))
    padded: list[Inputs] = []
    if any(contender.padded and contender.available for contender in contenders):
        padded = padded_buffers(packed, case.lengths, last_level_cache)
    generator = torch.Generator().manual_seed(1)
    most = max(case.frames, *(inputs.x.shape[0] * inputs.x.shape[1] // case.window for inputs in padded[:1]), 0)
    first = torch.randn(most * case.dim, generator=generator).to(dtype)
    grads = [first, *(first.clone() for _ in range(min(len(packed), _GRADIENTS) - 1 if case.backward else 0))]

    entrants, skipped = [], {}
    expected = exact
    for contender in sorted(contenders, key=lambda c: c.name != OURS):
        if not contender.available:
            skipped[contender.name] = f"{contender.module} is not installed"
            continue
        try:
            entrant = Entrant(contender, contender.build(), padded if contender.padded else packed)
            entrant.agreement = _check(entrant, expected, grads[0], case.backward)
        except WrongResult as error:
            if contender.name == OURS:
                raise
            skipped[contender.name] = f"wrong: {error}"
            continue
        except Exception as error:  # somebody else's code: say so and go on
            if contender.name == OURS:
                raise
            skipped[contender.name] = f"fails: {type(error).__name__}: {error}".split("\n", 1)[0]
            continue
        if contender.name == OURS:
            with torch.no_grad():
                starts = entrant.call(packed[0]).starts
            assert starts is not None
            expected = Expected(packed[0], starts)
        entrants.append(entrant)
    return Admitted(entrants, skipped, expected.starts.shape[0], grads)


def _forward_call(entrant: Entrant) -> Callable[[int], Any]:
    call, inputs = entrant.call, entrant.inputs
    return lambda i: call(inputs[i % len(inputs)])


def _backward_call(entrant: Entrant, grads: Sequence[Tensor]) -> Callable[[int], Any]:
    call, leaves = entrant.call, entrant.leaves
    return lambda i: _backward(call, leaves[i % len(leaves)], grads[i % len(grads)])


def measure(
    case: Case,
    dtype: torch.dtype,
    threads: int,
    contenders: Sequence[Contender],
    floor: Floor | None,
    reps: int,
    last_level_cache: int,
    max_seconds: float = 10.0,
    tries: int = TRIES,
) -> list[Table]:
    """The tables of one setting: forward, and forward + backward where the case has it.

    Raises:
        WrongResult: the library is wrong.
    """
    admitted = admit(contenders, case, dtype, threads, last_level_cache)
    entrants, tokens, grads = admitted.entrants, admitted.tokens, admitted.grads
    read, written = case.input_bytes(dtype), tokens * case.dim * dtype.itemsize
    xs = [inputs.x for inputs in next(e.inputs for e in entrants if not e.contender.padded)]
    # What the slowest forms allocate: a few fp32 copies of the input.
    recall = min(4 * case.frames * case.dim * 4, _MAX_RECALL) if case.calls == 1 else 0
    rows_of_grads = [grad.view(-1, case.dim) for grad in grads]
    tables = []
    for direction in (FORWARD, BOTH) if case.backward else (FORWARD,):
        backward = direction == BOTH
        functions: dict[str, Callable[[int], Any]] = {}
        for entrant in entrants:
            functions[entrant.contender.name] = _backward_call(entrant, grads) if backward else _forward_call(entrant)
        if floor is not None and case.floors:
            for kind in KINDS:
                functions[f"floor, {kind}"] = floor.calls(kind, xs, rows_of_grads, tokens, threads, backward)
        with torch.set_grad_enabled(backward):
            samples, disturbance = interleave(functions, reps, case.calls, max_seconds, tries, recall)
        groups = {e.contender.name: (e.contender.group, e.agreement) for e in entrants}
        rows = []
        for name, sample in samples.items():
            group, agreement = groups.get(name, ("floor", None))
            differing = None if agreement is None else agreement.differing
            rows.append(Row(name, group, sample.median, sample.p10, sample.p90, len(sample.seconds), differing))
        moved = (read + written) * (2 if backward else 1)
        name = str(dtype).removeprefix("torch.")
        skipped = dict(admitted.skipped)
        tables.append(Table(case, name, threads, direction, tokens, len(xs), moved, rows, skipped, disturbance))
    return tables

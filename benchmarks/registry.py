"""What is measured: every case and every contender. Add one here."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.harness.cases import Case, random_lengths
from benchmarks.suites import compiled
from benchmarks.suites import segment_pool as contenders
from benchmarks.suites.segment_pool import Call

OURS = "fastcompress"


@dataclass(frozen=True)
class Contender:
    """One way to do the job.

    Attributes:
        name: row of the table.
        group: ``fastcompress``, ``compile``, ``eager``, ``loop``, ``library`` or ``less work``: targets are against the
            best of a group.
        build: returns the function to time; called anew for each case, dtype and number of threads.
        padded: takes ``[B, T, D]`` and averages fixed windows: other segments than the rest.
        module: package it needs; without it the contender is left out, and the report says so.
    """

    name: str
    group: str
    build: Callable[[], Call]
    padded: bool = False
    module: str | None = None

    @property
    def available(self) -> bool:
        """Whether its package is installed."""
        return self.module is None or importlib.util.find_spec(self.module) is not None


def _eager(scores: str, pool: str, group: str = "eager", module: str | None = None) -> Contender:
    form = contenders.vectorised(getattr(contenders, f"{scores}_scores"), getattr(contenders, pool))
    return Contender(f"{scores} + {pool}", group, lambda: form, module=module)


CONTENDERS: tuple[Contender, ...] = (
    Contender(OURS, "fastcompress", lambda: contenders.fastcompress_pool),
    Contender("compile, plain", "compile", compiled.plain),
    Contender("compile, tuned + gather", "compile", lambda: compiled.tuned("gather")),
    Contender("compile, tuned + embedding_bag", "compile", lambda: compiled.tuned("embedding_bag")),
    _eager("cosine", "embedding_bag"),
    _eager("cosine", "scatter_reduce"),
    _eager("cosine", "index_add"),
    _eager("cosine", "segment_reduce"),
    _eager("bmm", "embedding_bag"),
    _eager("bmm", "scatter_reduce"),
    _eager("bmm", "index_add"),
    _eager("bmm", "segment_reduce"),
    _eager("blocked", "embedding_bag"),
    _eager("cosine", "segment_csr", "library", "torch_scatter"),
    _eager("bmm", "segment_csr", "library", "torch_scatter"),
    _eager("bmm", "jagged", "library", "fbgemm_gpu"),
    Contender("loop, tensor_split", "loop", lambda: contenders.loop("tensor_split")),
    Contender("loop, split", "loop", lambda: contenders.loop("split")),
    Contender("AvgPool1d, padded, less work", "less work", lambda: contenders.average_pool, padded=True),
)

CASES: tuple[Case, ...] = (
    Case("S1", random_lengths(8, 1350, 1500, seed=5), 1280),
    Case("S2", random_lengths(32, 200, 1500, seed=5), 1280),
    Case("clip", (1500,), 1280),
    Case(
        "tiny",
        (8,),
        64,
        calls=500,
        backward=False,
        floors=False,
        contenders=(OURS, "compile, plain", "cosine + index_add", "bmm + embedding_bag", "loop, split"),
    ),
    Case("long", (60_000,), 3584, default=False),
    Case(
        "quick",
        random_lengths(4, 300, 400, seed=5),
        1280,
        default=False,
        contenders=(
            OURS,
            "compile, plain",
            "cosine + embedding_bag",
            "bmm + embedding_bag",
            "bmm + index_add",
            "bmm + scatter_reduce",
            "bmm + segment_reduce",
            "bmm + segment_csr",
            "bmm + jagged",
            "blocked + embedding_bag",
            "loop, split",
            "AvgPool1d, padded, less work",
        ),
    ),
)


def case(name: str) -> Case:
    """The case of that name."""
    for candidate in CASES:
        if candidate.name == name:
            return candidate
    raise ValueError(f"case must be one of {', '.join(c.name for c in CASES)}, got {name!r}")

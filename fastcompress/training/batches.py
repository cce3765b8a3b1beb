"""The examples of each training batch.

The plan is a function of the seed, the step and the process alone. A run can resume at any step without saved state,
with the batches of an uninterrupted run.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import lru_cache

#: Batches per bucket. A bucket of shuffled examples is sorted by length and divided into batches, which have little
#: padding and are still random.
BATCHES_PER_BUCKET = 16


class BatchPlan:
    """Batches of examples of similar length, one epoch after the other.

    Args:
        lengths: Lengths of the examples, in any unit.
        batch_size: Examples per process and step.
        num_processes: Number of processes. Each gets different examples.
        seed: Seed of the order.
    """

    def __init__(self, lengths: Sequence[float], batch_size: int, num_processes: int = 1, seed: int = 0) -> None:
        for name, value in (("batch_size", batch_size), ("num_processes", num_processes)):
            if value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}")
        if not lengths:
            raise ValueError("`lengths` must have at least one example, got 0")
        self.lengths: list[float] = list(lengths)
        self.batch_size = batch_size
        self.num_processes = num_processes
        self.seed = seed
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)

    @property
    def steps_per_epoch(self) -> int:
        """Steps per epoch. Examples that do not fill a last step are left for another epoch."""
        return max(1, len(self.lengths) // (self.batch_size * self.num_processes))

    def batch(self, step: int, process: int = 0) -> list[int]:
        """Return the indices of a process's examples in a step. Steps and processes are counted from 0."""
        epoch, position = divmod(step, self.steps_per_epoch)
        return self._epoch(epoch)[position][process :: self.num_processes]

    def _make_epoch(self, epoch: int) -> list[list[int]]:
        g = random.Random(f"{self.seed}, {epoch}")
        order = list(range(len(self.lengths)))
        g.shuffle(order)
        size = self.batch_size * self.num_processes
        while len(order) < size:  # too few for one batch: use some twice
            order += order[: size - len(order)]
        order = order[: self.steps_per_epoch * size]
        batches: list[list[int]] = []
        for begin in range(0, len(order), BATCHES_PER_BUCKET * size):
            bucket = sorted(order[begin : begin + BATCHES_PER_BUCKET * size], key=lambda i: self.lengths[i])
            batches += [bucket[i : i + size] for i in range(0, len(bucket), size)]
        g.shuffle(batches)
        return batches

"""Which examples make up each training batch.

The plan is a function of the seed, the step and the process alone. Nothing has to be saved or skipped to go on from any
step, and that gives what an uninterrupted run would have seen.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import lru_cache

#: Batches that are cut from one piece of the shuffled examples, sorted by length: less padding, still random.
BATCHES_A_BUCKET = 16


class BatchPlan:
    """Batches of examples of similar length, an epoch after the other.

    Args:
        lengths: of the examples, in any unit; they are batched by it.
        batch_size: examples of a process in a step.
        num_processes: how many processes there are; each sees other examples.
        seed: of the order.
    """

    def __init__(self, lengths: Sequence[float], batch_size: int, num_processes: int = 1, seed: int = 0) -> None:
        for name, value in (("batch_size", batch_size), ("num_processes", num_processes)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not lengths:
            raise ValueError("lengths must hold at least one example, got none")
        self.lengths: list[float] = list(lengths)
        self.batch_size = batch_size
        self.num_processes = num_processes
        self.seed = seed
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)

    @property
    def steps_an_epoch(self) -> int:
        """Steps until every example was seen; what does not fill the last of them is left for another epoch."""
        return max(1, len(self.lengths) // (self.batch_size * self.num_processes))

    def batch(self, step: int, process: int = 0) -> list[int]:
        """Indices of the examples of a process in a step, both counted from 0."""
        epoch, position = divmod(step, self.steps_an_epoch)
        return self._epoch(epoch)[position][process :: self.num_processes]

    def _make_epoch(self, epoch: int) -> list[list[int]]:
        g = random.Random(f"{self.seed}, {epoch}")
        order = list(range(len(self.lengths)))
        g.shuffle(order)
        size = self.batch_size * self.num_processes
        while len(order) < size:  # too few for one batch: some twice
            order += order[: size - len(order)]
        order = order[: self.steps_an_epoch * size]
        batches: list[list[int]] = []
        for begin in range(0, len(order), BATCHES_A_BUCKET * size):
            bucket = sorted(order[begin : begin + BATCHES_A_BUCKET * size], key=lambda i: self.lengths[i])
            batches += [bucket[i : i + size] for i in range(0, len(bucket), size)]
        g.shuffle(batches)
        return batches

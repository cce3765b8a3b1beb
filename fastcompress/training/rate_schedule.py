"""Rules of a training run: one is drawn for each batch, and their rates rise in the first steps.

A model that was trained with several rules serves each of them (Matryoshka training; Cai et al., arXiv 2405.17430).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fastcompress.rules import MinVariance, Rule, TopK, Uniform

NONE = "none"


class RateSchedule:
    """Set the rule of a model for each batch. The choice is a function of the seed and the batch.

    Args:
        model: A ``FastCompressForConditionalGeneration`` whose rule is the first of ``rules``. Its other settings of
            compression stay as they are.
        rules: Text forms of the rules. The first is that of the model after training.
        warmup_steps: Number of steps in which the rates rise linearly from 1.
        seed: Seed of the choice.

    Raises:
        ValueError: The model does not take a rule, or a rule has no rate that could rise.
    """

    def __init__(self, model: Any, rules: Sequence[str], warmup_steps: int = 0, seed: int = 0) -> None:
        self.model: Any = model
        self.rules: list[str] = list(rules)
        self.warmup_steps: int = warmup_steps
        self.seed: int = seed
        self._parts = (model.proportional_attention, model.positions)
        if warmup_steps:
            for rule in self.rules:
                scaled(rule, 0.5)
        for rule in self.rules:  # fail now if the model does not take one
            self._set(rule)
        self.finish()

    def rule(self, step: int, batch: int) -> str:
        """Return the text form of the rule of a batch.

        Args:
            step: Number of steps before this one.
            batch: Number of batches before this one, per process; each step has at least one.
        """
        chosen = random.Random(f"rule, {self.seed}, {batch}").choice(self.rules)
        return scaled(chosen, step / self.warmup_steps) if step < self.warmup_steps else chosen

    def set(self, step: int, batch: int) -> None:
        """Set the rule of a batch."""
        self._set(self.rule(step, batch))

    def finish(self) -> None:
        """Set the rule of the trained model."""
        self._set(self.rules[0])

    def _set(self, rule: str) -> None:
        self.model.rule = None if rule == NONE else rule
        self.model.proportional_attention, self.model.positions = self._parts


def scaled(rule: str, share: float) -> str:
    """Return the text form of a rule whose rate has risen from 1 by a share of the way to that of ``rule``.

    Raises:
        ValueError: The rule has no rate.
    """
    if rule == NONE:
        return rule
    found = Rule.from_string(rule)
    if isinstance(found, Uniform):
        return str(replace(found, size=round(1 + share * (found.size - 1))))
    if isinstance(found, MinVariance) or (isinstance(found, TopK) and found.rate is not None):
        assert found.rate is not None
        return str(replace(found, rate=1 + share * (found.rate - 1)))
    raise ValueError(
        f"rule {rule} has no rate that could rise in rate_warmup_steps; use uniform, min-variance or top-k with a rate"
    )

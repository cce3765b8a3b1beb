"""Checkpoints whose content is a function of their step, so that a mixture of two is found."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from fastcompress.training import checkpoints

WIDTH = 200  # 160 KB of weights, and twice as much in the optimizer
KEEP = 2


def state(step: int) -> tuple[dict[str, Tensor], torch.optim.Optimizer]:
    """Return the state of training after this number of steps."""
    weights = {"a": torch.full((WIDTH, WIDTH), float(step), requires_grad=True)}
    optimizer = torch.optim.AdamW(weights.values())
    weights["a"].grad = torch.full((WIDTH, WIDTH), float(step))
    optimizer.step()
    with torch.no_grad():
        weights["a"].fill_(step)
    return weights, optimizer


def save(folder: Path, step: int) -> None:
    checkpoints.save(folder, step, *state(step), KEEP)


def check_whole(folder: Path) -> list[int]:
    """Assert that every checkpoint can be loaded and is of one step, and return the steps."""
    steps = []
    for path in checkpoints.found(folder):
        weights, optimizer = state(999)
        step = checkpoints.load(path, weights, optimizer)
        assert path.name == f"step-{step:08d}"
        assert bool((weights["a"] == step).all())
        moment = optimizer.state[weights["a"]]["exp_avg"]
        torch.testing.assert_close(moment, torch.full_like(moment, 0.1 * step))
        steps.append(step)
    return steps

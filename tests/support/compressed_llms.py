"""Audio LLMs to compress, in double precision, so that equivalent computations differ by 1e-14 instead of 1e-5."""

from __future__ import annotations

import torch
import transformers
from torch import nn

import fastcompress as fc
from tests.support import audio_llms

GREEDY = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
#: Sizes of audios that are at most one window in all families.
SIZES = (20, 9, 16)


class Gate(nn.Module):
    """A compressor that has parameters."""

    def __init__(self, width: int, rule: str = "uniform:2") -> None:
        super().__init__()
        self.gate = nn.Linear(width, width)
        self.pool = fc.nn.SegmentPool(rule)

    def forward(self, rows: torch.Tensor, cu_seqlens: torch.Tensor) -> fc.Pooled:
        return self.pool(self.gate(rows), cu_seqlens=cu_seqlens)


def make(name: str) -> transformers.PreTrainedModel:
    return audio_llms.make(name).double()


def batch(name: str, model: nn.Module, sizes=SIZES, **kwargs) -> dict[str, torch.Tensor]:
    inputs = audio_llms.batch(name, model, sizes, **kwargs)
    floats = {key: x.double() for key, x in inputs.items() if not isinstance(x, bool) and x.is_floating_point()}
    return inputs | floats


def grads(model: nn.Module) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def largest(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Return the largest difference relative to the largest value."""
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max() / b[name].abs().max().clamp_min(1)) for name in a)

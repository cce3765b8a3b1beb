"""Dtypes of the parts of the reference audio LLM, which differ where the pretrained ones do."""

from __future__ import annotations

import torch
from torch import nn


def part_dtypes(model: nn.Module) -> dict[str, torch.dtype]:
    """Of each part, that of its first floating parameter; parts without one are left out."""
    found = {}
    for name, part in model.named_children():
        dtype = next((p.dtype for p in part.parameters() if p.is_floating_point()), None)
        if dtype is not None:
            found[name] = dtype
    return found


def cast_part(part: nn.Module, dtype: torch.dtype) -> None:
    """Casts what is saved of a part, and not what is computed anew, such as frequencies of positions."""
    for tensor in part.state_dict(keep_vars=True).values():
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)


def float_trained(model: nn.Module) -> None:
    """Casts the parts of which something is trained to fp32, for in half precision small steps round to nothing."""
    for part in model.children():
        if any(p.requires_grad for p in part.parameters()):
            part.float()

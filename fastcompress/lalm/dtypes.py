"""Dtypes of the submodules of the reference audio LLM: each keeps the dtype of its pretrained checkpoint."""

from __future__ import annotations

import torch
from torch import nn


def part_dtypes(model: nn.Module) -> dict[str, torch.dtype]:
    """Return the dtype of each submodule's first floating-point parameter, by name; skip submodules without one."""
    found = {}
    for name, part in model.named_children():
        dtype = next((p.dtype for p in part.parameters() if p.is_floating_point()), None)
        if dtype is not None:
            found[name] = dtype
    return found


def cast_part(part: nn.Module, dtype: torch.dtype) -> None:
    """Cast the parameters and persistent buffers of a submodule; computed buffers, such as rotary frequencies, stay."""
    for tensor in part.state_dict(keep_vars=True).values():
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)


def float_trained(model: nn.Module) -> None:
    """Cast every submodule with a trainable parameter to fp32: in half precision small updates round to zero."""
    for part in model.children():
        if any(p.requires_grad for p in part.parameters()):
            part.float()

"""Features of audio before the stock encoder: excluded features must not affect included ones.

Encoders of transformers run convolutions and attention over the excluded frames, too. Finite values there are part of
the stock model, which pads with silence; a NaN or an infinity would reach every frame.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastcompress.checks import as_mask
from fastcompress.integrations.transformers.families import FAMILIES


def install(model: Any) -> None:
    """Set excluded features that are not finite to 0, in every use of a model."""
    model.model.register_forward_pre_hook(_clean, with_kwargs=True)


def uninstall(model: Any) -> None:
    """Remove the hook."""
    core = model.model
    for key, hook in list(core._forward_pre_hooks.items()):
        if hook is _clean:
            del core._forward_pre_hooks[key]
            core._forward_pre_hooks_with_kwargs.pop(key, None)


def _clean(core: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    family = FAMILIES[core.config.model_type]
    mask = kwargs.get(family.mask)
    found = {
        name: torch.where(_inside(core, kwargs[name], mask, family.time) | kwargs[name].isfinite(), kwargs[name], 0.0)
        for name in family.features
        if mask is not None and kwargs.get(name) is not None
    }
    return (args, kwargs | found) if found else None


def _inside(core: Any, features: Tensor, mask: Tensor, time: int) -> Tensor:
    """Return which features are included, broadcast to their shape: bool ``[A, T]`` with a 1 for the bins."""
    inside = as_mask(FAMILIES[core.config.model_type].mask, mask).to(features.device)
    if inside.shape[1] != features.shape[time]:  # Granite has one value per token, and not per frame
        inside = inside.repeat_interleave(core.config.downsample_rate, 1)[:, : features.shape[time]]
    if features.dim() == 2:
        return inside
    return inside[:, None] if time == -1 else inside[..., None]

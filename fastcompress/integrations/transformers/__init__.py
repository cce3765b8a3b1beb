"""Compression of the audio in stock audio LLMs of transformers.

``apply_to(model, "uniform:3")``, and ``model`` takes what its stock processor gives as it always did; ``revert(model)``
makes it stock again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

import fastcompress.decoder
from fastcompress.decoder.generation import unwrap
from fastcompress.integrations.transformers import budget, dynamic
from fastcompress.integrations.transformers.budget import BudgetProcessor
from fastcompress.integrations.transformers.dynamic import Settings, compressed_prompt
from fastcompress.integrations.transformers.families import (
    FAMILIES,
    REFUSED,
    TESTED,
    check_version,
    family_of,
    support,
    table,
)
from fastcompress.nn import SegmentPool
from fastcompress.rules import LabelChange, Rule, as_rule

__all__ = [
    "FAMILIES",
    "REFUSED",
    "TESTED",
    "BudgetProcessor",
    "apply_to",
    "compressed_prompt",
    "load_compressor",
    "revert",
    "support",
    "table",
]

MODES = ("dynamic", "budget")


def apply_to(
    model: Any,
    compressor: Rule | str | nn.Module,
    mode: str = "dynamic",
    pack: bool | None = None,
    *,
    before_projector: bool = False,
) -> Any:
    """Makes a stock audio LLM compress its audio, in place.

    In **dynamic** mode the number of tokens may depend on what is heard. Processor, chat template, ``forward`` with
    labels, ``generate``, ``Trainer`` and peft stay what they are; what the decoder sees becomes shorter. ``forward``
    returns logits ``[B, S, V]`` of the ``S`` rows of the longest compressed sample, padded on the side of the input, or
    on the left; with labels ``[1, K, V]``, of those rows alone that a label is predicted from, and the mean loss (or
    the sum divided by ``num_items_in_batch``). ``output.compressed`` is the decoder's input
    (:class:`fastcompress.PackedInputs`). ``generate`` returns the prompt as it was given, and what was written.

    In **budget** mode the number is a function of the length alone, and the prompt has as many placeholders
    (:class:`BudgetProcessor`): everything else of the model, and of engines that count placeholders, stays stock.

    Args:
        model: such as ``Qwen2AudioForConditionalGeneration``, with peft around it or not.
        compressor: a rule or its text form, or a module that is called with rows ``[N, D]`` and ``cu_seqlens``
            ``[A + 1]`` and returns ``values`` and ``cu_seqlens``, as those of :mod:`fastcompress.nn` do. It becomes
            ``model.audio_compressor``: what it learns is saved with the model, and can be one of ``modules_to_save`` of
            peft. It is cast to the model's dtype. If it leaves a ``loss`` of its own, as
            :class:`fastcompress.nn.LearnedBoundary` does, that is added, times its ``loss_weight``.
        mode: ``"dynamic"`` or ``"budget"``.
        pack: run the decoder without padding, each sample attending to itself alone, where nothing is generated
            (``forward`` with labels, or without a cache). ``None``: in dynamic mode.
        before_projector: pool the encoder's frames, and project only what is left; else what the projector gives.

    Returns:
        ``model``.

    Raises:
        NotImplementedError: a model, or a combination with it, that cannot work, with the reason.
        TypeError, ValueError: an argument of the wrong kind; a model that is compressed already.
    """
    base = unwrap(model)
    check_version()
    family = family_of(base)
    kind = base.config.model_type
    if mode not in MODES:
        raise ValueError(f"mode must be 'dynamic' or 'budget', got {mode!r}")
    if hasattr(base, "fastcompress_settings"):
        raise ValueError(f"this {kind} is compressed already, by {base.audio_compressor}: revert it first")
    if mode == "budget" and pack:
        raise ValueError("pack is of the dynamic mode: in budget mode forward stays stock")
    module = _compressor(compressor)
    if before_projector and (mode == "budget" or family.why_not_before):
        why = family.why_not_before or "in budget mode what the projector gives is pooled"
        raise NotImplementedError(f"{kind} cannot be compressed before its projector: {why}")
    settings = Settings(family, mode, mode == "dynamic" if pack is None else pack, before_projector)
    if mode == "budget":
        budget.check(kind, family, module)
    elif settings.pack:
        settings.attention = _prepare(base.model.language_model)
    table = base.get_input_embeddings().weight
    base.audio_compressor = module.to(table.device, table.dtype)
    base.fastcompress_settings = settings
    (budget if mode == "budget" else dynamic).install(base)
    return model


def revert(model: Any) -> Any:
    """Makes a compressed model what it was, in place, and returns it.

    Raises:
        ValueError: it is not compressed.
    """
    base = unwrap(model)
    if not hasattr(base, "fastcompress_settings"):
        raise ValueError(f"this {type(base).__name__} is not compressed")
    settings: Settings = base.fastcompress_settings
    dynamic.uninstall(base)
    budget.uninstall(base)
    if settings.attention is not None:
        base.model.language_model.set_attn_implementation(settings.attention)
    del base.fastcompress_settings
    del base.audio_compressor
    return model


def load_compressor(model: Any, folder: str | Path) -> Any:
    """Loads what ``model.audio_compressor`` learned from a folder of ``model.save_pretrained``; returns the model.

    Raises:
        ValueError: there is nothing of it in the folder, or something else.
    """
    from safetensors import safe_open

    base = unwrap(model)
    prefix = "audio_compressor."
    found: dict[str, torch.Tensor] = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found |= {name[len(prefix) :]: file.get_tensor(name) for name in file.keys() if name.startswith(prefix)}
    wanted = base.audio_compressor.state_dict()
    if found.keys() != wanted.keys():
        raise ValueError(
            f"folder {folder} has {', '.join(sorted(found)) or 'nothing'} of audio_compressor, which needs "
            f"{', '.join(sorted(wanted)) or 'nothing'}"
        )
    for name, tensor in found.items():
        if tensor.shape != wanted[name].shape:
            raise ValueError(
                f"{prefix}{name} of {folder} has shape {list(tensor.shape)}, the model's {list(wanted[name].shape)}"
            )
    base.audio_compressor.load_state_dict(found)
    return model


def _compressor(compressor: Any) -> nn.Module:
    if not isinstance(compressor, nn.Module):
        compressor = SegmentPool(as_rule(compressor))
    if type(compressor) is SegmentPool and isinstance(compressor.rule, LabelChange):
        raise NotImplementedError("label-change needs labels, which a stock model does not have: give a module")
    if isinstance(compressor, SegmentPool) and not compressor.compact:
        raise ValueError("compressor must have compact=True: a decoder has no use for rows of an upper bound")
    return compressor


def _prepare(decoder: Any) -> str | None:
    """Gives a decoder attention that keeps samples apart; returns what it had, if that was changed."""
    before: str | None = decoder.config._attn_implementation
    try:
        fastcompress.decoder.prepare(decoder)
    except NotImplementedError as error:
        raise NotImplementedError(f"{error}; pack=False compresses it without packing") from error
    return before

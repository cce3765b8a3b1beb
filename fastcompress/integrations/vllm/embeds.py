"""Pool audio embeddings outside of the engine, for rules whose number of tokens depends on the audio."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastcompress.nn import SegmentPool
from fastcompress.ops.segment_reduce import Reduce
from fastcompress.rules import Rule


class _Merged(Exception):
    """Stops a model before its decoder runs."""


def embed(model: Any, inputs: Mapping[str, Any], rule: Rule | str | nn.Module, reduce: Reduce = "mean") -> list[Tensor]:
    """Encode audio with a stock model of transformers and pool it, as ``audio_embeds`` for vLLM.

    Only the encoder and the projector run. The rule pools each audio as a whole, even if the encoder cuts it into
    windows.

    Args:
        model: Stock audio LLM of transformers, such as Qwen2AudioForConditionalGeneration.
        inputs: Output of its stock processor, with ``input_ids`` ``[B, L]``.
        rule: Rule, its text form, or a module of [`fastcompress.nn`][].
        reduce: Reduction of [`fastcompress.segment_reduce`][].

    Returns:
        The tokens of each audio, ``[M, D]``, on the CPU, in the order of the prompts.

    Raises:
        ValueError: The model is compressed, or the prompts have no audio.
    """
    if getattr(model, "fastcompress_settings", None) is not None:
        raise ValueError(f"model must be a stock model, got a compressed {type(model).__name__}; call revert first")
    rows, lengths = _audio_rows(model, inputs)
    offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int().to(rows.device)
    pool = rule if isinstance(rule, nn.Module) else SegmentPool(rule, reduce)
    with torch.no_grad():
        pooled = pool(rows, cu_seqlens=offsets)
    return [part.cpu() for part in pooled.values.split(pooled.cu_seqlens.diff().tolist())]


def _audio_rows(model: Any, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Return the rows that replace the placeholders of a model, ``[N, D]``, and the number of rows of each audio."""
    ids = inputs["input_ids"]
    audio = ids == model.config.audio_token_id
    edges = torch.nn.functional.pad(audio.int(), (1, 1)).diff()  # prompts are separate rows
    lengths = edges.eq(-1).nonzero()[:, 1] - edges.eq(1).nonzero()[:, 1]
    if not len(lengths):
        raise ValueError(f"inputs must have audio, got input_ids without the placeholder {model.config.audio_token_id}")
    found: list[Tensor] = []

    def keep(module: Any, args: Any, kwargs: Any) -> None:
        found.append(kwargs["inputs_embeds"])
        raise _Merged

    handle = model.model.language_model.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        with torch.no_grad(), contextlib.suppress(_Merged):
            model(**inputs)
    finally:
        handle.remove()
    (merged,) = found
    if merged.shape[:2] != ids.shape:
        raise ValueError(
            f"input_ids must have one placeholder per row of audio, got {list(ids.shape)} ids for "
            f"{list(merged.shape[:2])} rows"
        )
    return merged[audio.to(merged.device)], lengths.cpu()

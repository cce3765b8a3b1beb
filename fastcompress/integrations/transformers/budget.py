"""Compression to a number of tokens that the length of the audio decides.

The prompt then has a placeholder for each token from the start, and what is stock stays stock: ``forward``,
``generate``, caches, and engines that count placeholders before they run the encoder. Two things change: what the model
merges is pooled, and the processor writes fewer placeholders.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastcompress.checks import IGNORED_LABEL
from fastcompress.decoder.generation import unwrap
from fastcompress.integrations.transformers import patches
from fastcompress.integrations.transformers.families import Family
from fastcompress.nn import SegmentPool
from fastcompress.rules import TopK, Uniform

#: Rows of each audio, between the encoder of Qwen2-Audio, which is asked for them, and its projector.
_LENGTHS: contextvars.ContextVar[Tensor | None] = contextvars.ContextVar("fastcompress_lengths", default=None)


def check(kind: str, family: Family, compressor: nn.Module) -> None:
    """Raises if a family or a compressor has no budget mode.

    Raises:
        NotImplementedError: with the reason.
    """
    if family.budget is None:
        raise NotImplementedError(f"{kind} has no budget mode: {family.why_no_budget}")
    if not (type(compressor) is SegmentPool and isinstance(compressor.rule, (Uniform, TopK))):
        raise NotImplementedError(
            "budget mode needs a rule whose tokens are a function of the length, uniform:N or top-k, got "
            f"{compressor}: the dynamic mode takes any"
        )


def install(model: Any) -> None:
    """Replaces the methods of a model that has its ``Settings`` in ``fastcompress_settings``."""
    family: Family = model.fastcompress_settings.family
    pool: SegmentPool = model.audio_compressor  # has no state: a copy of the model may share it
    core = model.model
    if family.budget == "features":
        patches.replace(core, "get_audio_features", _features(family, pool))
    elif family.budget == "merge":
        patches.replace(core, "get_merged_audio_embeddings", _merge(pool))
    else:
        patches.replace(core.audio_tower, "_get_feat_extract_output_lengths", _lengths(pool))
        patches.replace(core.multi_modal_projector, "forward", _projector(pool))


def uninstall(model: Any) -> None:
    """Puts them back."""
    core = model.model
    parts = (core, getattr(core, "audio_tower", None), getattr(core, "multi_modal_projector", None))
    patches.restore(*(part for part in parts if part is not None))


def _features(family: Family, pool: SegmentPool) -> Callable[..., Any]:
    def get_audio_features(self: Any, *args: Any, **kwargs: Any) -> Any:
        stock = patches.original(self, "get_audio_features")
        out = stock(*args, **kwargs | {"return_dict": True})
        lengths = family.lengths(self, patches.named(stock, args, kwargs))  # type: ignore[misc]
        offsets = torch.nn.functional.pad(lengths.to(out.pooler_output.device).cumsum(0), (1, 0))
        out.pooler_output = pool(out.pooler_output, cu_seqlens=offsets.int()).values
        return out

    return get_audio_features


def _merge(pool: SegmentPool) -> Callable[..., Any]:
    def get_merged_audio_embeddings(
        self: Any, input_ids: Tensor, audio_features: Tensor, input_features_mask: Tensor | None = None
    ) -> Tensor:
        mask = None if input_features_mask is None else input_features_mask.long()
        pooled = pool(audio_features, attention_mask=mask).values
        return patches.original(self, "get_merged_audio_embeddings")(input_ids, pooled)

    return get_merged_audio_embeddings


def _lengths(pool: SegmentPool) -> Callable[..., Any]:
    rule = pool.rule
    assert isinstance(rule, Uniform | TopK)  # see `check`

    def _get_feat_extract_output_lengths(self: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        frames, rows = patches.original(self, "_get_feat_extract_output_lengths")(*args, **kwargs)
        _LENGTHS.set(rows)
        counts = rule.num_segments(rows)
        if not bool((counts > 1).any()):  # it would take such a batch for one whose placeholders it is to expand
            raise NotImplementedError(
                "Qwen2-Audio in budget mode needs an audio of two tokens or more in each batch, got "
                f"{counts.tolist()}: the dynamic mode takes any"
            )
        return frames, counts

    return _get_feat_extract_output_lengths


def _projector(pool: SegmentPool) -> Callable[..., Any]:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        rows = patches.original(self, "forward")(*args, **kwargs)
        lengths = _LENGTHS.get()
        assert lengths is not None
        return pool(rows, lengths=lengths.to(rows.device)).to_padded()[0]

    return forward


class BudgetProcessor:
    """A stock processor whose prompts have as many placeholders as a model in budget mode has tokens.

    All else is the stock processor's, which ``save_pretrained`` writes, too.

    Args:
        processor: of the model.
        model: compressed in budget mode.
    """

    def __init__(self, processor: Any, model: Any) -> None:
        model = unwrap(model)
        settings = getattr(model, "fastcompress_settings", None)
        if settings is None or settings.mode != "budget":
            raise ValueError(f"model must be compressed in budget mode, got a {type(model).__name__} that is not")
        self.processor = processor
        self._rule: Uniform | TopK = model.audio_compressor.rule
        self._window = None if settings.family.window is None else settings.family.window(model.config)
        self._token = model.config.audio_token_id

    def __getattr__(self, name: str) -> Any:
        if name == "processor":  # while it is copied
            raise AttributeError(name)
        return getattr(self.processor, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.shorten(self.processor(*args, **kwargs))

    def apply_chat_template(self, *args: Any, **kwargs: Any) -> Any:
        """As the processor's own, shortened by :meth:`shorten` where it returns tensors and not text."""
        out = self.processor.apply_chat_template(*args, **kwargs)
        return self.shorten(out) if isinstance(out, Mapping) else out

    def apply_transcription_request(self, *args: Any, **kwargs: Any) -> Any:
        """As the processor's own, where it has one, shortened likewise."""
        out = self.processor.apply_transcription_request(*args, **kwargs)
        return self.shorten(out) if isinstance(out, Mapping) else out

    def count(self, length: int) -> int:
        """Placeholders of an audio that had ``length``."""
        if self._window is None:
            return self._rule.num_segments(length)
        windows, rest = divmod(length, self._window)
        return windows * self._rule.num_segments(self._window) + (self._rule.num_segments(rest) if rest else 0)

    def shorten(self, inputs: Any) -> Any:
        """Drops placeholders from what the stock processor returned, in place, and pads anew on the same side.

        Args:
            inputs: ``input_ids`` ``[B, L]``, and whatever else has that shape.

        Raises:
            TypeError: ``input_ids`` is no tensor: give ``return_tensors="pt"``.
        """
        ids = inputs["input_ids"]
        if not isinstance(ids, Tensor):
            raise TypeError(f"input_ids must be a tensor (return_tensors='pt'), got {type(ids).__name__}")
        mask = inputs["attention_mask"].bool() if "attention_mask" in inputs else torch.ones_like(ids, dtype=torch.bool)
        kept = [self._kept(row, real) for row, real in zip(ids, mask, strict=True)]
        tokenizer = getattr(self.processor, "tokenizer", None)
        side: str = getattr(tokenizer, "padding_side", "right")
        if not bool(mask[:, 0].all()):
            side = "left"
        elif not bool(mask[:, -1].all()):
            side = "right"
        fill = {"input_ids": getattr(tokenizer, "pad_token_id", None) or 0, "labels": IGNORED_LABEL}
        for name, value in list(inputs.items()):
            if isinstance(value, Tensor) and value.shape == ids.shape:
                rows = [row[places] for row, places in zip(value, kept, strict=True)]
                inputs[name] = nn.utils.rnn.pad_sequence(rows, True, fill.get(name, 0), side)
        return inputs

    def _kept(self, ids: Tensor, real: Tensor) -> Tensor:
        """Places of a row that stay."""
        places = real.nonzero()[:, 0]
        audio = (ids[places] == self._token).int()
        edges = torch.nn.functional.pad(audio, (1, 1)).diff()
        keep = torch.ones_like(audio, dtype=torch.bool)
        for begin, end in zip(edges.eq(1).nonzero()[:, 0].tolist(), edges.eq(-1).nonzero()[:, 0].tolist(), strict=True):
            keep[begin + self.count(end - begin) : end] = False
        return places[keep]

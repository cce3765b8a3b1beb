"""Budget mode: the number of tokens depends only on the length of the audio.

The prompt therefore has one placeholder per token from the start. ``forward``, ``generate`` and caches stay stock, and
engines that count placeholders before they run the encoder work. Two things change: the audio is pooled before the
model merges it into the prompt, and the processor writes fewer placeholders. Proportional attention and positions in
time, which engines do not have, are added to the decoder if ``apply_to`` gets them.
"""

from __future__ import annotations

import contextvars
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastcompress.checks import IGNORED_LABEL, as_mask
from fastcompress.decoder import saved_rule
from fastcompress.decoder.generation import unwrap
from fastcompress.decoder.prompt import CACHES, Prompt, adapt, starting_from
from fastcompress.integrations.transformers import patches
from fastcompress.integrations.transformers.families import FAMILIES, Family
from fastcompress.integrations.transformers.settings import Settings
from fastcompress.nn import SegmentPool
from fastcompress.rules import MinVariance, Rule, TopK, Uniform
from fastcompress.segments import Pooled


@dataclass
class Call:
    """Pass data between the patched methods during one forward pass.

    Attributes:
        arguments: Arguments of the inner model, which merges the prompt.
        lengths: Frames of the tokens of all audios, ``[M]`` int64.
    """

    arguments: Mapping[str, Any]
    lengths: Tensor | None = None


_CALL: contextvars.ContextVar[Call | None] = contextvars.ContextVar("fastcompress_budget_call", default=None)
#: Number of rows of each audio, which the patched encoder of Qwen2-Audio passes to its patched projector.
_LENGTHS: contextvars.ContextVar[Tensor | None] = contextvars.ContextVar("fastcompress_lengths", default=None)


def check(kind: str, family: Family, compressor: nn.Module) -> None:
    """Check that a family and a compressor support budget mode.

    Raises:
        NotImplementedError: They do not. The message has the reason.
    """
    check_rule(kind, family, compressor.rule if type(compressor) is SegmentPool else compressor)


def check_rule(kind: str, family: Family, rule: Any) -> None:
    """Check that a family and a rule support budget mode.

    Raises:
        NotImplementedError: They do not. The message has the reason.
    """
    if family.budget is None:
        raise NotImplementedError(f"{kind} has no budget mode: {family.why_no_budget}")
    if not isinstance(rule, Uniform | TopK | MinVariance):
        raise NotImplementedError(
            "budget mode needs a rule whose number of tokens depends only on the length (uniform, min-variance or "
            f"top-k), got {rule}; use mode='dynamic' for other rules"
        )


def install(model: Any) -> None:
    """Replace methods of a model that has its ``Settings`` in ``fastcompress_settings``."""
    family: Family = model.fastcompress_settings.family
    pool: SegmentPool = model.audio_compressor  # has no state, so copies of the model may share it
    core = model.model
    settings: Settings = model.fastcompress_settings
    if settings.proportional_attention or settings.positions == "time":
        patches.replace(core, "forward", _forward)
        patches.replace(core.language_model, "forward", _decode(settings, model.config.audio_token_id))
    if family.budget == "features":
        patches.replace(core, "get_audio_features", _features(family, pool))
    elif family.budget == "merge":
        patches.replace(core, "get_merged_audio_embeddings", _merge(pool))
    else:
        patches.replace(core.audio_tower, "_get_feat_extract_output_lengths", _lengths(pool))
        patches.replace(core.multi_modal_projector, "forward", _projector(pool))
        patches.replace(core, "_merge_input_ids_with_audio_features", _scatter)


def uninstall(model: Any) -> None:
    """Restore the methods."""
    core = model.model
    names = ("audio_tower", "multi_modal_projector", "language_model")
    parts = (core, *(getattr(core, name, None) for name in names))
    patches.restore(*(part for part in parts if part is not None))


def _forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Replace ``forward`` of the inner model: keep its arguments for the decoder."""
    stock = patches.original(self, "forward")
    token = _CALL.set(Call(patches.named(stock, args, kwargs)))
    try:
        return stock(*args, **kwargs)
    finally:
        _CALL.reset(token)


def _decode(settings: Settings, audio_token_id: int) -> Callable[..., Any]:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Replace ``forward`` of the decoder: add positions in time and the bias of proportional attention."""
        stock = patches.original(self, "forward")
        arguments, call = patches.named(stock, args, kwargs), _CALL.get()
        if call is None or call.lengths is None:
            return stock(**adapt(self, arguments))
        cache = next((arguments[name] for name in CACHES if arguments.get(name) is not None), None)
        if cache is not None and int(cache.get_seq_length()):
            raise NotImplementedError(
                "audio cannot follow rows of a cache with proportional attention or positions in time; pass the whole "
                "conversation"
            )
        ids = call.arguments["input_ids"]
        real = _real_rows(ids, call.arguments.get("attention_mask"))
        lengths = real.long().masked_scatter(real & (ids == audio_token_id), call.lengths.to(ids.device))
        proportional = settings.proportional_attention and bool((lengths > 1).any())
        with starting_from(Prompt(lengths, settings.positions == "time", proportional)):
            return stock(**adapt(self, arguments))

    return forward


def _real_rows(ids: Tensor, mask: Any) -> Tensor:
    """Return which rows are not padding, ``[B, L]`` bool, from a mask ``[B, L]``, or from those of a static cache."""
    if isinstance(mask, Mapping):
        mask = mask.get("full_attention", next(iter(mask.values())))
    if mask is None:
        return torch.ones_like(ids, dtype=torch.bool)
    if mask.dim() == 4:  # a row that is not padding sees itself
        mask = mask[:, 0].diagonal(dim1=1, dim2=2)
        return mask if mask.dtype == torch.bool else mask == 0
    return as_mask("attention_mask", mask)


def _pool(pool: SegmentPool, rows: Tensor, **layout: Tensor | None) -> Pooled:
    """Pool rows of audio, and keep the lengths of the tokens for the decoder."""
    pooled = pool(rows, **layout)
    call = _CALL.get()
    if call is not None:
        call.lengths = pooled.segments.lengths
    return pooled


def _features(family: Family, pool: SegmentPool) -> Callable[..., Any]:
    def get_audio_features(self: Any, *args: Any, **kwargs: Any) -> Any:
        stock = patches.original(self, "get_audio_features")
        out = stock(*args, **kwargs | {"return_dict": True})
        lengths = family.lengths(self, patches.named(stock, args, kwargs))  # type: ignore[misc]
        offsets = torch.nn.functional.pad(lengths.to(out.pooler_output.device).cumsum(0), (1, 0))
        out.pooler_output = _pool(pool, out.pooler_output, cu_seqlens=offsets.int()).values
        return out

    return get_audio_features


def _merge(pool: SegmentPool) -> Callable[..., Any]:
    def get_merged_audio_embeddings(
        self: Any, input_ids: Tensor, audio_features: Tensor, input_features_mask: Tensor | None = None
    ) -> Tensor:
        mask = None if input_features_mask is None else input_features_mask.long()
        pooled = _pool(pool, audio_features, attention_mask=mask).values
        return patches.original(self, "get_merged_audio_embeddings")(input_ids, pooled)

    return get_merged_audio_embeddings


def _lengths(pool: SegmentPool) -> Callable[..., Any]:
    rule = pool.rule
    assert isinstance(rule, Uniform | TopK | MinVariance)  # see `check`

    def _get_feat_extract_output_lengths(self: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        frames, rows = patches.original(self, "_get_feat_extract_output_lengths")(*args, **kwargs)
        _LENGTHS.set(rows)
        return frames, rule.num_segments(rows)

    return _get_feat_extract_output_lengths


def _projector(pool: SegmentPool) -> Callable[..., Any]:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        rows = patches.original(self, "forward")(*args, **kwargs)
        lengths = _LENGTHS.get()
        assert lengths is not None
        return _pool(pool, rows, lengths=lengths.to(rows.device)).to_padded()[0]

    return forward


def _scatter(
    self: Any,
    audio_features: Tensor,
    num_audio_tokens: Tensor,
    inputs_embeds: Tensor,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    labels: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None, None, Tensor]:
    """Replace the merge for prompts of old processors, which Qwen2-Audio calls if no two placeholders are adjacent.

    The stock method expands the placeholder of each audio. In budget mode this placeholder is the audio's only token.
    """
    column = torch.arange(audio_features.shape[1], device=audio_features.device)
    rows = audio_features[column < num_audio_tokens.to(audio_features.device)[:, None]]
    is_audio = input_ids == self.config.audio_token_id
    if rows.shape[0] != int(is_audio.sum()):
        raise ValueError(
            f"input_ids must have one placeholder per token, as BudgetProcessor writes them, got {int(is_audio.sum())} "
            f"for {rows.shape[0]} tokens"
        )
    merged = inputs_embeds.masked_scatter(is_audio[..., None], rows.to(inputs_embeds))
    return merged, attention_mask, labels, None, input_ids


class BudgetProcessor:
    """Wrap a stock processor so that its prompts have one placeholder per token of a model in budget mode.

    Everything else is delegated to the stock processor; ``save_pretrained`` saves that. The rules are those
    whose number of tokens depends only on the length of the audio: ``uniform``, ``min-variance`` and ``top-k``.

    Args:
        processor: Stock processor of the model.
        model: Model compressed in budget mode.

    Raises:
        ValueError: The model is not compressed in budget mode.
    """

    def __init__(self, processor: Any, model: Any) -> None:
        model = unwrap(model)
        settings = getattr(model, "fastcompress_settings", None)
        if settings is None or settings.mode != "budget":
            raise ValueError(
                f"model must be compressed in budget mode, got {type(model).__name__}; call "
                "apply_to(model, rule, mode='budget') first"
            )
        self._set(processor, model.config, model.audio_compressor.rule)

    @classmethod
    def from_config(cls, processor: Any, config: Any) -> BudgetProcessor:
        """Wrap a stock processor for a model that is not in this process, such as one in a serving engine.

        Args:
            processor: Stock processor of the model.
            config: Configuration of a model that was saved in budget mode, from
                ``AutoConfig.from_pretrained(folder)``; its ``fastcompress`` has the rule.

        Raises:
            NotImplementedError: The model or the rule has no budget mode.
            ValueError: The configuration has no saved rule, or one of dynamic mode.
        """
        if config.model_type not in FAMILIES:
            raise NotImplementedError(f"{config.model_type} is not a supported audio LLM")
        saved = saved_rule.stored_in(config)
        if saved is None or saved.mode != "budget":
            got = "none" if saved is None else f"one of {saved.mode} mode"
            raise ValueError(
                f"config must have a rule that was saved in budget mode, got {got}; call apply_to(model, rule, "
                "mode='budget') before model.save_pretrained"
            )
        if saved.proportional_attention or saved.positions == "time":
            warnings.warn(
                f"the model was saved with {saved}: an engine that runs the stock decoder does not apply this; save it "
                "with proportional_attention=False and positions='compact', and compare",
                stacklevel=2,
            )
        rule = None if saved.rule is None else Rule.from_string(saved.rule)
        check_rule(config.model_type, FAMILIES[config.model_type], rule)
        found = cls.__new__(cls)
        found._set(processor, config, rule)
        return found

    def _set(self, processor: Any, config: Any, rule: Any) -> None:
        family = FAMILIES[config.model_type]
        self.processor = processor
        self._rule: Uniform | TopK | MinVariance = rule
        self._window = None if family.window is None else family.window(config)
        self._token = config.audio_token_id

    def __getattr__(self, name: str) -> Any:
        if name == "processor":  # copy looks attributes up before `processor` is set
            raise AttributeError(name)
        return getattr(self.processor, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.shorten(self.processor(*args, **kwargs))

    def apply_chat_template(self, *args: Any, **kwargs: Any) -> Any:
        """Call the processor's method; if it returns inputs and not text, drop placeholders ([`shorten`][])."""
        out = self.processor.apply_chat_template(*args, **kwargs)
        return self.shorten(out) if isinstance(out, Mapping) else out

    def apply_transcription_request(self, *args: Any, **kwargs: Any) -> Any:
        """Call the processor's method, which only some have, and drop placeholders ([`shorten`][])."""
        out = self.processor.apply_transcription_request(*args, **kwargs)
        return self.shorten(out) if isinstance(out, Mapping) else out

    def count(self, length: int) -> int:
        """Return the number of placeholders of an audio that has ``length`` placeholders in the stock prompt."""
        if self._window is None:
            return self._rule.num_segments(length)
        windows, rest = divmod(length, self._window)
        return windows * self._rule.num_segments(self._window) + (self._rule.num_segments(rest) if rest else 0)

    def shorten(self, inputs: Any) -> Any:
        """Drop surplus placeholders from the stock processor's output, in place, and pad again on the same side.

        Args:
            inputs: Output of the stock processor: ``input_ids`` ``[B, L]``. All tensors of that shape are shortened.

        Returns:
            ``inputs``.

        Raises:
            TypeError: ``input_ids`` is not a tensor.
        """
        ids = inputs["input_ids"]
        if not isinstance(ids, Tensor):
            raise TypeError(f"input_ids must be a tensor (return_tensors='pt'), got {type(ids).__name__}")
        mask = torch.ones_like(ids, dtype=torch.bool)
        if "attention_mask" in inputs:
            mask = as_mask("attention_mask", inputs["attention_mask"])
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
        """Return the columns of one row that are kept, as indices ``[K]`` int64."""
        places = real.nonzero()[:, 0]
        audio = (ids[places] == self._token).int()
        edges = torch.nn.functional.pad(audio, (1, 1)).diff()
        keep = torch.ones_like(audio, dtype=torch.bool)
        for begin, end in zip(edges.eq(1).nonzero()[:, 0].tolist(), edges.eq(-1).nonzero()[:, 0].tolist(), strict=True):
            keep[begin + self.count(end - begin) : end] = False
        return places[keep]

"""Dynamic mode: the number of tokens may depend on the audio, which is compressed between the merge and the decoder.

The stock model merges audio into a prompt with one placeholder per row of audio, as always. The patched decoder
compresses the merged embeddings and runs on the shorter rows, packed or padded. The stock model gets no labels, since
its rows no longer match them; the loss is computed here.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast

import fastcompress as fc
from fastcompress import decoder
from fastcompress.checks import IGNORED_LABEL
from fastcompress.decoder.generation import new_token_limits, prepend_prompt, setting, unwrap
from fastcompress.decoder.limits import warn_of_limits, warn_of_positions
from fastcompress.decoder.loss import batch_share, label_rows, next_token_loss, zero_of
from fastcompress.decoder.prompt import CACHES, Prompt, adapt, frames_per_token, starting_from
from fastcompress.integrations.transformers import patches
from fastcompress.integrations.transformers.outputs import ignore_in_predictions, with_compressed
from fastcompress.integrations.transformers.settings import Settings
from fastcompress.nn import SegmentPool
from fastcompress.ops.pack import with_row_lengths
from fastcompress.ops.row_groups import row_groups
from fastcompress.segments import Pooled

#: Settings of ``generate`` that turn assisted decoding on.
ASSISTED = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp")


@dataclass
class Call:
    """Pass data between the patched methods during one forward pass.

    Attributes:
        model: The compressed model.
        settings: Its settings.
        arguments: Arguments of ``forward``.
        packed: Whether the decoder runs on packed rows.
        side: Side of the padding if it does not.
        capture: Whether to stop before the decoder, to get its input only.
        kept: True for the rows of audio that contain a token after pooling before the projector, ``[N]`` bool.
        token_lengths: Frames of these tokens, ``[M]`` int64; ``None``: not known.
        inputs: Input of the decoder, set by the patched decoder.
    """

    model: Any
    settings: Settings
    arguments: Mapping[str, Any]
    packed: bool = False
    side: str = "left"
    capture: bool = False
    kept: Tensor | None = None
    token_lengths: Tensor | None = None
    inputs: fc.PackedInputs | None = None


_CALL: contextvars.ContextVar[Call | None] = contextvars.ContextVar("fastcompress_call", default=None)


@contextlib.contextmanager
def _running(call: Call) -> Iterator[None]:
    token = _CALL.set(call)
    try:
        yield
    finally:
        _CALL.reset(token)


def install(model: Any) -> None:
    """Replace methods of a model that has its ``Settings`` in ``fastcompress_settings``."""
    ignore_in_predictions(model.config)
    patches.replace(model, "forward", _forward)
    patches.replace(model, "generate", _generate)
    patches.replace(model.model.language_model, "forward", _decode)
    if "inputs_embeds" not in inspect.signature(model.prepare_inputs_for_generation).parameters:
        # `generate` accepts inputs_embeds only if this method's signature has them.
        like = GenerationMixin.prepare_inputs_for_generation.__get__(model)
        patches.replace(model, "prepare_inputs_for_generation", _prepare_inputs, like)
    if model.fastcompress_settings.before_projector:
        for projector in _projectors(model):
            patches.replace(projector, "forward", _project)


def uninstall(model: Any) -> None:
    """Restore the methods."""
    projector = getattr(model.model, "multi_modal_projector", None)
    patches.restore(model, model.model.language_model, *([] if projector is None else projector.modules()))


def _projectors(model: Any) -> list[Any]:
    return patches.copies(model.model.multi_modal_projector)


def _prepare_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Replace ``prepare_inputs_for_generation`` by the same method with another signature."""
    return patches.original(self, "prepare_inputs_for_generation")(*args, **kwargs)


def _forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Replace ``forward`` of the whole model."""
    stock = patches.original(self, "forward")
    arguments = patches.named(stock, args, kwargs)
    labels, ids = arguments.get("labels"), arguments.get("input_ids")
    has_audio = _has_audio(self, arguments)
    if has_audio and (ids is None or _cache_length(arguments)):
        raise NotImplementedError(
            "compressed audio needs input_ids, which locate it in the prompt, got None"
            if ids is None
            else "compressed audio cannot follow rows of a cache or of prefix tuning; pass the whole prompt"
        )
    if ids is None or _cache_length(arguments) or not (has_audio or labels is not None):
        return stock(*args, **kwargs)
    settings: Settings = self.fastcompress_settings
    _check(self, arguments)
    mask = arguments.get("attention_mask")
    # Without padding in the input, pad on the left: the last column then precedes the next token in every sample.
    side = "right" if mask is not None and not bool(mask[:, -1].all()) else "left"
    cached = arguments.get("use_cache") is True or any(arguments.get(name) is not None for name in CACHES)
    packed = settings.pack and _keeps_apart(self) and (labels is not None or not cached)
    call = Call(self, settings, dict(arguments), packed, side)
    as_tuple = not (self.config.return_dict if arguments.get("return_dict") is None else arguments["return_dict"])
    num_items = arguments.pop("num_items_in_batch", None)
    if labels is not None:
        arguments["use_cache"] = False
        arguments.pop("logits_to_keep", None)  # the patched decoder returns only the rows that predict a label
    with _running(call):
        out = stock(**arguments | {"labels": None, "return_dict": True})
    if call.inputs is None:
        raise RuntimeError(
            "nothing was compressed, because forward of language_model was replaced after apply_to; call revert and "
            "apply_to again"
        )
    warn_of_positions(self.config, call.inputs)
    loss = None
    if labels is not None:
        loss = _loss(call, out.logits, num_items)
        own = getattr(self.audio_compressor, "loss", None)
        if has_audio and own is not None:
            share = batch_share(out.logits.shape[1], num_items)
            loss = loss + self.audio_compressor.loss_weight * share * own.to(loss.device)
        if not has_audio and torch.is_grad_enabled():
            loss = loss + _unused(self, loss.device)
    found = with_compressed(out, call.inputs, loss=loss)
    return found.to_tuple() if as_tuple else found


def _keeps_apart(model: Any) -> bool:
    """Return whether the decoder still has packed attention; the user may have set another since ``apply_to``."""
    found: bool = model.model.language_model.config._attn_implementation == decoder.NAME
    return found


def _has_audio(model: Any, arguments: Mapping[str, Any]) -> bool:
    return any(arguments.get(name) is not None for name in model.fastcompress_settings.family.features)


def _cache_length(arguments: Mapping[str, Any]) -> int:
    caches = [arguments[name] for name in CACHES if arguments.get(name) is not None]
    return max((int(cache.get_seq_length()) for cache in caches), default=0)


def _check(model: Any, arguments: Mapping[str, Any]) -> None:
    """Raise for arguments that are not supported with compression."""
    kind = model.config.model_type
    for name in model.fastcompress_settings.family.refused:
        if arguments.get(name) is not None:
            raise NotImplementedError(
                f"a compressed {kind} takes only audio and text, got {name}: positions of images are not one per row"
            )
    if arguments.get("inputs_embeds") is not None:
        raise ValueError("pass input_ids, which locate the audio, without inputs_embeds")
    if arguments.get("output_router_logits"):
        raise NotImplementedError("output_router_logits must be False: the router's loss needs rows that are dropped")
    if arguments.get("position_ids") is not None and _has_audio(model, arguments):
        raise ValueError("position_ids must be None: compression changes the positions")
    mask, ids = arguments.get("attention_mask"), arguments["input_ids"]
    if mask is not None and mask.shape != ids.shape:
        raise ValueError(f"attention_mask must have the shape of input_ids, {list(ids.shape)}, got {list(mask.shape)}")


def _decode(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Replace ``forward`` of the decoder: compress the merged embeddings, then run the stock decoder."""
    stock = patches.original(self, "forward")
    call = _CALL.get()
    arguments = patches.named(stock, args, kwargs)
    if call is None or call.model.model.language_model is not self:
        return stock(**adapt(self, arguments))
    merged = arguments.pop("inputs_embeds")
    labels = call.arguments.get("labels")
    call.inputs = packed = _compressed(call, merged, labels)
    if call.capture:
        return BaseModelOutputWithPast(last_hidden_state=merged[:, :0])
    for name in ("attention_mask", "position_ids", "input_ids"):
        arguments.pop(name, None)
    lengths = packed.row_lengths
    proportional = call.settings.proportional_attention and lengths is not None and bool((lengths > 1).any())
    if call.packed:
        inputs = packed.model_inputs(proportional)
        inputs.pop("labels", None)
        for name in CACHES:
            arguments.pop(name, None)
        out = stock(**arguments | inputs | {"return_dict": True})
        hidden = out.last_hidden_state[0]
    else:
        embeds, mask = packed.unpack(side=call.side)
        arguments |= {"inputs_embeds": embeds, "attention_mask": mask, "return_dict": True}
        with starting_from(Prompt.of(packed, call.side, proportional)):
            arguments = adapt(self, arguments)
        out = stock(**arguments)
        hidden = out.last_hidden_state[mask.bool()]
    if labels is not None:
        assert packed.labels is not None
        out.last_hidden_state = hidden[label_rows(packed.labels)][None]
    elif call.packed:
        out.last_hidden_state = packed.unpack(hidden, call.side)[0]
    return out


def _compressed(call: Call, merged: Tensor, labels: Tensor | None) -> fc.PackedInputs:
    """Return the decoder's input, compressed from the merged embeddings ``[B, L, H]``."""
    ids, mask = call.arguments["input_ids"].to(merged.device), call.arguments.get("attention_mask")
    mask = None if mask is None else mask.to(merged.device)
    if merged.shape[:2] != ids.shape:
        raise ValueError(
            f"input_ids must have one placeholder per row of audio, as the processor writes them, got shape "
            f"{list(ids.shape)} for merged embeddings of {list(merged.shape[:2])} rows"
        )
    audio_id = call.model.config.audio_token_id
    is_audio = ids == audio_id
    if labels is not None:
        labels = labels.to(merged.device).masked_fill(is_audio, IGNORED_LABEL)
    if not _has_audio(call.model, call.arguments):  # placeholders without audio count as text
        return fc.pack(inputs_embeds=merged, attention_mask=mask, labels=labels)
    groups = row_groups(ids, audio_id, attention_mask=mask)
    rest: dict[str, Any] = {"inputs_embeds": merged, "labels": labels, "positions": call.settings.positions}
    if call.kept is not None:
        kept = torch.ones_like(ids, dtype=torch.bool).masked_scatter(is_audio, call.kept.to(merged.device))
        packed = fc.pack(inputs_embeds=merged, row_group=groups.clamp_max(0).masked_fill(~kept, -1), labels=labels)
        if call.token_lengths is None:
            return dataclasses.replace(packed, row_lengths=None)
        lengths = torch.ones_like(ids).masked_scatter(is_audio & kept, call.token_lengths.to(ids.device))
        return with_row_lengths(packed, lengths.flatten()[packed.source], call.settings.positions)
    if call.settings.before_projector:
        raise RuntimeError(
            "nothing was pooled before the projector, because its forward was replaced after apply_to; call revert and "
            "apply_to again"
        )
    compressor = call.model.audio_compressor
    if type(compressor) is SegmentPool and compressor.reduce == "mean":  # `pack` can pool in the same pass
        return fc.pack(**rest, row_group=groups, rule=compressor.rule)
    first = groups.clone()
    first[:, 1:] -= groups[:, :-1].clamp_min(0)
    is_audio = groups > 0
    bounds = (first > 0)[is_audio].nonzero()[:, 0]
    rows = merged[is_audio]
    offsets = torch.cat([bounds, bounds.new_tensor([len(rows)])]).int()
    pooled = _apply(call, rows, offsets)
    return fc.pack(
        **rest,
        audio=pooled.values.to(merged.dtype),
        audio_cu_seqlens=pooled.cu_seqlens,
        audio_lengths=frames_per_token(pooled),
        row_group=groups,
    )


def _apply(call: Call, rows: Tensor, offsets: Tensor) -> Pooled:
    """Run the compressor on rows of audio ``[N, D]`` with offsets ``[A + 1]``, and check its result."""
    pooled = call.model.audio_compressor(rows, cu_seqlens=offsets)
    if not (hasattr(pooled, "values") and hasattr(pooled, "cu_seqlens")):
        got = type(pooled).__name__
        raise TypeError(
            f"compressor must return an object with values and cu_seqlens, such as fastcompress.Pooled, got {got}"
        )
    if pooled.cu_seqlens.shape != offsets.shape:
        raise ValueError(
            f"compressor must return {len(offsets) - 1} audios, the number of its input, got "
            f"{len(pooled.cu_seqlens) - 1}"
        )
    settings = call.settings
    if (settings.proportional_attention or settings.positions == "time") and frames_per_token(pooled) is None:
        raise ValueError(
            "proportional attention and positions in time need a compressor that returns segments, as "
            f"fastcompress.Pooled has, got {type(pooled).__name__}: pass proportional_attention=False and "
            "positions='compact' to apply_to"
        )
    return pooled


def _project(self: Any, rows: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Replace ``forward`` of the projector: pool, project, and put the tokens into the first rows of each audio."""
    stock = patches.original(self, "forward")
    call = _CALL.get()
    if call is None or all(module is not self for module in call.model.model.multi_modal_projector.modules()):
        return stock(rows, *args, **kwargs)
    lengths = call.settings.family.lengths(call.model.model, call.arguments).to(rows.device)  # type: ignore[misc]
    longest = rows.shape[1] if rows.dim() == 3 else int(lengths.max())
    valid = torch.arange(longest, device=rows.device) < lengths[:, None]
    flat = rows[valid] if rows.dim() == 3 else rows
    offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    pooled = _apply(call, flat, offsets)
    counts = pooled.cu_seqlens.diff()
    if bool((counts > lengths).any()):
        raise ValueError(
            f"compressor must not return more rows per audio than its input has, {lengths.tolist()}, got "
            f"{counts.tolist()}"
        )
    tokens = stock(pooled.values.to(rows.dtype), *args, **kwargs)
    kept = (torch.arange(longest, device=rows.device) < counts[:, None])[valid]
    spread = tokens.new_zeros(len(flat), tokens.shape[-1]).masked_scatter(kept[:, None], tokens)
    call.kept, call.token_lengths = kept, frames_per_token(pooled)
    if rows.dim() == 2:
        return spread
    return spread.new_zeros(*rows.shape[:-1], spread.shape[-1]).masked_scatter(valid[..., None], spread)


def _loss(call: Call, logits: Tensor, num_items: Tensor | int | None) -> Tensor:
    assert call.inputs is not None and call.inputs.labels is not None
    labels = call.inputs.labels
    return next_token_loss(logits[0], labels, label_rows(labels), num_items)


def _unused(model: Any, device: torch.device) -> Tensor:
    """Return 0 with a gradient path to the parameters that a batch without audio does not use."""
    used = {id(p) for module in (model.model.language_model, model.lm_head) for p in module.parameters()}
    return zero_of((p for p in model.parameters() if id(p) not in used), device)


@torch.no_grad()
def _generate(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Replace ``generate`` of the whole model: compress the prompt, then run the stock method on it."""
    stock = patches.original(self, "generate")
    arguments = patches.named(GenerationMixin.generate.__get__(self), args, kwargs)  # some models declare only *args
    if arguments.get("inputs") is not None:
        arguments["input_ids"] = arguments.pop("inputs")
    ids = arguments.get("input_ids")
    if ids is None or not _has_audio(self, arguments):
        if ids is not None and _cache_length(arguments) and bool((ids == self.config.audio_token_id).any()):
            raise NotImplementedError(
                "generate cannot continue from the cache of a compressed prompt, which has fewer rows than ids; pass "
                "the whole conversation with its audio"
            )
        return stock(*args, **kwargs)
    if arguments.get("attention_mask") is None:
        arguments["attention_mask"] = _mask(self, arguments, ids)
    _check(self, arguments)
    _check_generation(self, arguments)
    family = self.fastcompress_settings.family
    inputs = _prompt_arguments(self, arguments)
    packed = _capture(self, inputs)
    lengths = packed.cu_seqlens.diff().tolist()
    if 0 in lengths:
        raise ValueError(f"sample {lengths.index(0)} is empty: {self.audio_compressor} dropped all of its rows")
    embeds, mask = packed.unpack(side="left")
    rest = {
        name: value
        for name, value in arguments.items()
        if name not in inputs and name != "labels" and not (isinstance(value, Tensor) and value.shape == ids.shape)
    }
    rest |= {"inputs_embeds": embeds, "attention_mask": mask} | new_token_limits(self, arguments, ids.shape[1])
    if family.prompt_ids:
        rest["input_ids"] = _prompt_ids(self, packed, ids, mask)
    if family.adapters_hear and getattr(self, "_hf_peft_config_loaded", False):
        self.enable_adapters()  # the stock method does this only if it gets audio features
        stock = GenerationMixin.generate.__get__(self)
    warn_of_positions(self.config, packed)
    with starting_from(Prompt.of(packed, "left", self.fastcompress_settings.proportional_attention)):
        found = stock(**rest)
    out = prepend_prompt(found, ids, embeds.shape[1] if family.prompt_ids else 0)
    warn_of_limits(self, rest, out, ids.shape[1], packed)
    return out


def compressed_prompt(model: Any, **inputs: Any) -> fc.PackedInputs:
    """Return the decoder's input for a prompt, from which ``generate`` starts, without running the decoder.

    Args:
        model: Model compressed in dynamic mode.
        inputs: Output of the processor.

    Returns:
        The compressed prompts.

    Raises:
        ValueError: ``input_ids`` are missing, or the model is not compressed in dynamic mode.
    """
    model = unwrap(model)
    if getattr(getattr(model, "fastcompress_settings", None), "mode", None) != "dynamic":
        raise ValueError(
            f"model must be compressed in dynamic mode, got {type(model).__name__}; call apply_to(model, rule) first"
        )
    if inputs.get("input_ids") is None:
        raise ValueError("inputs must have input_ids, got None")
    _check(model, inputs)
    return _capture(model, _prompt_arguments(model, inputs))


def _prompt_arguments(model: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Select the arguments of the inner model, which merges the prompt."""
    names = inspect.signature(model.model.forward).parameters
    return {n: v for n, v in arguments.items() if n in names and n not in ("labels", "use_cache", *CACHES)}


def _capture(model: Any, inputs: dict[str, Any]) -> fc.PackedInputs:
    """Run the model up to its decoder and return the decoder's input."""
    call = Call(model, model.fastcompress_settings, inputs, capture=True)
    with _running(call):
        model.model(**inputs, use_cache=False)
    assert call.inputs is not None
    return call.inputs


def _mask(model: Any, arguments: Mapping[str, Any], ids: Tensor) -> Tensor:
    """Infer an attention mask from the padding, as ``generate`` does if none is passed."""
    padding, ends = setting(model, arguments, "pad_token_id"), setting(model, arguments, "eos_token_id")
    ends = ends if isinstance(ends, (list, tuple)) else [ends]
    return torch.ones_like(ids) if padding is None or padding in ends else (ids != padding).long()


def _check_generation(model: Any, arguments: Mapping[str, Any]) -> None:
    """Raise for generation settings that assume one row per id of the prompt."""
    for name in ASSISTED:
        if setting(model, arguments, name):
            raise NotImplementedError(
                f"{name} cannot be used with a compressed prompt: assisted decoding assumes one row per id of the "
                "prompt"
            )
    paged = setting(model, arguments, "cache_implementation") == "paged"
    if paged or setting(model, arguments, "prefill_chunk_size"):
        raise NotImplementedError(
            "prefill_chunk_size and a paged cache cannot be used with a compressed prompt: they read it by its ids"
        )
    if setting(model, arguments, "use_cache") is False:
        raise NotImplementedError(
            "use_cache=False cannot be used with a compressed prompt: each step would compute the prompt from its ids"
        )
    if _cache_length(arguments):
        raise NotImplementedError(
            "generate cannot continue from a cache of earlier rows with new audio; pass the whole conversation"
        )


def _prompt_ids(model: Any, packed: fc.PackedInputs, ids: Tensor, mask: Tensor) -> Tensor:
    """Return ids for the rows of the compressed prompt, ``[B, S]``, which penalties and stopping criteria read."""
    flat = ids.flatten()
    source = packed.source.clamp_max(len(flat) - 1)
    rows = torch.where(packed.source < len(flat), flat[source], model.config.audio_token_id)
    padding = setting(model, {}, "pad_token_id")
    return packed.unpack(rows.double(), "left")[0].to(ids.dtype).masked_fill(mask == 0, padding or 0)

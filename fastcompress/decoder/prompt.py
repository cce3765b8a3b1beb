"""Positions and proportional attention of padded compressed prompts, and of the calls that continue their caches.

A row of a compressed prompt represents one or more frames. With positions in time, it has the position of its middle
frame, and rows after the prompt have the positions that they have without compression. With proportional attention,
``log(L)``, the bias, is added to the attention scores of a row of ``L`` frames.

The first call of a decoder gets both from a ``Prompt``; see ``adapt``. Later calls get them from the cache. Its keys
have the bias in additional columns, so that it is reordered, cropped and dropped with the keys. The cache also keeps
the number of positions that each row of the prompt takes, from which ``adapt`` computes the positions of new rows.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache

from fastcompress.decoder.attention import NAME
from fastcompress.decoder.packed_attention import widen_keys
from fastcompress.ops.packed_inputs import PackedInputs

#: Names of the argument of a decoder that is its cache; ``cache`` exists since transformers 5.24.
CACHES = ("past_key_values", "cache")


@dataclass(frozen=True)
class Prompt:
    """A padded compressed prompt.

    Attributes:
        lengths: Frames of each row, ``[B, S]`` int64; 1 for text, 0 for padding.
        in_time: Whether rows have positions in time.
        proportional: Whether the attention is proportional.
    """

    lengths: Tensor
    in_time: bool
    proportional: bool

    @staticmethod
    def of(packed: PackedInputs, side: str, proportional: bool) -> Prompt:
        """Make the prompt that ``packed.unpack(side=side)`` pads."""
        if packed.row_lengths is None:
            if proportional:
                packed.key_bias()  # raises
            rows = packed.position_ids.new_ones(packed.position_ids.shape)
            return Prompt(packed.unpack(rows, side)[0], False, False)
        lengths = packed.unpack(packed.row_lengths, side)[0]
        return Prompt(lengths, packed.in_time, proportional and bool((lengths > 1).any()))

    @property
    def positions(self) -> Tensor:
        """Position of each row, ``[B, S]`` int64."""
        if not self.in_time:
            return ((self.lengths > 0).cumsum(1) - 1).clamp_min(0)
        return self.lengths.cumsum(1) - self.lengths + (self.lengths - 1).clamp_min(0) // 2

    @property
    def bias(self) -> Tensor:
        """Bias of each key, ``[B, S]`` fp64."""
        return self.lengths.clamp_min(1).double().log()

    def repeated(self, rows: int) -> Prompt:
        """Return the prompt of a batch of ``rows`` samples, in which each one is repeated for its beams."""
        return Prompt(self.lengths.repeat_interleave(rows // len(self.lengths), 0), self.in_time, self.proportional)


def frames_per_token(pooled: Any) -> Tensor | None:
    """Return the number of frames of each token that a compressor returned, ``[M]`` int64.

    Return ``None`` if tokens are not segments of frames: they have neither a length nor a position in time.
    """
    segments = getattr(pooled, "segments", None)
    return None if segments is None else segments.lengths


_PENDING: contextvars.ContextVar[list[Prompt] | None] = contextvars.ContextVar("fastcompress_prompt", default=None)


@contextlib.contextmanager
def starting_from(prompt: Prompt) -> Iterator[None]:
    """Pass a prompt to the next call of ``adapt``."""
    token = _PENDING.set([prompt])
    try:
        yield
    finally:
        _PENDING.reset(token)


def adapt_calls(decoder: Any) -> None:
    """Pass the arguments of every call of a stack of layers through ``adapt``, also in copies of the stack."""
    if _hook not in decoder._forward_pre_hooks.values():  # models may share a decoder
        decoder.register_forward_pre_hook(_hook, with_kwargs=True)


def _hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if torch.compiler.is_compiling() and all(kwargs.get(name) is None for name in CACHES):
        return None  # packed rows; the compiler cannot read context variables
    names = inspect.signature(module.forward).parameters  # some models pass input_ids by position
    return (), adapt(module, dict(zip(names, args, strict=False)) | kwargs)


def adapt(decoder: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Add the positions and the bias of a compressed prompt to the arguments of a decoder's forward.

    Args:
        decoder: Stack of layers.
        arguments: Arguments of its forward, by name.

    Raises:
        NotImplementedError: The attention is to be proportional, but the decoder's attention or the cache does not
            support it.
    """
    arguments = dict(arguments)
    pending = _PENDING.get()
    if pending:
        return _start(decoder, arguments, pending.pop())
    cache = next((arguments[name] for name in CACHES if arguments.get(name) is not None), None)
    if not isinstance(cache, _PromptCache):
        return arguments
    cache.fastcompress_bias = None
    taken = cache.fastcompress_taken
    if taken is None:
        return arguments
    rows = arguments.get("inputs_embeds")
    count = (arguments["input_ids"] if rows is None else rows).shape[1]
    positions, mask = arguments.get("position_ids"), arguments.get("attention_mask")
    if positions is None and isinstance(mask, Tensor) and mask.dim() == 2:
        positions = (mask.long().cumsum(1) - 1)[:, -count:]
    if positions is None:  # count the slots of the cache, including padding
        seen = cache.get_seq_length()  # type: ignore[attr-defined]  # of the base class
        positions, further = torch.arange(count, device=taken.device)[None] + seen, taken - 1
    else:
        further = (taken - 1).clamp_min(0)
    arguments["position_ids"] = positions + further.sum(1, keepdim=True).to(positions.device)
    return arguments


def _start(decoder: Any, arguments: dict[str, Any], prompt: Prompt) -> dict[str, Any]:
    """Return the arguments of the first call, which has the rows of the prompt."""
    parameters = inspect.signature(decoder.forward).parameters
    if "position_ids" not in parameters:  # it supports neither positions in time nor this attention
        return arguments
    prompt = prompt.repeated(len(arguments["inputs_embeds"]))
    arguments["position_ids"] = prompt.positions
    if prompt.proportional and decoder.config._attn_implementation != NAME:
        raise NotImplementedError(
            f"proportional attention needs attn_implementation={NAME!r}, got "
            f"{decoder.config._attn_implementation!r}; set it again, or pass proportional_attention=False"
        )
    use_cache = arguments.get("use_cache")
    use_cache = getattr(decoder.config, "use_cache", True) if use_cache is None else use_cache
    if decoder.training and getattr(decoder, "gradient_checkpointing", False) and torch.is_grad_enabled():
        use_cache = arguments["use_cache"] = False  # as transformers does
        arguments |= {name: None for name in CACHES if name in arguments}
    name = next((name for name in CACHES if arguments.get(name) is not None), None)
    if name is None and use_cache:
        name = next((name for name in CACHES if name in parameters), None)
        if name is not None:
            arguments[name] = DynamicCache(config=decoder.config)
    if name is not None and isinstance(arguments[name], Cache):
        _keep(arguments[name], prompt)
        return arguments
    if arguments.get("attention_mask") is None:  # else transformers would find packed samples where positions jump
        arguments["attention_mask"] = (prompt.lengths > 0).long()
    if prompt.proportional:
        arguments["key_bias"] = prompt.bias
    return arguments


class _PromptCache:
    """Mixin for a cache that starts with a compressed prompt; see the module's docstring.

    Attributes:
        fastcompress_taken: Number of positions that each row of the prompt takes, ``[B, S]`` int64; ``None``: there is
            no prompt.
        fastcompress_bias: Bias of the rows that the current call adds, ``[B, S]``; ``None``: 0.
        fastcompress_wide: Whether keys have columns for the bias.
    """

    fastcompress_taken: Tensor | None = None
    fastcompress_bias: Tensor | None = None
    fastcompress_wide = False

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        if self.fastcompress_wide:
            bias = key_states.new_zeros(()) if self.fastcompress_bias is None else self.fastcompress_bias[:, None]
            key_states = widen_keys(key_states, bias.to(key_states.device))
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)  # type: ignore[misc]

    def crop(self, *args: Any, **kwargs: Any) -> None:
        super().crop(*args, **kwargs)  # type: ignore[misc]
        if self.fastcompress_taken is not None:
            length = int(self.get_seq_length())  # type: ignore[attr-defined]
            self.fastcompress_taken = self.fastcompress_taken[:, :length]

    def reset(self) -> None:
        super().reset()  # type: ignore[misc]
        self.fastcompress_taken = self.fastcompress_bias = None
        if self.fastcompress_wide:
            self._set_wide(False)

    def _set_wide(self, wide: bool) -> None:
        """Set whether the keys of an empty cache have columns for the bias; a static cache allocates them again."""
        self.fastcompress_wide = wide
        for layer in self.layers:  # type: ignore[attr-defined]
            layer.is_initialized = False

    def __reduce__(self) -> Any:  # pickle cannot find the class by its name
        return _restore, (type(self).__mro__[2], self.__dict__)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self._select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)  # type: ignore[misc]
        self._select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        if self.fastcompress_taken is not None:
            self.fastcompress_taken = self.fastcompress_taken.repeat_interleave(repeats, 0)

    def _select(self, rows: Tensor) -> None:
        if self.fastcompress_taken is not None:
            self.fastcompress_taken = self.fastcompress_taken[rows.to(self.fastcompress_taken.device)]


@functools.cache
def _class_with_prompt(base: Any) -> Any:
    return type(base.__name__, (_PromptCache, base), {"__module__": base.__module__})


def _restore(base: Any, state: dict[str, Any]) -> Any:
    cache = object.__new__(_class_with_prompt(base))
    cache.__dict__.update(state)
    return cache


def _keep(cache: Any, prompt: Prompt) -> None:
    """Make an empty cache keep the lengths and the bias of a prompt, whose rows the current call adds to it."""
    if prompt.proportional and any(hasattr(layer, "_quantize") for layer in cache.layers):
        raise NotImplementedError(
            "a quantized cache cannot be used with proportional attention, whose bias it would round; pass another "
            "cache, or proportional_attention=False"
        )
    if not isinstance(cache, _PromptCache):
        cache.__class__ = _class_with_prompt(cache.__class__)
    if prompt.proportional and not cache.fastcompress_wide:
        cache._set_wide(True)
    cache.fastcompress_taken = prompt.lengths if prompt.in_time else (prompt.lengths > 0).long()
    cache.fastcompress_bias = prompt.bias if prompt.proportional else None

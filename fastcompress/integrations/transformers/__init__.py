"""Compress the audio in stock audio LLMs of transformers.

After ``apply_to(model, "uniform:3")`` the model is used as before, with its stock processor; ``revert(model)`` restores
the stock model.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from torch import nn

import fastcompress.decoder
from fastcompress.decoder import saved_rule
from fastcompress.decoder.attention import takes_positions
from fastcompress.decoder.generation import unwrap
from fastcompress.integrations.transformers import budget, dynamic, features, patches, whisper
from fastcompress.integrations.transformers.budget import BudgetProcessor
from fastcompress.integrations.transformers.dynamic import compressed_prompt
from fastcompress.integrations.transformers.families import (
    FAMILIES,
    REFUSED,
    TESTED,
    Family,
    check_version,
    family_of,
    support,
    table,
)
from fastcompress.integrations.transformers.settings import Settings
from fastcompress.nn import SegmentPool
from fastcompress.ops.pack import POSITIONS, Positions
from fastcompress.ops.segment_reduce import Reduce
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

Mode = Literal["dynamic", "budget"]
MODES: tuple[str, ...] = get_args(Mode)

saved_rule.watch()


def apply_to(
    model: Any,
    compressor: Rule | str | nn.Module | None = None,
    mode: Mode | None = None,
    pack: bool | None = None,
    *,
    before_projector: bool | None = None,
    proportional_attention: bool | None = None,
    positions: Positions | None = None,
    silence: str | float | None = None,
) -> Any:
    """Compress the audio of a stock audio LLM, or of Whisper, in place.

    In **dynamic** mode the number of tokens may depend on the audio. Processor, chat template, ``forward`` with labels,
    ``generate``, ``Trainer`` and peft work as before, and the decoder's input becomes shorter. ``forward`` returns
    logits ``[B, S, V]`` of the ``S`` rows of the longest compressed sample, padded on the side of the input (on the
    left if that has no padding). With labels it returns logits ``[1, K, V]`` of the ``K`` rows that predict a label,
    and the mean loss (or the sum divided by ``num_items_in_batch``). ``output.compressed`` is the decoder's input
    ([`fastcompress.PackedInputs`][]). ``generate`` returns the ids of the prompt and the new ones.

    In **budget** mode the number of tokens depends only on the length of the audio, and [`BudgetProcessor`][] writes
    that number of placeholders into the prompt. The rest of the model stays stock, and engines that count placeholders
    can serve it, without proportional attention and positions in time, which are therefore off by default.

    **Whisper** has one mode: its encoder returns pooled frames, and its decoder attends to them. Forward with labels,
    ``generate`` and its long form, ``Trainer``, peft and pipelines work as before; timestamps of words do not.

    Proportional attention and positions in time make compression nearly free for a model that was not trained with it.
    Both are on for a rule, unless the weights were saved with a rule and without them.

    Saving writes rule, mode, side of the projector, proportional attention and positions as ``fastcompress`` into
    ``config.json``, and with a peft adapter into ``fastcompress.json`` next to ``adapter_config.json``. This applies to
    ``save_pretrained`` of the model, of a ``PeftModel`` and of a merged model, and for checkpoints of ``Trainer``. A
    model that is loaded with them, but used without ``apply_to``, warns once.

    Args:
        model: Audio LLM with a head, such as ``Qwen2AudioForConditionalGeneration``, which may be wrapped by peft.
        compressor: Rule or its text form, or a module that is called with rows ``[N, D]`` and ``cu_seqlens``
            ``[A + 1]`` int32 and returns an object with ``values`` and ``cu_seqlens``, like the modules of
            [`fastcompress.nn`][]. It becomes ``model.audio_compressor``, is cast to the model's dtype and saved with
            the model, and can be among peft's ``modules_to_save``. If it has a ``loss`` after the call, as
            [`fastcompress.nn.LearnedBoundary`][] has, that is added to the model's, times its ``loss_weight``.
            ``None``: the rule that was saved with the weights. A different one causes a warning.
        mode: ``"dynamic"`` or ``"budget"``. ``None``: the saved one if ``compressor`` is ``None``, else
            ``"dynamic"``.
        pack: Whether the decoder runs on packed rows, without padding, in ``forward`` with labels or without a cache.
            ``None``: in dynamic mode. ``generate`` is always padded.
        before_projector: Whether to pool the encoder's frames, so that only tokens are projected; else the projector's
            output is pooled. ``None``: as saved if ``compressor`` is ``None``, else false.
        proportional_attention: Whether a token of ``L`` frames weighs as much as its frames: ``log(L)`` is added to
            its attention scores. The decoder then needs ``attn_implementation="fastcompress"``, which ``apply_to``
            sets. ``None``: as saved with a rule, else true for a rule or ``SegmentPool``, and false for other modules
            and in budget mode.
        positions: ``"time"``: a token has the position of its segment's middle frame, and text has the position that it
            has without compression; the first token that is generated, too. ``"compact"``: rows are numbered 0, 1, 2,
            ... ``None``: as saved with a rule, else ``"time"`` for a rule or ``SegmentPool``, and ``"compact"`` for
            other modules and in budget mode. Whisper's decoder has no positions of audio.
        silence: What happens to the frames of the silence that fills Whisper's window after the audio: ``"keep"``
            each as a token, ``"pool"`` them like audio, or a number of seconds of it that are pooled, while the rest is
            dropped. ``None``: as saved if ``compressor`` is ``None``, else ``"keep"``.

    Returns:
        ``model``.

    Raises:
        NotImplementedError: The model, or its combination with an argument, is not supported. The message has the
            reason.
        TypeError: An argument has a wrong type.
        ValueError: An argument has a wrong value, the model is already compressed, or no rule is passed or saved.
    """
    base = unwrap(model)
    is_whisper = whisper.takes(base)
    family = None if is_whisper else family_of(base)
    kind = base.config.model_type
    trained = saved_rule.stored(base)
    if is_whisper and before_projector is False:
        raise NotImplementedError(f"{kind} has no projector; before_projector must be None or True, got False")
    if compressor is None:
        if trained is None:
            raise ValueError(f"no compression was saved with this {kind}; pass a rule, such as 'uniform:3'")
        if trained.rule is None:
            raise ValueError(f"this {kind} was trained with the module {trained.compressor}; pass that module")
        compressor = SegmentPool(trained.rule, cast(Reduce, trained.reduce or "mean"))
        mode = cast(Mode, trained.mode) if mode is None else mode
        before_projector = trained.before_projector if before_projector is None else before_projector
        silence = trained.silence if silence is None else silence
    mode, before_projector = "dynamic" if mode is None else mode, bool(before_projector)
    if mode not in MODES:
        raise ValueError(f"mode must be 'dynamic' or 'budget', got {mode!r}")
    check_version(mode)
    if hasattr(base, "fastcompress_settings"):
        raise ValueError(f"this {kind} is already compressed by {saved_rule.current(base)}; call revert first")
    if mode == "budget" and pack:
        raise ValueError("pack must be None or False in budget mode, whose forward stays stock, got True")
    module = _compressor(compressor)
    if not isinstance(proportional_attention, bool | None):
        raise TypeError(f"proportional_attention must be True, False or None, got {proportional_attention!r}")
    if positions not in (None, *POSITIONS):
        raise ValueError(f"positions must be 'compact' or 'time', got {positions!r}")
    if trained is not None and trained.rule is not None and type(module) is SegmentPool:
        proportional_attention = _first(proportional_attention, trained.proportional_attention)
        positions = _first(positions, cast(Positions, trained.positions))
    if family is None:
        if mode == "budget" or pack:
            raise NotImplementedError(f"{kind} has no budget mode and no packed rows: its prompt has no audio")
        if positions == "time":
            raise NotImplementedError(f"{kind} has no positions of audio in its decoder, got positions='time'")
        whisper.install(base, whisper.settings(module, proportional_attention, silence))
    else:
        if silence is not None:
            raise NotImplementedError(f"silence is supported for whisper only, got {kind}")
        _install(base, family, module, mode, pack, before_projector, proportional_attention, positions)
    patches.replace(base, "save_pretrained", _save_pretrained)
    if trained is not None:
        saved_rule.check_same(base.fastcompress_settings.saved_rule(base), trained, f"this {kind}")
    saved_rule.store(base)
    return model


def _first(value: Any, default: Any) -> Any:
    return default if value is None else value


def _install(
    base: Any,
    family: Family,
    module: nn.Module,
    mode: str,
    pack: bool | None,
    before_projector: bool,
    proportional_attention: bool | None,
    positions: str | None,
) -> None:
    """Compress an audio LLM, whose prompt has a placeholder per row of audio."""
    kind = base.config.model_type
    if before_projector and (mode == "budget" or family.why_not_before):
        why = family.why_not_before or "budget mode pools the projector's output"
        raise NotImplementedError(f"{kind} cannot be compressed before its projector: {why}")
    language_model = base.model.language_model
    settings = Settings(family, mode, mode == "dynamic" if pack is None else pack, before_projector, False, "compact")
    if mode == "budget":
        budget.check(kind, family, module)
    by_default = mode == "dynamic" and type(module) is SegmentPool
    settings.proportional_attention = _first(proportional_attention, by_default)
    settings.positions = _first(positions, "time" if by_default else "compact")
    if settings.positions == "time" and not takes_positions(language_model):
        if positions == "time":
            raise NotImplementedError(f"the decoder of {kind} takes no position_ids, got positions='time'")
        settings.positions = "compact"
    if settings.pack or settings.proportional_attention:
        try:
            settings.attention = _prepare(language_model)
        except NotImplementedError as error:
            if settings.pack:
                raise NotImplementedError(f"{error}; pass pack=False to compress without packing") from error
            if proportional_attention:
                raise NotImplementedError(f"{error}; pass proportional_attention=False") from error
            settings.proportional_attention = False
    table = base.get_input_embeddings().weight
    base.audio_compressor = module.to(table.device, table.dtype)
    base.fastcompress_settings = settings
    (budget if mode == "budget" else dynamic).install(base)
    features.install(base)


def revert(model: Any) -> Any:
    """Restore the stock model, in place. The rule is no longer saved with it.

    Args:
        model: Model that [`apply_to`][] changed.

    Returns:
        ``model``.

    Raises:
        ValueError: The model is not compressed.
        RuntimeError: Other code replaced a method after [`apply_to`][].
    """
    base = unwrap(model)
    if not hasattr(base, "fastcompress_settings"):
        raise ValueError(f"this {type(base).__name__} is not compressed, so there is nothing to revert")
    settings = base.fastcompress_settings
    if isinstance(settings, Settings):
        dynamic.uninstall(base)
        budget.uninstall(base)
        features.uninstall(base)
        if settings.attention is not None:
            base.model.language_model.set_attn_implementation(settings.attention)
        del base.audio_compressor
    else:
        whisper.uninstall(base)
    del base.fastcompress_settings
    saved_rule.erase(base)
    return model


def load_compressor(model: Any, folder: str | Path) -> Any:
    """Load the weights of ``model.audio_compressor`` from a folder that ``model.save_pretrained`` wrote.

    Args:
        model: Model that [`apply_to`][] changed.
        folder: Folder with ``*.safetensors`` files.

    Returns:
        ``model``.

    Raises:
        ValueError: The names or shapes of the weights in the folder differ from those of ``audio_compressor``.
    """
    from safetensors import safe_open

    base = unwrap(model)
    _check_folder(base, Path(folder))
    prefix = "audio_compressor."
    found: dict[str, torch.Tensor] = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found |= {name[len(prefix) :]: file.get_tensor(name) for name in file.keys() if name.startswith(prefix)}
    wanted = base.audio_compressor.state_dict()
    if found.keys() != wanted.keys():
        raise ValueError(
            f"{folder} must have these weights of audio_compressor: {', '.join(sorted(wanted)) or 'none'}; got "
            f"{', '.join(sorted(found)) or 'none'}"
        )
    for name, tensor in found.items():
        if tensor.shape != wanted[name].shape:
            raise ValueError(
                f"{prefix}{name} must have shape {list(wanted[name].shape)}, got {list(tensor.shape)} in {folder}"
            )
    base.audio_compressor.load_state_dict(found)
    return model


def _check_folder(base: Any, folder: Path) -> None:
    """Warn if the model in a folder was trained with another compression."""
    file = folder / "config.json"
    data = json.loads(file.read_text(encoding="utf-8")).get(saved_rule.KEY) if file.is_file() else None
    if data is not None:
        trained = saved_rule.SavedRule.from_dict(data)
        saved_rule.check_same(saved_rule.current(base), trained, f"the model in {folder}")


def _save_pretrained(self: Any, save_directory: str | Path, *args: Any, **kwargs: Any) -> Any:
    """Replace ``save_pretrained`` of the model: save the compression, too."""
    saved_rule.store(self)
    found = patches.original(self, "save_pretrained")(save_directory, *args, **kwargs)
    if kwargs.get("is_main_process", True):
        saved_rule.save_beside_adapter(self, save_directory)
    return found


def _compressor(compressor: Any) -> nn.Module:
    if not isinstance(compressor, nn.Module):
        compressor = SegmentPool(as_rule(compressor))
    if type(compressor) is SegmentPool and isinstance(compressor.rule, LabelChange):
        raise NotImplementedError(
            "label-change needs labels, which a stock model does not have; pass a module that computes them"
        )
    if isinstance(compressor, SegmentPool) and not compressor.compact:
        raise ValueError("compressor must have compact=True, got False: a decoder takes no empty segments")
    return compressor


def _prepare(decoder: Any) -> str | None:
    """Set packed attention on a decoder and return the name of its former attention."""
    before: str | None = decoder.config._attn_implementation
    fastcompress.decoder.prepare(decoder)
    return before

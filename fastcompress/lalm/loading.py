"""Load the reference audio LLM from a folder that a training run or ``save_pretrained`` wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from fastcompress.decoder.generation import unwrap
from fastcompress.files import one_line
from fastcompress.lalm.configuration import FastCompressConfig, warn_of_missing_compressor
from fastcompress.lalm.dtypes import part_dtypes
from fastcompress.lalm.lora import load_lora
from fastcompress.lalm.modeling import FastCompressForConditionalGeneration
from fastcompress.lalm.processing import FastCompressProcessor
from fastcompress.nn import LearnedBoundary

BASE_FILE = "base.json"


class RunError(ValueError):
    """A run cannot start or resume. The message is one line."""


def load_parts(audio_model: str, text_model: str) -> tuple[FastCompressForConditionalGeneration, FastCompressProcessor]:
    """Build a model and its processor from a pretrained encoder and decoder.

    Args:
        audio_model: Folder or name of the encoder.
        text_model: Folder or name of the decoder.

    Returns:
        The model, with a new projector, and its processor.
    """
    from transformers import AutoFeatureExtractor, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(text_model)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    processor = FastCompressProcessor(AutoFeatureExtractor.from_pretrained(audio_model), tokenizer)
    torch.manual_seed(0)  # the projector must have the same initial weights whenever an adapter is loaded on it
    model = FastCompressForConditionalGeneration.from_parts(
        audio_model, text_model, audio_token_id=processor.audio_token_id
    )
    return model, processor


def set_compression(
    model: Any,
    rule: str | None,
    reduce: str | None = None,
    keys: str | None = None,
    proportional_attention: bool | None = None,
    positions: str | None = None,
) -> None:
    """Change the compression settings of a model, which may be wrapped by peft.

    Args:
        model: Reference model, changed in place.
        rule: Text form of the rule; ``"none"``: every frame is kept; ``None``: unchanged.
        reduce: ``reduce`` of ``FastCompressConfig``; ``None``: unchanged.
        keys: ``keys`` of ``FastCompressConfig``; ``None``: unchanged.
        proportional_attention: ``proportional_attention`` of ``FastCompressConfig``; ``None``: as the rule sets it.
        positions: ``positions`` of ``FastCompressConfig``; ``None``: as the rule sets them.

    Raises:
        RunError: A value is not valid.
    """
    config = unwrap(model).config
    try:
        checked = FastCompressConfig(
            reduce=reduce or config.reduce, keys=keys or config.keys, ctc_tokens=config.ctc_tokens
        )
        if rule is not None:
            unwrap(model).rule = None if rule == "none" else rule
        if proportional_attention is not None:
            unwrap(model).proportional_attention = proportional_attention
        if positions is not None:
            unwrap(model).positions = positions
    except (NotImplementedError, ValueError) as error:
        raise RunError(str(error)) from error
    config.reduce, config.keys = checked.reduce, checked.keys
    for module in model.modules():  # peft runs a copy of the compressor, so every instance must change
        if isinstance(module, LearnedBoundary):
            module.reduce = config.reduce


def load_model(
    path: str | Path,
    rule: str | None = None,
    device: torch.device | str = "cpu",
    *,
    proportional_attention: bool | None = None,
    positions: str | None = None,
    keep_dtypes: bool = False,
) -> tuple[Any, FastCompressProcessor]:
    """Load a model and its processor.

    Args:
        path: Folder of a model, of a LoRA adapter, or of a run, whose ``final/`` is loaded.
        rule: Rule that replaces the model's; ``"none"``: every frame is kept; ``None``: the model's.
        device: Device of the model. On the CPU, fp16 submodules become fp32, which is faster there.
        proportional_attention: See ``set_compression``.
        positions: See ``set_compression``.
        keep_dtypes: Whether fp16 submodules stay so on the CPU, too.

    Returns:
        The model in evaluation mode, and its processor.

    Raises:
        RunError: The folder has no such model, or it cannot be loaded.
    """
    path = Path(path)
    if (path / "final").is_dir():
        path = path / "final"
    if not (path / "config.json").is_file():
        raise RunError(f"{path}: not a model folder, it has no config.json")
    try:
        processor = FastCompressProcessor.from_pretrained(path)
        if (path / "adapter_config.json").is_file():
            model = _load_adapter(path)
        else:
            config = FastCompressConfig.from_pretrained(path)
            model = FastCompressForConditionalGeneration.from_pretrained(path, config=config)
    except RunError:
        raise
    except Exception as error:
        raise RunError(f"{path}: cannot load the model ({type(error).__name__}: {one_line(error)})") from error
    set_compression(model, rule, proportional_attention=proportional_attention, positions=positions)
    device = torch.device(device)
    for name, dtype in part_dtypes(unwrap(model)).items():
        if device.type == "cpu" and dtype == torch.float16 and not keep_dtypes:
            getattr(unwrap(model), name).float()
    return model.to(device).eval(), processor


def _load_adapter(path: Path) -> Any:
    base = json.loads((path / BASE_FILE).read_text(encoding="utf-8"))
    if "model" in base:
        model, _ = load_model(base["model"])
        if hasattr(model, "merge_and_unload"):
            model = model.merge_and_unload()
    else:
        model, _ = load_parts(base["audio_model"], base["text_model"])
    config = FastCompressConfig.from_pretrained(path)
    replaced = config.boundary_ratio is not None or config.compressor is not None
    rule = config.rule or (None if replaced else "none")
    set_compression(model, rule, config.reduce, config.keys, config.proportional_attention, config.positions)
    model.trained_on_frames = rule == "none"
    if config.boundary_ratio is not None and model.compressor is None:
        model.learn_boundaries(config.boundary_ratio, config.boundary_kind)
    else:
        warn_of_missing_compressor(config)
    model.config.audio_padding = config.audio_padding
    model.train_encoder(config.train_encoder)
    return load_lora(model, path)

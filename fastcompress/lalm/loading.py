"""Models that a run, or ``save_pretrained``, has left in a folder."""

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
    """A run that cannot start or go on as asked; the message is one line."""


def load_parts(audio_model: str, text_model: str) -> tuple[FastCompressForConditionalGeneration, FastCompressProcessor]:
    from transformers import AutoFeatureExtractor, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(text_model)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    processor = FastCompressProcessor(AutoFeatureExtractor.from_pretrained(audio_model), tokenizer)
    torch.manual_seed(0)  # of the projector: LoRA that was trained must find it again before its own is loaded
    model = FastCompressForConditionalGeneration.from_parts(
        audio_model, text_model, audio_token_id=processor.audio_token_id
    )
    return model, processor


def set_compression(model: Any, rule: str | None, reduce: str | None = None, keys: str | None = None) -> None:
    """Changes what is given of the compression of a model, with LoRA or without; the rule ``"none"`` keeps every frame.

    Raises:
        RunError: a value that is none.
    """
    config = unwrap(model).config
    try:
        checked = FastCompressConfig(
            reduce=reduce or config.reduce, keys=keys or config.keys, ctc_tokens=config.ctc_tokens
        )
        if rule is not None:
            unwrap(model).rule = None if rule == "none" else rule
    except ValueError as error:
        raise RunError(str(error)) from error
    config.reduce, config.keys = checked.reduce, checked.keys
    for module in model.modules():  # with LoRA there is a copy, which is the one that runs
        if isinstance(module, LearnedBoundary):
            module.reduce = config.reduce


def load_model(
    path: str | Path, rule: str | None = None, device: torch.device | str = "cpu"
) -> tuple[Any, FastCompressProcessor]:
    """A model that a run, or ``save_pretrained``, has left, and its processor.

    Args:
        path: of the folder: of a model, of LoRA, or of a run, whose ``final/`` is meant.
        rule: in place of the model's; ``"none"``: every frame.
        device: where to. On the CPU fp16 becomes fp32, which is faster there.

    Raises:
        RunError: the folder holds no such model.
    """
    path = Path(path)
    if (path / "final").is_dir():
        path = path / "final"
    if not (path / "config.json").is_file():
        raise RunError(f"{path}: no model here (no config.json)")
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
        raise RunError(f"{path}: cannot be loaded ({type(error).__name__}: {one_line(error)})") from error
    set_compression(model, rule)
    device = torch.device(device)
    for name, dtype in part_dtypes(unwrap(model)).items():
        if device.type == "cpu" and dtype == torch.float16:
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
    set_compression(model, config.rule or (None if replaced else "none"), config.reduce, config.keys)
    if config.boundary_ratio is not None and model.compressor is None:
        model.learn_boundaries(config.boundary_ratio, config.boundary_kind)
    else:
        warn_of_missing_compressor(config)
    model.train_encoder(config.train_encoder)
    return load_lora(model, path)

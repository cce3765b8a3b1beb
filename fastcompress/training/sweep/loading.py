"""Load the model of a sweep."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from fastcompress.files import named, one_line
from fastcompress.lalm.loading import RunError, load_model
from fastcompress.training.settings import SettingsError
from fastcompress.training.sweep.audio_llms import AudioLLM
from fastcompress.training.sweep.models import Decoding, SweepModel
from fastcompress.training.sweep.reference import Reference
from fastcompress.training.sweep.whisper import Whisper

#: Architectures to load in place of a whole model: the part of it that ``apply_to`` supports.
_PARTS = {
    "qwen2_5_omni": "Qwen2_5OmniThinkerForConditionalGeneration",
    "qwen3_omni_moe": "Qwen3OmniMoeThinkerForConditionalGeneration",
}


def load(path: str, device: str, decoding: Decoding) -> SweepModel:
    """Load a stock model by folder or name, or a folder of the reference model.

    The folder of an adapter, or of a run of ``fastcompress finetune``, is loaded as its base model with the adapter
    merged into it.

    Raises:
        SettingsError: There is no such model, or it does not support ``apply_to`` or the decoding.
    """
    folder = Path(path)
    folder = next((folder / part for part in ("final", "adapter") if (folder / part).is_dir()), folder)
    if _is_reference(folder):
        try:
            return Reference(*load_model(folder, None, device), decoding)
        except (RunError, RuntimeError) as error:
            raise SettingsError(f"`model`: {error}") from error
    adapter = folder if (folder / "adapter_config.json").is_file() else None
    if folder.exists() and adapter is None and not (folder / "config.json").is_file():
        raise SettingsError(f"`model` {path}: not a model folder, it has no config.json or adapter_config.json")
    if not folder.exists() and (path.startswith(("/", ".", "~")) or path.count("/") > 1):
        raise SettingsError(f"`model` {path}: no such folder")
    model, processor = _load_stock(path, adapter, device)
    kind = model.config.model_type
    try:
        return (Whisper if kind == "whisper" else AudioLLM)(model, processor, decoding)
    except NotImplementedError as error:
        raise SettingsError(f"`model` {path}: {error}") from error


def _is_reference(folder: Path) -> bool:
    if (folder / "base.json").is_file():
        return True
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return isinstance(config, dict) and config.get("model_type") == "fastcompress"
    except (OSError, ValueError):
        return False


def _load_stock(path: str, adapter: Path | None, device: str) -> tuple[Any, Any]:
    import transformers

    try:
        base = path if adapter is None else _base_of(adapter)
        config = transformers.AutoConfig.from_pretrained(base)
        name = _PARTS.get(config.model_type) or (config.architectures or ["none"])[0]
        if not hasattr(transformers, name):
            raise SettingsError(f"`model` {path}: transformers has no architecture {name}")
        model = getattr(transformers, name).from_pretrained(base, dtype="auto")
        if device == "cpu" and model.dtype == torch.float16:
            model = model.float()  # fp32 is faster on a CPU
        processor = transformers.AutoProcessor.from_pretrained(base if adapter is None else adapter)
        if adapter is not None:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    except SettingsError:
        raise
    except Exception as error:  # transformers, safetensors and json raise errors of many types for a bad folder
        raise SettingsError(f"`model` {named(path, one_line(error))}") from error
    return model.to(device).eval(), processor


def _base_of(adapter: Path) -> str:
    """Return the folder or name of the model to which an adapter belongs."""
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    base = config.get("base_model_name_or_path")
    if not base:
        raise SettingsError(f"`model` {adapter}: adapter_config.json has no base_model_name_or_path")
    return str(base)

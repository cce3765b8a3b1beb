"""Load a stock model of transformers by folder or name, or the adapter of a finetuned one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastcompress.decoder import saved_rule
from fastcompress.files import named, one_line
from fastcompress.training.settings import SettingsError

#: Architectures to load in place of a whole model: the part of it that ``apply_to`` supports.
_PARTS = {
    "qwen2_5_omni": "Qwen2_5OmniThinkerForConditionalGeneration",
    "qwen3_omni_moe": "Qwen3OmniMoeThinkerForConditionalGeneration",
}


def run_folder(path: str) -> Path:
    """Return the folder of the weights of a run of ``train`` or ``finetune``; other paths are returned unchanged."""
    folder = Path(path)
    return next((folder / part for part in ("final", "adapter") if (folder / part).is_dir()), folder)


def is_reference(folder: Path) -> bool:
    """Return whether a folder has a reference model, or an adapter of one."""
    if (folder / "base.json").is_file():
        return True
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return isinstance(config, dict) and config.get("model_type") == "fastcompress"
    except (OSError, ValueError):
        return False


def load_stock(path: str) -> tuple[Any, Any]:
    """Load a model and its processor.

    Args:
        path: Folder or name of a model, or folder of an adapter or of a run of ``finetune``, which is merged into its
            base model. The rule of an adapter is then in the configuration of the model.

    Raises:
        SettingsError: There is no such model, or it cannot be loaded.
    """
    import transformers

    saved_rule.watch()  # the rule of an adapter gets into the configuration
    folder = run_folder(path)
    adapter = folder if (folder / "adapter_config.json").is_file() else None
    if folder.exists() and adapter is None and not (folder / "config.json").is_file():
        raise SettingsError(f"`model` {path}: not a model folder, it has no config.json or adapter_config.json")
    if not folder.exists() and (path.startswith(("/", ".", "~")) or path.count("/") > 1):
        raise SettingsError(f"`model` {path}: no such folder")
    try:
        base = path if adapter is None else _base_of(adapter)
        config = transformers.AutoConfig.from_pretrained(base)
        name = _PARTS.get(config.model_type) or (config.architectures or ["none"])[0]
        if not hasattr(transformers, name):
            raise SettingsError(f"`model` {path}: transformers has no architecture {name}")
        model = getattr(transformers, name).from_pretrained(base, dtype="auto")
        processor = transformers.AutoProcessor.from_pretrained(base if adapter is None else adapter)
        if adapter is not None:
            model = _merged(model, adapter)
    except SettingsError:
        raise
    except Exception as error:  # transformers, safetensors and json raise errors of many types for a bad folder
        raise SettingsError(f"`model` {named(path, one_line(error))}") from error
    return model.eval(), processor


def _base_of(adapter: Path) -> str:
    """Return the folder or name of the model to which an adapter belongs."""
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    base = config.get("base_model_name_or_path")
    if not base:
        raise SettingsError(f"`model` {adapter}: adapter_config.json has no base_model_name_or_path")
    return str(base)


def _merged(model: Any, adapter: Path) -> Any:
    """Merge an adapter, which is in fp32, into the weights, and return them in their dtypes."""
    from peft import PeftModel

    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(dtypes[name])
    return model

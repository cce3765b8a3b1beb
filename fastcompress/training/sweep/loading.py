"""Load the model of a sweep."""

from __future__ import annotations

import torch

from fastcompress.lalm.loading import RunError, load_model
from fastcompress.training.settings import SettingsError
from fastcompress.training.stock import is_reference, load_stock, run_folder
from fastcompress.training.sweep.audio_llms import AudioLLM
from fastcompress.training.sweep.models import Decoding, SweepModel
from fastcompress.training.sweep.reference import Reference
from fastcompress.training.sweep.whisper import Whisper


def load(path: str, device: str, decoding: Decoding) -> SweepModel:
    """Load a stock model (``load_stock``), or the folder of a reference model or of a run of ``train``.

    Raises:
        SettingsError: There is no such model, or it does not support ``apply_to`` or the decoding.
    """
    if is_reference(run_folder(path)):
        try:
            return Reference(*load_model(run_folder(path), None, device), decoding)
        except (RunError, RuntimeError) as error:
            raise SettingsError(f"`model`: {error}") from error
    model, processor = load_stock(path)
    if device == "cpu" and model.dtype == torch.float16:
        model = model.float()  # fp32 is faster on a CPU
    kind = model.config.model_type
    try:
        return (Whisper if kind == "whisper" else AudioLLM)(model.to(device), processor, decoding)
    except NotImplementedError as error:
        raise SettingsError(f"`model` {path}: {error}") from error

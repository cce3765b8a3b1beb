"""LoRA on the decoder of the reference audio LLM. The projector and a learned compressor are trained in full."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import nn

from fastcompress.decoder import saved_rule


def lora_targets(decoder: Any) -> str:
    """Return a regular expression that matches the linear layers of the decoder's attention and MLP.

    The pattern requires ``language_model`` in the name: the encoder has layers of the same names.
    """
    head = decoder.get_output_embeddings()
    names = {
        name.rpartition(".")[2]
        for name, module in decoder.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }
    return rf"(?:.*\.)?language_model\..*\.(?:{'|'.join(re.escape(name) for name in sorted(names))})"


def add_lora(model: Any, rank: int = 16, alpha: float = 32.0, dropout: float = 0.0, **kwargs: Any) -> Any:
    """Add LoRA (Hu et al., 2021) to the decoder and freeze its other weights.

    The projector, the compressor and, if ``config.train_encoder`` is set, the encoder with its CTC head are trained in
    full. Trained weights are cast to fp32; frozen weights keep their dtype.

    Args:
        model: [`FastCompressForConditionalGeneration`][], changed in place.
        rank: Rank of the adapter.
        alpha: Scale of the adapter, which is multiplied by ``alpha / rank``.
        dropout: Dropout probability of the adapter's input.
        kwargs: Further arguments of ``peft.LoraConfig``.

    Returns:
        A ``PeftModel``. Its ``save_pretrained`` writes the adapter and the weights trained in full, with the rule in
        ``fastcompress.json``. ``PeftModel.from_pretrained`` loads them, and warns if the model has another rule.
    """
    from peft import LoraConfig, get_peft_model

    saved_rule.watch()
    learns = model.compressor is not None and any(True for _ in model.compressor.parameters())
    saved = ["projector"] + (["compressor"] if learns else [])
    if model.config.train_encoder:
        saved += ["audio_tower"] + ([] if model.ctc_head is None else ["ctc_head"])
    for name in saved:
        getattr(model, name).float()
    frozen = [name for name, p in model.audio_tower.named_parameters() if not p.requires_grad]
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # annotated as int, but only divided by the rank
        lora_dropout=dropout,
        target_modules=lora_targets(model.language_model),
        modules_to_save=saved,
        **kwargs,
    )
    wrapped = get_peft_model(model, config)
    if model.config.train_encoder:  # peft trains every parameter of its copy, fixed position tables included
        for copy in model.audio_tower.modules_to_save.values():
            for name in frozen:
                copy.get_parameter(name).requires_grad_(False)
    return wrapped


def load_lora(model: Any, path: str | Path) -> Any:
    """Load an adapter of ``add_lora`` from a folder.

    Args:
        model: Model with the same parts as the one that was passed to ``add_lora``.
        path: Folder that ``save_pretrained`` wrote.

    Returns:
        A ``PeftModel`` with the adapter and the weights trained in full.
    """
    from peft import PeftConfig, PeftModel

    saved_rule.watch()
    for name in PeftConfig.from_pretrained(str(path)).modules_to_save or ():
        getattr(model, name).float()
    return PeftModel.from_pretrained(model, str(path))

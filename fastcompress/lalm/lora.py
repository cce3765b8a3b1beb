"""LoRA on the decoder of the reference audio LLM; what connects it to the encoder is trained in full."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import nn


def lora_targets(decoder: Any) -> str:
    """A pattern of the linear layers, attention and MLP, of a decoder that its model calls ``language_model``, and of
    none of the encoder's of the same names."""
    head = decoder.get_output_embeddings()
    names = {
        name.rpartition(".")[2]
        for name, module in decoder.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }
    return rf"(?:.*\.)?language_model\..*\.(?:{'|'.join(re.escape(name) for name in sorted(names))})"


def add_lora(model: Any, rank: int = 16, alpha: float = 32.0, dropout: float = 0.0, **kwargs: Any) -> Any:
    """Freezes a :class:`FastCompressForConditionalGeneration` but for LoRA on its decoder, its projector and, if
    ``train_encoder`` says so, its encoder. What is trained is in fp32, what is frozen stays in its dtype.

    Args:
        model: which is changed.
        rank, alpha, dropout: of LoRA (Hu et al., 2021).
        kwargs: more of ``peft.LoraConfig``.

    Returns:
        a ``PeftModel``: ``save_pretrained`` writes LoRA and projector, ``PeftModel.from_pretrained`` loads them.
    """
    from peft import LoraConfig, get_peft_model

    learns = model.compressor is not None and any(True for _ in model.compressor.parameters())
    saved = ["projector"] + (["compressor"] if learns else [])
    if model.config.train_encoder:
        saved += ["audio_tower"] + ([] if model.ctc_head is None else ["ctc_head"])
    for name in saved:
        getattr(model, name).float()
    frozen = [name for name, p in model.audio_tower.named_parameters() if not p.requires_grad]
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # peft says int, and divides it by the rank
        lora_dropout=dropout,
        target_modules=lora_targets(model.language_model),
        modules_to_save=saved,
        **kwargs,
    )
    wrapped = get_peft_model(model, config)
    if model.config.train_encoder:  # of which peft trains a copy, all of it
        for copy in model.audio_tower.modules_to_save.values():
            for name in frozen:
                copy.get_parameter(name).requires_grad_(False)
    return wrapped


def load_lora(model: Any, path: str | Path) -> Any:
    """What ``save_pretrained`` wrote of :func:`add_lora`, on a model like that which was given to it."""
    from peft import PeftConfig, PeftModel

    for name in PeftConfig.from_pretrained(str(path)).modules_to_save or ():
        getattr(model, name).float()
    return PeftModel.from_pretrained(model, str(path))

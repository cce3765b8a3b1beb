"""Inputs of a stock audio LLM for audios and instructions, by its own processor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def processor_inputs(processor: Any, audios: Sequence[np.ndarray], prompts: Sequence[str]) -> Any:
    """Return the processor's output for instructions that all have an audio, or none of which has one.

    Args:
        processor: Processor of the model. Its chat template is used, or, without one, the audio token and the prompt.
        audios: Samples ``[S]`` of each audio, or none.
        prompts: Instructions; empty ones are left out.
    """
    padded = {"text_kwargs": {"padding": True}, "return_tensors": "pt"}
    if not (getattr(processor, "chat_template", None) or processor.tokenizer.chat_template):
        texts = [f"{processor.audio_token if audios else ''}{prompt}" for prompt in prompts]
        return processor(text=texts, audio=list(audios) or None, **padded)
    heard: list[list[dict[str, Any]]] = [[{"type": "audio", "audio": audio}] for audio in audios]
    conversations = [
        [{"role": "user", "content": [*audio, *([{"type": "text", "text": prompt}] if prompt else [])]}]
        for audio, prompt in zip(heard or [[] for _ in prompts], prompts, strict=True)
    ]
    return processor.apply_chat_template(
        conversations, tokenize=True, return_dict=True, add_generation_prompt=True, processor_kwargs=padded
    )

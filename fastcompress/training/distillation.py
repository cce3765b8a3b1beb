"""Distillation (Hinton et al., arXiv 1503.02531): a student learns the next-token distributions of a teacher."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastcompress.decoder.generation import unwrap
from fastcompress.lalm.loading import RunError, load_model
from fastcompress.training.settings import SettingsError


class Teacher:
    """A frozen model that reads the batches of the student, with the compression of its own training.

    Args:
        path: Folder of a model or run, such as that from which the student starts.
        student: The student.
        processor: Processor of the student.
        device: Device of the teacher.
        weight: Weight of the divergence in the loss.

    Raises:
        SettingsError: The teacher cannot be loaded, or its vocabulary or features differ from the student's.
    """

    def __init__(
        self, path: str, student: Any, processor: Any, device: torch.device | str, weight: float = 1.0
    ) -> None:
        try:
            model, own_processor = load_model(path, device=device)
        except (RunError, RuntimeError) as error:
            raise SettingsError(f"`teacher`: {error}") from error
        self.weight: float = weight
        self.model: Any = model.requires_grad_(False).eval()
        own, other = unwrap(model), unwrap(student)
        for what, a, b in (
            ("number of ids", own.config.text_config.vocab_size, other.config.text_config.vocab_size),
            ("audio token", own.config.audio_token_id, other.config.audio_token_id),
            ("padding of audio", own.config.audio_padding, other.config.audio_padding),
            ("input of the encoder", _input_of(own), _input_of(other)),
        ):
            if a != b:
                raise SettingsError(f"`teacher` {path}: its {what} is {a}, that of the model is {b}")
        if own_processor.tokenizer.get_vocab() != processor.tokenizer.get_vocab():
            raise SettingsError(f"`teacher` {path}: its vocabulary differs from that of the model")
        if own_processor.feature_extractor.to_dict() != processor.feature_extractor.to_dict():
            raise SettingsError(f"`teacher` {path}: its audio features differ from those of the model")

    def has_encoder_of(self, student: Any) -> bool:
        """Return whether the teacher's encoder has the weights of the student's."""
        own, other = (unwrap(m).audio_tower.state_dict() for m in (self.model, student))
        return own.keys() == other.keys() and all(torch.equal(own[name].cpu(), other[name].cpu()) for name in own)

    @torch.no_grad()
    def logits(self, batch: dict[str, Tensor]) -> Tensor:
        """Return the logits of the rows that predict a label, ``[1, K, V]``."""
        inputs = {name: value for name, value in batch.items() if name != "ctc_labels"}
        logits: Tensor = self.model(**inputs).logits
        return logits


def divergence(student: Tensor, teacher: Tensor, num_items: int) -> Tensor:
    """Return the Kullback-Leibler divergence from the teacher's distributions, divided by ``num_items``.

    Args:
        student: Logits of the rows that predict a label, ``[1, K, V]``.
        teacher: Logits of the same labels, ``[1, K, V]``.
        num_items: Number of labels of the whole optimizer step.
    """
    log_p, log_q = (logits.float().log_softmax(-1) for logits in (teacher, student))
    return torch.nn.functional.kl_div(log_q, log_p, reduction="sum", log_target=True) / max(1, num_items)


def _input_of(model: Any) -> tuple[str, int | None]:
    config = model.config.audio_config
    return config.model_type, getattr(config, "num_mel_bins", None)

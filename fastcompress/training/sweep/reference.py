"""The reference model in a sweep."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastcompress.audio import AudioError
from fastcompress.decoder.generation import unwrap
from fastcompress.lalm.loading import RunError, set_compression
from fastcompress.training.evaluation import end_tokens
from fastcompress.training.manifest import Utterance
from fastcompress.training.sweep.models import Answer, Batch, Clock, Decoding, SweepModel, Variant, written

_PARTS = ("proportional_attention", "positions")


class Reference(SweepModel):
    """A run of ``fastcompress train``.

    Args:
        model: A ``FastCompressForConditionalGeneration``, with or without LoRA.
        processor: Its ``FastCompressProcessor``.
        decoding: Settings of decoding.
    """

    def __init__(self, model: Any, processor: Any, decoding: Decoding) -> None:
        self.model: Any = model
        self.kind: str = "fastcompress"
        self.processor: Any = processor
        self.sampling_rate: int = processor.sampling_rate
        # A run that was trained with a rule keeps the settings of its training.
        on_frames = getattr(unwrap(model), "trained_on_frames", False)
        self.switches: dict[str, Any] = {"proportional_attention": False, "positions": "compact"} if on_frames else {}
        self.decoding: Decoding = decoding

    @torch.inference_mode()
    def encode(self, samples: np.ndarray) -> dict[str, Tensor]:
        if len(samples) < self.processor.shortest:
            raise AudioError(f"has {len(samples) / self.sampling_rate:.3f} s of audio, less than one frame")
        base = unwrap(self.model)
        features = self.processor.pad_features([self.processor.features(samples, self.sampling_rate)])
        frames, lengths = base.encode(*(value.to(base.device) for value in features.values()))
        return {"states": frames[0, : int(lengths[0])]}

    @contextlib.contextmanager
    def compressed(self, variant: Variant) -> Iterator[None]:
        if variant.silence is not None:
            raise NotImplementedError("`silence` is supported for whisper only, got fastcompress")
        base = unwrap(self.model)
        config, compressor, rule = base.config, base.compressor, base.rule
        names = ("reduce", "boundary_ratio", "compressor", *_PARTS)
        before = {name: getattr(config, name) for name in names}
        try:
            set_compression(self.model, "none", variant.reduce)  # removes a compressor, which would refuse a rule
            set_compression(self.model, variant.rule)
            for name in _PARTS:
                if (value := getattr(variant, name)) is not None:
                    setattr(base, name, value)
        except RunError as error:
            raise ValueError(str(error)) from error
        try:
            yield
        finally:
            set_compression(self.model, rule or "none", before["reduce"])
            base.compressor = compressor
            for name, value in before.items():
                setattr(config, name, value)

    @torch.inference_mode()
    def answer(self, utterances: Sequence[Utterance], states: Sequence[dict[str, Tensor]]) -> Batch:
        base, tokenizer = unwrap(self.model), self.processor.tokenizer
        prompts = [self.decoding.prompt if u.prompt is None else u.prompt for u in utterances]
        rows = [torch.tensor(self.processor.prompt_ids(prompt, True)) for prompt in prompts]
        pad = torch.nn.utils.rnn.pad_sequence
        ids = pad(rows, True, tokenizer.pad_token_id).to(base.device)
        mask = pad([torch.ones_like(row) for row in rows], True, 0).to(base.device)
        frames = pad([s["states"] for s in states], True).to(base.device)
        lengths = torch.tensor([len(s["states"]) for s in states], device=base.device)
        counts = base.compress(frames, lengths).cu_seqlens.diff().tolist()
        limits: dict[str, Any] = {"max_new_tokens": self.decoding.max_new_tokens, "do_sample": False, "num_beams": 1}
        clock = Clock(base.device)
        self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            frames=frames,
            frame_lengths=lengths,
            stopping_criteria=[clock],
            **limits,
        )
        prefill, decoding = clock.times()
        answers = []
        for i, (new, clipped) in enumerate(written(clock.new, end_tokens(base, tokenizer))):
            text = tokenizer.decode(new, skip_special_tokens=True).strip()
            count = len(states[i]["states"])
            seconds = utterances[i].duration or 0.0
            keys = len(rows[i]) - 1 + counts[i]
            answers.append(Answer(text, keys, counts[i], count, seconds, counts[i], count, len(new), clipped))
        return Batch(answers, prefill, decoding)

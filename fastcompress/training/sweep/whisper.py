"""Whisper in a sweep: encoder states from disk replace the encoder."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

from fastcompress.audio import AudioError
from fastcompress.integrations.transformers.whisper import audio_frames
from fastcompress.training.evaluation import end_tokens
from fastcompress.training.manifest import Utterance
from fastcompress.training.settings import SettingsError
from fastcompress.training.sweep.models import Answer, Batch, Clock, Decoding, SweepModel, Variant, applied, written

#: Seconds of the window.
WINDOW = 30

_PROMPT = 4  # ids before the text: start, language, task, no timestamps

#: Function that changes the output of the compressed encoder. It is called with the frames ``[B, T, D]``, the number of
#: frames of the audio ``[B]``, and the output, which has ``last_hidden_state`` and ``token_lengths``.
Control = Callable[[Tensor, Tensor, Any], Any]


class Whisper(SweepModel):
    """A Whisper model.

    In place of log-mel features, the model gets the indices of the utterances, and its encoder returns their states.

    Args:
        model: A ``WhisperForConditionalGeneration``.
        processor: Its processor.
        decoding: Settings of decoding.

    Attributes:
        controls: Controls of an experiment, by name.

    Raises:
        SettingsError: The model is English only and the settings ask for another language or for translation, or
            texts can be longer than the model supports.
    """

    def __init__(self, model: Any, processor: Any, decoding: Decoding) -> None:
        self.model: Any = model
        self.kind: str = model.config.model_type
        self.processor: Any = processor
        self.sampling_rate: int = processor.feature_extractor.sampling_rate
        self.switches: dict[str, Any] = {"proportional_attention": False}
        self.decoding: Decoding = decoding
        self.controls: dict[str, Control] = {}
        self._is_multilingual = bool(getattr(model.generation_config, "is_multilingual", False))
        if not self._is_multilingual and decoding.task == "translate":
            raise SettingsError("this Whisper model is English only, and cannot translate")
        if not self._is_multilingual and decoding.language not in (None, "en", "english"):
            raise SettingsError(f"`language` must be en for this English-only Whisper model, got {decoding.language!r}")
        longest = model.config.max_target_positions - _PROMPT
        if decoding.max_new_tokens > longest:
            raise SettingsError(f"`new_tokens` must be at most {longest} for this model, got {decoding.max_new_tokens}")
        self._states: Sequence[dict[str, Tensor]] = ()
        self._hidden = torch.empty(0)
        self._lengths = torch.empty(0)

    @property
    def _frames(self) -> int:
        return int(self.model.config.max_source_positions)

    @torch.inference_mode()
    def encode(self, samples: np.ndarray) -> dict[str, Tensor]:
        window = 2 * self._frames * self.processor.feature_extractor.hop_length
        if len(samples) > window:
            raise AudioError(
                f"has {len(samples) / self.sampling_rate:.1f} s of audio, more than Whisper's window of "
                f"{window / self.sampling_rate:g} s; cut it by offset and duration"
            )
        found = self.processor.feature_extractor(samples, sampling_rate=self.sampling_rate, return_tensors="pt")
        features = found.input_features.to(self.model.device, self.model.dtype)
        states = self.model.model.encoder(features).last_hidden_state[0]
        return {"states": states, "frames": audio_frames(features)}

    @contextlib.contextmanager
    def compressed(self, variant: Variant) -> Iterator[None]:
        if variant.positions is not None:
            raise NotImplementedError("whisper has no positions of audio in its decoder")
        encoder = self.model.model.encoder
        stock = encoder.__dict__.get("forward")
        encoder.forward = self._stock_states
        parts = {"proportional_attention": variant.proportional_attention, "silence": variant.silence}
        try:
            with applied(self.model, variant.rule, variant.reduce, **parts):
                control = self.controls[variant.control] if variant.control else None
                hook = encoder.register_forward_hook(lambda module, inputs, out: self._record(control, out))
                try:
                    yield
                finally:
                    hook.remove()
        finally:
            del encoder.forward
            if stock is not None:
                encoder.forward = stock

    def _stock_states(self, input_features: Tensor | None = None, **kwargs: Any) -> BaseModelOutput:
        """Replace the stock encoder: return the states of the utterances whose indices are in mel bin 1."""
        assert input_features is not None
        chosen = [self._states[i]["states"] for i in input_features[:, 1, 0].long().tolist()]
        self._hidden = torch.stack(chosen).to(self.model.device, self.model.dtype)
        return BaseModelOutput(last_hidden_state=cast(torch.FloatTensor, self._hidden))

    def _record(self, control: Control | None, out: Any) -> Any:
        """Apply a control to the output of the compressed encoder, and keep the lengths of the tokens."""
        self._lengths = out.token_lengths
        if control is not None:
            frames = torch.stack([s["frames"].reshape(()) for s in self._states]).to(self._hidden.device)
            out = control(self._hidden, frames, out)
            if not out.token_lengths.is_floating_point():  # else they are weights
                self._lengths = out.token_lengths
        return out

    def features(self, states: Sequence[dict[str, Tensor]]) -> Tensor:
        """Return log-mel features ``[B, mels, columns]`` for which the encoder returns the given states.

        They are valid within the context of ``compressed``, until the next call.
        """
        self._states = states
        features = torch.zeros(len(states), self.model.config.num_mel_bins, 2 * self._frames)
        for i, (row, found) in enumerate(zip(features, states, strict=True)):
            columns = 2 * int(found["frames"])
            row[0, :columns] = torch.arange(1, columns + 1)  # columns that differ from the last one are audio
            row[1] = i
        return features.to(self.model.device)

    @torch.inference_mode()
    def answer(self, utterances: Sequence[Utterance], states: Sequence[dict[str, Tensor]]) -> Batch:
        model, frames = self.model, [int(s["frames"]) for s in states]
        features = self.features(states)
        limits = {"max_new_tokens": self.decoding.max_new_tokens, "do_sample": False, "num_beams": 1}
        clock = Clock(model.device)
        model.generate(features, stopping_criteria=[clock], **limits, **self._task(utterances))
        prefill, decoding = clock.times()
        answers = []
        ends = end_tokens(model, self.processor.tokenizer)
        for (ids, clipped), lengths, count in zip(written(clock.new, ends), self._lengths, frames, strict=True):
            text = self.processor.tokenizer.decode(ids, skip_special_tokens=True).strip()
            answers.append(self._answer(text, len(ids), clipped, lengths[lengths > 0], count))
        return Batch(answers, prefill, decoding)

    def _answer(self, text: str, new: int, clipped: bool, lengths: Tensor, count: int) -> Answer:
        """Count the tokens of an utterance from the frames of each token ``[S]``."""
        keep = self.model.fastcompress_settings.silence == "keep"
        starts = lengths.cumsum(0) - lengths
        of_audio = int((starts < count).sum())
        tokens = of_audio if keep else len(lengths)
        pooled = count if keep else int(lengths.sum())
        return Answer(
            text,
            keys=len(lengths),
            tokens=tokens,
            frames=pooled,
            seconds=pooled * WINDOW / self._frames,
            audio_tokens=of_audio,
            audio_frames=count,
            new_tokens=new,
            clipped=clipped,
        )

    def _task(self, utterances: Sequence[Utterance]) -> dict[str, Any]:
        if not self._is_multilingual:
            return {}
        languages = [u.more.get("language", self.decoding.language) for u in utterances]
        found: dict[str, Any] = {"task": self.decoding.task}
        if all(language is not None for language in languages):
            return found | {"language": languages}
        if any(language is not None for language in languages):
            raise SettingsError("`language` is missing: some lines of the manifest have a language and others do not")
        return found

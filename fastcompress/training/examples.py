"""From utterances to what the model takes: features, token ids, labels.

A text-only example, without audio, is one too.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastcompress.audio import AudioError
from fastcompress.checks import IGNORED_LABEL
from fastcompress.training.manifest import ManifestError, Utterance, load_utterance


@dataclass(frozen=True)
class Augmentation:
    """SpecAugment (Park et al., 2019) of log-mel features, other speakers and tempos, and a change of level.

    Attributes:
        warp: vocal tract length perturbation (Jaitly and Hinton, 2013): frequencies are scaled by 1 - ``warp`` to
            1 + ``warp``, as if by a shorter or longer vocal tract; 0: not.
        tempo: frames are stretched or squeezed by as much at most, the pitch staying; 0: not.
        time_masks, time_width: how many stretches of frames are masked, and the most frames of one (at most an eighth
            of the utterance).
        frequency_masks, frequency_width: likewise of mel bins.
        level: the most that is added to, or taken from, all of the features.
    """

    time_masks: int = 2
    time_width: int = 10
    frequency_masks: int = 2
    frequency_width: int = 12
    level: float = 0.15
    warp: float = 0.2
    tempo: float = 0.15

    def __call__(self, features: Tensor, g: random.Random) -> Tensor:
        """``[bins, frames]`` -> the same, but for frames if there is a ``tempo``; what is masked gets the mean."""
        features = features.clone()
        if self.warp:
            features = _warped(features, 1 + g.uniform(-self.warp, self.warp))
        if self.tempo:
            frames = max(2, round(features.shape[1] * (1 + g.uniform(-self.tempo, self.tempo))))
            features = torch.nn.functional.interpolate(features[None], frames, mode="linear", align_corners=True)[0]
        bins, frames = features.shape
        mean = features.mean()
        for _ in range(self.time_masks):
            width = g.randint(0, min(self.time_width, frames // 8))
            begin = g.randint(0, frames - width)
            features[:, begin : begin + width] = mean
        for _ in range(self.frequency_masks):
            width = g.randint(0, min(self.frequency_width, bins // 4))
            begin = g.randint(0, bins - width)
            features[begin : begin + width] = mean
        return features + g.uniform(-self.level, self.level)


def _warped(features: Tensor, scale: float) -> Tensor:
    """What mel bins ``[bins, frames]`` would hold if every frequency were divided by ``scale``.

    Up to 4.8 kHz (of 8 kHz) frequencies are scaled, and above that so that the highest stays what it is.
    """
    bins = len(features)
    highest, knee = 8000.0, 4800.0
    mel = torch.linspace(0, 2595 * math.log10(1 + highest / 700), bins + 2)[1:-1]
    hertz = 700 * (10 ** (mel / 2595) - 1)
    bend = knee * min(1.0, 1 / scale)
    slope = (highest - bend * scale) / (highest - bend)
    source = torch.where(hertz <= bend, hertz * scale, highest - slope * (highest - hertz))
    place = 2595 * torch.log10(1 + source / 700) / (2595 * math.log10(1 + highest / 700)) * (bins + 1) - 1
    place = place.clamp(0, bins - 1)
    below = place.floor().long().clamp(max=bins - 2)
    share = (place - below)[:, None]
    return torch.lerp(features[below], features[below + 1], share)


class Examples:
    """Utterances with their features, which are kept in memory, in half precision, if ``cache``.

    Args:
        utterances: of a manifest.
        processor: a :class:`FastCompressProcessor`.
        cache: whether features are kept.
        phones: the units of the auxiliary CTC loss; ``None``: no such loss.

    Raises:
        ManifestError: an utterance has a phone that is none of them.
    """

    def __init__(
        self, utterances: Sequence[Utterance], processor: Any, cache: bool = False, phones: Sequence[str] | None = None
    ) -> None:
        self.utterances: list[Utterance] = list(utterances)
        self.processor = processor
        self.phones: dict[str, int] | None = None
        if phones is not None:
            self.phones = {phone: i for i, phone in enumerate(phones, start=1)}
            for utterance in self.utterances:
                unknown = [phone for phone in (utterance.phones or "").split() if phone not in self.phones]
                if unknown:
                    raise ManifestError(f"{utterance.name}: phone {unknown[0]!r} is none of those of the model")
        self.skipped: dict[int, str] = {}
        self._features: dict[int, Tensor] | None = {} if cache else None
        self._checked: dict[int, Tensor] = {}  # without a cache: of is_usable, until they are asked for

    def __len__(self) -> int:
        return len(self.utterances)

    def features(self, index: int) -> Tensor | None:
        """What the feature extractor makes of an utterance: ``[bins, frames]`` or ``[samples]``; ``None``: no audio.

        Raises:
            AudioError: the audio cannot be used.
        """
        utterance = self.utterances[index]
        if not utterance.has_audio:
            return None
        if self._features is not None and index in self._features:
            return self._features[index].float()
        if index in self._checked:
            return self._checked.pop(index)
        rate = self.processor.feature_extractor.sampling_rate
        samples = load_utterance(utterance, rate)
        if len(samples) < self.processor.shortest:
            raise AudioError(
                f"{utterance.name}: has {len(samples) / rate:.3f} s of audio, less than one frame of "
                f"{self.processor.shortest / rate:g} s"
            )
        features = self.processor.features(samples, rate)
        if self._features is not None:
            features = self._features[index] = features.half()
        return features.float()

    def is_usable(self, index: int) -> bool:
        """Whether the audio of an utterance is not damaged; if it is, ``skipped`` says why from then on."""
        if index not in self.skipped and index not in self._checked:
            try:
                features = self.features(index)
                if self._features is None and features is not None:
                    self._checked[index] = features
            except AudioError as error:
                self.skipped[index] = str(error)
        return index not in self.skipped

    def usable(self, index: int) -> int:
        """``index``, or, if its audio turns out to be damaged, the next whose audio is not.

        Raises:
            AudioError: none is left.
        """
        for step in range(len(self)):
            if self.is_usable(candidate := (index + step) % len(self)):
                return candidate
        raise AudioError(f"none of the {len(self)} utterances has audio that can be used: {self.skipped[index]}")

    def prompt_ids(self, index: int) -> list[int]:
        """Ids up to where the model's own words begin."""
        utterance = self.utterances[index]
        return self.processor.prompt_ids(utterance.prompt or "", utterance.has_audio)

    def target_ids(self, index: int) -> list[int]:
        """Ids of what the model is to write, the end included."""
        tokenizer = self.processor.tokenizer
        return [*tokenizer(self.utterances[index].target, add_special_tokens=False).input_ids, tokenizer.eos_token_id]

    def batch(
        self, indices: Sequence[int], augmentation: Augmentation | None = None, seed: str = "", targets: bool = True
    ) -> dict[str, Tensor]:
        """Arguments of the model: right-padded for training, without labels if not ``targets``.

        ``seed`` and the place in the batch decide what is augmented.
        """
        rows, labels, features, ctc_labels = [], [], [], []
        for place, index in enumerate(self.usable(i) for i in indices):
            prompt, target = self.prompt_ids(index), self.target_ids(index) if targets else []
            rows.append(torch.tensor(prompt + target))
            labels.append(torch.tensor([IGNORED_LABEL] * len(prompt) + target))
            found = self.features(index)
            if found is None:
                continue
            if augmentation is not None and found.dim() == 2:  # not samples
                found = augmentation(found, random.Random(f"{seed}, {place}"))
            features.append(found)
            if self.phones is not None:
                ctc_labels.append(self._phone_ids(index))
        tokenizer = self.processor.tokenizer
        batch = {
            "input_ids": _pad(rows, tokenizer.pad_token_id),
            "attention_mask": _pad([torch.ones_like(row) for row in rows], 0),
        }
        if targets:
            batch["labels"] = _pad(labels, IGNORED_LABEL)
        if features:
            batch |= self._pad_audio(features)
            if self.phones is not None and targets:
                batch["ctc_labels"] = _pad(ctc_labels, IGNORED_LABEL)
        return batch

    def _pad_audio(self, features: list[Tensor]) -> dict[str, Tensor]:
        return self.processor.pad_features(features)

    def _phone_ids(self, index: int) -> Tensor:
        assert self.phones is not None
        phones = (self.utterances[index].phones or "").split()
        return torch.tensor([self.phones[phone] for phone in phones], dtype=torch.int64)


class EncodedExamples(Examples):
    """Examples whose audio went through the encoder once and for all: for an encoder that is frozen.

    Args:
        examples: which are encoded.
        model: a ``FastCompressForConditionalGeneration``.
        batch_size: utterances that are encoded together.
    """

    def __init__(self, examples: Examples, model: Any, batch_size: int = 16) -> None:
        super().__init__(examples.utterances, examples.processor)
        self.skipped: dict[int, str] = examples.skipped
        self._frames: dict[int, Tensor] = {}
        order = sorted(range(len(self)), key=lambda i: self.utterances[i].duration or 0.0)
        model.eval()
        for begin in range(0, len(order), batch_size):
            batch = [i for i in order[begin : begin + batch_size] if self.utterances[i].has_audio]
            indices = [i for i in batch if examples.is_usable(i)]
            if indices:
                padded = self.processor.pad_features([examples.features(i) for i in indices])
                with torch.no_grad():
                    frames, lengths = model.encode(*(t.to(model.device) for t in padded.values()))
                for index, rows, length in zip(indices, frames.cpu(), lengths.tolist(), strict=True):
                    self._frames[index] = rows[:length].clone()

    def features(self, index: int) -> Tensor | None:
        """Frames of the encoder, ``[F, D]``."""
        return self._frames[index] if self.utterances[index].has_audio else None

    def _pad_audio(self, features: list[Tensor]) -> dict[str, Tensor]:
        return {
            "frames": torch.nn.utils.rnn.pad_sequence(features, batch_first=True),
            "frame_lengths": torch.tensor([len(f) for f in features]),
        }


def phones_of(utterances: Sequence[Utterance]) -> list[str]:
    """The phones of a manifest, in order."""
    return sorted({phone for utterance in utterances for phone in (utterance.phones or "").split()})


def _pad(rows: Sequence[Tensor], value: int) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value)

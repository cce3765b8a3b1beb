"""Examples: features, token ids and labels of utterances. An example may have only text."""

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
from fastcompress.training.manifest import ManifestError, Utterance
from fastcompress.training.usable import Skipped, load_utterance


@dataclass(frozen=True)
class Augmentation:
    """SpecAugment (Park et al., 2019) of log-mel features, with changes of speaker, tempo and level.

    Attributes:
        time_masks: Number of masked stretches of frames.
        time_width: Longest masked stretch, in frames; at most an eighth of the utterance.
        frequency_masks: Number of masked stretches of mel bins.
        frequency_width: Longest masked stretch, in bins; at most a quarter of the bins.
        level: Largest value that is added to, or subtracted from, all features.
        warp: Vocal tract length perturbation (Jaitly and Hinton, 2013): frequencies are scaled by 1 - ``warp`` to
            1 + ``warp``. 0: none.
        tempo: Largest share by which frames are stretched or squeezed, at the same pitch. 0: none.
    """

    time_masks: int = 2
    time_width: int = 10
    frequency_masks: int = 2
    frequency_width: int = 12
    level: float = 0.15
    warp: float = 0.2
    tempo: float = 0.15

    def __call__(self, features: Tensor, g: random.Random) -> Tensor:
        """Return augmented features ``[bins, frames]``; ``tempo`` changes the frames. Masked values become the mean."""
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
    """Return mel bins ``[bins, frames]`` with every frequency divided by ``scale``.

    Frequencies up to 4.8 kHz are scaled. Those above, up to 8 kHz, are scaled such that the highest stays the same.
    """
    bins = len(features)
    highest, knee = 8000.0, 4800.0
    mel = torch.linspace(0, 2595 * math.log10(1 + highest / 700), bins + 2, dtype=torch.float32, device="cpu")[1:-1]
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
    """Utterances with their features.

    Args:
        utterances: Utterances of a manifest.
        processor: A ``FastCompressProcessor``.
        cache: Whether to keep features in memory, in half precision.
        phones: Units of the auxiliary CTC loss. ``None``: no such loss.
        report: Function called with each utterance whose audio is damaged.

    Attributes:
        skipped: Reasons why utterances could not be decoded, by their indices.
        seconds: Seconds of audio that were decoded, by the indices of the utterances.

    Raises:
        ManifestError: An utterance has a phone that is not in ``phones``.
    """

    def __init__(
        self,
        utterances: Sequence[Utterance],
        processor: Any,
        cache: bool = False,
        phones: Sequence[str] | None = None,
        report: Skipped | None = None,
    ) -> None:
        self.utterances: list[Utterance] = list(utterances)
        self.processor = processor
        self.report = report
        self.phones: dict[str, int] | None = None
        if phones is not None:
            self.phones = {phone: i for i, phone in enumerate(phones, start=1)}
            for utterance in self.utterances:
                unknown = [phone for phone in (utterance.phones or "").split() if phone not in self.phones]
                if unknown:
                    raise ManifestError(f"{utterance.name}: the model has no phone {unknown[0]!r}")
        self.skipped: dict[int, str] = {}
        self.seconds: dict[int, float] = {}
        self._features: dict[int, Tensor] | None = {} if cache else None
        self._checked: dict[int, Tensor] = {}  # features from is_usable, without a cache

    def __len__(self) -> int:
        return len(self.utterances)

    def features(self, index: int) -> Tensor | None:
        """Return the features of an utterance, ``[bins, frames]`` or ``[samples]``; ``None`` without audio.

        Raises:
            AudioError: The audio cannot be used.
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
        self.seconds[index] = len(samples) / rate
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
        """Return False if the audio of an utterance is damaged; ``skipped`` then has the reason."""
        if index not in self.skipped and index not in self._checked:
            try:
                features = self.features(index)
                if self._features is None and features is not None:
                    self._checked[index] = features
            except AudioError as error:
                self.skipped[index] = str(error)
                if self.report is not None:
                    self.report.add(self.utterances[index], error)
        return index not in self.skipped

    def usable(self, index: int) -> int:
        """Return ``index``, or the next one with usable audio if that of ``index`` is damaged.

        Raises:
            AudioError: No utterance has usable audio.
        """
        for step in range(len(self)):
            if self.is_usable(candidate := (index + step) % len(self)):
                return candidate
        raise AudioError(f"none of the {len(self)} utterances has usable audio: {self.skipped[index]}")

    def prompt_ids(self, index: int) -> list[int]:
        """Return the ids up to where the answer starts."""
        utterance = self.utterances[index]
        return self.processor.prompt_ids(utterance.prompt or "", utterance.has_audio)

    def target_ids(self, index: int) -> list[int]:
        """Return the ids of the answer, with the end token."""
        tokenizer = self.processor.tokenizer
        return [*tokenizer(self.utterances[index].target, add_special_tokens=False).input_ids, tokenizer.eos_token_id]

    def batch(
        self, indices: Sequence[int], augmentation: Augmentation | None = None, seed: str = "", targets: bool = True
    ) -> dict[str, Tensor]:
        """Return the arguments of the model for a batch, padded on the right.

        Args:
            indices: Examples.
            augmentation: Augmentation of their features. ``None``: none.
            seed: Seed of the augmentation, together with the place in the batch.
            targets: Whether to add answers and labels, for training.
        """
        rows, labels, features, ctc_labels = [], [], [], []
        for place, index in enumerate(self.usable(i) for i in indices):
            prompt, target = self.prompt_ids(index), self.target_ids(index) if targets else []
            rows.append(torch.tensor(prompt + target, device="cpu"))
            labels.append(torch.tensor([IGNORED_LABEL] * len(prompt) + target, device="cpu"))
            found = self.features(index)
            if found is None:
                continue
            if augmentation is not None and found.dim() == 2:  # features, not samples
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
    """Examples whose audio is encoded once, for a frozen encoder.

    Args:
        examples: Examples to encode.
        model: A ``FastCompressForConditionalGeneration``.
        batch_size: Utterances per batch of the encoder.
    """

    def __init__(self, examples: Examples, model: Any, batch_size: int = 16) -> None:
        super().__init__(examples.utterances, examples.processor)
        self.skipped: dict[int, str] = examples.skipped
        self.seconds: dict[int, float] = examples.seconds
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
        """Return the frames of the encoder, ``[F, D]``."""
        return self._frames[index] if self.utterances[index].has_audio else None

    def _pad_audio(self, features: list[Tensor]) -> dict[str, Tensor]:
        return {
            "frames": torch.nn.utils.rnn.pad_sequence(features, batch_first=True),
            "frame_lengths": torch.tensor([len(f) for f in features], device="cpu"),
        }


def phones_of(utterances: Sequence[Utterance]) -> list[str]:
    """Return the phones of a manifest, sorted."""
    return sorted({phone for utterance in utterances for phone in (utterance.phones or "").split()})


def _pad(rows: Sequence[Tensor], value: int) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value)

"""Settings of a training run, from flags and YAML."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml

from fastcompress.files import one_line
from fastcompress.lalm.configuration import BOUNDARIES
from fastcompress.lalm.loading import RunError
from fastcompress.rules import Rule
from fastcompress.training.trainer import TrainingArguments


@dataclass(frozen=True)
class RunSettings:
    """What is trained, on what, and how.

    Attributes:
        train, dev: manifests.
        model: folder of a model to go on from; or
        audio_model, text_model: folders or names of a pretrained encoder and decoder; or none of them: a small model
            with random weights, for the data.
        rule: of the compression; ``"none"``: every frame, in place of boundaries that were learned, too; ``None``: the
            model's.
        reduce, keys: of the compression, as in :class:`FastCompressConfig`; ``None``: the model's.
        boundary_ratio: frames a token that learned boundaries aim at, in place of a rule; ``None``: none are learned.
        boundary_kind: how they are, as in :class:`FastCompressConfig`.
        lora_rank: of LoRA on the decoder, whose own weights, and the encoder's, are then frozen; 0: no LoRA.
        lora_alpha, lora_dropout: of LoRA.
        train_encoder: whether the encoder is trained; ``None``: only without LoRA and pretrained parts.
        merge: write ``final/`` with LoRA merged into the decoder.
        max_seconds: longer audio is skipped.
        cache: keep features in memory.
        encode_once: run the encoder, which must be frozen, once an utterance and keep its frames; without augmentation.
        training: how.
    """

    train: str
    dev: str | None = None
    model: str | None = None
    audio_model: str | None = None
    text_model: str | None = None
    rule: str | None = None
    reduce: str | None = None
    keys: str | None = None
    boundary_ratio: float | None = None
    boundary_kind: str = "h-net"
    lora_rank: int = 0
    lora_alpha: float = 32.0
    lora_dropout: float = 0.0
    train_encoder: bool | None = None
    merge: bool = False
    max_seconds: float = 60.0
    cache: bool = True
    encode_once: bool = False
    training: TrainingArguments = field(default_factory=TrainingArguments)

    def __post_init__(self) -> None:
        if (self.audio_model is None) != (self.text_model is None):
            raise RunError("audio_model and text_model go together")
        if self.model is not None and self.audio_model is not None:
            raise RunError("model excludes audio_model and text_model: it has both")
        if self.encode_once and self.training.augment:
            raise RunError("encode_once excludes augment: what is encoded once is the same each time")
        if self.lora_rank < 0:
            raise RunError(f"lora_rank must not be negative, got {self.lora_rank}")
        if self.boundary_kind not in BOUNDARIES:
            raise RunError(f"boundary_kind must be one of {', '.join(BOUNDARIES)}, got {self.boundary_kind!r}")
        if self.boundary_ratio is not None:
            if not self.boundary_ratio > 1:
                raise RunError(f"boundary_ratio must be more than 1, got {self.boundary_ratio}")
            if self.rule not in (None, "none"):
                raise RunError(f"boundary_ratio excludes a rule, got {self.boundary_ratio} and {self.rule!r}")
        if self.rule not in (None, "none"):
            try:
                Rule.from_string(self.rule)
            except ValueError as error:
                raise RunError(f"rule: {error}") from error

    @classmethod
    def from_flat(cls, values: dict[str, Any]) -> RunSettings:
        """From one level of names, those of training among the others, as a YAML file or flags have them."""
        own = {f.name for f in dataclasses.fields(cls)} - {"training"}
        of_training = {f.name for f in dataclasses.fields(TrainingArguments)}
        unknown = sorted(map(str, values.keys() - own - of_training))
        if unknown:
            raise RunError(f"unknown setting {unknown[0]!r}; known are {', '.join(sorted(own | of_training))}")
        if not values.get("train"):
            raise RunError("train is missing: the manifest to train on")
        training = {name: values[name] for name in values.keys() & of_training}
        if isinstance(training.get("betas"), list):
            training["betas"] = tuple(training["betas"])
        _check_types(cls, {name: values[name] for name in values.keys() & own})
        _check_types(TrainingArguments, training)
        try:
            return cls(**{name: values[name] for name in values.keys() & own}, training=TrainingArguments(**training))
        except (TypeError, ValueError) as error:
            raise RunError(str(error)) from error

    def to_flat(self) -> dict[str, Any]:
        """The reverse."""
        values = dataclasses.asdict(self)
        training = values.pop("training")
        return values | training | {"betas": list(training["betas"])}


def _check_types(cls: type, values: dict[str, Any]) -> None:
    """Checks values against the annotations of a dataclass: what a YAML file holds may be anything."""
    hints = get_type_hints(cls)
    for name, value in values.items():
        hint = hints[name]
        if get_origin(hint) is tuple:
            fits = isinstance(value, tuple) and [_fits(v, kind) for v, kind in zip(value, get_args(hint), strict=False)]
            if not fits or not all(fits) or len(value) != len(get_args(hint)):
                raise RunError(f"{name} must be {len(get_args(hint))} numbers, got {value!r}")
        elif not any(_fits(value, kind) for kind in get_args(hint) or (hint,)):
            kinds = " or ".join(_KINDS[kind] for kind in get_args(hint) or (hint,))
            raise RunError(f"{name} must be {kinds}, got {value!r}")


_KINDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false", type(None): "null"}


def _fits(value: Any, kind: type) -> bool:
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def read_settings(path: Path) -> dict[str, Any]:
    """The settings in a YAML file, one level of names.

    Raises:
        RunError: it cannot be read or is none.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    # ValueError: no UTF-8, or what looks like a date and is none. RecursionError: nested too deeply.
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise RunError(f"{path}: {one_line(error)}") from error
    if not isinstance(values, dict):
        raise RunError(f"{path}: must hold names and values, got {type(values).__name__}")
    return values

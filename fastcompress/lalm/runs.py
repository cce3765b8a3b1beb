"""A training run: a folder that says all that is needed to repeat it, and holds what came of it.

``run.yaml`` (settings), ``environment.json`` (versions, machine, hashes of the manifests), ``skipped.txt``,
``log.csv``, ``checkpoints/`` and ``final/``, which :func:`load_model` loads.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import torch
import yaml

from fastcompress.lalm.checkpoints import WRITE_ERRORS, clean, one_line, write_file, write_folder
from fastcompress.lalm.configuration import BOUNDARIES, FastCompressConfig, warn_of_missing_compressor
from fastcompress.lalm.dtypes import float_trained, part_dtypes
from fastcompress.lalm.examples import EncodedExamples, Examples
from fastcompress.lalm.lora import add_lora, load_lora, unwrap
from fastcompress.lalm.manifest import Utterance, check_audio, format_skipped, read_manifest
from fastcompress.lalm.modeling import FastCompressForConditionalGeneration
from fastcompress.lalm.processing import FastCompressProcessor
from fastcompress.lalm.training import Training, TrainingArguments
from fastcompress.nn import LearnedBoundary
from fastcompress.rules import Rule

_BASE = "base.json"
_PACKAGES = ("torch", "transformers", "peft", "accelerate", "tokenizers", "numpy", "soundfile", "soxr")


class RunError(ValueError):
    """A run that cannot start or go on as asked; the message is one line."""


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


def build_model(
    settings: RunSettings, utterances: list[Utterance]
) -> tuple[Any, FastCompressProcessor, dict[str, Any]]:
    """The model to train, its processor, and what LoRA will be put on again (:func:`load_model`)."""
    from fastcompress.lalm.recipes import build_small

    base: dict[str, Any]
    if settings.model is not None:
        model, processor = load_model(settings.model)
        if hasattr(model, "merge_and_unload"):
            model = model.merge_and_unload()
        base = {"model": os.path.abspath(settings.model)}
    elif settings.audio_model is not None and settings.text_model is not None:
        model, processor = _from_parts(settings.audio_model, settings.text_model)
        base = {"audio_model": _absolute(settings.audio_model), "text_model": _absolute(settings.text_model)}
    else:
        model, processor = build_small(utterances, seed=settings.training.seed)
        base = {}
    set_compression(model, settings.rule, settings.reduce, settings.keys)
    if settings.boundary_ratio is not None:
        torch.manual_seed(settings.training.seed)
        model.learn_boundaries(settings.boundary_ratio, settings.boundary_kind)
    encoder = settings.train_encoder
    if encoder is None:
        encoder = model.config.train_encoder and not settings.lora_rank
    model.train_encoder(encoder)
    if settings.lora_rank:
        if not base:
            raise RunError("LoRA needs a trained model: give model, or audio_model and text_model")
        torch.manual_seed(settings.training.seed)  # of LoRA's own weights
        model = add_lora(model, settings.lora_rank, settings.lora_alpha, settings.lora_dropout)
    else:
        float_trained(model)
    return model, processor, base


def _from_parts(
    audio_model: str, text_model: str
) -> tuple[FastCompressForConditionalGeneration, FastCompressProcessor]:
    from transformers import AutoFeatureExtractor, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(text_model)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    processor = FastCompressProcessor(AutoFeatureExtractor.from_pretrained(audio_model), tokenizer)
    torch.manual_seed(0)  # of the projector: LoRA that was trained must find it again before its own is loaded
    model = FastCompressForConditionalGeneration.from_parts(
        audio_model, text_model, audio_token_id=processor.audio_token_id
    )
    return model, processor


def set_compression(model: Any, rule: str | None, reduce: str | None = None, keys: str | None = None) -> None:
    """Changes what is given of the compression of a model, with LoRA or without; the rule ``"none"`` keeps every frame.

    Raises:
        RunError: a value that is none.
    """
    config = unwrap(model).config
    try:
        checked = FastCompressConfig(
            reduce=reduce or config.reduce, keys=keys or config.keys, ctc_tokens=config.ctc_tokens
        )
        if rule is not None:
            unwrap(model).rule = None if rule == "none" else rule
    except ValueError as error:
        raise RunError(str(error)) from error
    config.reduce, config.keys = checked.reduce, checked.keys
    for module in model.modules():  # with LoRA there is a copy, which is the one that runs
        if isinstance(module, LearnedBoundary):
            module.reduce = config.reduce


def load_model(
    path: str | Path, rule: str | None = None, device: torch.device | str = "cpu"
) -> tuple[Any, FastCompressProcessor]:
    """A model that a run, or ``save_pretrained``, has left, and its processor.

    Args:
        path: of the folder: of a model, of LoRA, or of a run, whose ``final/`` is meant.
        rule: in place of the model's; ``"none"``: every frame.
        device: where to. On the CPU fp16 becomes fp32, which is faster there.

    Raises:
        RunError: the folder holds no such model.
    """
    path = Path(path)
    if (path / "final").is_dir():
        path = path / "final"
    if not (path / "config.json").is_file():
        raise RunError(f"{path}: no model here (no config.json)")
    try:
        processor = FastCompressProcessor.from_pretrained(path)
        if (path / "adapter_config.json").is_file():
            model = _load_adapter(path)
        else:
            config = FastCompressConfig.from_pretrained(path)
            model = FastCompressForConditionalGeneration.from_pretrained(path, config=config)
    except RunError:
        raise
    except Exception as error:
        raise RunError(f"{path}: cannot be loaded ({type(error).__name__}: {one_line(error)})") from error
    set_compression(model, rule)
    device = torch.device(device)
    for name, dtype in part_dtypes(unwrap(model)).items():
        if device.type == "cpu" and dtype == torch.float16:
            getattr(unwrap(model), name).float()
    return model.to(device).eval(), processor


def _load_adapter(path: Path) -> Any:
    base = json.loads((path / _BASE).read_text(encoding="utf-8"))
    if "model" in base:
        model, _ = load_model(base["model"])
        if hasattr(model, "merge_and_unload"):
            model = model.merge_and_unload()
    else:
        model, _ = _from_parts(base["audio_model"], base["text_model"])
    config = FastCompressConfig.from_pretrained(path)
    replaced = config.boundary_ratio is not None or config.compressor is not None
    set_compression(model, config.rule or (None if replaced else "none"), config.reduce, config.keys)
    if config.boundary_ratio is not None and model.compressor is None:
        model.learn_boundaries(config.boundary_ratio, config.boundary_kind)
    else:
        warn_of_missing_compressor(config)
    model.train_encoder(config.train_encoder)
    return load_lora(model, path)


class Run:
    """A run in ``folder``: start it, or go on with it, and :meth:`train`.

    Raises:
        RunError: the folder holds a run already and ``resume`` is not said; ``resume`` with other settings, or
            manifests that have changed.
    """

    def __init__(
        self, folder: Path, settings: RunSettings | None, resume: bool = False, say: Callable[[str], None] = print
    ) -> None:
        from accelerate import Accelerator

        record = folder / "run.yaml"
        if resume:
            if not record.is_file():
                raise RunError(f"{folder}: no run to go on with (no run.yaml)")
            known = RunSettings.from_flat(read_settings(record))
            if settings is not None and settings != known:
                old, new = known.to_flat(), settings.to_flat()
                name = next(name for name in new if new[name] != old[name])
                raise RunError(f"{folder}: its {name} is {old[name]!r}, not {new[name]!r}; a run goes on as it began")
            settings = known
            _check_manifests(folder, known)
        elif record.exists():
            raise RunError(f"{folder}: holds a run already; resume it, or choose another folder")
        if settings is None:
            raise RunError("settings are missing")
        self.folder: Path = folder
        self.settings: RunSettings = settings
        self.say: Callable[[str], object] = say
        mixed = "bf16" if settings.training.precision == "bf16" else "no"
        self.accelerator: Any = Accelerator(mixed_precision=mixed)
        if not self.accelerator.is_main_process:
            self.say = lambda text: None
        train, skipped = self._read(settings.train)
        dev, _ = self._read(settings.dev) if settings.dev else ([], [])
        self.processor: FastCompressProcessor
        self.base: dict[str, Any]
        model, self.processor, self.base = self._build(train)
        config = unwrap(model).config
        if settings.encode_once and config.train_encoder:
            raise RunError("encode_once needs a frozen encoder, but the encoder is trained")
        if self.accelerator.is_main_process:
            folder.mkdir(parents=True, exist_ok=True)
            clean(folder)
            if not resume:
                self._record(skipped)
        self.model = model
        units = config.ctc_tokens if config.train_encoder else None
        examples = Examples(train, self.processor, settings.cache, units)
        development = Examples(dev, self.processor, settings.cache) if dev else None
        if settings.encode_once:
            examples = EncodedExamples(examples, unwrap(model))
            development = EncodedExamples(development, unwrap(model)) if development else None
        self.training: Training = Training(model, examples, settings.training, folder, development, self.accelerator)
        if resume:
            self.say(f"going on after step {self.training.resume()} of {settings.training.steps}")

    def _build(self, train: list[Utterance]) -> tuple[Any, FastCompressProcessor, dict[str, Any]]:
        audio, text = self.settings.audio_model, self.settings.text_model
        try:
            return build_model(self.settings, train)
        except (OSError, ValueError, NotImplementedError) as error:  # of transformers, where a part is none
            if audio is None or isinstance(error, RunError):
                raise
            why = f"{type(error).__name__}: {one_line(error)}"
            raise RunError(f"audio_model {audio}, text_model {text}: cannot be loaded ({why})") from error

    def _read(self, path: str) -> tuple[list[Utterance], list[tuple[Utterance, str]]]:
        good, skipped = check_audio(read_manifest(path), max_seconds=self.settings.max_seconds)
        if skipped:
            self.say(f"{path}: {format_skipped(skipped)}")
        if not good:
            raise RunError(f"{path}: no utterance is left that can be used")
        return good, skipped

    def _record(self, skipped: list[tuple[Utterance, str]]) -> None:
        text = yaml.safe_dump(self.settings.to_flat(), sort_keys=False)
        environment = {
            "command": sys.argv,
            "python": platform.python_version(),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "processes": self.accelerator.num_processes,
            "threads": torch.get_num_threads(),
            "device": str(self.accelerator.device),
            "packages": {name: _version(name) for name in ("fastcompress", *_PACKAGES)},
            "sha256": {p: _digest(p) for p in (self.settings.train, self.settings.dev) if p},
        }
        write_file(self.folder / "environment.json", json.dumps(environment, indent=1))
        write_file(self.folder / "skipped.txt", "".join(f"{u.name}: {reason}\n" for u, reason in skipped))
        write_file(self.folder / "run.yaml", text)  # last: with it the run is there

    def train(self, progress: Callable[[int, dict[str, float]], None] | None = None) -> Path:
        """Trains to the end and writes ``final/``; returns its path."""
        self.training.run(progress)
        final = self.folder / "final"
        if self.accelerator.is_main_process:
            try:
                write_folder(final, self._write_final)
            except WRITE_ERRORS as error:
                raise RunError(f"{final}: cannot be written ({one_line(error)}); resume to try again") from error
            damaged = self.training.examples.skipped
            if damaged:
                self.say(f"{len(damaged)} utterances turned out to be damaged: {'; '.join(damaged.values())}")
        self.accelerator.wait_for_everyone()
        return final

    def _write_final(self, folder: Path) -> None:
        model = self.accelerator.unwrap_model(self.model)
        if self.settings.lora_rank and self.settings.merge:
            model = model.merge_and_unload()
        elif self.settings.lora_rank:
            model.get_base_model().config.save_pretrained(folder)
            (folder / _BASE).write_text(json.dumps(self.base), encoding="utf-8")
        model.save_pretrained(folder)
        self.processor.save_pretrained(folder)


def _check_manifests(folder: Path, settings: RunSettings) -> None:
    """Raises if a manifest is not the one that a run began with: its order of examples would be another."""
    try:
        known = json.loads((folder / "environment.json").read_text(encoding="utf-8"))["sha256"]
    except (OSError, ValueError, KeyError, TypeError):  # nothing to compare with
        return
    for path in filter(None, (settings.train, settings.dev)):
        if Path(path).is_file() and known.get(path, found := _digest(path)) != found:
            raise RunError(f"{path}: is not what the run began with; a run goes on as it began")


def _absolute(model: str) -> str:
    """A folder as it is called from anywhere; a name as it is."""
    return os.path.abspath(model) if os.path.isdir(model) else model


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _digest(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()

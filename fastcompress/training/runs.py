"""A training run: a folder that says all that is needed to repeat it, and holds what came of it.

``run.yaml`` (settings), ``environment.json`` (versions, machine, hashes of the manifests), ``skipped.txt``,
``log.csv``, ``checkpoints/`` and ``final/``, which :func:`load_model` loads.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml

from fastcompress.decoder.generation import unwrap
from fastcompress.files import WRITE_ERRORS, clean, one_line, write_file, write_folder
from fastcompress.lalm.dtypes import float_trained
from fastcompress.lalm.loading import BASE_FILE, RunError, load_model, load_parts, set_compression
from fastcompress.lalm.lora import add_lora
from fastcompress.lalm.processing import FastCompressProcessor
from fastcompress.training.examples import EncodedExamples, Examples
from fastcompress.training.manifest import Utterance, check_audio, format_skipped, read_manifest
from fastcompress.training.settings import RunSettings, read_settings
from fastcompress.training.trainer import Training

_PACKAGES = ("torch", "transformers", "peft", "accelerate", "tokenizers", "numpy", "av", "soxr")


def build_model(
    settings: RunSettings, utterances: list[Utterance]
) -> tuple[Any, FastCompressProcessor, dict[str, Any]]:
    """The model to train, its processor, and what LoRA will be put on again (:func:`load_model`)."""
    from fastcompress.training.recipes import build_small

    base: dict[str, Any]
    if settings.model is not None:
        model, processor = load_model(settings.model)
        if hasattr(model, "merge_and_unload"):
            model = model.merge_and_unload()
        base = {"model": os.path.abspath(settings.model)}
    elif settings.audio_model is not None and settings.text_model is not None:
        model, processor = load_parts(settings.audio_model, settings.text_model)
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
            (folder / BASE_FILE).write_text(json.dumps(self.base), encoding="utf-8")
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

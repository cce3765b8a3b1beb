"""Training runs of the reference model. A run is a folder with its results and everything that is needed to repeat it.

The folder has ``run.yaml`` (settings), ``environment.json`` (versions, machine, hashes of the manifests),
``skipped.txt``, ``log.csv``, ``checkpoints/`` and ``final/``, which ``load_model`` loads.
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

from fastcompress.decoder.generation import unwrap
from fastcompress.files import WRITE_ERRORS, check_folder, clean, one_line, reason, write_file, write_folder
from fastcompress.lalm.dtypes import float_trained
from fastcompress.lalm.loading import BASE_FILE, RunError, load_model, load_parts, set_compression
from fastcompress.lalm.lora import add_lora
from fastcompress.lalm.processing import FastCompressProcessor
from fastcompress.training.distillation import Teacher
from fastcompress.training.examples import EncodedExamples, Examples
from fastcompress.training.manifest import Utterance
from fastcompress.training.parsing import RECORD, check_record, write_record
from fastcompress.training.rate_schedule import RateSchedule
from fastcompress.training.settings import SettingsError, TrainSettings
from fastcompress.training.trainer import Training
from fastcompress.training.usable import SKIPPED, Skipped, print_line

_PACKAGES = ("torch", "transformers", "peft", "accelerate", "tokenizers", "numpy", "av", "soxr")


def build_model(
    settings: TrainSettings, utterances: list[Utterance]
) -> tuple[Any, FastCompressProcessor, dict[str, Any]]:
    """Make the model to train and its processor.

    Returns:
        The model, the processor, and the names of the models onto which ``load_model`` loads the adapter.

    Raises:
        SettingsError: The settings exclude each other.
    """
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
        model, processor = build_small(utterances, seed=settings.seed)
        base = {}
    set_compression(
        model,
        settings.rules[0] if settings.rules else None,
        settings.reduce,
        settings.keys,
        settings.proportional_attention,
        settings.positions,
    )
    if settings.boundary_ratio is not None:
        torch.manual_seed(settings.seed)
        model.learn_boundaries(settings.boundary_ratio, settings.boundary_kind)
    encoder = settings.train_encoder
    if encoder is None:
        encoder = model.config.train_encoder and not settings.lora_rank
    model.train_encoder(encoder)
    if settings.audio_padding is not None:
        unwrap(model).config.audio_padding = settings.audio_padding
    if settings.lora_rank:
        if not base:
            raise SettingsError("`lora_rank` needs a trained model: set `model`, or `audio_model` and `text_model`")
        torch.manual_seed(settings.seed)  # of LoRA's own weights
        model = add_lora(model, settings.lora_rank, settings.lora_alpha, settings.lora_dropout)
    else:
        float_trained(model)
    return model, processor, base


class Run:
    """A new or resumed run in ``settings.output_dir``.

    Args:
        settings: Settings of the run.
        resume: Whether to continue after the last checkpoint.
        say: Function called with each line to print.

    Raises:
        SettingsError: Settings exclude each other; or ``resume`` with other settings than the run started with.
        RunError: The folder already contains a run, and ``resume`` is not set; or a manifest has changed since.
    """

    def __init__(self, settings: TrainSettings, resume: bool = False, say: Callable[[str], None] = print) -> None:
        from accelerate import Accelerator

        folder = Path(settings.output_dir)
        if resume:
            check_record(settings, folder)
            _check_manifests(folder, settings)
        elif (folder / RECORD).exists():
            raise RunError(f"{folder}: already contains a run; resume it, or choose another folder")
        try:
            check_folder(folder)  # before hours of reading and loading
        except OSError as error:
            raise SettingsError(f"`output_dir` {folder}: {reason(error)}") from error
        self.folder: Path = folder
        self.settings: TrainSettings = settings
        self.say: Callable[[str], object] = say
        self.accelerator: Any = Accelerator(mixed_precision="bf16" if settings.bf16 else "no")
        main = self.accelerator.is_main_process
        if not main:
            self.say = lambda text: None
        self.skipped: Skipped = Skipped(folder / SKIPPED, print_line if main else None)
        train = self.skipped.read(settings.data, settings.max_seconds, training=True)
        dev = self.skipped.read(settings.dev, settings.max_seconds, training=True) if settings.dev else []
        self.processor: FastCompressProcessor
        self.base: dict[str, Any]
        model, self.processor, self.base = self._build(train)
        config = unwrap(model).config
        if settings.encode_once and config.train_encoder:
            raise SettingsError("`encode_once` needs a frozen encoder: set `lora_rank`, or `train_encoder` to false")
        schedule, teacher = self._schedule(model), self._teacher(model)
        if main:
            folder.mkdir(parents=True, exist_ok=True)
            clean(folder)
            self.skipped.write()
            if not resume:
                self._record()
        self.model = model
        units = config.ctc_tokens if config.train_encoder else None
        examples = Examples(train, self.processor, settings.cache, units, self.skipped)
        development = Examples(dev, self.processor, settings.cache, report=self.skipped) if dev else None
        if settings.encode_once:
            examples = EncodedExamples(examples, unwrap(model))
            development = EncodedExamples(development, unwrap(model)) if development else None
        self.training: Training = Training(
            model, examples, settings, folder, development, self.accelerator, schedule, teacher
        )
        if resume:
            self.say(f"resuming after step {self.training.resume()} of {settings.max_steps}")

    def _build(self, train: list[Utterance]) -> tuple[Any, FastCompressProcessor, dict[str, Any]]:
        audio, text = self.settings.audio_model, self.settings.text_model
        try:
            return build_model(self.settings, train)
        except (OSError, ValueError, NotImplementedError) as error:  # from transformers, if a part is not a model
            if audio is None or isinstance(error, (RunError, SettingsError)):
                raise
            why = f"{type(error).__name__}: {one_line(error)}"
            raise SettingsError(f"`audio_model` {audio}, `text_model` {text}: cannot be loaded ({why})") from error

    def _schedule(self, model: Any) -> RateSchedule | None:
        settings = self.settings
        if len(settings.rules) < 2 and not settings.rate_warmup_steps:
            return None
        try:
            return RateSchedule(unwrap(model), settings.rules, settings.rate_warmup_steps, settings.seed)
        except ValueError as error:
            raise SettingsError(f"`rule`: {error}") from error

    def _teacher(self, model: Any) -> Teacher | None:
        if self.settings.teacher is None:
            return None
        teacher = Teacher(
            self.settings.teacher, model, self.processor, self.accelerator.device, self.settings.teacher_weight
        )
        if self.settings.encode_once and not teacher.has_encoder_of(model):
            raise SettingsError(f"`encode_once` excludes `teacher` {self.settings.teacher}, whose encoder is another")
        return teacher

    def _record(self) -> None:
        environment = {
            "command": sys.argv,
            "python": platform.python_version(),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "processes": self.accelerator.num_processes,
            "threads": torch.get_num_threads(),
            "device": str(self.accelerator.device),
            "packages": {name: _version(name) for name in ("fastcompress", *_PACKAGES)},
            "sha256": {p: _digest(p) for p in (self.settings.data, self.settings.dev) if p},
        }
        write_file(self.folder / "environment.json", json.dumps(environment, indent=1))
        write_record(self.settings, self.folder)  # last: a folder with this file is a run

    def train(self, progress: Callable[[int, dict[str, float]], None] | None = None) -> Path:
        """Train to the last step, write ``final/`` and return its path."""
        self.training.run(progress)
        final = self.folder / "final"
        self._gather_skipped()
        if self.accelerator.is_main_process:
            try:
                write_folder(final, self._write_final)
            except WRITE_ERRORS as error:
                raise RunError(f"{final}: cannot be written ({one_line(error)}); resume to try again") from error
            self.skipped.finish()
        self.accelerator.wait_for_everyone()
        return final

    def _gather_skipped(self) -> None:
        """Add to the list of the main process what the others have skipped."""
        from accelerate.utils import gather_object

        if self.accelerator.num_processes > 1:
            self.skipped.merge(gather_object(list(self.skipped.lines)))

    def _write_final(self, folder: Path) -> None:
        model = self.accelerator.unwrap_model(self.model)
        if self.settings.lora_rank and self.settings.merge:
            model = model.merge_and_unload()
        elif self.settings.lora_rank:
            model.get_base_model().config.save_pretrained(folder)
            (folder / BASE_FILE).write_text(json.dumps(self.base), encoding="utf-8")
        model.save_pretrained(folder)
        self.processor.save_pretrained(folder)


def _check_manifests(folder: Path, settings: TrainSettings) -> None:
    """Check that the manifests have not changed since the run started, which would change the order of examples.

    Raises:
        RunError: One has changed.
    """
    try:
        known = json.loads((folder / "environment.json").read_text(encoding="utf-8"))["sha256"]
    except (OSError, ValueError, KeyError, TypeError):  # there is no record to compare with
        return
    for path in filter(None, (settings.data, settings.dev)):
        if Path(path).is_file() and known.get(path, found := _digest(path)) != found:
            raise RunError(f"{path} has changed since this run started; restore it to resume, or start a new run")


def _absolute(model: str) -> str:
    """Return the absolute path of a folder; leave other names as they are."""
    return os.path.abspath(model) if os.path.isdir(model) else model


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _digest(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()

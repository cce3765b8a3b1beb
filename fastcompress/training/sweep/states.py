"""Encoder states of a sweep on disk, one file per utterance.

The path of a file has hashes of the model and of the audio. States are therefore not computed twice, and not used for
another model or other audio.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastcompress.files import UNFINISHED
from fastcompress.training.manifest import Utterance

_VALUES = 64  # number of values of each weight that are hashed, about


def fingerprint(model: Any) -> str:
    """Return a hash of a model's configuration and of a sample of each weight, as hexadecimal digits."""
    found = hashlib.sha256(type(model).__name__.encode())
    for name, weight in model.state_dict().items():
        flat = weight.detach().flatten()
        some = flat[:: max(1, len(flat) // _VALUES)].to("cpu", torch.float64)
        found.update(f"{name} {weight.dtype} {list(weight.shape)}".encode())
        found.update(some.numpy().tobytes())
    config = {name: value for name, value in model.config.to_dict().items() if name != "_name_or_path"}
    found.update(json.dumps(config, sort_keys=True, default=str).encode())
    return found.hexdigest()


def audio_key(utterance: Utterance) -> str:
    """Return a hash of an utterance's audio: of path, size, time of change and excerpt of a file, or of the samples."""
    path = utterance.audio_filepath
    if path is None:
        samples, rate = utterance.samples or (b"", 0)
        content = bytes(samples) if utterance.encoded is None else utterance.encoded
        return hashlib.sha256(repr((rate, utterance.offset, utterance.duration)).encode() + content).hexdigest()
    found = os.stat(path)
    duration = utterance.duration if utterance.offset is not None else None  # without an offset, the whole file is read
    facts = [str(path.absolute()), found.st_size, found.st_mtime_ns, utterance.offset, duration]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


class States:
    """Tensors of utterances in a folder.

    Args:
        folder: The folder, which need not exist.
        model: Fingerprint of the model.
    """

    def __init__(self, folder: Path, model: str) -> None:
        self.folder: Path = folder / model[:16]

    def _path(self, key: str) -> Path:
        return self.folder / f"{key[:32]}.safetensors"

    def facts(self, key: str) -> tuple[float, float] | None:
        """Return the duration of an utterance and the processor time of its states, in seconds; ``None``: no states."""
        try:
            with safe_open(self._path(key), "pt") as file:
                found = file.metadata()
                return float(found["seconds"]), float(found["cpu_seconds"])
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):
            return None

    def save(self, key: str, tensors: dict[str, Tensor], seconds: float, cpu_seconds: float) -> None:
        """Write the states of an utterance. An interrupted write leaves no file."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self._path(key)
        unfinished = path.with_name(f"{UNFINISHED}{path.name}")
        try:
            facts = {"seconds": repr(seconds), "cpu_seconds": repr(cpu_seconds)}
            save_file({name: value.contiguous().cpu() for name, value in tensors.items()}, unfinished, facts)
            os.replace(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)

    def load(self, key: str) -> dict[str, Tensor]:
        """Return the states of an utterance."""
        with safe_open(self._path(key), "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}

"""Training checkpoints that survive being killed at any moment.

A checkpoint is a folder ``step-00000500``. It is written under another name, flushed to the disk, and renamed: whatever
has the name is whole.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

_NAME = re.compile(r"step-(\d{8})")
_UNFINISHED = "unfinished-"
_WEIGHTS, _OPTIMIZER, _STATE = "weights.safetensors", "optimizer.pt", "state.json"


#: What a full disk, or a folder that may not be written to, raises out of the libraries that write.
WRITE_ERRORS = (OSError, RuntimeError, SafetensorError)


class CheckpointError(ValueError):
    """A checkpoint that cannot be written, or does not fit what it is loaded into; the message is one line."""


def write_folder(target: Path, write: Callable[[Path], None]) -> None:
    """Makes ``target`` hold what ``write`` puts into the folder it is given, whole or not at all.

    A folder that is there already is replaced.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f"{_UNFINISHED}{target.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    try:
        write(unfinished)
        for path in [*unfinished.rglob("*"), unfinished]:
            _flush(path)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    if target.exists():  # a folder with files cannot be renamed over
        old = target.with_name(f"{_UNFINISHED}old-{target.name}")
        shutil.rmtree(old, ignore_errors=True)
        os.rename(target, old)
        os.rename(unfinished, target)
        shutil.rmtree(old)
    else:
        os.rename(unfinished, target)
    _flush(target.parent)


def write_file(target: Path, text: str) -> None:
    """Makes ``target`` hold ``text``, whole or not at all."""
    unfinished = target.with_name(f"{_UNFINISHED}{target.name}")
    try:
        unfinished.write_text(text, encoding="utf-8")
        _flush(unfinished)
        os.replace(unfinished, target)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    _flush(target.parent)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save(folder: Path, step: int, weights: dict[str, Tensor], optimizer: torch.optim.Optimizer, keep: int) -> Path:
    """Writes the checkpoint after ``step`` steps, and then deletes all but the last ``keep``.

    Raises:
        CheckpointError: it cannot be written; those before it are whole.
    """
    target = folder / f"step-{step:08d}"

    def write(path: Path) -> None:
        save_file({name: tensor.detach().contiguous() for name, tensor in weights.items()}, path / _WEIGHTS)
        with open(path / _OPTIMIZER, "wb") as file:  # Python's, which says what torch's does not: no space left
            torch.save(optimizer.state_dict(), file)
        (path / _STATE).write_text(json.dumps({"step": step}), encoding="utf-8")

    try:
        write_folder(target, write)
    except WRITE_ERRORS as error:
        whole = found(folder)
        kept = f"the last whole one is {whole[-1]}" if whole else "there is none before it"
        raise CheckpointError(f"{target}: cannot be written ({one_line(error)}); {kept}") from error
    for old in found(folder)[:-keep]:  # under another name first, or a kill would leave it half deleted
        gone = old.with_name(f"{_UNFINISHED}{old.name}")
        os.rename(old, gone)
        shutil.rmtree(gone, ignore_errors=True)
    return target


def one_line(error: BaseException) -> str:
    """What an error says, in one line, or what the system said before it: torch.save covers that with its own."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__context__
    return " ".join(str(cause or error).split())


def found(folder: Path) -> list[Path]:
    """The whole checkpoints in a folder, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name) and path.is_dir())


def clean(folder: Path) -> None:
    """Deletes what a killed run left unfinished, and puts back what it had moved aside to replace."""
    old = f"{_UNFINISHED}old-"
    for path in folder.glob(f"{old}*") if folder.is_dir() else []:
        if not (target := path.with_name(path.name.removeprefix(old))).exists():
            os.rename(path, target)
    for path in folder.glob(f"{_UNFINISHED}*") if folder.is_dir() else []:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def load(
    path: Path, weights: dict[str, Tensor], optimizer: torch.optim.Optimizer, buffers: dict[str, Tensor] | None = None
) -> int:
    """Puts a checkpoint into the weights and the optimizer; returns the steps it was made after.

    Buffers that it lacks stay as they are: at first none were saved.

    Raises:
        CheckpointError: it has other weights than these, or cannot be read.
    """
    try:
        state: dict[str, Any] = json.loads((path / _STATE).read_text(encoding="utf-8"))
        saved = load_file(path / _WEIGHTS)
        optimizer_state = torch.load(path / _OPTIMIZER, map_location="cpu", weights_only=True)
        step = int(state["step"])
    except Exception as error:
        raise CheckpointError(f"{path}: cannot be read ({type(error).__name__}: {error})") from error
    copy_weights(path, saved, weights | {name: b for name, b in (buffers or {}).items() if name in saved})
    try:
        optimizer.load_state_dict(optimizer_state)
    except ValueError as error:
        raise CheckpointError(f"{path}: the optimizer has other parameters ({error})") from error
    return step


def copy_weights(path: Path, saved: dict[str, Tensor], weights: dict[str, Tensor]) -> None:
    """Copies what was saved into the weights, in place.

    Raises:
        CheckpointError: a name or a shape differs.
    """
    missing, more = sorted(weights.keys() - saved.keys()), sorted(saved.keys() - weights.keys())
    if missing or more:
        what = [f"lacks {missing[0]}" if missing else "", f"has {more[0]}, which the model lacks" if more else ""]
        raise CheckpointError(
            f"{path}: {' and '.join(filter(None, what))} ({len(missing)} missing, {len(more)} too many)"
        )
    for name, tensor in weights.items():
        if tensor.shape != saved[name].shape:
            raise CheckpointError(
                f"{path}: {name} has shape {list(saved[name].shape)}, the model's has {list(tensor.shape)}"
            )
    with torch.no_grad():
        for name, tensor in weights.items():
            tensor.copy_(saved[name])

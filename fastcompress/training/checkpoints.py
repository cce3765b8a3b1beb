"""Training checkpoints that survive a kill at any moment.

A checkpoint is a folder such as ``step-00000500``. It is written under another name, flushed to disk and renamed, so a
folder with such a name is whole.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastcompress.files import UNFINISHED, WRITE_ERRORS, one_line, write_folder

_NAME = re.compile(r"step-(\d{8})")
_WEIGHTS, _OPTIMIZER, _STATE = "weights.safetensors", "optimizer.pt", "state.json"


class CheckpointError(ValueError):
    """A checkpoint cannot be written, or does not match the model. The message is one line."""


def save(folder: Path, step: int, weights: dict[str, Tensor], optimizer: torch.optim.Optimizer, keep: int) -> Path:
    """Write the checkpoint after ``step`` steps, then delete all but the last ``keep``.

    Raises:
        CheckpointError: It cannot be written. Earlier checkpoints are whole.
    """
    target = folder / f"step-{step:08d}"

    def write(path: Path) -> None:
        save_file({name: tensor.detach().contiguous() for name, tensor in weights.items()}, path / _WEIGHTS)
        with open(path / _OPTIMIZER, "wb") as file:  # a Python file reports a full disk, torch's own does not
            torch.save(optimizer.state_dict(), file)
        (path / _STATE).write_text(json.dumps({"step": step}), encoding="utf-8")

    try:
        write_folder(target, write)
    except WRITE_ERRORS as error:
        whole = found(folder)
        kept = f"the last whole checkpoint is {whole[-1]}" if whole else "there is no earlier checkpoint"
        raise CheckpointError(f"{target}: cannot be written ({one_line(error)}); {kept}") from error
    for old in found(folder)[:-keep]:  # renamed first, so that a kill leaves no incomplete checkpoint with this name
        gone = old.with_name(f"{UNFINISHED}{old.name}")
        os.rename(old, gone)
        shutil.rmtree(gone, ignore_errors=True)
    return target


def found(folder: Path) -> list[Path]:
    """Return the whole checkpoints in a folder, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name) and path.is_dir())


def load(
    path: Path, weights: dict[str, Tensor], optimizer: torch.optim.Optimizer, buffers: dict[str, Tensor] | None = None
) -> int:
    """Load a checkpoint into the weights and the optimizer, and return its number of steps.

    Buffers that the checkpoint lacks keep their values.

    Raises:
        CheckpointError: The checkpoint has other weights, or cannot be read.
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
    """Copy saved tensors into the weights, in place.

    Raises:
        CheckpointError: A name or a shape differs.
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

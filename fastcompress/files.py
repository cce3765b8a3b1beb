"""Files and folders that are written whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

UNFINISHED = "unfinished-"


#: What a full disk, or a folder that may not be written to, raises out of the libraries that write.
WRITE_ERRORS = (OSError, RuntimeError, SafetensorError)


def write_folder(target: Path, write: Callable[[Path], None]) -> None:
    """Makes ``target`` hold what ``write`` puts into the folder it is given, whole or not at all.

    A folder that is there already is replaced.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f"{UNFINISHED}{target.name}")
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
        old = target.with_name(f"{UNFINISHED}old-{target.name}")
        shutil.rmtree(old, ignore_errors=True)
        os.rename(target, old)
        os.rename(unfinished, target)
        shutil.rmtree(old)
    else:
        os.rename(unfinished, target)
    _flush(target.parent)


def write_file(target: Path, text: str) -> None:
    """Makes ``target`` hold ``text``, whole or not at all."""
    unfinished = target.with_name(f"{UNFINISHED}{target.name}")
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


def clean(folder: Path) -> None:
    """Deletes what a killed run left unfinished, and puts back what it had moved aside to replace."""
    old = f"{UNFINISHED}old-"
    for path in folder.glob(f"{old}*") if folder.is_dir() else []:
        if not (target := path.with_name(path.name.removeprefix(old))).exists():
            os.rename(path, target)
    for path in folder.glob(f"{UNFINISHED}*") if folder.is_dir() else []:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def one_line(error: BaseException) -> str:
    """What an error says, in one line, or what the system said before it: torch.save covers that with its own."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__context__
    return " ".join(str(cause or error).split())

"""Atomic writes: a file or folder is written completely or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

#: Prefix of the name under which a file or folder is written before it is renamed.
UNFINISHED = "unfinished-"

#: Errors that the writing libraries raise when the disk is full or the folder is not writable.
WRITE_ERRORS: tuple[type[Exception], ...] = (OSError, RuntimeError)
with contextlib.suppress(ImportError):  # without safetensors, nothing writes weights
    from safetensors import SafetensorError

    WRITE_ERRORS += (SafetensorError,)


def write_folder(target: Path, write: Callable[[Path], None]) -> None:
    """Create the folder ``target`` atomically. ``write`` is called with a temporary folder and writes the files.

    An existing folder is replaced.
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
    if target.exists():  # a rename cannot replace a folder that has files
        old = target.with_name(f"{UNFINISHED}old-{target.name}")
        shutil.rmtree(old, ignore_errors=True)
        os.rename(target, old)
        os.rename(unfinished, target)
        shutil.rmtree(old)
    else:
        os.rename(unfinished, target)
    _flush(target.parent)


def write_file(target: Path, text: str) -> None:
    """Write ``text`` to the file ``target`` atomically, as UTF-8."""
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
    """Delete the unfinished files and folders of a killed run, and restore a folder that it was replacing."""
    old = f"{UNFINISHED}old-"
    for path in folder.glob(f"{old}*") if folder.is_dir() else []:
        if not (target := path.with_name(path.name.removeprefix(old))).exists():
            os.rename(path, target)
    for path in folder.glob(f"{UNFINISHED}*") if folder.is_dir() else []:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def check_folder(folder: Path) -> None:
    """Check that a folder can be made and written to, without making it.

    Raises:
        OSError: It cannot.
    """
    existing = folder.absolute()
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(existing))
    if not os.access(existing, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(existing))


def reason(error: BaseException) -> str:
    """Return the cause of an error on one line, for messages that already name the file."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return " ".join(str(error).split())


def named(path: object, message: str) -> str:
    """Return a message with the name of a file, which is added if the message does not have it."""
    return message if str(path) in message else f"{path}: {message}"


def one_line(error: BaseException) -> str:
    """Return the message of an error on one line.

    If an earlier error in the chain is from the operating system, return its cause and the last part of its path,
    because ``torch.save`` raises an error of its own after it.
    """
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__context__
    if isinstance(cause, OSError) and cause.strerror and isinstance(cause.filename, str):
        return f"{reason(cause)}: {os.path.basename(cause.filename)}"
    return reason(cause or error)

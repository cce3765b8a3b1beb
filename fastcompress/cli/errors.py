"""How the command line fails: exit codes, and the one line that says what is wrong."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path

EXIT_OK, EXIT_SOME_FAILED, EXIT_ERROR, EXIT_INTERRUPTED = 0, 1, 2, 130


class UserError(Exception):
    """A mistake of the user's; its message is the line that they read."""


def print_error(error: object) -> None:
    """On stderr."""
    print(f"fastcompress: error: {error}", file=sys.stderr)


def check_writable(option: str, path: Path) -> None:
    """Makes the folder of a file that is to be written, and says now, before the work, if the file cannot be."""
    try:
        if path.parent.exists() and not path.parent.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise UserError(f"{option}: {(error.strerror or str(error)).lower()}") from error

"""How the command line fails: exit codes, and the one line that names the problem."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path

EXIT_OK, EXIT_SOME_FAILED, EXIT_ERROR, EXIT_INTERRUPTED = 0, 1, 2, 130

#: The end of every ``--help``.
EXIT_CODES = (
    f"Exit codes: {EXIT_OK} success; {EXIT_SOME_FAILED} some of several files failed; {EXIT_ERROR} error, one line on "
    f"stderr; {EXIT_INTERRUPTED} interrupted."
)


class UserError(Exception):
    """A mistake of the user's. The message is the one line that is printed."""


def print_error(error: object) -> None:
    """Print an error on stderr."""
    print(f"fastcompress: error: {error}", file=sys.stderr)


def check_writable(option: str, path: Path) -> None:
    """Make the folder of an output file, and check before the work starts that the file can be written.

    Raises:
        UserError: It cannot.
    """
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

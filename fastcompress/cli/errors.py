"""Exit codes of the command line, and errors that it prints as one line."""

from __future__ import annotations

import contextlib
import difflib
import errno
import os
import sys
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

from fastcompress.files import check_folder, reason

EXIT_OK, EXIT_SOME_FAILED, EXIT_ERROR, EXIT_INTERRUPTED = 0, 1, 2, 130

#: The end of every ``--help``.
EXIT_CODES = (
    f"Exit codes: {EXIT_OK} success; {EXIT_SOME_FAILED} some of several files failed; {EXIT_ERROR} error, one line on "
    f"stderr; {EXIT_INTERRUPTED} interrupted."
)


class UserError(Exception):
    """A mistake of the user. The message is printed as one line."""


class StdoutError(Exception):
    """Standard output that cannot be written: a full disk, or a pipe that its reader has closed.

    It is no ``OSError``, which argparse would ignore when it prints help.
    """


class GuardedStdout:
    """Standard output whose failures are ``StdoutError``, so that they are not taken for those of other files."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write text."""
        try:
            return self._stream.write(text)
        except OSError as error:
            raise StdoutError(f"standard output: {reason(error)}") from error

    def flush(self) -> None:
        """Write what is buffered."""
        try:
            self._stream.flush()
        except OSError as error:
            raise StdoutError(f"standard output: {reason(error)}") from error


def print_error(error: object) -> None:
    """Print an error on stderr."""
    with contextlib.suppress(OSError):  # stderr, too, can be full or closed
        print(f"fastcompress: error: {error}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def one_line_warnings() -> Iterator[None]:
    """Print warnings of this package as one line, without the place in the code."""
    shown = warnings.showwarning

    def show(message: Any, category: Any, filename: str, *args: Any, **kwargs: Any) -> None:
        if category is UserWarning or category.__module__.partition(".")[0] == "fastcompress":
            print(f"fastcompress: warning: {reason(message)}", file=sys.stderr)
        else:
            shown(message, category, filename, *args, **kwargs)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return the end of a sentence with the most similar name, or nothing."""
    nearest = difflib.get_close_matches(name[:80], list(known), n=1)
    return f"; did you mean {nearest[0]}?" if nearest else ""


def check_writable(option: str, path: Path) -> None:
    """Make the folder of an output file, and check before the work starts that the file can be written.

    Raises:
        UserError: The file cannot be written.
    """
    try:
        check_folder(path.parent)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if path.exists() and not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise UserError(f"{option}: {reason(error)}") from error

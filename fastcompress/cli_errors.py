"""How the command line fails: exit codes, and the one line that says what is wrong."""

from __future__ import annotations

import sys

EXIT_OK, EXIT_SOME_FAILED, EXIT_ERROR, EXIT_INTERRUPTED = 0, 1, 2, 130


class UserError(Exception):
    """A mistake of the user's; its message is the line that they read."""


def print_error(error: object) -> None:
    """On stderr."""
    print(f"fastcompress: error: {error}", file=sys.stderr)

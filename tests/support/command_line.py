"""Run commands in this process, as a user types them."""

from __future__ import annotations

import pytest

from fastcompress.cli import main as cli


def fails(arguments: list[str], capsys: pytest.CaptureFixture[str], code: int = 2) -> str:
    """Run a command that must fail, and return its one line of error."""
    capsys.readouterr()
    assert cli.main(arguments) == code
    error = capsys.readouterr().err
    assert error.startswith("fastcompress: error: ") and error.count("\n") == 1 and "Traceback" not in error
    return error

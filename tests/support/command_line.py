"""Commands as one types them, in this process."""

from __future__ import annotations

import pytest

from fastcompress.cli import main as cli


def fails(arguments: list[str], capsys: pytest.CaptureFixture[str], code: int = 2) -> str:
    """The one line in which a command says why it does not go on."""
    capsys.readouterr()
    assert cli.main(arguments) == code
    error = capsys.readouterr().err
    assert error.startswith("fastcompress: error: ") and error.count("\n") == 1 and "Traceback" not in error
    return error

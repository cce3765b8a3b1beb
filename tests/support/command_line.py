"""Run commands of ``fastcompress`` in this process."""

from __future__ import annotations

import pytest

from fastcompress.cli import main as cli


def flags(**options: object) -> list[str]:
    """Return options as flags: ``bf16=False`` becomes ``--no-bf16``."""
    found = []
    for name, value in options.items():
        name = name.replace("_", "-")
        found.append(f"--{'' if value else 'no-'}{name}" if isinstance(value, bool) else f"--{name}={value}")
    return found


def fails(arguments: list[str], capsys: pytest.CaptureFixture[str], code: int = 2) -> str:
    """Run a command that must fail, and return the one line that it writes to standard error."""
    capsys.readouterr()
    assert cli.main(arguments) == code
    error = capsys.readouterr().err
    assert error.startswith("fastcompress: error: ") and error.count("\n") == 1 and "Traceback" not in error
    return error

"""Replace the interpreter's conversions from and to bf16 by those of hardware."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    # Imported here, since this file is also imported without the interpreter, which the import would start.
    from tests.support.triton_interpreter import convert_float, interpreter

    monkeypatch.setattr(interpreter, "_convert_float", convert_float)

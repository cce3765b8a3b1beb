"""Where triton is an interpreter, its conversions from and to bf16 are those of hardware."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    # Not above: this file is also read where nothing is interpreted, and the import would change that.
    from tests.support.triton_interpreter import convert_float, interpreter

    monkeypatch.setattr(interpreter, "_convert_float", convert_float)

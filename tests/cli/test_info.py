"""``fastcompress info``."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import fastcompress as fc
from fastcompress import reference
from fastcompress.cli import info
from fastcompress.cli import main as cli
from fastcompress.dispatch import backends
from fastcompress.dispatch.library import COMPILED


@pytest.fixture(autouse=True)
def state() -> Iterator[None]:
    backends._default.cache_clear()
    yield
    backends._default.cache_clear()


def text(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.main(["info", *arguments]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def pretend(monkeypatch: pytest.MonkeyPatch, archs: str, *devices: backends.Device, no_triton: str | None = None):
    """Pretend that the compiled library has CUDA kernels for ``archs`` and that these GPUs are installed."""
    for module in (backends, info):
        monkeypatch.setattr(module, "COMPILED", True)
        monkeypatch.setattr(module, "cuda_archs", lambda: archs)
        monkeypatch.setattr(module, "cuda_version", lambda: "13.0" if archs else "")
    monkeypatch.setattr(backends, "cuda_devices", lambda: devices)
    monkeypatch.setattr(backends, "driver_version", lambda: (13, 0) if devices else None)
    monkeypatch.setattr(backends, "_why_no_triton", lambda: no_triton)


needs_library = pytest.mark.skipif(not COMPILED, reason="no compiled library")
H100 = backends.Device("NVIDIA H100", (9, 0))


def test_versions(capsys: pytest.CaptureFixture[str]):
    found = json.loads(text(capsys, "--json"))
    versions = found["versions"]
    assert (versions["fastcompress"], versions["torch"]) == (fc.__version__, torch.__version__)
    assert versions["python"] == platform.python_version()
    assert found["library"]["compiled"] is COMPILED
    if COMPILED:
        assert found["library"]["cpu_isa"] in ("avx512", "avx2", "portable")
    plain = text(capsys)
    for word in (fc.__version__, torch.__version__, platform.python_version()):
        assert word in plain


def test_every_op_and_every_reason(capsys: pytest.CaptureFixture[str]):
    found = json.loads(text(capsys, "--json"))
    assert list(found["ops"]) == list(reference.OPS)
    plain = text(capsys).splitlines()
    for op, by_device in found["ops"].items():
        assert [op, by_device["cpu"]["backend"], by_device["cuda"]["backend"]] in [line.split() for line in plain]
        for device, choice in by_device.items():
            assert f"{choice['backend']} on {device}: {choice['reason']}" in plain


@needs_library
@pytest.mark.parametrize(
    "archs, devices, no_triton, expected",
    [
        (
            "80;90+PTX",
            [H100],
            None,
            [
                "cuda:0        NVIDIA H100, capability 9.0, driver for CUDA 13.0",
                "cuda on cuda: the library has CUDA kernels for 80;90+PTX",
            ],
        ),
        ("", [H100], None, ["triton on cuda: the library has no CUDA kernels"]),
        (
            "100+PTX",
            [H100],
            "triton is not installed",
            [
                "reference on cuda: the library has CUDA kernels for 100+PTX, not for NVIDIA H100 (90); "
                "triton is not installed"
            ],
        ),
        (
            "80;90+PTX",
            [],
            None,
            [
                "cuda          no device",
                "cuda on cuda: the library has CUDA kernels for 80;90+PTX (no CUDA device here)",
            ],
        ),
    ],
)
def test_machines(
    archs: str,
    devices: list[Any],
    no_triton: str | None,
    expected: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    pretend(monkeypatch, archs, *devices, no_triton=no_triton)
    lines = text(capsys).splitlines()
    assert [line for line in expected if line not in lines] == []
    library = next(line for line in lines if line.startswith("library"))
    assert library.endswith(f"CUDA 13.0 kernels for {archs}" if archs else "no CUDA kernels")
    assert backends.undecided and backends._override is None  # `info` does not choose a backend


def test_a_choice_shows(capsys: pytest.CaptureFixture[str]):
    with fc.backend("reference"):
        found = json.loads(text(capsys, "--json"))
        for by_device in found["ops"].values():
            assert by_device["cpu"] == {"backend": "reference", "reason": "fastcompress.backend selects it"}
            assert by_device["cuda"]["backend"] == "reference"


def test_without_a_library():
    found = info.collect()
    found["library"].update(compiled=False, problem="_C.so is missing")
    assert "library       none: _C.so is missing" in info.format_text(found).splitlines()

"""Make speech and phones with espeak-ng. ``pip install 'fastcompress[synthesis]'`` installs the library and voices.

The library runs in a separate process (``espeak_server.py`` gives the reason), and calls from several threads wait for
each other. The same arguments give the same samples.
"""

from __future__ import annotations

import atexit
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np

_SERVER = Path(__file__).with_name("espeak_server.py")
_SEPARATOR = "_"


class SynthesisError(RuntimeError):
    """The synthesizer is missing or reported an error. The message is one line."""


class _Client:
    """The process that runs espeak-ng, started on first use, and again in a fork of this process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._server: subprocess.Popen[bytes] | None = None
        self._owner = 0
        self.sample_rate = 0

    def ask(self, **request: Any) -> bytes:
        with self._lock:
            if self._server is None or self._owner != os.getpid() or self._server.poll() is not None:
                self._start()
            assert self._server is not None and self._server.stdin is not None
            try:
                self._server.stdin.write(json.dumps(request).encode() + b"\n")
                self._server.stdin.flush()
                return self._receive()
            except OSError as error:
                raise SynthesisError(f"espeak-ng has ended ({error})") from error

    def _start(self) -> None:
        command = [sys.executable, "-I", str(_SERVER)]
        self._server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._owner = os.getpid()
        atexit.register(self._server.kill)
        self.sample_rate = int(self._receive())

    def _receive(self) -> bytes:
        assert self._server is not None and self._server.stdout is not None
        length = int.from_bytes(self._server.stdout.read(8), "little")
        answer = self._server.stdout.read(length)
        if not answer:
            raise SynthesisError("espeak-ng has ended")
        if answer[0]:
            raise SynthesisError(answer[1:].decode())
        return answer[1:]


_client = _Client()


def synthesize(text: str, voice: str = "en-us", *, rate: int = 150, pitch: int = 50) -> tuple[np.ndarray, int]:
    """Make speech of a text.

    Args:
        text: Text to say.
        voice: Language, and, after a plus, a variant: ``"en-us+f3"``.
        rate: Words per minute, 80 to 450.
        pitch: Pitch, 0 to 100.

    Returns:
        float32 ``[S]``, full scale at 1, and its sampling rate in Hz.

    Raises:
        SynthesisError: The voice does not exist, the text has no speech, or no synthesizer is installed.
        ValueError: A number is out of range.
    """
    for name, value, low, high in (("rate", rate, 80, 450), ("pitch", pitch, 0, 100)):
        if not low <= value <= high:
            raise ValueError(f"{name} must lie in [{low}, {high}], got {value}")
    samples = _client.ask(function="speak", text=text, voice=voice, rate=int(rate), pitch=int(pitch))
    return np.frombuffer(samples, np.int16).astype(np.float32) / 32768, _client.sample_rate


def phonemes(text: str, voice: str = "en-us") -> list[str]:
    """Return the phones of a text, by espeak-ng's ASCII names without stress and length."""
    found = _client.ask(function="phonemes", text=text, voice=voice, separator=_SEPARATOR).decode()
    units = (re.sub(r"[',%=:#;|!^-]", "", unit) for unit in re.split(rf"[{_SEPARATOR}\s]+", found))
    return [unit for unit in units if unit]

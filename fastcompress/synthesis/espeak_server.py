"""Run espeak-ng in a separate process, which ``espeak.py`` starts as a script and which imports only the library.

The library keeps state from one utterance to the next (phases, flutter, random numbers) that cannot be reset, so that
the same words would give different samples each time. Here, a fork of a process that has only started the library
handles each request, so a crash of the library is one failed request.

A request is a line of JSON. An answer is its length (8 bytes, little-endian), a byte that is 1 if the request failed,
and text or samples (int16 at the rate that the first answer gives).
"""

import ctypes
import json
import os
import sys
from collections.abc import Callable
from typing import Any

SYNCHRONOUS = 2  # AUDIO_OUTPUT_SYNCHRONOUS: samples go to the callback before espeak_Synth returns, without threads
UTF8 = 1
RATE, PITCH = 1, 3  # espeak_PARAMETER

Callback: Any = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p)


def answer(payload: bytes, failed: bool = False) -> None:
    data = (len(payload) + 1).to_bytes(8, "little") + bytes([failed]) + payload
    while data:
        data = data[os.write(1, data) :]


def set_voice(library: ctypes.CDLL, voice: str) -> None:
    if library.espeak_SetVoiceByName(voice.encode()) != 0:
        raise ValueError(f"espeak-ng has no voice {voice!r}")


def speak(library: ctypes.CDLL, text: str, voice: str, rate: float, pitch: float) -> bytes:
    blocks: list[bytes] = []

    def receive(samples: int | None, count: int, events: int | None) -> int:
        if samples and count > 0:
            blocks.append(ctypes.string_at(samples, 2 * count))
        return 0

    callback = Callback(receive)  # keeps a reference, because C keeps only the pointer
    library.espeak_SetSynthCallback(callback)
    set_voice(library, voice)
    for parameter, value in ((RATE, rate), (PITCH, pitch)):
        library.espeak_SetParameter(parameter, int(value), 0)
    data = text.encode()
    status = library.espeak_Synth(data, len(data) + 1, 0, 1, 0, UTF8, None, None)
    library.espeak_Synchronize()
    if status != 0 or not blocks:
        raise ValueError(f"espeak-ng made no sound of {text!r} with the voice {voice!r}")
    return b"".join(blocks)


def phonemes(library: ctypes.CDLL, text: str, voice: str, separator: str) -> bytes:
    set_voice(library, voice)
    data = ctypes.create_string_buffer(text.encode())
    position = ctypes.c_void_p(ctypes.addressof(data))
    parts = []
    while position.value:  # one clause per call
        found = library.espeak_TextToPhonemes(ctypes.byref(position), UTF8, ord(separator) << 8)
        parts.append(found or b"")
    return b" ".join(parts)


def main() -> None:
    try:
        import espeakng_loader

        library = ctypes.CDLL(espeakng_loader.get_library_path())
        library.espeak_TextToPhonemes.restype = ctypes.c_char_p
        sample_rate = library.espeak_Initialize(SYNCHRONOUS, 0, os.fsencode(espeakng_loader.get_data_path()), 0)
        if sample_rate <= 0:
            raise RuntimeError("espeak-ng does not start with its voices")
    except ImportError:
        answer(b"speech synthesis needs espeakng-loader: pip install 'fastcompress[synthesis]'", True)
        return
    except (OSError, RuntimeError) as error:
        answer(str(error).encode(), True)
        return
    answer(str(sample_rate).encode())
    for line in sys.stdin.buffer:
        child = os.fork()
        if child == 0:
            try:
                request = json.loads(line)
                functions: dict[str, Callable[..., bytes]] = {"speak": speak, "phonemes": phonemes}
                answer(functions[request.pop("function")](library, **request))
            except BrokenPipeError:  # the client has ended
                pass
            except Exception as error:
                answer(str(error).encode(), True)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status != 0:
            answer(b"espeak-ng crashed", True)


if __name__ == "__main__":
    try:
        main()
    except BrokenPipeError:
        os._exit(0)

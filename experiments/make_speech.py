"""Synthesize the short utterances of assets/speech with espeak-ng.

    pip install espeakng-loader numpy soundfile soxr
    python experiments/make_speech.py [FOLDER]

The files have the same bytes on every run: the random numbers of the synthesizer (breath in the female voices) and of
the faint noise floor are seeded. The noise floor replaces the exact zeros in espeak's pauses. No microphone records
exact zeros, and every rule would see a pause of equal frames.
"""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import espeakng_loader
import numpy as np
import soundfile
import soxr

SAMPLE_RATE = 16_000
FOLDER = Path(__file__).resolve().parent.parent / "assets" / "speech"
PAUSE_SECONDS = 0.25  # before and after each utterance
PEAK = 0.6
NOISE_FLOOR = 10 ** (-60 / 20)  # RMS, relative to full scale: a quiet room

RANDOM_SEED = 1

# espeak-ng's C interface (speak_lib.h)
AUDIO_OUTPUT_SYNCHRONOUS = 2  # pass the samples to the callback during the call, and play nothing
POS_CHARACTER = 1
CHARS_UTF8 = 1
PARAMETER_RATE = 1  # words per minute
PARAMETER_PITCH = 3  # 0 to 100
OK = 0
SYNTH_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)


@dataclass(frozen=True)
class Utterance:
    """An utterance: espeak-ng voice (``language+variant``), words per minute, pitch (0 to 100) and text."""

    name: str
    voice: str
    rate: int
    pitch: int
    text: str


UTTERANCES = (
    Utterance("rainbow", "en-us+f3", 160, 50, "When the sunlight strikes raindrops in the air, they act as a prism."),
    Utterance("numbers", "en-gb-x-rp+m3", 140, 35, "Seven, two, five, zero. Please wait."),
    Utterance(
        "fast",
        "en-gb-scotland+m1",
        240,
        45,
        "Speech is mostly slow vowels and silence, so a steady frame rate says most things twice.",
    ),
    Utterance(
        "german",
        "de+f2",
        165,
        55,
        "Die Straßenbahn fährt heute nur bis zum Hauptbahnhof, bitte steigen Sie um.",
    ),
)


class Espeak:
    """The espeak-ng library of the espeakng-loader package, as a function from text to samples."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(espeakng_loader.get_library_path())
        data_path = espeakng_loader.get_data_path().encode()
        self.sample_rate = self._library.espeak_Initialize(AUDIO_OUTPUT_SYNCHRONOUS, 0, data_path, 0)
        if self.sample_rate <= 0:
            raise RuntimeError(f"espeak_Initialize failed with {self.sample_rate}")
        self._blocks: list[np.ndarray] = []
        self._callback = SYNTH_CALLBACK(self._collect)  # keeps a reference, because C keeps only the pointer
        self._library.espeak_SetSynthCallback(self._callback)

    def _collect(self, samples: Any, count: int, events: Any) -> int:
        if samples and count > 0:
            self._blocks.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    def speak(self, utterance: Utterance) -> np.ndarray:
        """Return the samples of the utterance, int16 [S] at `self.sample_rate`."""
        if self._library.espeak_SetVoiceByName(utterance.voice.encode()) != OK:
            raise ValueError(f"espeak-ng has no voice {utterance.voice!r}")
        self._library.espeak_SetParameter(PARAMETER_RATE, utterance.rate, 0)
        self._library.espeak_SetParameter(PARAMETER_PITCH, utterance.pitch, 0)
        self._blocks.clear()
        text = utterance.text.encode()
        self._library.espeak_ng_SetRandSeed(ctypes.c_long(RANDOM_SEED))  # otherwise seeded with the time of day
        status = self._library.espeak_Synth(text, len(text) + 1, 0, POS_CHARACTER, 0, CHARS_UTF8, None, None)
        if status != OK or not self._blocks:
            raise RuntimeError(f"espeak_Synth failed with {status} on {utterance.name!r}")
        return np.concatenate(self._blocks)


def record(espeak: Espeak, utterance: Utterance) -> np.ndarray:
    """Return the samples of a file: int16 [S] at 16 kHz, at a fixed level, with short pauses and the noise floor."""
    speech = espeak.speak(utterance).astype(np.float64)
    speech = soxr.resample(speech, espeak.sample_rate, SAMPLE_RATE)
    loud = np.flatnonzero(np.abs(speech) > 0.01 * np.abs(speech).max())
    speech = speech[loud[0] : loud[-1] + 1] * (PEAK / np.abs(speech).max())
    pause = np.zeros(round(PAUSE_SECONDS * SAMPLE_RATE))
    samples = np.concatenate([pause, speech, pause])
    samples += NOISE_FLOOR * np.random.RandomState(0).standard_normal(len(samples))  # RandomState: stable across numpy
    return np.round(samples * 32767).astype(np.int16)


def readme(seconds: dict[str, float]) -> str:
    rows = "\n".join(
        f"| `{u.name}.wav` | {seconds[u.name]:.1f} | `{u.voice}` | {u.rate} | {u.pitch} | {u.text} |"
        for u in UTTERANCES
    )
    return f"""# Speech for the demonstration and the tests

The voices are synthetic; no person was recorded. The files are 16 kHz, mono, 16 bit. These commands write the same
bytes on every run:

    pip install espeakng-loader numpy soundfile soxr
    python experiments/make_speech.py

They use the espeak-ng library of `espeakng-loader` {version("espeakng-loader")}. In pauses, a noise floor
({20 * np.log10(NOISE_FLOOR):.0f} dB of full scale) replaces the exact zeros of the synthesizer. We wrote the texts for
this folder.

| file | seconds | voice | words per minute | pitch | text |
| --- | ---: | --- | ---: | ---: | --- |
{rows}
"""


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    espeak = Espeak()
    seconds = {}
    for utterance in UTTERANCES:
        samples = record(espeak, utterance)
        soundfile.write(folder / f"{utterance.name}.wav", samples, SAMPLE_RATE, subtype="PCM_16")
        seconds[utterance.name] = len(samples) / SAMPLE_RATE
    (folder / "README.md").write_text(readme(seconds), encoding="utf-8")
    for name, duration in seconds.items():
        print(f"{name:<10} {duration:5.2f} s")


if __name__ == "__main__":
    main()

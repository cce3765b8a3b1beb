"""Synthetic speech with manifests: recognition and translation data for machines that have none.

An utterance is a function of task, split, index and seed: neither the number of utterances nor of processes changes it,
and a run that was broken off goes on where it was.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import random
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import soxr

from fastcompress.audio import SAMPLE_RATE
from fastcompress.files import write_file
from fastcompress.synthesis.espeak import SynthesisError, phonemes, synthesize
from fastcompress.synthesis.texts import TASKS, sentence
from fastcompress.training.manifest import Utterance, write_manifest
from fastcompress.version import __version__

LANGUAGES = ("en-us", "en", "en-gb-scotland", "en-gb-x-rp")
#: Variants of espeak-ng's voices. Those that squeak, whisper or stutter are left out, and so are Alicia, f2, f3, f5 and
#: victor, whose breath is another each time the library is started.
TRAIN_VARIANTS = (
    "Alex", "Andrea", "Annie", "Denis", "Lee", "Mario", "Michael", "Mike", "Reed", "adam", "anika", "belinda",
    "benjamin", "boris", "caleb", "david", "ed", "edward", "f1", "f4", "ian", "iven3", "john", "klatt",
    "klatt2", "klatt3", "klatt6", "linda", "m1", "m2", "m3", "m4", "m5", "m6", "max", "michel", "mike2", "norbert",
    "quincy", "rob", "steph", "steph2",
)  # fmt: skip
HELD_OUT_VARIANTS = ("Gene", "aunty", "grandma", "klatt4", "m7", "m8", "paul", "robert", "shelby", "zac")
#: What a second synthesiser is called, and its voice; it is used where the machine has it.
OTHER_ENGINE, OTHER_VOICE = "flite", "slt"

TRAIN_SNR, HELD_OUT_SNR = (10.0, 40.0), (0.0, 5.0)  # dB
DIRECTIONS = ("recognition", "translation")
_PEAK = 0.9
_PADDING = 0.05  # seconds of near silence around the speech


@dataclass(frozen=True)
class TestSet:
    """Which texts, voices and noise a manifest is made of."""

    name: str
    split: str
    variants: tuple[str, ...]
    snr: tuple[float, float] = TRAIN_SNR
    engine: str = "espeak-ng"


SETS = (
    TestSet("train", "train", TRAIN_VARIANTS),
    TestSet("dev", "dev", TRAIN_VARIANTS),
    TestSet("test", "test", TRAIN_VARIANTS),
    TestSet("test-voice", "test", HELD_OUT_VARIANTS),
    TestSet("test-noise", "test", TRAIN_VARIANTS, HELD_OUT_SNR),
    TestSet("test-engine", "test", (OTHER_VOICE,), engine=OTHER_ENGINE),
)


def make_utterance(task: str, which: TestSet, index: int, seed: int) -> tuple[np.ndarray, str, str, str, str]:
    """Samples float32 ``[S]`` at 16 kHz, text, German, phones and voice of one utterance."""
    g = random.Random(f"{task}, {which.name}, {index}, {seed}")
    text, german = sentence(task, which.split, index, seed)
    language = g.choice(LANGUAGES)
    if which.engine == OTHER_ENGINE:
        voice = f"{OTHER_ENGINE}:{OTHER_VOICE}"
        samples, rate = _flite(text, g.uniform(0.9, 1.2))
    else:
        voice = f"{language}+{g.choice(which.variants)}"
        samples, rate = synthesize(text, voice, rate=g.randint(115, 180), pitch=g.randint(25, 75))
    samples = soxr.resample(_trim(samples, rate), rate, SAMPLE_RATE, quality="HQ")
    units = " ".join(phonemes(text, "en-us"))  # one accent's: what is said, not how
    return _degrade(samples, g, which.snr), text, german, units, voice


def _flite(text: str, stretch: float) -> tuple[np.ndarray, int]:
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "speech.wav")
        command = [
            OTHER_ENGINE,
            "-voice",
            OTHER_VOICE,
            "--setf",
            f"duration_stretch={stretch:.3f}",
            "-t",
            text,
            "-o",
            path,
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise SynthesisError(f"{OTHER_ENGINE} failed: {done.stderr.strip().splitlines()[-1:]}")
        return soundfile.read(path, dtype="float32")


def _trim(samples: np.ndarray, rate: int) -> np.ndarray:
    """Without the silence around it, but for a little."""
    loud = np.flatnonzero(np.abs(samples) > 0.01 * np.abs(samples).max())
    if not len(loud):
        raise SynthesisError("the synthesiser gave silence")
    margin = round(_PADDING * rate)
    return samples[max(0, loud[0] - margin) : loud[-1] + margin]


def _degrade(samples: np.ndarray, g: random.Random, snr: tuple[float, float]) -> np.ndarray:
    """With white or coloured noise, at times a tilted spectrum, and another level."""
    from scipy.signal import lfilter

    noise = np.random.default_rng(g.getrandbits(64)).standard_normal(len(samples)).astype(np.float32)
    if g.random() < 0.5:
        noise = lfilter([1.0], [1.0, -g.uniform(0.5, 0.97)], noise).astype(np.float32)
    decibels = g.uniform(*snr)
    noise *= np.sqrt(np.mean(samples**2) / np.mean(noise**2)) * 10 ** (-decibels / 20)
    mixed = samples + noise
    if g.random() < 0.5:
        mixed = lfilter([1.0, g.uniform(-0.5, 0.5)], [1.0], mixed).astype(np.float32)
    level = 10 ** g.uniform(-1.2, 0.0)
    return (mixed / np.abs(mixed).max() * _PEAK * level).astype(np.float32)


@dataclass(frozen=True)
class _Job:
    task: str
    which: TestSet
    index: int
    seed: int
    folder: Path
    direction: str

    @property
    def path(self) -> Path:
        return self.folder / "audio" / self.which.name / f"{self.index:06d}.wav"


def _make(job: _Job) -> Utterance:
    """Writes the audio of a job, if it is not there, and its line."""
    note = job.path.with_suffix(".json")
    if job.path.exists() and note.exists():
        values = json.loads(note.read_text(encoding="utf-8"))
    else:
        samples, text, german, phones, voice = make_utterance(job.task, job.which, job.index, job.seed)
        unfinished = job.path.with_suffix(".unfinished")
        soundfile.write(unfinished, samples, SAMPLE_RATE, subtype="PCM_16", format="WAV")
        os.replace(unfinished, job.path)
        values = {
            "text": text,
            "german": german,
            "phones": phones,
            "voice": voice,
            "seconds": len(samples) / SAMPLE_RATE,
        }
        write_file(note, json.dumps(values, ensure_ascii=False))
    target = values["german"] if job.direction == "translation" else values["text"]
    return Utterance(
        job.path,
        values["text"],
        target,
        round(values["seconds"], 4),
        phones=values["phones"],
        more={"voice": values["voice"]},
    )


def make_data(
    folder: Path,
    task: str,
    direction: str = "recognition",
    *,
    train: int = 4000,
    dev: int = 200,
    test: int = 200,
    seed: int = 0,
    jobs: int = 1,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, int]:
    """Makes audio and manifests: ``train``, ``dev``, ``test``, ``test-voice``, ``test-noise``, and, where a second
    synthesiser is installed, ``test-engine``.

    Args:
        folder: which is made, or gone on with.
        task, direction: of :mod:`fastcompress.synthesis.texts`; what is to be written, English or German.
        train, dev, test: utterances, of each test set.
        seed: of everything.
        jobs: processes.
        progress: called with a set's name, how many utterances are done, and of how many.

    Returns:
        how many utterances each manifest holds.

    Raises:
        ValueError: an argument out of range, or a folder that holds other data.
        SynthesisError: there is no synthesiser.
    """
    if task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {task!r}")
    if direction not in DIRECTIONS:
        raise ValueError(f"direction must be one of {', '.join(DIRECTIONS)}, got {direction!r}")
    if direction == "translation" and task == "digits":
        raise ValueError("direction 'translation' needs a task with German: numbers or commands")
    for name, value in (("train", train), ("dev", dev), ("test", test), ("jobs", jobs)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    made_of = {"task": task, "seed": seed}
    record = folder / "data.json"
    if record.exists():
        known = json.loads(record.read_text(encoding="utf-8"))
        if any(known.get(name) != value for name, value in made_of.items()):
            raise ValueError(f"{folder} holds other data, {known}: choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    write_file(record, json.dumps(made_of | {"version": __version__}))
    phonemes("one")  # before any process starts: is there a synthesiser?
    counts: dict[str, int] = {}
    hours: dict[str, float] = {}
    context = multiprocessing.get_context("spawn")
    with context.Pool(jobs) if jobs > 1 else _NoPool() as pool:
        for which in SETS:
            if which.engine != "espeak-ng" and shutil.which(which.engine) is None:
                continue
            (folder / "audio" / which.name).mkdir(parents=True, exist_ok=True)
            count = {"train": train, "dev": dev}.get(which.name, test)
            made = []
            every = [_Job(task, which, i, seed, folder, direction) for i in range(count)]
            for utterance in pool.imap(_make, every, chunksize=8):
                made.append(utterance)
                if progress is not None:
                    progress(which.name, len(made), count)
            write_manifest(folder / f"{which.name}.jsonl", made)
            counts[which.name] = count
            hours[which.name] = math.fsum(u.duration or 0.0 for u in made) / 3600
    details = {
        "version": __version__,
        "direction": direction,
        "utterances": counts,
        "hours": hours,
        "held_out_voices": HELD_OUT_VARIANTS,
        "held_out_snr_db": HELD_OUT_SNR,
        "train_snr_db": TRAIN_SNR,
    }
    write_file(record, json.dumps(made_of | details, indent=1))
    return counts


class _NoPool:
    """One process: this one."""

    def __enter__(self) -> _NoPool:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def imap(self, function: Callable[[Any], Any], values: list[Any], chunksize: int) -> Iterator[Any]:
        return map(function, values)

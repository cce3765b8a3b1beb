"""Make synthetic speech with manifests: recognition and translation data for machines that have no data.

An utterance is a function of task, split, index and seed. Neither the number of utterances nor that of processes
changes it, and a run that was interrupted resumes where it stopped.
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
import wave
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soxr

from fastcompress.audio import SAMPLE_RATE
from fastcompress.files import write_file
from fastcompress.synthesis.espeak import SynthesisError, phonemes, synthesize
from fastcompress.synthesis.texts import TASKS, sentence
from fastcompress.version import __version__

LANGUAGES = ("en-us", "en", "en-gb-scotland", "en-gb-x-rp")
#: Variants of espeak-ng's voices. Those that squeak, whisper or stutter are left out, and so are Alicia, f2, f3, f5 and
#: victor, whose breath differs each time the library is started.
TRAIN_VARIANTS = (
    "Alex", "Andrea", "Annie", "Denis", "Lee", "Mario", "Michael", "Mike", "Reed", "adam", "anika", "belinda",
    "benjamin", "boris", "caleb", "david", "ed", "edward", "f1", "f4", "ian", "iven3", "john", "klatt",
    "klatt2", "klatt3", "klatt6", "linda", "m1", "m2", "m3", "m4", "m5", "m6", "max", "michel", "mike2", "norbert",
    "quincy", "rob", "steph", "steph2",
)  # fmt: skip
HELD_OUT_VARIANTS = ("Gene", "aunty", "grandma", "klatt4", "m7", "m8", "paul", "robert", "shelby", "zac")
#: Name and voice of a second synthesizer, which is used if it is installed.
OTHER_ENGINE, OTHER_VOICE = "flite", "slt"

TRAIN_SNR, HELD_OUT_SNR = (10.0, 40.0), (0.0, 5.0)  # dB
DIRECTIONS = ("recognition", "translation")
_PEAK = 0.9
_PADDING = 0.05  # seconds of near silence around the speech


@dataclass(frozen=True)
class TestSet:
    """Texts, voices and noise of one manifest."""

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
    """Return samples (float32 ``[S]`` at 16 kHz), text, German, phones and voice of one utterance."""
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
    units = " ".join(phonemes(text, "en-us"))  # the same phones for every voice
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
        return _read_wav(path)


def _read_wav(path: str) -> tuple[np.ndarray, int]:
    """Read 16-bit WAV as float32 ``[S]`` and its rate in Hz."""
    with wave.open(path, "rb") as file:
        samples = np.frombuffer(file.readframes(file.getnframes()), "<i2")
        return samples.astype(np.float32) / 32768, file.getframerate()


def _write_wav(path: Path, samples: np.ndarray) -> None:
    """Write float32 ``[S]`` below full scale as 16-bit WAV at 16 kHz."""
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, SAMPLE_RATE, len(samples), "NONE", ""))
        wide = np.rint(samples * 2.0**31).astype(np.int64)  # rounded as libsndfile does, which wrote earlier data sets
        file.writeframes((wide >> 16).astype("<i2").tobytes())


def _trim(samples: np.ndarray, rate: int) -> np.ndarray:
    """Remove the silence around speech, except for a margin."""
    loud = np.flatnonzero(np.abs(samples) > 0.01 * np.abs(samples).max())
    if not len(loud):
        raise SynthesisError("the synthesizer returned silence")
    margin = round(_PADDING * rate)
    return samples[max(0, loud[0] - margin) : loud[-1] + margin]


def _degrade(samples: np.ndarray, g: random.Random, snr: tuple[float, float]) -> np.ndarray:
    """Add white or coloured noise, tilt the spectrum of half of the utterances, and change the level."""
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


def _make(job: _Job) -> dict[str, Any]:
    """Write the audio of a job, unless it exists, and return its line of the manifest."""
    note = job.path.with_suffix(".json")
    if job.path.exists() and note.exists():
        values = json.loads(note.read_text(encoding="utf-8"))
    else:
        samples, text, german, phones, voice = make_utterance(job.task, job.which, job.index, job.seed)
        unfinished = job.path.with_suffix(".unfinished")
        _write_wav(unfinished, samples)
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
    return {
        "audio_filepath": job.path.relative_to(job.folder).as_posix(),
        "duration": round(values["seconds"], 4),
        "text": values["text"],
        **({} if target == values["text"] else {"target": target}),
        "phones": values["phones"],
        "voice": values["voice"],
    }


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
    """Make audio and manifests: ``train``, ``dev``, ``test``, ``test-voice`` and ``test-noise``.

    If a second synthesizer is installed, also make ``test-engine``.

    Args:
        folder: Folder to create, or to resume.
        task: Task of ``fastcompress.synthesis.texts``.
        direction: ``"recognition"``: the target is the text; ``"translation"``: the target is its German translation.
        train: Number of utterances to train on.
        dev: Number of utterances to validate on.
        test: Number of utterances of each test set.
        seed: Seed of texts, voices and noise.
        jobs: Number of processes.
        progress: Function called with a set's name, the number of utterances done, and their number in all.

    Returns:
        Number of utterances of each manifest.

    Raises:
        ValueError: An argument is out of range, or the folder contains other data.
        SynthesisError: No synthesizer is installed.
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
            raise ValueError(f"{folder} contains other data, {known}: choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    write_file(record, json.dumps(made_of | {"version": __version__}))
    phonemes("one")  # raises if there is no synthesizer, before any process starts
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
            for line in pool.imap(_make, every, chunksize=8):
                made.append(line)
                if progress is not None:
                    progress(which.name, len(made), count)
            lines = [json.dumps(line, ensure_ascii=False) for line in made]
            write_file(folder / f"{which.name}.jsonl", "".join(f"{line}\n" for line in lines))
            counts[which.name] = count
            hours[which.name] = math.fsum(line["duration"] for line in made) / 3600
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
    """Run jobs in this process."""

    def __enter__(self) -> _NoPool:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def imap(self, function: Callable[[Any], Any], values: list[Any], chunksize: int) -> Iterator[Any]:
        return map(function, values)

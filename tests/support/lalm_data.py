"""Audio and manifests for the tests of the reference audio LLM, in which each word is a tone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

WORDS = {"low": 300.0, "middle": 900.0, "high": 2500.0}  # Hz
RATE = 16_000


def write_tones(folder: Path, count: int, name: str = "train", seed: int = 0, texts: int = 0) -> Path:
    """Write a manifest with ``count`` utterances of one to three tones, and ``texts`` lines without audio."""
    g = np.random.default_rng(seed)
    (folder / "audio").mkdir(parents=True, exist_ok=True)
    lines: list[Any] = []
    for i in range(count):
        words = list(g.choice(list(WORDS), g.integers(1, 4)))
        parts = []
        for word in words:
            t = np.arange(int(RATE * g.uniform(0.12, 0.2))) / RATE
            parts += [0.3 * np.sin(2 * np.pi * WORDS[word] * t), np.zeros(800)]
        samples = np.concatenate(parts) + 0.003 * g.standard_normal(sum(map(len, parts)))
        path = f"audio/{name}-{i}.wav"
        soundfile.write(folder / path, samples, RATE)
        text = " ".join(words)
        lines.append({"audio_filepath": path, "duration": len(samples) / RATE, "text": text, "phones": text})
    lines += [{"text": " ".join(g.choice(list(WORDS), 2))} for _ in range(texts)]
    return write_lines(folder, *lines, name=name)


def write_lines(folder: Path, *lines: Any, name: str = "m") -> Path:
    """Write a manifest with the given lines: strings unchanged, other values as JSON."""
    path = folder / f"{name}.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")
    return path

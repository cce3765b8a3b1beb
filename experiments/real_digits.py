"""Score compression without training in an audio LLM of pretrained parts: ``python -m experiments.real_digits FOLDER``.

    FOLDER/whisper-tiny.en/     encoder, which is frozen
    FOLDER/smollm2-135m/        decoder, which is trained with LoRA; its chat template is not used
    FOLDER/speech/fsdd.jsonl    spoken digits of six people (Free Spoken Digit Dataset), with "speaker" and "take"

Strings of digits are made of the recordings of one person each. The model is trained on every frame of four people.
It is then scored without further training with every rule, control and combination of ``experiments/training_free.py``,
on other recordings of the same four people and on recordings of a fifth. Settings are chosen on those of a sixth. A
later call resumes an interrupted training from its last checkpoint, and skips complete rows.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
import transformers

from experiments.training_free import measure, table
from fastcompress.files import write_file
from fastcompress.lalm.loading import load_model
from fastcompress.training.examples import EncodedExamples, Examples
from fastcompress.training.manifest import Utterance, read_manifest
from fastcompress.training.runs import Run
from fastcompress.training.settings import TrainSettings
from fastcompress.training.sweep.bootstrap import Bootstrap
from fastcompress.training.usable import load_utterance

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "experiments" / "results"
ENCODER, DECODER = "whisper-tiny.en", "smollm2-135m"
#: People of the training set, of the development set, and of the test set of new voices.
TRAINED, DEV, NEW = ("jackson", "lucas", "nicolas", "yweweler"), ("george",), ("theo",)
#: Takes of each digit that are for the test set: the official split.
TEST_TAKES = range(5)
SETS = {"test": "known voices", "test-voice": "new voice"}
RATE = 8000
#: Number of digits per string, and seconds of silence around and between them.
DIGITS, GAP = (1, 4), (0.03, 0.1)


def make_strings(
    utterances: Sequence[Utterance], folder: Path, name: str, people: Sequence[str], test: bool, count: int
) -> Path:
    """Write strings of digits and their manifest, and return its path.

    Args:
        utterances: Single digits.
        folder: Folder of the manifest and the audio.
        name: Name of the set, which is also the seed of its strings.
        people: People who speak; each string is of one of them.
        test: Whether to use the takes of the test set, or the others.
        count: Number of strings.
    """
    path = folder / f"{name}.jsonl"
    if path.exists() and len(path.read_text().splitlines()) == count:
        return path
    takes: dict[str, list[Utterance]] = {}
    for utterance in utterances:
        person = utterance.more["speaker"]
        if person in people and (utterance.more["take"] in TEST_TAKES) == test:
            takes.setdefault(person, []).append(utterance)
    g = random.Random(name)
    (folder / name).mkdir(parents=True, exist_ok=True)
    lines = []
    for i in range(count):
        person = people[i % len(people)]
        chosen = [g.choice(takes[person]) for _ in range(g.randint(*DIGITS))]
        parts = [_silence(g)]
        for utterance in chosen:
            parts += [load_utterance(utterance, RATE), _silence(g)]
        samples = np.concatenate(parts)
        file = folder / name / f"{i}.flac"
        soundfile.write(file, samples, RATE)
        lines.append(
            {
                "audio_filepath": f"{name}/{i}.flac",
                "duration": len(samples) / RATE,
                "text": " ".join(utterance.text for utterance in chosen),
                "speaker": person,
            }
        )
    write_file(path, "".join(f"{json.dumps(line)}\n" for line in lines))
    return path


def _silence(g: random.Random) -> np.ndarray:
    return np.zeros(round(g.uniform(*GAP) * RATE), np.float32)


def make_decoder(source: Path, folder: Path) -> Path:
    """Link the files of a decoder without its chat template, whose system prompt is longer than most strings."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        link = folder / file.name
        if file.is_file() and file.name != "chat_template.jinja" and not link.exists():
            link.symlink_to(file.resolve())
    return folder


def train(folder: Path, out: Path, steps: int, batch_size: int, rates: tuple[float, float]) -> tuple[Path, float]:
    """Train the model on every frame, or resume; return the run's folder, and the processor time of all calls."""
    run, spent = out / "run", out / "cpu_seconds.json"
    before, since = (json.loads(spent.read_text()) if spent.exists() else 0.0), time.process_time()
    if (run / "final").is_dir():
        return run, before
    settings = TrainSettings(
        output_dir=str(run),
        data=str(out / "data" / "train.jsonl"),
        dev=str(out / "data" / "dev.jsonl"),
        audio_model=str(folder / ENCODER),
        text_model=str(make_decoder(folder / DECODER, out / "decoder")),
        audio_padding="longest",
        encode_once=True,
        augment=False,
        rule="none",
        lora_rank=16,
        merge=True,
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        learning_rate=rates[0],
        projector_learning_rate=rates[1],
        warmup_steps=max(1, steps // 20),
        logging_steps=10,
        save_steps=50,
        eval_steps=50,
    )
    resumed = (run / "run.yaml").exists()
    try:
        Run(settings, resume=resumed, say=lambda text: print(text, flush=True)).train(
            lambda step, row: print(f"step {step}: {row}", flush=True)
        )
    finally:
        write_file(spent, json.dumps(before + time.process_time() - since))
    return run, before + time.process_time() - since


def summary(details: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """Return what was trained, its losses, and the processor time."""
    scoring = sum(row["cpu_seconds"] for row in rows)
    losses = [row for row in details["log"] if "development_loss" in row]
    lines = [f"| {row['step']:.0f} | {row['loss']:.3f} | {row['development_loss']:.3f} |" for row in losses]
    return "\n".join(
        [
            f"{details['encoder']} and {details['decoder']}: {details['steps']} steps of {details['batch_size']} of "
            f"{details['strings']} strings, learning rates {details['rates'][0]:g} (LoRA) and "
            f"{details['rates'][1]:g} (projector). {details['training_cpu_seconds'] / 3600:.2f} hours of one core for "
            f"training, {scoring / 3600:.2f} for scoring.",
            "",
            "| step | loss | loss on the person for choosing |",
            "| ---: | ---: | ---: |",
            *lines,
            "",
        ]
    )


def differences(rows: list[dict[str, Any]], words: dict[str, list[int]]) -> str:
    """Return a table of min-variance against uniform pooling and against its lengths in random order, in points."""
    from tabulate import tabulate

    places = {(r["compression"], r["proportional_attention"], r["positions"]): r["scores"] for r in rows}
    lines = []
    for (name, *parts), scores in places.items():
        if not name.startswith("min-variance") or "," in name:
            continue
        rate = name.rpartition(" ")[2]
        cells = [name, f"{'log' if parts[0] else 'none'}, {parts[1]}"]
        for test in SETS:
            bootstrap = Bootstrap([None] * len(words[test]))
            every = places[("every frame", False, "compact")]
            others = (
                every,
                *(places.get((n, *parts)) for n in (f"uniform {rate}", f"{name}, lengths in random order")),
            )
            for other in others:
                if other is None:
                    cells.append("")
                    continue
                found = bootstrap.difference(scores[test]["errors"], other[test]["errors"], words[test])
                cells.append(f"{found.value:+.1f} [{found.low:+.1f}, {found.high:+.1f}]")
        lines.append(cells)
    against = ("every frame", "uniform", "random order")
    head = ["", "parts", *(f"{title}, vs {other}" for title in SETS.values() for other in against)]
    return tabulate(lines, head, "pipe", disable_numparse=True)


def main() -> int:
    """Train the model, and score it."""
    parser = argparse.ArgumentParser(prog="python -m experiments.real_digits", description=__doc__)
    parser.add_argument("folder", type=Path, help="folder of models and speech")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "real-digits", help="folder of data and model")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results (experiments/results)")
    parser.add_argument("--strings", type=int, default=960, help="strings of the training set (default %(default)s)")
    parser.add_argument("--scored", type=int, default=40, help="strings of each test set (default %(default)s)")
    parser.add_argument("--steps", type=int, default=240, help="steps of training (default %(default)s)")
    parser.add_argument("--batch-size", type=int, default=4, help="strings per step (default %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="learning rate of LoRA (default %(default)s)")
    parser.add_argument("--projector-rate", type=float, default=2e-3, help="its learning rate (default %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    digits, data = read_manifest(options.folder / "speech" / "fsdd.jsonl"), options.out / "data"
    for name, people, test, count in (
        ("train", TRAINED, False, options.strings),
        ("dev", DEV, False, 24),
        ("test", TRAINED, True, options.scored),
        ("test-voice", NEW, True, options.scored),
    ):
        make_strings(digits, data, name, people, test, count)
    rates = (options.learning_rate, options.projector_rate)
    run, seconds = train(options.folder, options.out, options.steps, options.batch_size, rates)
    model, processor = load_model(run)
    utterances = {name: read_manifest(data / f"{name}.jsonl") for name in SETS}
    sets: dict[str, Examples] = {n: EncodedExamples(Examples(u, processor), model) for n, u in utterances.items()}
    words = {name: [len(u.target.split()) for u in found] for name, found in utterances.items()}
    with (run / "log.csv").open(encoding="utf-8") as file:
        log = [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]
    details = {
        "encoder": ENCODER,
        "decoder": DECODER,
        "strings": options.strings,
        "steps": options.steps,
        "batch_size": options.batch_size,
        "rates": rates,
        "training_cpu_seconds": round(seconds, 1),
        "words": words,
        "log": log,
    }
    rows = measure(lambda: load_model(run)[0], sets, options.results / "real-digits.json", details)
    text = f"{summary(details, rows)}\n{table(rows, SETS)}\n{differences(rows, words)}\n"
    write_file(options.results / "real-digits.md", text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())

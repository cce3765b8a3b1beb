"""The commands of the reference audio LLM: ``make-data``, ``train``, ``evaluate`` and ``transcribe``.

Arguments are declared here; what does the work is imported when a command runs.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastcompress.cli_errors import EXIT_ERROR, EXIT_OK, EXIT_SOME_FAILED, UserError, check_writable, print_error

_TASKS, _DIRECTIONS = ("digits", "numbers", "commands"), ("recognition", "translation")


Settings = tuple[tuple[str, type, str], ...]
"""Names, types and descriptions."""


def add_settings(parser: argparse.ArgumentParser, settings: Settings, required: tuple[str, ...] = ()) -> None:
    """Declares a flag for each; what is not given is ``None``."""
    for name, kind, text in settings:
        flag = f"--{name.replace('_', '-')}"
        if kind is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=text)
        else:
            metavar = kind.__name__.upper()
            parser.add_argument(flag, type=kind, default=None, metavar=metavar, help=text, required=name in required)


def add_commands(commands: Any) -> None:
    """Declares the four commands."""
    _add_make_data(commands)
    _add_train(commands)
    _add_evaluate(commands)
    _add_transcribe(commands)


def _add_make_data(commands: Any) -> None:
    parser = commands.add_parser(
        "make-data",
        help="synthetic speech with manifests, for recognition and translation",
        description="Synthesises speech (espeak-ng: many voices, speeds, pitches, noise) and writes manifests: train, "
        "dev, test, test-voice (voices that train lacks), test-noise (more noise than in train) and, where flite is "
        "installed, test-engine. The same seed gives the same files; a run that was broken off goes on.",
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="what to write to")
    parser.add_argument("--task", choices=_TASKS, default="digits", help="what is said (default digits)")
    parser.add_argument(
        "--direction", choices=_DIRECTIONS, default="recognition", help="write what is said, or its German"
    )
    parser.add_argument("--train", type=int, default=4000, metavar="N", help="utterances to train on (default 4000)")
    parser.add_argument("--dev", type=int, default=200, metavar="N", help="for development (default 200)")
    parser.add_argument("--test", type=int, default=200, metavar="N", help="of each test set (default 200)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, metavar="N", help="processes (default all cores)"
    )
    parser.set_defaults(run=_run_make_data)


def _run_make_data(options: argparse.Namespace) -> int:
    from tqdm import tqdm

    from fastcompress.lalm.espeak import SynthesisError
    from fastcompress.lalm.synthesis import make_data

    bar: Any = None
    shown = ""

    def progress(name: str, done: int, total: int) -> None:
        nonlocal bar, shown
        if name != shown:
            if bar is not None:
                bar.close()
            shown = name
            bar = tqdm(total=total, desc=name, unit="utt", file=sys.stderr, disable=not sys.stderr.isatty())
        bar.update(done - bar.n)

    try:
        counts = make_data(
            options.folder, options.task, options.direction, train=options.train, dev=options.dev, test=options.test,
            seed=options.seed, jobs=options.jobs, progress=progress,
        )  # fmt: skip
    except (ValueError, SynthesisError, OSError) as error:
        raise UserError(error) from error
    finally:
        if bar is not None:
            bar.close()
    hours = json.loads((options.folder / "data.json").read_text(encoding="utf-8"))["hours"]
    for name, count in counts.items():
        print(f"{options.folder / name}.jsonl: {count} utterances, {hours[name]:.2f} h")
    if "test-engine" not in counts:
        print("test-engine is left out: flite is not installed")
    return EXIT_OK


def _add_train(commands: Any) -> None:
    parser = commands.add_parser(
        "train",
        help="train the reference audio LLM, from nothing or with LoRA, and go on after a kill",
        description="Trains in a folder that then says all that is needed to repeat it. Settings come from a YAML file "
        "(--config) and from flags, which win. Without a model to go on from, a small one for the data is made. "
        "Several processes: accelerate launch -m fastcompress train ...",
    )
    parser.add_argument("folder", type=Path, metavar="RUN", help="folder of the run")
    parser.add_argument("--config", type=Path, metavar="FILE", help="settings, as YAML")
    parser.add_argument("--resume", action="store_true", help="go on with the run after its last checkpoint")
    parser.add_argument("--threads", type=int, metavar="N", help="threads of torch")
    add_settings(parser, _SETTINGS)
    parser.set_defaults(run=_run_train)


#: Settings of a run (fastcompress.lalm.runs), their types and what they are.
_SETTINGS: Settings = (
    ("train", str, "manifest to train on"),
    ("dev", str, "manifest whose loss is logged"),
    ("model", str, "folder of a model to go on from"),
    ("audio_model", str, "pretrained encoder, with --text-model"),
    ("text_model", str, "pretrained decoder, with --audio-model"),
    ("rule", str, "compression: none, uniform:3, local-max, ...; default: the model's"),
    ("reduce", str, "what a segment becomes: mean, first, max, ...; default: the model's"),
    ("keys", str, "what distances are taken between: frames, or ctc; default: the model's"),
    ("boundary_ratio", float, "frames a token that learned boundaries aim at, in place of a rule"),
    ("boundary_kind", str, "how they are learned: h-net (default), or cif"),
    ("lora_rank", int, "of LoRA on the decoder; 0: train all of it (default)"),
    ("lora_alpha", float, "of LoRA (default 32)"),
    ("lora_dropout", float, "of LoRA (default 0)"),
    ("train_encoder", bool, "train the encoder; default: without LoRA"),
    ("merge", bool, "write the final model with LoRA merged into it"),
    ("max_seconds", float, "skip longer audio (default 60)"),
    ("cache", bool, "keep features in memory (default yes)"),
    ("encode_once", bool, "run a frozen encoder once an utterance; needs --no-augment"),
    ("steps", int, "updates (default 1000)"),
    ("batch_size", int, "utterances of a process in a batch (default 8)"),
    ("accumulate", int, "batches in an update (default 1)"),
    ("learning_rate", float, "at its highest (default 1e-3)"),
    ("projector_learning_rate", float, "default: the same"),
    ("warmup_steps", int, "default 100"),
    ("final_rate", float, "share of the highest rate at the end (default 0.03)"),
    ("weight_decay", float, "default 0.02"),
    ("max_grad_norm", float, "default 1"),
    ("augment", bool, "SpecAugment (default yes)"),
    ("seed", int, "default 0"),
    ("precision", str, "fp32 or bf16 (default fp32)"),
    ("gradient_checkpointing", bool, "save memory"),
    ("save_every", int, "steps between checkpoints (default 500)"),
    ("keep", int, "checkpoints to keep (default 2)"),
    ("log_every", int, "steps between lines of log.csv (default 10)"),
    ("evaluate_every", int, "steps between losses on dev; 0: at the end (default)"),
)


def _run_train(options: argparse.Namespace) -> int:
    import torch
    from tqdm import tqdm

    from fastcompress.audio import AudioError
    from fastcompress.lalm.checkpoints import CheckpointError
    from fastcompress.lalm.manifest import ManifestError
    from fastcompress.lalm.runs import Run, RunError, RunSettings, read_settings
    from fastcompress.lalm.training import TrainingStopped

    if options.threads is not None:
        if options.threads < 1:
            raise UserError(f"--threads must be at least 1, got {options.threads}")
        torch.set_num_threads(options.threads)
    _quiet()
    try:
        values = read_settings(options.config) if options.config else {}
        flags = {name: getattr(options, name) for name, _, _ in _SETTINGS}
        values |= {name: value for name, value in flags.items() if value is not None}
        settings = RunSettings.from_flat(values) if values or not options.resume else None
        run = Run(options.folder, settings, options.resume, lambda text: print(text, flush=True))
        steps = run.settings.training.steps
        main = run.accelerator.is_main_process
        terminal = sys.stderr.isatty()
        bar = tqdm(
            total=steps, initial=run.training.step, unit="step", file=sys.stderr, disable=not main,
            mininterval=0.5 if terminal else 30.0,
        )  # fmt: skip

        def progress(step: int, row: dict[str, float]) -> None:
            bar.set_postfix(loss=f"{row['loss']:.3f}", tokens_per_s=f"{row['tokens_per_second']:.0f}", refresh=False)
            bar.update(step - bar.n)

        with bar:
            final = run.train(progress)
    except (RunError, ManifestError, CheckpointError, TrainingStopped, AudioError) as error:
        raise UserError(error) from error
    if main:
        print(f"trained: {final}")
    return EXIT_OK


def _add_evaluate(commands: Any) -> None:
    parser = commands.add_parser(
        "evaluate",
        help="error rates, tokens a second and times of a model on manifests",
        description="Writes down each utterance of the manifests and compares: word and character error rate (with a "
        "95 % interval), exact matches, BLEU; tokens a second of audio, ratio, time of encoder and prefill.",
    )
    parser.add_argument("model", metavar="MODEL", help="folder of a model or of a run")
    parser.add_argument("manifests", nargs="+", type=Path, metavar="MANIFEST")
    parser.add_argument("--rule", help="compression in place of the model's; none: every frame")
    parser.add_argument("--batch-size", type=_positive, default=16, metavar="N")
    parser.add_argument("--num-beams", type=_positive, default=1, metavar="N", help="1: greedy search (default)")
    parser.add_argument("--max-new-tokens", type=_positive, default=128, metavar="N")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--threads", type=_positive, metavar="N", help="threads of torch")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the scores and every line that was written")
    parser.set_defaults(run=_run_evaluate)


def _run_evaluate(options: argparse.Namespace) -> int:
    import torch
    from tqdm import tqdm

    from fastcompress.audio import AudioError
    from fastcompress.lalm.evaluation import evaluate
    from fastcompress.lalm.examples import Examples
    from fastcompress.lalm.lora import unwrap
    from fastcompress.lalm.manifest import ManifestError, check_audio, format_skipped, read_manifest

    if options.threads:
        torch.set_num_threads(options.threads)
    if options.json:
        check_writable(f"--json {options.json}", options.json)
    model, processor = _load(options)
    rule = unwrap(model).compression
    found: dict[str, Any] = {"model": options.model, "rule": rule, "num_beams": options.num_beams, "manifests": {}}
    rows = []
    for path in options.manifests:
        try:
            utterances, skipped = check_audio(read_manifest(path))
            if skipped:
                print(f"{path}: {format_skipped(skipped)}", file=sys.stderr)
            if not utterances:
                raise UserError(f"{path}: no utterance is left that can be used")
            with tqdm(total=len(utterances), desc=path.stem, file=sys.stderr, disable=not sys.stderr.isatty()) as bar:
                result, written = evaluate(
                    model, Examples(utterances, processor), options.batch_size,
                    progress=lambda done: bar.update(done - bar.n),  # noqa: B023
                    num_beams=options.num_beams, max_new_tokens=options.max_new_tokens,
                )  # fmt: skip
        except (ManifestError, AudioError) as error:
            raise UserError(error) from error
        lines = [{"reference": u.target, "written": w} for u, w in zip(utterances, written, strict=True)]
        found["manifests"][str(path)] = dataclasses.asdict(result) | {"lines": lines}
        found["manifests"][str(path)]["skipped"] += len(skipped)
        rows.append(_row(path.stem, result))
    print(f"{options.model}, rule {rule}")
    head = "|utterances|WER %|95 %|CER %|exact %|BLEU|tokens/s|ratio|encode ms|prefill ms|peak MB"
    _print_table(head.split("|"), rows)
    if options.json:
        try:
            options.json.write_text(json.dumps(found, indent=1, ensure_ascii=False), encoding="utf-8")
        except OSError as error:
            raise UserError(f"--json {options.json}: {(error.strerror or str(error)).lower()}") from error
    return EXIT_OK


def _row(name: str, r: Any) -> list[str]:
    return [
        name, str(r.utterances), f"{r.wer:.1f}", f"{r.wer_low:.1f}-{r.wer_high:.1f}", f"{r.cer:.1f}", f"{r.exact:.1f}",
        f"{r.bleu:.1f}", f"{r.tokens_per_second:.1f}", f"{r.ratio:.2f}", f"{r.encode_ms:.1f}", f"{r.prefill_ms:.1f}",
        f"{r.peak_bytes / 1e6:.0f}",
    ]  # fmt: skip


def _print_table(head: list[str], rows: list[list[str]]) -> None:
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    for row in [head, *rows]:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        print("  ".join(cells).rstrip())


def _add_transcribe(commands: Any) -> None:
    parser = commands.add_parser(
        "transcribe",
        help="write down what audio files say",
        description="Writes a line for each audio file: what the model hears in it. With --stream as the audio comes, "
        "such as from a microphone: arecord -q -f S16_LE -r 16000 -t wav | fastcompress transcribe - --stream ...",
    )
    parser.add_argument(
        "files", nargs="+", metavar="FILE", help="audio: WAV, FLAC, MP3, Ogg, ...; - with --stream: WAV from stdin"
    )
    parser.add_argument("--model", required=True, metavar="FOLDER", help="folder of a model or of a run")
    parser.add_argument("--rule", help="compression in place of the model's; none: every frame")
    parser.add_argument("--prompt", default="", help="what to ask of the model, if it was trained with prompts")
    parser.add_argument("--batch-size", type=_positive, default=8, metavar="N")
    parser.add_argument("--num-beams", type=_positive, default=1, metavar="N", help="1: greedy search (default)")
    parser.add_argument("--max-new-tokens", type=_positive, default=256, metavar="N")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    stream = parser.add_argument_group("with --stream")
    stream.add_argument("--stream", action="store_true", help="write text as audio comes, as soon as it is final")
    for name, text in _STREAM.items():
        stream.add_argument(f"--{name.replace('_', '-')}", type=float, metavar="SECONDS", help=text)
    parser.set_defaults(run=_run_transcribe)


#: Settings of a stream (fastcompress.lalm.streaming), in seconds.
_STREAM = {
    "window": "that the encoder takes at once, and of an utterance at most (default all it can, or 30)",
    "look_ahead": "of audio after a frame until it is final (default 0.5)",
    "hop": "between two hypotheses; text is final where they agree (default 0.5)",
}


def _run_transcribe(options: argparse.Namespace) -> int:
    settings = {name: value for name in _STREAM if (value := getattr(options, name)) is not None}
    if options.stream:
        return _run_stream(options, settings)
    if settings:
        raise UserError(f"--{next(iter(settings)).replace('_', '-')} needs --stream")
    if "-" in options.files:
        raise UserError("- (standard input) needs --stream")
    from fastcompress.audio import AudioError
    from fastcompress.lalm.evaluation import transcribe
    from fastcompress.lalm.examples import Examples
    from fastcompress.lalm.manifest import Utterance, load_utterance

    model, processor = _load(options)
    utterances, failed = [], 0
    for file in options.files:
        utterance = Utterance(Path(file), "", "", prompt=options.prompt)
        try:
            samples = load_utterance(utterance, processor.sampling_rate)
        except AudioError as error:
            print_error(error)
            failed += 1
            continue
        seconds = len(samples) / processor.sampling_rate
        rate = processor.sampling_rate
        utterances.append(Utterance(Path(file), "", "", seconds, prompt=options.prompt, samples=(samples, rate)))
    examples = Examples(utterances, processor)
    if utterances:
        settings = {"num_beams": options.num_beams, "max_new_tokens": options.max_new_tokens, "do_sample": False}
        written, _ = transcribe(model, examples, options.batch_size, **settings)
        for utterance, text in zip(utterances, written, strict=True):
            if text is not None:
                print(f"{utterance.audio_filepath}: {text}" if len(options.files) > 1 else text)
    for reason in examples.skipped.values():
        print_error(reason)
        failed += 1
    if failed:
        return EXIT_ERROR if failed == len(options.files) else EXIT_SOME_FAILED
    return EXIT_OK


def _run_stream(options: argparse.Namespace, settings: dict[str, float]) -> int:
    from fastcompress.audio import AudioError
    from fastcompress.lalm.streaming import StreamingTranscriber

    if options.files.count("-") > 1:
        raise UserError("- (standard input) can be read once")
    model, processor = _load(options)
    done = 0
    for file in options.files:
        try:
            stream = StreamingTranscriber(
                model, processor, prompt=options.prompt, num_beams=options.num_beams,
                max_new_tokens=options.max_new_tokens, **settings,
            )  # fmt: skip
        except (NotImplementedError, ValueError) as error:
            raise UserError(f"--stream: {error}") from error
        if len(options.files) > 1:
            print(f"{file}: ", end="", flush=True)
        try:
            with _interrupt_ends_input() if file == "-" else contextlib.nullcontext():
                computing = _print_stream(stream, sys.stdin.buffer if file == "-" else file)
        except AudioError as error:
            if stream.text or len(options.files) > 1:
                print(flush=True)  # what was written stays a line
            print_error(error)
            continue
        print(flush=True)
        done += 1
        latency = stream.latency()
        first = "no text" if latency.first is None else f"first text after {latency.first:.2f} s"
        lagging = "" if latency.lagging is None else f", words {latency.lagging:.2f} s behind on average"
        print(f"{file}: {latency.seconds:.2f} s, computed in {computing:.2f} s; {first}{lagging}", file=sys.stderr)
    return EXIT_OK if done == len(options.files) else EXIT_SOME_FAILED if done else EXIT_ERROR


def _print_stream(stream: Any, source: Any) -> float:
    """Writes the text of an audio as it becomes final; returns the seconds that computing it took."""
    from fastcompress.audio import AudioError, audio_blocks

    computing = 0.0
    for block in audio_blocks(source, stream.rate, seconds=0.1):
        since = time.perf_counter()
        text = stream.feed(block)
        computing += time.perf_counter() - since
        if text:
            print(text, end="", flush=True)
    since = time.perf_counter()
    try:
        text = stream.finish()
    except ValueError as error:
        raise AudioError(f"{getattr(source, 'name', source)}: {error}") from error
    print(text, end="")
    return computing + time.perf_counter() - since


@contextlib.contextmanager
def _interrupt_ends_input() -> Iterator[None]:
    """The first Ctrl-C ends the program that writes into the pipe, and so the input, but not this one."""
    previous = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, lambda *_: signal.signal(signal.SIGINT, previous))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def _load(options: argparse.Namespace) -> tuple[Any, Any]:
    import torch

    from fastcompress import Rule
    from fastcompress.lalm.checkpoints import one_line
    from fastcompress.lalm.runs import RunError, load_model

    _quiet()
    if options.rule not in (None, "none"):
        try:
            Rule.from_string(options.rule)
        except ValueError as error:
            raise UserError(f"--rule: {error}") from error
    try:
        torch.empty(0, device=options.device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch without CUDA
        raise UserError(f"--device {options.device}: {one_line(error)}") from error
    try:
        return load_model(options.model, options.rule, options.device)
    except (RunError, RuntimeError) as error:
        raise UserError(error) from error


def _quiet() -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()  # of loading weights
    logging.set_verbosity_error()


def _positive(text: str) -> int:
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 on, got {text!r}")
    return value

"""``fastcompress transcribe``."""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastcompress.cli.errors import EXIT_ERROR, EXIT_OK, EXIT_SOME_FAILED, UserError, print_error
from fastcompress.cli.models import add_model_options, clipped, load_model_and_processor


def add_command(commands: Any) -> None:
    """Declare the command and its options."""
    parser = commands.add_parser(
        "transcribe",
        help="transcribe audio files or a stream",
        description="Print the transcript of each audio file, one line per file. With --stream, print text while the "
        "audio arrives, for example from a microphone: "
        "arecord -q -f S16_LE -r 16000 -t wav | fastcompress transcribe - --stream ...",
    )
    parser.add_argument(
        "files", nargs="+", metavar="FILE", help="audio: WAV, FLAC, MP3, Ogg, ...; - with --stream: WAV from stdin"
    )
    parser.add_argument("--model", required=True, metavar="FOLDER", help="folder of a model or of a run")
    add_model_options(parser, batch_size=8, max_new_tokens=256)
    parser.add_argument("--prompt", default="", help="instruction, for models that were trained with prompts")
    stream = parser.add_argument_group("streaming")
    stream.add_argument("--stream", action="store_true", help="print text as soon as it is final")
    for name, text in _STREAM.items():
        stream.add_argument(f"--{name.replace('_', '-')}", type=float, metavar="SECONDS", help=text)
    parser.set_defaults(run=_run_transcribe)


#: Arguments of ``fastcompress.lalm.streaming.StreamingTranscriber`` in seconds, which has the defaults.
_STREAM = {
    "window": "longest utterance that the encoder takes in one call (default: its window, at most 30)",
    "look_ahead": "audio after a frame until the frame is final (default: 0.5)",
    "hop": "time between two hypotheses; text is final where they agree (default: 0.5)",
}


def _run_transcribe(options: argparse.Namespace) -> int:
    settings = {name: value for name in _STREAM if (value := getattr(options, name)) is not None}
    if options.stream:
        return _run_stream(options, settings)
    if settings:
        raise UserError(f"--{next(iter(settings)).replace('_', '-')} needs --stream")
    if "-" in options.files:
        raise UserError("- (standard input) needs --stream")
    from tqdm import tqdm

    from fastcompress.training.usable import Skipped, print_line

    model, processor = load_model_and_processor(options)
    skipped = Skipped(label="fastcompress: error: ", listed=len(options.files))
    size = options.batch_size
    done = cut = 0
    terminal = sys.stderr.isatty()
    with tqdm(total=len(options.files), unit="file", file=sys.stderr, disable=not terminal, leave=False) as bar:
        try:
            for begin in range(0, len(options.files), size):
                files = options.files[begin : begin + size]
                texts, clipped_here = _texts(model, processor, files, skipped, options)
                for file, text in zip(files, texts, strict=True):
                    if text is not None:
                        tqdm.write(f"{file}: {text}" if len(options.files) > 1 else text, file=sys.stdout)
                        done += 1
                sys.stdout.flush()  # each batch as soon as it is done
                cut += clipped_here
                bar.update(len(files))
        except KeyboardInterrupt:
            print_line(f"fastcompress: interrupted; {done} of {len(options.files)} files are done")
            raise
    if cut:
        print_line(f"fastcompress: {clipped(cut, done, options)}")
    if failed := len(options.files) - done:
        return EXIT_ERROR if failed == len(options.files) else EXIT_SOME_FAILED
    return EXIT_OK


def _texts(
    model: Any, processor: Any, files: list[str], skipped: Any, options: argparse.Namespace
) -> tuple[list[str | None], int]:
    """Return the text of each file, ``None`` if it cannot be read, and the number of texts that were cut."""
    from fastcompress.training.evaluation import transcribe
    from fastcompress.training.examples import Examples
    from fastcompress.training.manifest import Utterance

    utterances = [Utterance(Path(file), "", "", prompt=options.prompt) for file in files]
    limits = {"num_beams": options.num_beams, "max_new_tokens": options.max_new_tokens, "do_sample": False}
    examples = Examples(utterances, processor, report=skipped)
    written, totals = transcribe(model, examples, len(files), **limits)
    return written, int(totals["clipped"])


def _run_stream(options: argparse.Namespace, settings: dict[str, float]) -> int:
    from fastcompress.audio import AudioError
    from fastcompress.lalm.streaming import StreamingTranscriber

    if options.files.count("-") > 1:
        raise UserError("- (standard input) can be read once")
    model, processor = load_model_and_processor(options)
    done = 0
    for file in options.files:
        try:
            stream = StreamingTranscriber(
                model,
                processor,
                prompt=options.prompt,
                num_beams=options.num_beams,
                max_new_tokens=options.max_new_tokens,
                **settings,
            )
        except (NotImplementedError, ValueError) as error:
            raise UserError(f"--stream: {error}") from error
        if len(options.files) > 1:
            print(f"{file}: ", end="", flush=True)
        try:
            with _interrupt_ends_input() if file == "-" else contextlib.nullcontext():
                computing = _print_stream(stream, sys.stdin.buffer if file == "-" else file)
        except AudioError as error:
            if stream.text or len(options.files) > 1:
                print(flush=True)  # keep the printed text as a line
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
    """Print the text of an audio as it becomes final; return the seconds of computation."""
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
    """Ignore the first Ctrl-C: it ends the program that writes to the pipe, and with it the input."""
    previous = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, lambda *_: signal.signal(signal.SIGINT, previous))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)

"""The command line: ``fastcompress inspect`` and ``fastcompress info``; more in ``cli_lalm`` and ``cli_integrations``.

Each subcommand is a pair of functions: ``_add_<name>`` declares its arguments, ``_run_<name>`` does the work and
returns the exit code. What only one subcommand needs is imported inside it, so that the others run without it.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
from pathlib import Path
from typing import Any, NoReturn

from fastcompress import LabelChange, Rule, __version__, cli_integrations, cli_lalm
from fastcompress.cli_errors import (
    EXIT_ERROR,
    EXIT_INTERRUPTED,
    EXIT_OK,
    EXIT_SOME_FAILED,
    UserError,
    check_writable,
    print_error,
)

# Which extra of the package brings a module that is missing.
_EXTRA = {name: "audio" for name in ("numpy", "soundfile", "soxr", "matplotlib", "tqdm")} | {"transformers": "encoders"}
_EXTRA |= {name: "lalm" for name in ("accelerate", "jiwer", "peft", "sacrebleu", "scipy", "tokenizers", "yaml")}

_BAR_FROM_SECONDS = 60.0  # of audio: without a terminal, shorter work shows no bar


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see: {self.prog} --help)")


def make_parser() -> argparse.ArgumentParser:
    """Every command and its options."""
    parser = _Parser(prog="fastcompress", description="Compression of audio frames for audio language models.")
    parser.add_argument("--version", action="version", version=f"fastcompress {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    _add_inspect(commands)
    _add_info(commands)
    cli_lalm.add_commands(commands)
    cli_integrations.add_commands(commands)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns 0, or 1 (some files failed), 2 (nothing was done), 130 (interrupted)."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names of files need not be text
    try:
        options = make_parser().parse_args(arguments)
        code: int = options.run(options)
        return code
    except UserError as error:
        print_error(error)
        return EXIT_ERROR
    except ModuleNotFoundError as error:
        module = (error.name or "").partition(".")[0]
        if module not in _EXTRA:
            raise
        print_error(f"this needs {module}: pip install 'fastcompress[{_EXTRA[module]}]'")
        return EXIT_ERROR
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader (`head`, `less`) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the flush at exit fails again
        return EXIT_ERROR


def _add_inspect(commands: Any) -> None:
    parser = commands.add_parser(
        "inspect",
        help="what each compression rule does to an audio file: a table, and a picture with --png",
        description="Compresses the frames of each audio file by several rules and prints what comes out: tokens, "
        "ratio (frames a token), tokens a second, and milliseconds of the compression itself. The same rules run on "
        "white noise of the same length: local maxima, for one, make even noise three times shorter.",
    )
    parser.add_argument("files", nargs="+", metavar="FILE", help="audio: WAV, FLAC, MP3, Ogg, ...")
    parser.add_argument(
        "--rule",
        dest="rules",
        action="append",
        type=_rule,
        metavar="RULE",
        help="a rule instead of the default ones; may be repeated. Examples: uniform:3, uniform:size=3,tail=drop, "
        "local-max, local-max:order=2,threshold=0.1, local-max:prominence=0.15, threshold:0.15",
    )
    parser.add_argument(
        "--encoder",
        metavar="FOLDER",
        help="compress the output of this transformers audio encoder (a local folder) instead of log-mel frames",
    )
    parser.add_argument(
        "--png", type=Path, metavar="PATH", help="write a picture: a .png file, or a folder for one picture a file"
    )
    parser.add_argument("--start", type=_seconds, default=0.0, help="where the picture starts, in seconds (default 0)")
    parser.add_argument(
        "--seconds", type=_positive_seconds, default=10.0, help="how much the picture shows, in seconds (default 10)"
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the tables and the segments' times as JSON")
    parser.add_argument("--no-noise", dest="noise", action="store_false", help="leave out the white noise")
    parser.set_defaults(run=_run_inspect)


def _run_inspect(options: argparse.Namespace) -> int:
    from tqdm import tqdm  # noqa: F401  (missing: say so now, not in the middle)

    from fastcompress import inspection
    from fastcompress.audio import AudioError

    pictures = _picture_paths(options.files, options.png)
    if pictures:
        from fastcompress import plotting
    for picture in pictures:
        check_writable(f"--png {options.png}", picture)
    if options.json:
        check_writable(f"--json {options.json}", options.json)
    source = _load_encoder(options.encoder) if options.encoder else inspection.LogMel()
    failed: list[str] = []
    tables: list[dict[str, Any]] = []
    for number, file in enumerate(options.files):
        progress = _ProgressBars(file)
        try:
            inspected = inspection.inspect_audio(file, options.rules, source, options.noise, progress)
        except (AudioError, inspection.EncoderError) as error:
            progress.close()  # before the line, not through it
            failed.append(file)
            print_error(error)
            continue
        progress.close()
        if tables:
            print()
        print(inspection.format_table(inspected), flush=True)
        tables.append(inspection.to_dict(inspected))
        if pictures:
            try:
                plotting.draw(inspected, pictures[number], options.start, options.seconds)
                print(f"picture: {pictures[number]}", flush=True)
            except (ValueError, OSError) as error:
                failed.append(file)
                print_error(f"{file}: {error}")
    if options.json:
        try:
            options.json.write_text(json.dumps(tables), encoding="utf-8")
        except OSError as error:
            raise UserError(f"--json {options.json}: {(error.strerror or str(error)).lower()}") from error
    if failed and len(options.files) > 1:
        print_error(f"{len(failed)} of {len(options.files)} files failed: {', '.join(failed)}")
    if not failed:
        return EXIT_OK
    return EXIT_ERROR if len(failed) == len(options.files) else EXIT_SOME_FAILED


def _load_encoder(path: str) -> Any:
    from transformers.utils import logging

    from fastcompress.inspection import Encoder, EncoderError

    if not sys.stderr.isatty():
        logging.disable_progress_bar()  # of loading weights
    try:
        return Encoder(path)
    except EncoderError as error:
        raise UserError(error) from error


def _picture_paths(files: list[str], png: Path | None) -> list[Path]:
    """Where the picture of each file goes; empty without --png."""
    if png is None:
        return []
    if png.suffix.lower() == ".png" and not png.is_dir():
        if len(files) > 1:
            raise UserError(f"--png {png}: one picture for {len(files)} files; name a folder instead")
        return [png]
    if png.exists() and not png.is_dir():
        raise UserError(f"--png {png}: neither a folder nor a .png file")
    pictures: dict[Path, str] = {}
    for file in files:
        picture = png / f"{Path(file).stem}.png"
        if picture in pictures:
            raise UserError(f"--png {png}: {pictures[picture]} and {file} would both be drawn to {picture}")
        pictures[picture] = file
    return list(pictures)


def _add_info(commands: Any) -> None:
    parser = commands.add_parser(
        "info",
        help="versions, what the compiled library has in it, and which backend each op will use",
        description="Prints versions, what the compiled library has in it, the CUDA devices, and which backend each op "
        "will use on CPU and on CUDA tensors, and why. FASTCOMPRESS_BACKEND=cuda, triton or reference chooses another.",
    )
    parser.add_argument("--json", action="store_true", help="print it as JSON")
    parser.add_argument("--models", action="store_true", help="print which audio LLMs can be compressed")
    parser.set_defaults(run=_run_info)


def _run_info(options: argparse.Namespace) -> int:
    from fastcompress import info

    if options.models:
        from fastcompress.integrations.transformers import support, table

        print(json.dumps(support(), indent=1) if options.json else table())
        return EXIT_OK
    found = info.collect()
    print(json.dumps(found, indent=1) if options.json else info.format_text(found))
    return EXIT_OK


class _ProgressBars:
    """A tqdm bar on stderr for each stage of the work on one file.

    On a terminal a bar appears once a stage has taken half a second. Elsewhere (a log file) only audio of more than a
    minute gets one, with a line every five seconds.
    """

    def __init__(self, file: str) -> None:
        self._file = os.path.basename(file)
        self._stage = ""
        self._bar: Any = None

    def __call__(self, stage: str, done: float, total: float) -> None:
        from tqdm import tqdm

        if stage != self._stage:
            self.close()
            self._stage = stage
            terminal = sys.stderr.isatty()
            self._bar = tqdm(
                desc=f"{self._file}: {stage}",
                total=round(total),
                bar_format="{desc} {percentage:3.0f}% |{bar:30}| {n:.0f}/{total:.0f} s of audio, {remaining} left",
                file=sys.stderr,
                disable=not terminal and total <= _BAR_FROM_SECONDS,
                delay=0.5 if terminal else 0.0,
                mininterval=0.1 if terminal else 5.0,
                leave=not terminal,
            )
        self._bar.update(min(done, self._bar.total or 0) - self._bar.n)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _rule(text: str) -> Rule:
    try:
        rule = Rule.from_string(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    if isinstance(rule, LabelChange):
        raise argparse.ArgumentTypeError(f"{rule.name} needs a label a frame, which an audio file does not give")
    return rule


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a time in seconds")
    return value


def _positive_seconds(text: str) -> float:
    value = _seconds(text)
    if value == 0:
        raise argparse.ArgumentTypeError("must be more than 0 seconds")
    return value


if __name__ == "__main__":
    sys.exit(main())

"""``fastcompress inspect``."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from fastcompress import LabelChange, Rule
from fastcompress.cli.errors import (
    EXIT_ERROR,
    EXIT_OK,
    EXIT_SOME_FAILED,
    UserError,
    check_writable,
    print_error,
)
from fastcompress.files import reason

_OTHER_PICTURES = (".bmp", ".eps", ".gif", ".jpeg", ".jpg", ".pdf", ".ps", ".svg", ".tif", ".tiff", ".webp")
_BAR_FROM_SECONDS = 60.0  # of audio; without a terminal, shorter audio shows no bar


def add_command(commands: Any) -> None:
    """Declare the command and its options."""
    parser = commands.add_parser(
        "inspect",
        help="compression of an audio file by each rule, as a table, and as a picture with --png",
        description="Compress the frames of each audio file by several rules and print the number of tokens, the ratio "
        "(frames per token), tokens per second, and the time of the compression in milliseconds. The same rules run on "
        "white noise of the same length as a baseline: local maxima compress even noise 3x.",
    )
    parser.add_argument("files", nargs="+", metavar="FILE", help="audio file: WAV, FLAC, MP3, Ogg, ...")
    parser.add_argument(
        "--rule",
        dest="rules",
        action="append",
        type=_rule,
        metavar="RULE",
        help="rule to use instead of the default ones; can be repeated. Examples: uniform:3, uniform:size=3,tail=drop, "
        "local-max, local-max:order=2,threshold=0.1, local-max:prominence=0.15, threshold:0.15",
    )
    parser.add_argument(
        "--encoder",
        metavar="FOLDER",
        help="compress the output of this model instead of log-mel frames: a local folder of an audio encoder of "
        "transformers, of an audio LLM that `fastcompress info --models` lists, or of a run of train",
    )
    parser.add_argument(
        "--before-projector",
        action="store_true",
        help="of an audio LLM, compress the encoder's frames and not the projector's output",
    )
    parser.add_argument(
        "--ratio",
        type=_ratio,
        metavar="R",
        help="search the thresholds that leave R frames per token, for all files together, and print them with the "
        "quantiles of the distances; --json then writes an object with files and search",
    )
    parser.add_argument(
        "--png",
        type=Path,
        metavar="PATH",
        help="write a picture: a .png file, or a folder that gets one picture per audio file",
    )
    parser.add_argument("--start", type=_seconds, default=0.0, help="start of the picture, in seconds (default: 0)")
    parser.add_argument(
        "--seconds", type=_positive_seconds, default=10.0, help="length of the picture, in seconds (default: 10)"
    )
    parser.add_argument(
        "--json", type=Path, metavar="PATH", help="write the tables and the times of the segments as JSON"
    )
    parser.add_argument("--no-noise", dest="noise", action="store_false", help="skip the white noise")
    parser.set_defaults(run=_run_inspect)


def _run_inspect(options: argparse.Namespace) -> int:
    from tqdm import tqdm  # noqa: F401  (fail now if it is missing)

    from fastcompress.audio import AudioError
    from fastcompress.inspection import search as searching
    from fastcompress.inspection import table

    pictures = _picture_paths(options.files, options.png)
    if pictures:
        from fastcompress.inspection import picture as drawing
    for picture in pictures:
        check_writable(f"--png {options.png}", picture)
    if options.json:
        check_writable(f"--json {options.json}", options.json)
    if options.before_projector and not options.encoder:
        raise UserError("--before-projector needs --encoder, with the folder of an audio LLM")
    source = _load_encoder(options.encoder, options.before_projector) if options.encoder else table.LogMel()
    failed: list[str] = []
    tables: list[dict[str, Any]] = []
    distances: list[Any] = []
    for number, file in enumerate(options.files):
        progress = _ProgressBars(file)
        try:
            inspected = table.inspect_audio(file, options.rules, source, options.noise, progress)
        except (AudioError, table.EncoderError) as error:
            progress.close()
            failed.append(file)
            print_error(error)
            continue
        progress.close()
        if tables:
            print()
        print(table.format_table(inspected), flush=True)
        tables.append(table.to_dict(inspected))
        distances.append(inspected.distance)
        if pictures:
            try:
                drawing.draw(inspected, pictures[number], options.start, options.seconds)
                print(f"picture: {pictures[number]}", flush=True)
            except (ValueError, OSError) as error:
                failed.append(file)
                print_error(f"{file}: {reason(error)}")
    content: Any = tables
    if options.ratio and tables:
        found = searching.search(distances, options.ratio, sum(file["seconds"] for file in tables))
        print()
        print(searching.format_search(found), flush=True)
        content = {"files": tables, "search": searching.to_dict(found)}
    if options.json:
        try:
            options.json.write_text(json.dumps(content), encoding="utf-8")
        except OSError as error:
            raise UserError(f"--json {options.json}: {reason(error)}") from error
    if failed and len(options.files) > 1:
        print_error(f"{len(failed)} of {len(options.files)} files failed: {', '.join(failed)}")
    if not failed:
        return EXIT_OK
    return EXIT_ERROR if len(failed) == len(options.files) else EXIT_SOME_FAILED


def _load_encoder(path: str, before_projector: bool) -> Any:
    from transformers.utils import logging

    from fastcompress.inspection.audio_llm import load_source
    from fastcompress.inspection.table import EncoderError

    if not sys.stderr.isatty():
        logging.disable_progress_bar()  # of loading weights
    try:
        return load_source(path, before_projector)
    except EncoderError as error:
        raise UserError(error) from error


def _picture_paths(files: list[str], png: Path | None) -> list[Path]:
    """Return the path of each file's picture; empty without --png."""
    if png is None:
        return []
    if png.suffix.lower() == ".png" and not png.is_dir():
        if len(files) > 1:
            raise UserError(f"--png {png}: one picture for {len(files)} files; name a folder instead")
        return [png]
    if png.exists() and not png.is_dir():
        raise UserError(f"--png {png}: neither a folder nor a .png file")
    if png.suffix.lower() in _OTHER_PICTURES and not png.is_dir():
        raise UserError(f"--png {png}: pictures are PNG files; name {png.with_suffix('.png')}, or a folder")
    pictures: dict[Path, str] = {}
    for file in files:
        picture = png / f"{Path(file).stem}.png"
        if picture in pictures:
            raise UserError(f"--png {png}: {pictures[picture]} and {file} would both be written to {picture}")
        pictures[picture] = file
    return list(pictures)


class _ProgressBars:
    """A tqdm bar on stderr for each stage of the work on one file.

    On a terminal, a bar appears after half a second. Elsewhere, for example in a log file, only audio of more than a
    minute gets one, which prints a line every five seconds.
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
        raise argparse.ArgumentTypeError(f"{rule.name} needs a label per frame, which an audio file does not have")
    return rule


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a time in seconds")
    return value


def _ratio(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 1 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be more than 1, got {text!r}")
    return value


def _positive_seconds(text: str) -> float:
    value = _seconds(text)
    if value == 0:
        raise argparse.ArgumentTypeError("must be more than 0 seconds")
    return value

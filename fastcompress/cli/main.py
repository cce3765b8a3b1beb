"""The command line. ``fastcompress --help`` lists the commands.

Each command is a module with ``add_command``, which declares its options, and a function that does the work and returns
the exit code. Packages that only one command needs are imported inside that function.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, TextIO, cast

from fastcompress import __version__
from fastcompress.cli import completion, evaluate, export, finetune, info, inspect, make_data, sweep, train, transcribe
from fastcompress.cli.errors import (
    EXIT_CODES,
    EXIT_ERROR,
    EXIT_INTERRUPTED,
    GuardedStdout,
    StdoutError,
    UserError,
    did_you_mean,
    one_line_warnings,
    print_error,
)
from fastcompress.cli.settings import spell_flags
from fastcompress.training.settings import SettingsError

if TYPE_CHECKING:
    from fastcompress.training.parsing import SettingsParser

# Which extra of the package installs a module that is missing.
_EXTRA = {name: "audio" for name in ("av", "numpy", "soxr", "matplotlib", "tabulate", "tqdm")}
_EXTRA |= {"transformers": "encoders", "whisper_normalizer": "normalize", "shtab": "completion"}
_EXTRA |= {
    name: "lalm"
    for name in (
        "accelerate", "docstring_parser", "jiwer", "jsonargparse", "peft", "sacrebleu", "scipy", "tokenizers", "yaml",
    )
}  # fmt: skip


class Parser(argparse.ArgumentParser):
    """Parser that raises ``UserError``.

    Attributes:
        build: Function that makes the parser of a command whose options are settings. It is called when the command
            runs, so that other commands need not import jsonargparse.
    """

    build: Callable[[], SettingsParser] | None = None

    def full(self) -> argparse.ArgumentParser:
        """Return the parser that has all options."""
        return self if self.build is None else self.build()

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """Parse, with the parser of the settings if there is one."""
        if self.build is None:
            return super().parse_known_args(args, namespace)
        try:
            flags, options = self.build().parse_flags(args)
        except SettingsError as error:
            self.error(spell_flags(str(error)))
        return argparse.Namespace(run=self.get_default("run"), flags=flags, **options), []

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse, and report the nearest option for an unknown one."""
        options, rest = self.parse_known_args(args, namespace)
        if rest:
            command = self.commands[options.command]
            known = [option for action in command._actions for option in action.option_strings]
            hint = did_you_mean(rest[0].partition("=")[0], known) if rest[0].startswith("-") else ""
            command.error(f"unrecognized arguments: {' '.join(rest)}{hint}")
        return options

    @property
    def commands(self) -> dict[str, Parser]:
        """Parsers of the commands by name."""
        return next(action.choices for action in self._actions if isinstance(action, argparse._SubParsersAction))

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Raise an error for a value that is not a choice, with the nearest choice."""
        if action.choices is not None and value not in action.choices:
            is_command = isinstance(action, argparse._SubParsersAction)
            known = list(map(str, action.choices))
            hint = did_you_mean(str(value), known) or f"; choose one of {', '.join(known)}"
            message = f"unknown {'command' if is_command else 'choice'} {value!r}{hint}"
            raise argparse.ArgumentError(None if is_command else action, message)

    def error(self, message: str) -> NoReturn:
        """Raise a mistake in the options.

        Raises:
            UserError: Always.
        """
        raise UserError(f"{message} (see: {self.prog} --help)")


def make_parser() -> Parser:
    """Make the parser of every command and its options."""
    parser = Parser(
        prog="fastcompress",
        description="Compression of audio frames for audio language models.",
        epilog=f"Options of a command: fastcompress COMMAND --help. {EXIT_CODES}",
    )
    parser.add_argument("--version", action="version", version=f"fastcompress {__version__}")
    parser.set_defaults(parser=parser)  # for the command that prints all options
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    for command in (inspect, info, make_data, train, evaluate, transcribe, finetune, sweep, export, completion):
        command.add_command(commands)
    for command_parser in commands.choices.values():
        command_parser.epilog = EXIT_CODES
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code (``fastcompress.cli.errors``)."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names of files may be invalid UTF-8
    stdout = sys.stdout
    sys.stdout = cast(TextIO, GuardedStdout(stdout))
    try:
        with one_line_warnings():
            try:
                code = _run(arguments)
            finally:
                sys.stdout.flush()  # fail here, and not in the interpreter's exit
    except StdoutError as error:
        if not isinstance(error.__cause__, BrokenPipeError):  # the reader (`head`, `less`) has closed the pipe
            print_error(error)
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stdout.fileno())  # otherwise the flush at exit fails again
        return EXIT_ERROR
    finally:
        sys.stdout = stdout
    return code


def _run(arguments: Sequence[str] | None) -> int:
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


if __name__ == "__main__":
    sys.exit(main())

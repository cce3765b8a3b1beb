"""The command line: ``fastcompress inspect`` and ``fastcompress info``; more in ``cli_lalm`` and ``cli_integrations``.

Each subcommand is a pair of functions: ``_add_<name>`` declares its arguments, ``_run_<name>`` does the work and
returns the exit code. What only one subcommand needs is imported inside it, so that the others run without it.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from typing import NoReturn

from fastcompress import __version__
from fastcompress.cli import evaluate, finetune, info, inspect, make_data, train, transcribe
from fastcompress.cli.errors import (
    EXIT_ERROR,
    EXIT_INTERRUPTED,
    UserError,
    print_error,
)

# Which extra of the package brings a module that is missing.
_EXTRA = {name: "audio" for name in ("av", "numpy", "soxr", "matplotlib", "tabulate", "tqdm")}
_EXTRA |= {"transformers": "encoders"}
_EXTRA |= {name: "lalm" for name in ("accelerate", "jiwer", "peft", "sacrebleu", "scipy", "tokenizers", "yaml")}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see: {self.prog} --help)")


def make_parser() -> argparse.ArgumentParser:
    """Every command and its options."""
    parser = _Parser(prog="fastcompress", description="Compression of audio frames for audio language models.")
    parser.add_argument("--version", action="version", version=f"fastcompress {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    for command in (inspect, info, make_data, train, evaluate, transcribe, finetune):
        command.add_command(commands)
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


if __name__ == "__main__":
    sys.exit(main())

"""``fastcompress completion``: completion of commands, options, choices and paths by the shell.

shtab writes a script that runs without Python. argcomplete would start this program, and import torch, at every press
of the tab key.
"""

from __future__ import annotations

import argparse
from typing import Any, Literal, get_args, get_origin

from fastcompress.cli.errors import EXIT_OK
from fastcompress.training.settings import type_hints

_SHELLS = ("bash", "zsh", "fish")
_FILES = ("FILE", "MANIFEST", "PATH")
_FOLDERS = ("FOLDER", "MODEL")


def add_command(commands: Any) -> None:
    """Declare the command and its options."""
    parser = commands.add_parser(
        "completion",
        help="print a script with which the shell completes commands and options",
        description="Print a script with which the shell completes commands, options and paths. For bash: "
        "fastcompress completion bash > ~/.local/share/bash-completion/completions/fastcompress. "
        "For fish: fastcompress completion fish > ~/.config/fish/completions/fastcompress.fish. "
        "For zsh: fastcompress completion zsh > _fastcompress, in a folder of $fpath.",
    )
    parser.add_argument("shell", choices=_SHELLS, help="bash, zsh or fish")
    parser.set_defaults(run=_run_completion)


def _run_completion(options: argparse.Namespace) -> int:
    import shtab

    parser = options.parser
    for name, command in parser.commands.items():
        full = parser.commands[name] = command.full()
        full.prog = f"{parser.prog} {name}"
        hints = type_hints(full.settings) if hasattr(full, "settings") else {}
        for action in full._actions:
            if get_origin(hints.get(action.dest)) is Literal:
                action.choices = get_args(hints[action.dest])
            metavar = action.metavar if isinstance(action.metavar, str) else ""
            if metavar in _FILES:
                action.complete = shtab.FILE
            elif metavar in _FOLDERS:
                action.complete = shtab.DIRECTORY
    print(shtab.complete(parser, options.shell))
    return EXIT_OK

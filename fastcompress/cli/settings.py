"""Options of ``train`` and ``finetune``, which are made from their settings and read from flags and a YAML file."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from fastcompress.cli.errors import EXIT_CODES, UserError
from fastcompress.training.settings import Settings, SettingsError

if TYPE_CHECKING:
    from fastcompress.training.parsing import SettingsParser

S = TypeVar("S", bound=Settings)


def make_settings_parser(
    settings: type[Settings], command: str, required: str, description: str, add_options: Callable[[Any], None]
) -> SettingsParser:
    """Make the parser of a command that trains.

    Args:
        settings: Settings of the command.
        command: Name of the command.
        required: Required flags, for the usage line.
        description: Description for ``--help``.
        add_options: Function that adds options that are not settings.
    """
    from fastcompress.training.parsing import SettingsParser

    prog = f"fastcompress {command}"
    parser = SettingsParser(
        settings, prog=prog, usage=f"{prog} {required}\n       [options]", description=description, epilog=EXIT_CODES
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="YAML file of settings, with the names of the options below, such as max_steps or max-steps; options of "
        "the command line override it. The run.yaml of another run can be used",
    )
    parser.add_argument(
        "--resume", action="store_true", help="Continue the run in --output-dir after its last complete checkpoint"
    )
    add_options(parser)
    parser.add_settings()
    return parser


@dataclass
class Given(Generic[S]):
    """Settings from a command line and its ``--config``.

    Attributes:
        settings: Class of the settings.
        flags: Settings from the command line.
        config: YAML file, if there is one.
        values: Settings from that file.
    """

    settings: type[S]
    flags: dict[str, Any]
    config: Path | None
    values: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, settings: type[S], options: argparse.Namespace) -> Given[S]:
        """Read the file that the options name.

        Raises:
            UserError: The file cannot be used.
        """
        from fastcompress.training.parsing import read_values

        given = cls(settings, options.flags, Path(options.config) if options.config else None)
        if given.config is not None:
            try:
                given.values = read_values(settings, given.config)
            except SettingsError as error:
                raise UserError(error) from error
        return given

    def make(self, resume: bool) -> S:
        """Make the settings. To resume a run, only its folder is needed.

        Raises:
            SettingsError: A value is missing or cannot be used.
        """
        from fastcompress.training.parsing import build, read_record

        values = self.values | self.flags
        if resume and "output_dir" not in values:
            raise SettingsError("`output_dir` is missing: the folder of the run to resume")
        if resume and values.keys() == {"output_dir"}:
            return read_record(self.settings, Path(values["output_dir"]))
        return build(self.settings, values)

    def explain(self, error: SettingsError) -> str:
        """Return the message of an error with the names that the user typed, and the file if it has the setting."""
        names = re.findall(r"`(\w+)`", str(error))
        if names and names[0] in self.values and names[0] not in self.flags:
            return f"{self.config}: {error}"
        return spell_flags(str(error))


def resume_hint(command: str, folder: Path) -> str:
    """Return the command line that resumes a run."""
    return f"`fastcompress {command} --output-dir {shlex.quote(str(folder))} --resume`"


def spell_flags(message: str) -> str:
    """Return a message with flags in place of the names of settings."""
    return re.sub(r"`(\w+)`", lambda found: f"--{found[1].replace('_', '-')}", message)

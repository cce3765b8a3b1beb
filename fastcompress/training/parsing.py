"""Flags and YAML files of the settings, by jsonargparse: types, defaults and help come from the dataclasses."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, fields
from inspect import getdoc
from pathlib import Path
from types import NoneType
from typing import Any, Literal, NoReturn, TypeVar, get_args, get_origin, get_type_hints

import docstring_parser
import jsonargparse
import yaml

from fastcompress.files import reason, write_file
from fastcompress.training.settings import Settings, SettingsError, type_hints

#: The settings of a run, in its folder; ``--config`` reads this file, too.
RECORD = "run.yaml"

_KINDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false", NoneType: "null"}
_METAVARS = {str: "TEXT", int: "INT", float: "FLOAT"}

S = TypeVar("S", bound=Settings)


class _HelpFormatter(argparse.HelpFormatter):
    """The default formatter, except that it does not break names of flags."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(text, width, break_on_hyphens=False)


class SettingsParser(jsonargparse.ArgumentParser):
    """Parser with a flag for every setting of a class, in its groups.

    Args:
        settings: The class.
        arguments: Arguments of ``argparse.ArgumentParser``.
    """

    def __init__(self, settings: type[Settings], **arguments: Any) -> None:
        super().__init__(
            formatter_class=_HelpFormatter,
            allow_abbrev=False,
            exit_on_error=False,
            print_config=None,
            **arguments,
        )
        self.settings: type[Settings] = settings

    def add_settings(self) -> None:
        """Add the groups, after what the caller has added."""
        by_name = {field.name: field for field in fields(self.settings)}
        metavars = get_type_hints(self.settings, include_extras=True)
        help_texts = _help_texts(self.settings)
        for title, names in self.settings.groups().items():
            group = self.add_argument_group(title)
            for name in names:
                hint, default = type_hints(self.settings)[name], by_name[name].default
                text = help_texts[name]
                if default is MISSING:
                    text += " (required)"
                elif default is not None:
                    text += f" (default: {_show(default)})"
                arguments: dict[str, Any] = {"help": text, "default": None if default is MISSING else default}
                if bool in (hint, *get_args(hint)):
                    arguments["action"] = jsonargparse.ActionYesNo(no_prefix="no-")
                else:
                    arguments["type"] = hint
                    if get_origin(hint) is not Literal:
                        arguments["metavar"] = _metavar(metavars[name])
                group.add_argument(flag(name), **arguments)

    def parse_flags(self, arguments: Sequence[str] | None) -> tuple[dict[str, Any], dict[str, Any]]:
        """Parse a command line.

        Returns:
            The settings that were given, and the values of the other options.

        Raises:
            SettingsError: A flag is unknown or has a value of another type.
        """
        given_arguments = sys.argv[1:] if arguments is None else arguments
        try:
            parsed = vars(self.parse_args(_joined(given_arguments, self.settings.repeated), defaults=False))
        except ArithmeticError as error:  # of an integer that no float can hold
            raise SettingsError(reason(error)) from error
        # jsonargparse puts a zero-width space before names of methods of its Namespace, such as `keys`.
        given = {name.removeprefix("\u200b"): value for name, value in parsed.items()}
        settings = {name: value for name, value in given.items() if name in type_hints(self.settings)}
        others = {
            action.dest: action.default for action in self._actions if action.dest not in type_hints(self.settings)
        }
        return settings, others | {name: value for name, value in given.items() if name not in settings}

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise a mistake in flags as one line.

        Raises:
            SettingsError: Always.
        """
        raise SettingsError(self._explain(message)) from ex

    def _explain(self, message: str) -> str:
        found = re.match(r'Parser key "(\w+)"', message)
        value = re.search(r"value: (.*)\Z", message, re.DOTALL)
        if found and value and found[1] in type_hints(self.settings):
            return _wrong_type(self.settings, found[1], value[1])
        unknown = re.match(r"unrecognized arguments: (--[\w-]+)", message)
        if unknown:
            known = [option for action in self._actions for option in action.option_strings]
            return f"unknown option {unknown[1]}; the nearest known option is {_nearest(unknown[1], known)}"
        return " ".join(message.split())


def _joined(arguments: Sequence[str], names: Sequence[str]) -> list[str]:
    """Return arguments in which the repeated flags of the named settings are one, with spaces between the values."""
    rest: list[str] = []
    values: dict[str, list[str]] = {flag(name): [] for name in names}
    i = 0
    while i < len(arguments):
        name, sign, value = arguments[i].partition("=")
        if name in values and sign:
            values[name].append(value)
        elif name in values and i + 1 < len(arguments) and not arguments[i + 1].startswith("--"):
            values[name].append(arguments[i + 1])
            i += 1
        else:
            rest.append(arguments[i])
        i += 1
    return rest + [f"{name}={' '.join(given)}" for name, given in values.items() if given]


def flag(name: str) -> str:
    """Return the flag of a setting."""
    return f"--{name.replace('_', '-')}"


def build(settings: type[S], values: Mapping[str, Any]) -> S:
    """Make settings of checked values.

    Raises:
        SettingsError: A required value is missing, or a value cannot be used.
    """
    for field in fields(settings):
        if field.default is MISSING and field.name not in values:
            raise SettingsError(f"`{field.name}` is missing")
    return settings(**values)


def read_values(settings: type[Settings], path: Path) -> dict[str, Any]:
    """Read a YAML file with one level of names, in which ``-`` and ``_`` are the same.

    Returns:
        The values by name, each of its setting's type.

    Raises:
        SettingsError: The file cannot be read, has an unknown key, or a value of another type.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    # ValueError: not UTF-8, or an impossible date. RecursionError: nested too deeply.
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise SettingsError(f"{path}: {reason(error)}") from error
    if not isinstance(content, dict):
        raise SettingsError(f"{path}: must hold names and values, got {type(content).__name__}")
    parser = SettingsParser(settings)
    parser.add_settings()
    values: dict[str, Any] = {}
    for key, value in content.items():
        name = key.replace("-", "_") if isinstance(key, str) else _repr(key)
        if name not in type_hints(settings):
            nearest = _nearest(name, type_hints(settings))
            raise SettingsError(f"{path}: unknown key {_repr(key)}; the nearest known key is {nearest}")
        if name in values:
            raise SettingsError(f"{path}: `{name}` is given twice")
        try:
            values[name] = parser.parse_object({name: value}, defaults=False)[name]
        except (SettingsError, ArithmeticError, RecursionError) as error:
            raise SettingsError(f"{path}: {_wrong_type(settings, name, value)}") from error
        if values[name] is None and NoneType not in get_args(type_hints(settings)[name]):
            raise SettingsError(f"{path}: {_wrong_type(settings, name, value)}")
    return values


def read_settings(settings: type[S], path: Path, **more: Any) -> S:
    """Read a YAML file that, together with ``more``, has all required settings.

    Raises:
        SettingsError: As ``read_values`` and ``build``.
    """
    values = read_values(settings, path)
    try:
        return build(settings, values | more)
    except SettingsError as error:
        raise SettingsError(f"{path}: {error}") from error


def write_record(settings: Settings, folder: Path) -> None:
    """Write the settings of a run to its folder."""
    write_file(folder / RECORD, yaml.safe_dump(settings.to_dict(), sort_keys=False, allow_unicode=True))


def read_record(settings: type[S], folder: Path) -> S:
    """Read the settings of the run in a folder, which may have been moved since.

    Raises:
        SettingsError: There is no run, or its record cannot be used.
    """
    if not (folder / RECORD).is_file():
        raise SettingsError(f"{folder}: no run to resume (no {RECORD})")
    return read_settings(settings, folder / RECORD, output_dir=str(folder))


def check_record(settings: Settings, folder: Path) -> None:
    """Check that the run in a folder has these settings, whatever folder it started in.

    Raises:
        SettingsError: It has others, or there is no run.
    """
    known = read_record(type(settings), folder).to_dict()
    for name, value in settings.to_dict().items():
        if name != "output_dir" and value != known[name]:
            raise SettingsError(
                f"{folder}: `{name}` of this run is {known[name]!r}, got {value!r}; resume with the same settings, or "
                f"start a new run in another `output_dir`"
            )


def _help_texts(settings: type[Settings]) -> dict[str, str]:
    """Return the texts in the docstrings by name; a subclass overrides its bases."""
    found: dict[str, str] = {}
    for c in settings.__mro__:
        for entry in docstring_parser.parse(getdoc(c) or "").params if c is not object else ():
            text = " ".join((entry.description or "").split()).rstrip(".")
            found.setdefault(entry.arg_name, text.replace("%", "%%"))
    return found


def _metavar(hint: Any) -> str:
    for kind in (hint, *get_args(hint)):
        if hasattr(kind, "__metadata__"):
            return str(kind.__metadata__[0])
    return next(_METAVARS[kind] for kind in (hint, *get_args(hint)) if kind in _METAVARS)


def _show(default: Any) -> str:
    if isinstance(default, bool):
        return "yes" if default else "no"
    return f"{default:g}" if isinstance(default, float) else str(default)


def _wrong_type(settings: type[Settings], name: str, value: Any) -> str:
    hint = type_hints(settings)[name]
    if get_origin(hint) is Literal:
        wanted = f"one of {', '.join(get_args(hint))}"
    else:
        wanted = " or ".join(_KINDS[kind] for kind in (get_args(hint) or (hint,)))
    return f"`{name}` must be {wanted}, got {_repr(value)}"


def _repr(value: Any, most: int = 80) -> str:
    """Return the repr of a value, shortened."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # nested too deeply, or a number of too many digits
        text = type(value).__name__
    return text if len(text) <= most else f"{text[: most - 3]}..."


def _nearest(name: str, known: Iterable[str]) -> str:
    return difflib.get_close_matches(name[:80], list(known), n=1, cutoff=0.0)[0]

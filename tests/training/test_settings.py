"""Settings of ``train`` and ``finetune``: they are declared once, read from flags and YAML, and written to run.yaml."""

from __future__ import annotations

import re
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, get_args

import pytest
import transformers

from fastcompress.cli import finetune, train
from fastcompress.lalm.configuration import BOUNDARIES
from fastcompress.training.parsing import SettingsParser, flag, read_record, read_settings, read_values, write_record
from fastcompress.training.settings import FinetuneSettings, Settings, SettingsError, TrainSettings, type_hints
from tests.support import ROOT

COMMANDS: dict[type[Settings], Any] = {TrainSettings: train, FinetuneSettings: finetune}
both = pytest.mark.parametrize("settings", COMMANDS)


def options(settings: type[Settings]) -> dict[str, Any]:
    parser: SettingsParser = COMMANDS[settings]._make_parser()
    return {action.dest: action for action in parser._actions}


@both
def test_every_setting_is_in_one_group_and_has_help(settings: type[Settings]):
    names = [name for group in settings.groups().values() for name in group]
    assert sorted(names) == sorted(field.name for field in fields(settings))
    found = options(settings)
    for field in fields(settings):
        action = found[field.name]
        assert action.help and action.help.partition(" (")[0], field.name
        assert flag(field.name) in action.option_strings
        assert action.help.endswith("(required)") == (field.default is MISSING)
        assert ("(default: " in action.help) == (field.default not in (MISSING, None))


@both
def test_names_are_those_of_training_arguments(settings: type[Settings]):
    theirs = {field.name for field in fields(transformers.TrainingArguments)}
    ours = set(settings.groups()["optimization"] + settings.groups()["checkpoints and log"])
    assert "output_dir" in theirs
    assert ours - theirs <= {"min_lr_rate", "projector_learning_rate", "augment"}  # not in TrainingArguments


def test_one_dialect():
    """A setting of both commands has the same meaning and type in both, but may be required in one only."""
    shared = type_hints(TrainSettings).keys() & type_hints(FinetuneSettings).keys()
    assert {"output_dir", "data", "dev", "model", "rule", "lora_rank", "max_steps", "save_steps", "bf16"} <= shared
    for name in shared:
        a, b = (type_hints(settings)[name] for settings in COMMANDS)
        assert a == b or a == b | None, name
    commands = (options(settings).keys() - type_hints(settings).keys() for settings in COMMANDS)
    assert [sorted(more) for more in commands] == [
        ["config", "help", "resume", "threads"],
        ["config", "dry_run", "help", "resume"],
    ]


def test_the_table_of_the_documentation():
    page = (ROOT / "docs" / "speech.md").read_text()
    groups = [settings.groups() for settings in COMMANDS]
    for group in groups[0]:
        cells = re.search(rf"^\| {group} \| (.*) \| (.*) \| (.*) \|$", page, re.MULTILINE)
        assert cells is not None, group
        both_, ours, theirs = (set(re.findall(r"`(\w+)`", cell)) for cell in cells.groups())
        assert both_ | ours == set(groups[0][group]) and both_ | theirs == set(groups[1].get(group, ())), group


def test_kinds_of_learned_boundaries():
    """The settings repeat the names of the configuration, which imports transformers."""
    assert get_args(type_hints(TrainSettings)["boundary_kind"]) == BOUNDARIES


def write(folder: Path, text: str) -> Path:
    (folder / "c.yaml").write_text(text)
    return folder / "c.yaml"


def test_values_of_a_file(tmp_path: Path):
    text = "max-steps: 3\nlearning_rate: 1e-3\nlora-alpha: 8\nrule: none\naugment: no\ntrain_encoder: null\ndata: '5'\n"
    assert read_values(TrainSettings, write(tmp_path, text)) == {
        "max_steps": 3,
        "learning_rate": 1e-3,
        "lora_alpha": 8.0,
        "rule": "none",
        "augment": False,
        "train_encoder": None,
        "data": "5",
    }


@pytest.mark.parametrize(
    "text, message",
    [
        ("max_stepz: 3", "unknown key 'max_stepz'; the nearest known key is max_steps"),
        ("max-stepz: 3", "unknown key 'max-stepz'; the nearest known key is max_steps"),
        ("out: x", "unknown key 'out'; the nearest known key is "),
        ("1: x", "unknown key 1; the nearest known key is "),
        ("max-steps: 3\nmax_steps: 3", "`max_steps` is given twice"),
        ("max_steps: many", "`max_steps` must be a whole number, got 'many'"),
        ("max_steps: 3.5", "`max_steps` must be a whole number, got 3.5"),
        ("max_steps: true", "`max_steps` must be a whole number, got True"),
        ("max_steps: null", "`max_steps` must be a whole number, got None"),
        ("learning_rate: [1]", "`learning_rate` must be a number, got [1]"),
        (f"learning_rate: 1{'0' * 400}", "`learning_rate` must be a number, got 1000"),
        (f"0x{'f' * 900}: x", "unknown key 5104866514341945590710842651568"),
        ("boundary_ratio: x", "`boundary_ratio` must be a number or null, got 'x'"),
        ("boundary_kind: cnn", "`boundary_kind` must be one of h-net, cif, got 'cnn'"),
        ("cache: perhaps", "`cache` must be true or false, got 'perhaps'"),
        ("data: 2001-01-01", "`data` must be text, got datetime.date(2001, 1, 1)"),
        ("data: 2001-99-99", "month must be in 1..12"),
        ("data: {a: b}", "`data` must be text, got {'a': 'b'}"),
        ("data: &a [*a]", "`data` must be text, got [[...]]"),
        ("dev: 3", "`dev` must be text or null, got 3"),
        ("a: [", "while parsing a flow node"),
        (f"data: {'[' * 3000}{']' * 3000}", "maximum recursion depth exceeded"),
        ("- a", "must hold names and values, got list"),
        ("", "must hold names and values, got NoneType"),
    ],
)
def test_files_that_are_wrong(text: str, message: str, tmp_path: Path):
    path = write(tmp_path, text)
    with pytest.raises(SettingsError, match=re.escape(f"{path}: {message}")) as caught:
        read_values(TrainSettings, path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_files_that_lack_something(tmp_path: Path):
    for text in ("output_dir: r", "{output_dir: r, data: ''}"):
        with pytest.raises(SettingsError, match=r"c.yaml: `data` is missing"):
            read_settings(TrainSettings, write(tmp_path, text))
    for text, message in (
        ("seed: -0x" + "f" * 5000, "less than 2\\*\\*63"),
        ("lora_alpha: .nan", "a number, got nan"),
        ("lora_dropout: 1", "less than 1, got 1.0"),
        ("reduce: median", "one of mean, sum, max, first, last, middle, got 'median'"),
        ("keys: foo", "one of frames, ctc, got 'foo'"),
    ):
        with pytest.raises(SettingsError, match=rf"c.yaml: `\w+` must be {message}$"):
            read_settings(TrainSettings, write(tmp_path, f"output_dir: r\ndata: a\n{text}"))
    with pytest.raises(SettingsError, match="no.yaml: no such file"):
        read_values(TrainSettings, tmp_path / "no.yaml")


@both
def test_a_record_is_read_as_it_was_written(settings: type[Settings], tmp_path: Path):
    """A record can be read after its folder was moved, and can be used as --config."""
    required: dict[str, Any] = {"data": "ä: #b.jsonl", "output_dir": "old"}
    if settings is FinetuneSettings:
        required["model"] = "null"
    given = settings(**required, learning_rate=1e-5, rule="uniform:3", bf16=True, lora_dropout=0.1)
    write_record(given, tmp_path)
    assert read_settings(settings, tmp_path / "run.yaml") == given
    moved = read_record(settings, tmp_path)
    assert moved.to_dict() == given.to_dict() | {"output_dir": str(tmp_path)}


@both
def test_every_flag_becomes_a_setting(settings: type[Settings]):
    """This includes flags with the name of a method of jsonargparse's Namespace, such as ``keys``."""
    values = {bool: True, int: 3, float: 0.5, str: "x"}
    wanted: dict[str, Any] = {}
    for name, hint in type_hints(settings).items():
        kinds = get_args(hint) or (hint,)
        choices = [choice for choice in kinds if isinstance(choice, str)]
        wanted[name] = choices[0] if choices else next(values[kind] for kind in kinds if kind in values)
    flags = [f"{flag(name)}{'' if value is True else f'={value}'}" for name, value in wanted.items()]
    found, others = COMMANDS[settings]._make_parser().parse_flags(flags)
    assert found == wanted and not others.keys() & wanted.keys()

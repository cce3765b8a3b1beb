"""Flags and YAML files of ``train`` and ``finetune``: help, errors, and imported modules."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from fastcompress.cli.errors import EXIT_CODES
from fastcompress.cli.main import main, make_parser
from tests.support import processes
from tests.support.command_line import fails

MODULES = """
import json, sys
from fastcompress.cli.main import main
try:
    code = main(sys.argv[1:])
except SystemExit as stop:
    code = stop.code
heavy = {"transformers", "accelerate", "peft", "jsonargparse", "yaml", "tabulate"}  # torch imports tqdm
print(json.dumps([code, sorted(heavy & set(sys.modules))]))
"""


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["info", "--json"], []),
        (["--help"], []),
        (["inspect", "--help"], []),
        (["train", "--help"], ["jsonargparse", "yaml"]),
        (["finetune", "--help"], ["jsonargparse", "yaml"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_commands_import_what_they_need(arguments: list[str], expected: list[str]):
    done = processes.run(["-c", MODULES, *arguments])
    assert json.loads(done.stdout.splitlines()[-1]) == [0, expected], done.stderr


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("command", ["train", "finetune"])
def test_help(command: str, width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setenv("COLUMNS", str(width))
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    lines = text.splitlines()
    assert max(map(len, lines)) < width
    titles = [line for line in lines if re.fullmatch(r"\w[\w ]*:", line)]
    distillation = ["distillation"] if command == "train" else []
    groups = ["data", "model", "compression", *distillation, "LoRA", "optimization", "checkpoints and log"]
    assert titles == [f"{title}:" for title in ["options", *groups]]
    words = " ".join(text.split())
    assert "--max-steps INT Updates of the weights (default: 1000)" in words
    assert "--data MANIFEST Manifest to train on (required)" in words
    assert '{"audio_filepath": "audio/1.wav", "duration": 2.31, "text": "two hundred"}' in words
    assert "--bf16, --no-bf16" in text
    assert not any(line.rstrip().endswith("-") for line in lines)  # no line ends inside a flag
    assert words.endswith(EXIT_CODES)


def test_every_help_has_the_exit_codes():
    parser = make_parser()
    commands = next(action for action in parser._actions if isinstance(action.choices, dict)).choices
    for one in (parser, *(command.full() for command in commands.values())):
        assert EXIT_CODES in " ".join(one.format_help().split()), one.prog


def test_mistakes_are_named_as_they_were_typed(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for command in ("train", "finetune"):
        error = fails([command, "--max-step", "3"], capsys)
        assert "unknown option --max-step; the nearest known option is --max-steps" in error
        assert "--max-steps must be a whole number, got 'x'" in fails([command, "--max-steps", "x"], capsys)
        assert "too large" in fails([command, "--learning-rate", "1" + 400 * "0"], capsys)
        assert "expected one argument" in fails([command, "--data"], capsys)
        assert "unrecognized arguments: x" in fails([command, "x"], capsys)
        assert f"--{'output-dir' if command == 'train' else 'model'} is missing" in fails([command], capsys)
        assert "--output-dir is missing" in fails([command, "--resume"], capsys)
        assert "no run to resume" in fails([command, "--output-dir", str(tmp_path), "--resume"], capsys)
    config = tmp_path / "c.yaml"
    train = ["train", "--output-dir", str(tmp_path / "run"), "--data", "x", "--config", str(config)]
    assert "c.yaml: no such file or directory\n" in fails(train, capsys)
    for text, message in (
        ("max-stepz: 3", f"error: {config}: unknown key 'max-stepz'; the nearest known key is max_steps"),
        ("max-steps: x", f"error: {config}: `max_steps` must be a whole number, got 'x'"),
        ("max-steps: 0", f"error: {config}: `max_steps` must be at least 1, got 0"),
        ("save_steps: 15", f"error: {config}: `save_steps` must be a multiple of `logging_steps` (10), got 15"),
    ):
        config.write_text(text)
        assert message in fails(train, capsys)
    config.write_text("max_steps: 5")  # flags win
    assert "error: --max-steps must be at least 1, got 0" in fails([*train, "--max-steps", "0"], capsys)

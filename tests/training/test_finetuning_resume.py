"""``fastcompress finetune --resume``: after a kill at any moment, and with other settings."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from fastcompress.cli import main as cli
from fastcompress.training.finetuning import newest_checkpoint
from tests.support import audio_llms
from tests.support.command_line import flags
from tests.support.lalm_data import write_tones


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run of 4 steps with checkpoints after steps 2 and 4; its model and data are next to it."""
    folder = tmp_path_factory.mktemp("finetune")
    audio_llms.make("qwen2_audio").save_pretrained(folder / "model")
    audio_llms.processor("qwen2_audio").save_pretrained(folder / "model")
    write_tones(folder, 8)
    assert cli.main(arguments(folder / "run")) == 0
    return folder / "run"


def arguments(out: Path, **more: object) -> list[str]:
    options = {
        "model": out.parent / "model",
        "data": out.parent / "train.jsonl",
        "output_dir": out,
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "learning_rate": 0.02,
        "bf16": False,
        "save_steps": 2,
        "logging_steps": 1,
        "lora_rank": 4,
        "prompt": "write",
    } | more
    return ["finetune", *flags(**options)]


def empty(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint)
    checkpoint.mkdir()


def cut(name: str) -> Callable[[Path], None]:
    def half(checkpoint: Path) -> None:
        content = (checkpoint / name).read_bytes()
        (checkpoint / name).write_bytes(content[: len(content) // 2])

    return half


BROKEN: dict[str, Callable[[Path], None]] = {
    "empty": empty,
    "no state": lambda checkpoint: (checkpoint / "trainer_state.json").unlink(),
    "no weights": lambda checkpoint: (checkpoint / "adapter_model.safetensors").unlink(),
    "no optimizer": lambda checkpoint: (checkpoint / "optimizer.pt").unlink(),
    "half a state": cut("trainer_state.json"),
    "half of the weights": cut("adapter_model.safetensors"),
    "half an optimizer": cut("optimizer.pt"),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_the_newest_whole_checkpoint_is_found(broken: str, run: Path, tmp_path: Path):
    for name in ("checkpoint-2", "checkpoint-4"):
        shutil.copytree(run / name, tmp_path / name)
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-4"
    BROKEN[broken](tmp_path / "checkpoint-4")
    said: list[str] = []
    assert newest_checkpoint(tmp_path, said.append) == tmp_path / "checkpoint-2"
    assert said == [f"{tmp_path / 'checkpoint-4'} is not whole: skipped"]


def test_the_newest_whole_checkpoint_is_resumed(run: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.main(arguments(run)) == 2
    assert "already contains a run; resume it, or choose another folder" in capsys.readouterr().err
    out = run.parent / "cut"
    shutil.copytree(run, out)
    BROKEN["half an optimizer"](out / "checkpoint-4")
    assert cli.main([*arguments(out), "--resume"]) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert f"{out / 'checkpoint-4'} is not whole" in said and "resuming after step 2 of 4" in said
    losses = [json.loads((folder / "finetune.json").read_text())["losses"] for folder in (run, out)]
    assert losses[0] == losses[1] and len(losses[0]) == 4


def test_without_a_whole_checkpoint_training_starts_again(run: Path, capsys: pytest.CaptureFixture[str]):
    out = run.parent / "new"
    (out / "checkpoint-2").mkdir(parents=True)
    assert cli.main([*arguments(out), "--resume"]) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert "checkpoint-2 is not whole" in said and "resuming" not in said
    assert (out / "checkpoint-4" / "trainer_state.json").is_file()


def test_resuming_with_other_settings_is_an_error(run: Path, capsys: pytest.CaptureFixture[str]):
    kept = (run / "run.yaml").read_text()
    other = (
        ({"rule": "uniform:5"}, "--rule of this run is 'uniform:3', got 'uniform:5'; resume with the same settings"),
        ({"max_steps": 8}, "--max-steps of this run is 4, got 8"),
    )
    for more, text in other:
        assert cli.main([*arguments(run, **more), "--resume"]) == 2
        error = capsys.readouterr().err
        assert text in error and error.count("\n") == 1
    assert (run / "run.yaml").read_text() == kept


def test_settings_are_written_before_training(run: Path, monkeypatch: pytest.MonkeyPatch):
    import transformers

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(transformers.Trainer, "train", killed)
    out = run.parent / "killed"
    assert cli.main(arguments(out)) == 130
    assert yaml.safe_load((out / "run.yaml").read_text())["lora_rank"] == 4

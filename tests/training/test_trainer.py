"""Training of the reference audio LLM: killed runs, several processes, and errors."""

from __future__ import annotations

import json
import math
import os
import pydoc
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState

from fastcompress import files
from fastcompress.cli.main import main
from fastcompress.lalm.loading import RunError, load_model
from fastcompress.training import checkpoints, logs
from fastcompress.training.checkpoints import CheckpointError
from fastcompress.training.examples import EncodedExamples, Examples
from fastcompress.training.manifest import ManifestError, read_manifest
from fastcompress.training.parsing import read_record
from fastcompress.training.runs import Run
from fastcompress.training.settings import SettingsError, TrainerSettings, TrainSettings
from fastcompress.training.trainer import Training, TrainingStopped
from tests.support import ROOT
from tests.support.forking import in_fork, write_to
from tests.support.lalm_data import write_tones
from tests.support.slow import some

pytestmark = [
    pytest.mark.xdist_group("training"),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tones")
    write_tones(folder, 24, texts=4)
    write_tones(folder, 6, "dev", seed=1)
    return folder


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def settings(data: Path, run: Path, /, **values: Any) -> TrainSettings:
    small = {
        "output_dir": str(run),
        "data": str(data / "train.jsonl"),
        "max_steps": 8,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "save_steps": 3,
    }
    return TrainSettings(**(small | values))


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in logs.read(folder / "log.csv")]


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of an uninterrupted run."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("run") / "whole"
    Run(settings(data, folder, dev=str(data / "dev.jsonl")), say=lambda text: None).train()
    return folder


def test_a_run_records_its_settings(trained: Path, data: Path):
    assert len(losses(trained)) == 8 and all(map(math.isfinite, losses(trained)))
    rows = logs.read(trained / "log.csv")
    assert [row["step"] for row in rows] == list(range(1, 9)) and rows[-1]["development_loss"] > 0
    assert rows[0]["audio_tokens"] == rows[0]["audio_frames"] > 0 and rows[0]["tokens_per_second"] > 0
    environment = json.loads((trained / "environment.json").read_text())
    assert environment["packages"]["torch"] == torch.__version__.partition("+")[0] or environment["packages"]["torch"]
    assert environment["sha256"].keys() == {str(data / "train.jsonl"), str(data / "dev.jsonl")}
    assert [p.name for p in checkpoints.found(trained / "checkpoints")] == ["step-00000006", "step-00000008"]
    model, processor = load_model(trained)
    assert processor.audio_token_id == model.config.audio_token_id


def test_the_same_settings_give_the_same_run(trained: Path, data: Path, tmp_path: Path):
    Run(settings(data, tmp_path / "again", dev=str(data / "dev.jsonl")), say=lambda text: None).train()
    assert losses(tmp_path / "again") == losses(trained)
    other = settings(data, tmp_path / "other", seed=1)
    Run(other, say=lambda text: None).train()
    assert losses(tmp_path / "other")[0] != losses(trained)[0]


def test_training_learns(data: Path, tmp_path: Path):
    Run(
        settings(data, tmp_path / "run", max_steps=40, learning_rate=3e-3, warmup_steps=5), say=lambda text: None
    ).train()
    found = losses(tmp_path / "run")
    assert sum(found[-5:]) < 0.6 * sum(found[:5])


# Kills


def command(folder: Path, data: Path, *more: str) -> list[str]:
    return [
        sys.executable, "-m", "fastcompress", "train", "--output-dir", str(folder), "--data", str(data / "train.jsonl"),
        "--threads", "1", "--per-device-train-batch-size", "4", "--logging-steps", "1", "--save-steps", "3", *more,
    ]  # fmt: skip


def environment(**more: str) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | more


@pytest.mark.parametrize("when", some(["step 4", "writing a checkpoint", "writing the result"], "step 4"))
def test_killed_and_resumed_to_the_bit(when: str, data: Path, tmp_path: Path):
    """The run is killed at a step, while it writes a checkpoint, and while it writes the result."""
    whole, killed, printed = tmp_path / "whole", tmp_path / "killed", tmp_path / "printed"

    def train(folder: Path, *more: str) -> Callable[[], None]:
        def task() -> None:
            with printed.open("wb") as file:
                write_to(file.fileno(), file.fileno())
            assert main(command(folder, data, "--max-steps", "8", *more)[3:]) == 0
            sys.stdout.flush()

        return task

    assert in_fork(train(whole)) == 0, printed.read_text()
    # The process kills itself, because a signal from outside would not arrive exactly at this place.
    places = {
        "step 4": ("fastcompress.training.trainer.Training.update", 4),
        "writing a checkpoint": ("torch.save", 1),
        "writing the result": ("fastcompress.training.runs.Run._write_final", 1),
    }
    name, call = places[when]

    def train_and_die() -> None:
        kill_at(name, call)
        train(killed)()

    assert in_fork(train_and_die) == -signal.SIGKILL, printed.read_text()
    assert not (killed / "final").exists()
    found = checkpoints.found(killed / "checkpoints")
    assert (len(found) > 0) == (when != "writing a checkpoint")
    assert in_fork(train(killed, "--resume")) == 0, printed.read_text()
    assert "resuming after step" in printed.read_text()
    assert losses(killed) == losses(whole)
    a, b = ((f / "final" / "model.safetensors").read_bytes() for f in (killed, whole))
    assert a == b
    assert not list(killed.rglob("unfinished-*"))


def kill_at(name: str, call: int) -> None:
    """Kill this process after a call of a function with this number."""
    parts = name.split(".")
    owner: Any = pydoc.locate(".".join(parts[:-1]))
    real, calls = getattr(owner, parts[-1]), 0

    def killing(*arguments: Any, **more: Any) -> Any:
        nonlocal calls
        calls += 1
        result = real(*arguments, **more)
        if calls == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, parts[-1], killing)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", range(3))
def test_killed_at_any_moment(seed: int, data: Path, tmp_path: Path):
    """The run is killed from outside repeatedly until it is done. Its losses are those of an uninterrupted run."""
    whole, killed, steps = tmp_path / "whole", tmp_path / "killed", ["--max-steps", "30"]
    begin = time.monotonic()
    subprocess.run(command(whole, data, *steps), env=environment(), check=True, capture_output=True)
    took = time.monotonic() - begin
    for attempt in range(20):
        more = ["--resume"] if (killed / "run.yaml").exists() else []
        process = subprocess.Popen(
            command(killed, data, *steps, *more), env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        try:
            process.wait(took * (0.6 + 0.05 * seed + 0.07 * attempt))
            assert process.returncode == 0, process.stderr.read().decode()
            break
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
    assert losses(killed) == losses(whole)


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    target = tmp_path / "final"

    def write(text: str) -> None:
        files.write_folder(target, lambda folder: (folder / "a").write_text(text))

    write("one")
    write("two")
    assert (target / "a").read_text() == "two" and [p.name for p in tmp_path.iterdir()] == ["final"]

    def fail(folder: Path) -> None:
        (folder / "a").write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        files.write_folder(target, fail)
    assert (target / "a").read_text() == "two" and [p.name for p in tmp_path.iterdir()] == ["final"]
    # The process is killed between the two renames. No folder has the final name, and cleaning restores the old one.
    rename, calls = os.rename, []

    def once(a: Any, b: Any) -> None:
        calls.append(a)
        if len(calls) == 2:
            raise SystemExit
        rename(a, b)

    monkeypatch.setattr(os, "rename", once)
    with pytest.raises(SystemExit):
        write("three")
    monkeypatch.undo()
    assert not target.exists()
    files.clean(tmp_path)
    assert (target / "a").read_text() == "two" and [p.name for p in tmp_path.iterdir()] == ["final"]


# Runs that must stop


def test_a_nan_stops_and_leaves_the_last_checkpoint(data: Path, tmp_path: Path):
    run = Run(settings(data, tmp_path / "run"), say=lambda text: None)
    good = run.training.update
    model = run.training.model

    def poisoned() -> dict[str, float]:
        if run.training.step == 5:
            with torch.no_grad():
                model.projector.weight[0, 0] = math.nan
        return good()

    run.training.update = poisoned
    message = re.escape(f"the last good checkpoint is {tmp_path / 'run' / 'checkpoints' / 'step-00000003'}")
    with pytest.raises(TrainingStopped, match=f"the loss of step 6 is nan .*{message}"):
        run.train()
    assert [p.name for p in checkpoints.found(tmp_path / "run" / "checkpoints")] == ["step-00000003"]
    # The last checkpoint can be used.
    again = Run(read_record(TrainSettings, tmp_path / "run"), resume=True, say=lambda text: None)
    assert again.training.step == 3 and again.training.model.projector.weight.isfinite().all()
    again.train()
    assert len(losses(tmp_path / "run")) == 8


@pytest.mark.parametrize(
    "values, message",
    [
        ({"data": ""}, "`data` is missing"),
        ({"rule": "nonsense"}, "`rule`: unknown rule 'nonsense'"),
        ({"max_steps": 0}, "`max_steps` must be at least 1, got 0"),
        ({"boundary_kind": "cnn"}, "`boundary_kind` must be one of h-net, cif, got 'cnn'"),
        ({"learning_rate": -1.0}, "`learning_rate` must be more than 0, got -1.0"),
        ({"audio_model": "a"}, "`audio_model` needs `text_model`"),
        ({"audio_model": "a", "text_model": "b", "model": "c"}, "`model` excludes `audio_model` and `text_model`"),
        ({"lora_rank": -1}, "`lora_rank` must be at least 0, got -1"),
        ({"save_steps": 5, "logging_steps": 2}, "`save_steps` must be a multiple of `logging_steps` (2), got 5"),
    ],
)
def test_settings_that_are_wrong(values: dict[str, Any], message: str, data: Path):
    with pytest.raises(SettingsError, match=re.escape(message)):
        settings(data, data / "run", **values)


def test_runs_that_cannot_start(data: Path, tmp_path: Path, trained: Path):
    with pytest.raises(RunError, match="already contains a run; resume it, or choose another folder"):
        Run(settings(data, trained))
    with pytest.raises(SettingsError, match="no run to resume"):
        Run(read_record(TrainSettings, tmp_path / "none"), resume=True)
    with pytest.raises(SettingsError, match="`max_steps` of this run is 8, got 9; resume with the same settings"):
        Run(settings(data, trained, max_steps=9, dev=str(data / "dev.jsonl")), resume=True)
    with pytest.raises(SettingsError, match="`lora_rank` needs a trained model"):
        Run(settings(data, tmp_path / "lora", lora_rank=4))
    with pytest.raises(RunError, match="not a model folder"):
        load_model(tmp_path)
    (tmp_path / "empty.jsonl").write_text('{"audio_filepath": "nowhere.wav", "text": "low"}\n')
    with pytest.raises(ManifestError, match="has no usable utterance"):
        Run(settings(data, tmp_path / "x", data=str(tmp_path / "empty.jsonl")), say=lambda text: None)


def test_a_checkpoint_of_another_shape(trained: Path, data: Path, tmp_path: Path):
    model, processor = load_model(trained)
    model.train_encoder(True)
    examples = Examples(read_manifest(data / "train.jsonl"), processor)
    training = Training(model, examples, TrainerSettings(max_steps=1), tmp_path)
    last = checkpoints.found(trained / "checkpoints")[-1]
    weights = dict(training.trained)
    weights["projector.weight"] = torch.zeros(3, 3)
    message = re.escape("projector.weight has shape [128, 128], the model's has [3, 3]")
    with pytest.raises(CheckpointError, match=message):
        checkpoints.load(last, weights, training.optimizer)
    del weights["projector.weight"]
    with pytest.raises(CheckpointError, match="has projector.weight, which the model lacks"):
        checkpoints.load(last, weights, training.optimizer)
    (tmp_path / "step-00000001").mkdir()
    with pytest.raises(CheckpointError, match="cannot be read"):
        checkpoints.load(tmp_path / "step-00000001", weights, training.optimizer)


def test_damaged_files_are_skipped_and_listed(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Headers are checked before training. A damage that is found when a file is decoded must not stop the run."""
    lines = (data / "train.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines[:8]]
    for entry in entries:
        entry["audio_filepath"] = str(data / entry["audio_filepath"])
    import numpy as np
    import soundfile

    soundfile.write(tmp_path / "nan.wav", np.full(8000, np.nan, np.float32), 16000, subtype="FLOAT")
    entries[1] |= {"audio_filepath": str(tmp_path / "nan.wav"), "duration": 0.5}
    entries[2]["audio_filepath"] = str(tmp_path / "missing.wav")
    manifest = tmp_path / "train.jsonl"
    manifest.write_text("\n".join(map(json.dumps, entries)))
    run = Run(settings(data, tmp_path / "run", data=str(manifest), max_steps=3), say=lambda text: None)
    before, after = f"{manifest}:3: {tmp_path / 'missing.wav'}: no such file", f"{manifest}:2: {tmp_path / 'nan.wav'}: "
    file = tmp_path / "run" / "skipped.txt"
    assert file.read_text() == f"{before}\n"
    run.train()
    found = file.read_text().splitlines()
    assert found[0] == before and len(found) == 2 and found[1].startswith(f"{after}contains NaN")
    err = capsys.readouterr().err.splitlines()
    assert err[:3] == [f"{manifest}: skipped 1 of 8 utterances:", f"  {before}", f"skipped {found[1]}"]
    assert err[-1] == f"skipped 1 utterances that could not be decoded, listed in {file}"
    assert not any("skipped" in line for line in err[3:-1])  # progress bars of transformers
    assert len(losses(tmp_path / "run")) == 3


# Continuing with LoRA


def test_lora_on_a_trained_model(trained: Path, data: Path, tmp_path: Path):
    pytest.importorskip("peft")
    lora = {"model": str(trained / "final"), "lora_rank": 4, "rule": "uniform:2", "max_steps": 4}
    final = Run(settings(data, tmp_path / "lora", **lora), say=lambda text: None).train()
    assert (final / "adapter_model.safetensors").exists() and not (final / "model.safetensors").exists()
    model, processor = load_model(tmp_path / "lora")
    base, _ = load_model(trained, rule="uniform:2")
    examples = Examples(read_manifest(data / "dev.jsonl"), processor)
    batch = examples.batch(range(4))
    adapted = model(**batch).loss
    assert abs(float(adapted - base(**batch).loss)) > 1e-4 and model.get_base_model().rule == "uniform:2"
    merged = settings(data, tmp_path / "merged", **lora, merge=True)
    Run(merged, say=lambda text: None).train()
    whole, _ = load_model(tmp_path / "merged")
    torch.testing.assert_close(whole(**batch).loss, adapted, rtol=1e-4, atol=1e-4)
    # LoRA on LoRA: the first is merged.
    again = settings(data, tmp_path / "again", **(lora | {"model": str(tmp_path / "lora"), "rule": None}))
    Run(again, say=lambda text: None).train()
    assert load_model(tmp_path / "again")[0].get_base_model().rule == "uniform:2"


def test_frames_that_are_encoded_once(trained: Path, data: Path):
    model, processor = load_model(trained, rule="uniform:2")
    examples = Examples(read_manifest(data / "train.jsonl"), processor, cache=True)
    encoded = EncodedExamples(examples, model)
    for indices in ([0, 1, 2], [25, 3], [26]):
        a, b = (model(**e.batch(indices)).loss for e in (examples, encoded))
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_dropout_depends_on_the_step(trained: Path, data: Path, tmp_path: Path):
    """The random numbers of a step depend on the step alone, not on the number of earlier steps in this process."""
    pytest.importorskip("peft")
    lora = {"model": str(trained / "final"), "lora_rank": 4, "lora_dropout": 0.5, "max_steps": 6, "augment": False}
    Run(settings(data, tmp_path / "whole", **lora), say=lambda text: None).train()
    run = Run(settings(data, tmp_path / "half", **lora), say=lambda text: None)
    run.training.save, save = lambda: (_ for _ in ()).throw(KeyboardInterrupt), run.training.save
    with pytest.raises(KeyboardInterrupt):
        run.train()
    save()
    again = Run(read_record(TrainSettings, tmp_path / "half"), resume=True, say=lambda text: None)
    assert again.training.step == 3
    again.train()
    assert losses(tmp_path / "half") == losses(tmp_path / "whole")
    plain = settings(data, tmp_path / "plain", **(lora | {"lora_dropout": 0.0}))
    Run(plain, say=lambda text: None).train()
    assert losses(tmp_path / "plain") != losses(tmp_path / "whole")


@pytest.mark.parametrize(
    "values, tolerance",
    [
        ({"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}, 1e-4),
        ({"gradient_checkpointing": True}, 1e-5),
        ({"bf16": True}, 0.05),
    ],
    ids=["accumulate", "checkpointing", "bf16"],
)
def test_settings_that_do_not_change_the_losses(values: dict[str, Any], tolerance: float, data: Path, tmp_path: Path):
    found = []
    for name, more in (("plain", {}), ("other", values)):
        AcceleratorState._reset_state()  # a process has one precision
        run = Run(settings(data, tmp_path / name, max_steps=3, augment=False, **more), say=lambda text: None)
        arguments = run.settings
        order = [[0, 1, 2, 25], [3, 4, 24, 5], [6, 7, 8, 9]]  # 24 and 25 have no audio

        def batch(
            where: int, process: int = 0, size: int = arguments.per_device_train_batch_size, order: list = order
        ) -> list[int]:
            flat = [index for row in order for index in row]
            return flat[where * size : (where + 1) * size]

        run.training.plan.batch = batch
        if name == "plain":
            with torch.no_grad():
                first = run.training.model(**run.training.examples.batch(order[0]))
        run.train()
        found.append(logs.read(tmp_path / name / "log.csv"))
    assert found[0][0]["loss"] == pytest.approx(float(first.loss), rel=1e-5)
    assert found[0][0]["ctc_loss"] == pytest.approx(float(first.ctc_loss), rel=1e-5) and first.ctc_loss > 0
    for a, b in zip(*found, strict=True):
        for column in ("loss", "lm_loss", "ctc_loss", "grad_norm"):
            assert a[column] == pytest.approx(b[column], rel=tolerance), (a["step"], column)
        assert a["audio_tokens"] == b["audio_tokens"]
    AcceleratorState._reset_state()
    assert ("bf16" not in values.values()) or found[0][0]["loss"] != found[1][0]["loss"]


# Several processes


LAUNCH = """
import json, sys
import torch
from fastcompress.training.batches import BatchPlan
from fastcompress.training.examples import Examples
from fastcompress.training.manifest import read_manifest
from fastcompress.training.recipes import build_small
from fastcompress.training.settings import TrainerSettings
from fastcompress.training.trainer import Training
from pathlib import Path

torch.set_num_threads(1)
folder, batch_size = Path(sys.argv[1]), int(sys.argv[2])
utterances = read_manifest(sys.argv[3])
model, processor = build_small(utterances, rule="local-max")
examples = Examples(utterances, processor, cache=True, phones=model.config.ctc_tokens)
settings = TrainerSettings(
    max_steps=3, per_device_train_batch_size=batch_size, logging_steps=1, save_steps=0, augment=False
)
training = Training(model, examples, settings, folder)
# In the second step, the second process has only text.
order = [[0, 1, 2, 3, 4, 5], [6, 7, 8, 24, 25, 26], [9, 10, 11, 12, 13, 14]]
count = training.accelerator.num_processes
training.plan.batch = lambda step, process=0: order[step][process * batch_size : (process + 1) * batch_size]
training.run()
if training.accelerator.is_main_process:
    (folder / "processes").write_text(str(count))
"""


@pytest.mark.slow
def test_two_processes_are_one(data: Path, tmp_path: Path):
    """Loss and weights are those of one process with the batches of both, also if one batch has only text."""
    script = tmp_path / "train.py"
    script.write_text(LAUNCH)
    # Without --multi_gpu, accelerate would use MPI on the CPU. With it, it uses torch's launcher, and finds no GPU.
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    arguments = [str(script), str(tmp_path / "two"), "3", str(data / "train.jsonl")]
    env = environment(ACCELERATE_USE_CPU="true")
    done = subprocess.run([*launch, *arguments], env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "two" / "processes").read_text() == "2"
    arguments = [str(script), str(tmp_path / "one"), "6", str(data / "train.jsonl")]
    done = subprocess.run([sys.executable, *arguments], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    two, one = (logs.read(tmp_path / name / "log.csv") for name in ("two", "one"))
    for a, b in zip(two, one, strict=True):
        for name in ("loss", "lm_loss", "ctc_loss", "grad_norm"):
            assert a[name] == pytest.approx(b[name], rel=2e-4), (a["step"], name)
        assert a["audio_tokens"] == b["audio_tokens"] and a["audio_frames"] == b["audio_frames"]
    a, b = (
        checkpoints.load_file(checkpoints.found(tmp_path / name / "checkpoints")[-1] / "weights.safetensors")
        for name in ("two", "one")
    )
    assert max(float((a[n.removeprefix("module.")] - b[n]).abs().max()) for n in b) < 1e-3

"""Plain checkpoints of trained models: weights, rule and processor, and what happens if they cannot be written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from fastcompress.cli.main import main
from fastcompress.decoder.saved_rule import stored
from fastcompress.integrations.transformers import apply_to
from fastcompress.lalm import add_lora
from fastcompress.lalm.loading import BASE_FILE, load_model
from fastcompress.training.export import export
from fastcompress.training.settings import SettingsError
from tests.support import ROOT, audio_llms, processes

pytestmark = [pytest.mark.xdist_group("training")]

DIGITS = ROOT / "assets" / "models" / "digits"


def with_random_lora(model: Any, **settings: Any) -> Any:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=r".*language_model.*q_proj", init_lora_weights=False, **settings)
    return peft.get_peft_model(model, config, autocast_adapter_dtype=False).eval()


@pytest.mark.parametrize("mode", ["dynamic", "budget"])
def test_a_stock_model(mode: str, tmp_path: Path):
    """transformers loads the checkpoint alone, and gives the logits of the base model with its adapter."""
    base, run, out = tmp_path / "base", tmp_path / "run", tmp_path / "out"
    audio_llms.make("qwen2_audio").save_pretrained(base)
    model = transformers.Qwen2AudioForConditionalGeneration.from_pretrained(base)
    apply_to(model, "uniform:3", mode=mode)
    tuned = with_random_lora(model, modules_to_save=["multi_modal_projector"])
    projector = model.model.multi_modal_projector
    with torch.no_grad():
        projector.modules_to_save["default"].linear.weight += 0.1
    tuned.save_pretrained(run / "adapter")
    audio_llms.processor("qwen2_audio").save_pretrained(run / "adapter")
    # In a new process: this one has imported the patch, which restores the rules of adapters.
    done = processes.run(["-m", "fastcompress", "export", str(run), "--out", str(out)])
    assert done.returncode == 0 and done.stdout == f"written: {out}\n", done.stderr
    assert not list(out.glob("adapter*")) and transformers.AutoProcessor.from_pretrained(out)
    found = transformers.Qwen2AudioForConditionalGeneration.from_pretrained(out).eval()
    assert stored(found) == stored(model) is not None
    trained = projector.modules_to_save["default"].linear.weight
    assert torch.equal(found.model.multi_modal_projector.linear.weight, trained)
    apply_to(found)
    assert found.fastcompress_settings.mode == mode
    if mode == "dynamic":
        inputs = audio_llms.batch("qwen2_audio", found)
        torch.testing.assert_close(found(**inputs).logits, tuned(**inputs).logits)


def test_dtypes_are_those_of_the_base_model(tmp_path: Path):
    audio_llms.make("qwen2_audio").bfloat16().save_pretrained(tmp_path / "base")
    model = transformers.Qwen2AudioForConditionalGeneration.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    apply_to(model, "uniform:3")
    with_random_lora(model).float().save_pretrained(tmp_path / "adapter")
    audio_llms.processor("qwen2_audio").save_pretrained(tmp_path / "adapter")
    export(str(tmp_path / "adapter"), tmp_path / "out")
    found = transformers.Qwen2AudioForConditionalGeneration.from_pretrained(tmp_path / "out", dtype="auto")
    assert {p.dtype for p in found.parameters()} == {torch.bfloat16}


def test_a_reference_model(tmp_path: Path):
    """The rule and the positions of the training stay."""
    model, processor = load_model(DIGITS, "min-variance:rate=3")
    tuned = add_lora(model, 4)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05, generator=torch.Generator().manual_seed(0))
    final = tmp_path / "run" / "final"
    tuned.get_base_model().config.save_pretrained(final)
    tuned.save_pretrained(final)
    processor.save_pretrained(final)
    (final / BASE_FILE).write_text(json.dumps({"model": str(DIGITS)}))
    export(str(tmp_path / "run"), tmp_path / "out")
    expected, _ = load_model(tmp_path / "run")
    found, _ = load_model(tmp_path / "out")
    assert not hasattr(found, "merge_and_unload")
    for name in ("rule", "reduce", "proportional_attention", "positions"):
        assert getattr(found.config, name) == getattr(expected.config, name), name
    merged = dict(expected.merge_and_unload().named_parameters())
    for name, parameter in found.named_parameters():
        torch.testing.assert_close(parameter, merged[name], msg=name)


def test_a_reference_model_in_fp16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model, processor = load_model(DIGITS)
    model.half().save_pretrained(tmp_path / "half")
    processor.save_pretrained(tmp_path / "half")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    export(str(tmp_path / "half"), Path())
    found = load_model(tmp_path / "here", keep_dtypes=True)[0]
    assert {p.dtype for p in found.parameters()} == {torch.float16}


def test_errors_name_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["export", str(tmp_path / "none"), "--out", str(tmp_path / "out")]) == 2
    assert f"RUN {tmp_path / 'none'}: no such folder" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").write_text("")
    (tmp_path / "file").write_text("")
    for out, message in ((tmp_path / "full", "is not empty"), (tmp_path / "file" / "out", "not a directory")):
        with pytest.raises(SettingsError, match=f"`out` .*{message}"):
            export(str(DIGITS), out)
    with pytest.raises(SettingsError, match="`model` .*no config.json"):
        export(str(tmp_path / "full"), tmp_path / "out")

    def full(*arguments: Any, **settings: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", full)
    with pytest.raises(SettingsError, match="no space left"):
        export(str(DIGITS), tmp_path / "out")
    assert not (tmp_path / "out").exists()

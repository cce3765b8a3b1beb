"""The rule travels with the weights: what is saved, what is read, and what is said without it."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

import fastcompress as fc
from fastcompress.decoder import saved_rule
from fastcompress.decoder.saved_rule import SavedRule
from fastcompress.integrations.transformers import FAMILIES, apply_to, load_compressor, revert
from tests.support import audio_llms
from tests.support.compressed_llms import Gate, batch, make

#: Settings of a rule by default, as ``SavedRule`` shows them.
PARTS = "proportional attention, positions in time"
WITHOUT = f"trained with uniform:3, {PARTS}, after the projector, and runs without compression: call fastcompress"


def in_config(folder: Path) -> Any:
    return json.loads((folder / "config.json").read_text()).get("fastcompress")


def beside_adapter(folder: Path) -> Any:
    assert (folder / "adapter_config.json").is_file()
    return json.loads((folder / "fastcompress.json").read_text())


def load(folder: Path, dtype: torch.dtype = torch.float64) -> Any:
    config = transformers.AutoConfig.from_pretrained(folder)
    kind = getattr(transformers, config.architectures[0])
    return kind.from_pretrained(folder, dtype=dtype).eval()


def lora(model: Any, **kwargs: Any) -> Any:
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=r".*language_model.*q_proj", **kwargs))


def lines(caught: list[warnings.WarningMessage]) -> list[str]:
    return [str(w.message) for w in caught if "trained with" in str(w.message)]


def use(model: Any, inputs: dict[str, Any]) -> list[str]:
    """Return what is said while a model is used."""
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        model(**inputs)
        model.generate(**{k: v for k, v in inputs.items() if k != "labels"}, max_new_tokens=1)
    return lines(caught)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_saved_model_has_its_rule(name: str, tmp_path: Path):
    model = audio_llms.make(name)
    inputs = audio_llms.batch(name, model, (20, 9, 16), labels=True)
    before = not FAMILIES[name].why_not_before
    apply_to(model, "top-k:rate=3", before_projector=before)
    model.save_pretrained(tmp_path)
    wanted = {"version": 1, "mode": "dynamic", "before_projector": before, "rule": "top-k:rate=3", "reduce": "mean"}
    wanted |= {"proportional_attention": True, "positions": "time"}
    assert in_config(tmp_path) == wanted
    again = load(tmp_path, torch.float32)
    assert vars(again.config)["fastcompress"] == wanted
    with torch.no_grad():
        assert apply_to(again) is again and abs(again(**inputs).loss - model(**inputs).loss) <= 1e-6
    assert again.fastcompress_settings.before_projector is before and use(again, inputs) == []
    revert(again)
    assert "fastcompress" not in vars(again.config) and use(again, inputs) == []
    again.save_pretrained(tmp_path / "stock")
    assert in_config(tmp_path / "stock") is None


def test_budget_mode_and_a_reduction_are_saved(tmp_path: Path):
    model = apply_to(make("glmasr"), fc.nn.SegmentPool("uniform:3", reduce="max"), "budget")
    model.save_pretrained(tmp_path)
    again = apply_to(load(tmp_path))
    assert again.fastcompress_settings.mode == "budget" and again.audio_compressor.reduce == "max"
    revert(again)
    apply_to(load(tmp_path), mode="dynamic")  # the modes pool alike: nothing to warn of
    with pytest.warns(
        UserWarning, match=re.escape("trained with uniform:3, reduce=max, after the projector, and runs")
    ):
        apply_to(load(tmp_path), "uniform:3", "budget")


def test_use_without_the_rule_warns_once(tmp_path: Path):
    model = make("qwen2_audio")
    inputs = batch("qwen2_audio", model, labels=True)
    apply_to(model, "uniform:3").save_pretrained(tmp_path)
    again = load(tmp_path)
    (said,) = use(again, inputs)
    assert WITHOUT in said and said.startswith("this qwen2_audio was")
    assert use(again, inputs) == []
    tuned = lora(load(tmp_path))  # peft calls forward of the model, and not the model
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tuned(**inputs)
    assert len(lines(caught)) == 1
    with pytest.warns(
        UserWarning,
        match=f"trained with uniform:3, {PARTS}, after .* with uniform:4, {PARTS}, after",
    ):
        apply_to(load(tmp_path), "uniform:4")
    with pytest.warns(UserWarning, match=f"and runs with uniform:3, {PARTS}, before the projector"):
        apply_to(load(tmp_path), before_projector=True)
    stock = make("qwen2_audio")
    stock.save_pretrained(tmp_path / "stock")
    assert use(load(tmp_path / "stock"), inputs) == []
    with pytest.raises(ValueError, match="no compression was saved with this qwen2_audio; pass a rule"):
        apply_to(stock)


@pytest.mark.parametrize("first", ["rule", "adapter"])
def test_adapters_have_their_rule(first: str, tmp_path: Path):
    model = make("qwen2_audio")
    inputs = batch("qwen2_audio", model, labels=True)
    tuned = lora(apply_to(model, "uniform:3")) if first == "rule" else apply_to(lora(model), "uniform:3")
    tuned.save_pretrained(tmp_path)
    assert beside_adapter(tmp_path)["rule"] == "uniform:3"
    again = peft.PeftModel.from_pretrained(make("qwen2_audio"), tmp_path)
    (said,) = use(again, inputs)
    assert WITHOUT in said
    again = peft.PeftModel.from_pretrained(make("qwen2_audio"), tmp_path)
    apply_to(again)
    assert use(again, inputs) == [] and str(again.get_base_model().audio_compressor.rule) == "uniform:3"
    again.save_pretrained(tmp_path / "again")
    assert beside_adapter(tmp_path / "again") == beside_adapter(tmp_path)
    with pytest.warns(UserWarning, match="adapter .* was trained with uniform:3, .* and runs with uniform:2, .*after"):
        peft.PeftModel.from_pretrained(apply_to(make("qwen2_audio"), "uniform:2"), tmp_path)
    native = make("qwen2_audio")  # without a PeftModel
    native.load_adapter(str(tmp_path))
    assert WITHOUT in use(native, inputs)[0]


def test_every_adapter_of_a_model_has_the_rule(tmp_path: Path):
    tuned = lora(apply_to(make("glmasr"), "uniform:3"))
    tuned.add_adapter("other", peft.LoraConfig(r=2, target_modules=r".*language_model.*v_proj"))
    tuned.save_pretrained(tmp_path)
    assert beside_adapter(tmp_path) == beside_adapter(tmp_path / "other")
    tuned.save_pretrained(tmp_path / "main", is_main_process=False)
    assert not (tmp_path / "main" / "fastcompress.json").exists()
    stock = lora(make("glmasr"))
    stock.save_pretrained(tmp_path / "stock")
    assert not (tmp_path / "stock" / "fastcompress.json").exists()


@pytest.mark.parametrize("compressed", [True, False])
def test_merged_models_have_the_rule(compressed: bool, tmp_path: Path):
    tuned = lora(apply_to(make("qwen2_audio"), "uniform:3"))
    tuned.save_pretrained(tmp_path / "adapter")
    if not compressed:
        tuned = peft.PeftModel.from_pretrained(make("qwen2_audio"), tmp_path / "adapter")
    tuned.merge_and_unload().save_pretrained(tmp_path / "merged")
    assert in_config(tmp_path / "merged") == beside_adapter(tmp_path / "adapter")


@pytest.mark.parametrize("adapter", [False, True])
def test_checkpoints_of_trainer_have_the_rule(adapter: bool, tmp_path: Path):
    model = apply_to(make("glmasr").float(), "uniform:3")
    inputs = audio_llms.batch("glmasr", model, labels=True)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=1, save_steps=1, report_to=[], remove_unused_columns=False, use_cpu=True,
        disable_tqdm=True,
    )  # fmt: skip
    trainer = transformers.Trainer(
        model=lora(model) if adapter else model, args=arguments, train_dataset=[0] * 4, data_collator=lambda _: inputs
    )
    trainer.train()
    folder = tmp_path / "checkpoint-1"
    assert (beside_adapter(folder) if adapter else in_config(folder))["rule"] == "uniform:3"


def test_modules_are_saved_by_name(tmp_path: Path):
    model = make("audioflamingo3")
    apply_to(model, Gate(32).double())
    model.save_pretrained(tmp_path)
    assert in_config(tmp_path) == {"version": 1, "mode": "dynamic", "before_projector": False, "compressor": "Gate"} | {
        "proportional_attention": False,
        "positions": "compact",
    }
    again = load(tmp_path)
    with pytest.raises(ValueError, match="this audioflamingo3 was trained with the module Gate; pass that module"):
        apply_to(again)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_compressor(apply_to(again, Gate(32).double()), tmp_path)
    other = apply_to(make("audioflamingo3"), Gate(32).double(), before_projector=True)
    with pytest.warns(UserWarning, match="the model in .* was trained with Gate, after .* runs with Gate, before"):
        load_compressor(other, tmp_path)


def test_a_replaced_compressor_is_the_one_that_is_saved(tmp_path: Path):
    model = apply_to(make("glmasr"), "uniform:3")
    model.audio_compressor = fc.nn.SegmentPool("uniform:5")
    model.save_pretrained(tmp_path)
    assert in_config(tmp_path)["rule"] == "uniform:5"


def test_the_thinker_of_a_whole_model(tmp_path: Path):
    """Its configuration is a part of another one."""

    class Whole(transformers.PreTrainedModel):
        def __init__(self, thinker: Any) -> None:
            super().__init__(transformers.PreTrainedConfig())
            self.thinker = thinker

    thinker = apply_to(make("qwen2_5_omni_thinker"), "uniform:3")
    inputs = batch("qwen2_5_omni_thinker", thinker)
    thinker.save_pretrained(tmp_path)
    again = load(tmp_path)
    saved_rule._unwatch(again.model)
    saved_rule._after_loading(Whole(again))
    assert len(use(again, inputs)) == 1


GOOD = {"version": 1, "mode": "dynamic", "before_projector": False, "rule": "uniform:3", "reduce": "mean"}


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"clock": "time"}, "fastcompress has an unknown field 'clock' (version 1); this fastcompress reads"),
        ({"positions": "stretched"}, "positions of fastcompress must be one of compact, time, got 'stretched'"),
        ({"proportional_attention": 1}, "proportional_attention of fastcompress must be a bool, got 1"),
        ({"version": 2, "more": 1}, "unknown field 'more' (version 2)"),
        ({"version": 2}, "fastcompress must have version 1, got 2; install a newer fastcompress"),
        ({"version": True}, "must have version 1, got True"),
        ({"mode": 3}, "mode of fastcompress must be a str, got 3"),
        ({"before_projector": "no"}, "before_projector of fastcompress must be a bool, got 'no'"),
        ({"rule": None}, "must have a rule or a compressor"),
        ({"compressor": "Gate"}, "must have a rule or a compressor"),
        ({"rule": "unifrom:3"}, "unifrom"),
        ({"rule": 3}, "rule of fastcompress must be a str, got 3"),
    ],
)
def test_what_cannot_be_read(change: dict[str, Any], text: str, tmp_path: Path):
    data = {k: v for k, v in (GOOD | change).items() if v is not None}
    with pytest.raises(ValueError, match=re.escape(text)):
        SavedRule.from_dict(data)
    model = make("glmasr")
    model.config.fastcompress = data
    with pytest.raises(ValueError, match=re.escape(text)):
        apply_to(model)
    assert not hasattr(model, "fastcompress_settings")


def test_what_is_no_object_or_lacks_a_field():
    with pytest.raises(ValueError, match="fastcompress must be an object with a version, got 'uniform:3'"):
        SavedRule.from_dict("uniform:3")
    with pytest.raises(ValueError, match="fastcompress must have a mode, got the fields version, rule"):
        SavedRule.from_dict({"version": 1, "rule": "uniform:3"})


def test_a_file_beside_an_adapter_that_cannot_be_read(tmp_path: Path):
    lora(apply_to(make("glmasr"), "uniform:3")).save_pretrained(tmp_path)
    (tmp_path / "fastcompress.json").write_text(json.dumps(GOOD | {"clock": "time"}))
    again = peft.PeftModel.from_pretrained(make("glmasr"), tmp_path)
    with pytest.raises(ValueError, match="unknown field 'clock'"):
        apply_to(again)
    assert "'clock': 'time'" in use(again, batch("glmasr", again))[0]
    (tmp_path / "fastcompress.json").write_text("{")
    with pytest.raises(ValueError, match="fastcompress.json must be JSON"):
        peft.PeftModel.from_pretrained(make("glmasr"), tmp_path)


def test_the_reference_model_s_adapters(tmp_path: Path):
    """Its configuration has the rule; its adapters alone have not."""
    from fastcompress.lalm import FastCompressConfig, FastCompressForConditionalGeneration, add_lora

    def make_reference(rule: str | None) -> Any:
        torch.manual_seed(0)
        text = {k: v for k, v in audio_llms.TEXT.items()} | {"model_type": "qwen2"}
        config = FastCompressConfig(audio_llms.WHISPER | {"model_type": "whisper"}, text, rule, audio_token_id=100)
        return FastCompressForConditionalGeneration(config)

    add_lora(make_reference("uniform:3")).save_pretrained(tmp_path)
    assert beside_adapter(tmp_path)["rule"] == "uniform:3"
    with pytest.warns(UserWarning, match="trained with uniform:3, before the projector, and runs without compression"):
        peft.PeftModel.from_pretrained(make_reference(None), tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        peft.PeftModel.from_pretrained(make_reference("uniform:3"), tmp_path)


def test_a_rule_runs_as_it_was_trained(tmp_path: Path):
    """Weights keep their attention and positions with any rule, and so do files without these settings."""
    model = audio_llms.make("glmasr")
    apply_to(model, "uniform:3", proportional_attention=False, positions="compact")
    model.save_pretrained(tmp_path)
    data = json.loads((tmp_path / "config.json").read_text())
    for older in (False, True):
        if older:
            del data["fastcompress"]["positions"], data["fastcompress"]["proportional_attention"]
            (tmp_path / "config.json").write_text(json.dumps(data))
        for rule in (None, "uniform:3"):
            settings = apply_to(load(tmp_path), rule).fastcompress_settings
            assert (settings.proportional_attention, settings.positions) == (False, "compact")
        with pytest.warns(UserWarning, match=f"runs with uniform:3, {PARTS}, after"):
            apply_to(load(tmp_path), proportional_attention=True, positions="time")
        with pytest.warns(UserWarning, match="runs with uniform:4, after"):
            apply_to(load(tmp_path), "uniform:4")

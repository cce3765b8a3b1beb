"""The reference audio LLM with learned boundaries, and with the CTC head's labels as boundaries."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import pytest
import torch

import fastcompress as fc
from fastcompress.decoder.generation import unwrap
from fastcompress.lalm import FastCompressConfig, FastCompressForConditionalGeneration
from fastcompress.lalm.loading import _load_adapter, load_model, set_compression
from fastcompress.lalm.lora import add_lora
from fastcompress.training import logs
from fastcompress.training.examples import Examples
from fastcompress.training.manifest import read_manifest
from fastcompress.training.runs import Run
from fastcompress.training.settings import SettingsError, TrainSettings
from tests.support.lalm_data import write_tones
from tests.support.reference_models import batch, build


def learned(**options) -> FastCompressForConditionalGeneration:
    model = build(boundary_ratio=3.0, **options)
    assert model.compressor is not None
    torch.manual_seed(1)
    for p in model.compressor.parameters():  # larger weights, so that there are some boundaries
        torch.nn.init.normal_(p, std=0.3)
    return model


def test_learned_boundaries_in_the_model(tmp_path: Path):
    model = learned()
    inputs = batch()
    labels = inputs.pop("labels")
    frames, lengths = model.encode(inputs["input_features"], inputs["feature_attention_mask"])
    pooled = model.compress(frames, lengths)
    direct = model.compressor(frames, lengths=lengths)
    assert torch.equal(pooled.values, direct.values) and 3 < len(pooled.values) < int(lengths.sum())
    out = model(**inputs, labels=labels)
    assert out.num_audio_tokens == len(pooled.values)
    torch.testing.assert_close(out.loss, out.lm_loss + 0.1 * out.compressor_loss)
    out.loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.compressor.parameters())
    written = model.generate(**inputs, max_new_tokens=3)
    model.save_pretrained(tmp_path)
    again = FastCompressForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert again.config.boundary_ratio == 3.0
    assert torch.equal(again.compressor.key.weight, model.compressor.key.weight)
    assert torch.equal(again.generate(**inputs, max_new_tokens=3), written)
    text = {k: v[1:2] for k, v in inputs.items() if k in ("input_ids", "attention_mask")}
    model.zero_grad()
    model(**text, labels=labels[1:2]).loss.backward()  # without audio its parameters are still in the graph
    assert all(p.grad is not None for p in model.compressor.parameters())


def test_a_new_compressor_is_the_identity():
    config = build(boundary_ratio=2.0).config
    model = FastCompressForConditionalGeneration(config)
    assert torch.equal(model.compressor.key.weight.detach(), torch.eye(24))
    with pytest.raises(ValueError, match="cannot set rule uniform:3"):
        model.rule = "uniform:3"
    with pytest.raises(ValueError, match="set boundary_ratio or rule, not both, got 2.0 and 'uniform:3'"):
        FastCompressConfig(boundary_ratio=2.0, rule="uniform:3")
    set_compression(model, None, reduce="first")
    assert model.compressor.reduce == "first"


def test_integrate_and_fire_in_the_model(tmp_path: Path):
    model = build(boundary_ratio=3.0, boundary_kind="cif")
    inputs = batch()
    labels = inputs.pop("labels")
    frames, lengths = model.encode(inputs["input_features"], inputs["feature_attention_mask"])
    wanted = (lengths / 3.0).ceil().long()
    model.train()
    fired = model.compress(frames, lengths)
    assert fired.cu_seqlens.diff().tolist() == wanted.tolist()
    whole = frames[0, : 3 * int(lengths[0] // 3)].unflatten(0, (-1, 3)).mean(1)  # means of 3 frames
    if lengths[0] % 3 == 0:
        torch.testing.assert_close(fired.values[: len(whole)], whole)
    torch.manual_seed(1)
    torch.nn.init.normal_(model.compressor.weight.weight, std=0.5)
    out = model(**inputs, labels=labels)
    torch.testing.assert_close(out.loss, out.lm_loss + 0.1 * out.compressor_loss)
    assert out.num_audio_tokens == wanted.sum()
    out.lm_loss.backward()
    assert model.compressor.weight.weight.grad.any()  # only the borders of tokens depend on it
    model.eval()
    alpha = model.compressor.weight(frames)[..., 0].sigmoid()
    direct = fc.integrate_and_fire(frames, alpha, lengths=lengths)
    assert torch.equal(model.compress(frames, lengths).values, direct.values)
    model.save_pretrained(tmp_path)
    again = FastCompressForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert torch.equal(again.compressor.weight.weight, model.compressor.weight.weight)
    written = model.generate(**inputs, max_new_tokens=3)
    assert torch.equal(again.generate(**inputs, max_new_tokens=3), written)
    with pytest.raises(ValueError, match="boundary_kind must be one of h-net, cif, got 'cnn'"):
        FastCompressConfig(boundary_kind="cnn")


def test_saving_a_compressor(tmp_path: Path):
    model = learned()
    inputs = batch()
    model(**inputs).loss.backward()
    copied = copy.deepcopy(model)  # also while `loss` has a graph
    assert copied.compressor.loss is None and torch.equal(copied.compressor.key.weight, model.compressor.key.weight)
    model.use_compressor(fc.nn.BipartiteMerge(2.0))
    assert model.config.boundary_ratio is None
    tokens = model(**inputs).num_audio_tokens
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="was saved with compressor BipartiteMerge, which the"):
        again = FastCompressForConditionalGeneration.from_pretrained(tmp_path)
    again.use_compressor(fc.nn.BipartiteMerge(2.0))
    assert again(**inputs).num_audio_tokens == tokens
    with pytest.raises(ValueError, match="kind must be one of h-net, cif, got 'foo'"):
        model.learn_boundaries(3.0, "foo")


def test_changes_of_the_compressor(tmp_path: Path):
    """LoRA wraps the compressor; a new rule or compressor replaces the old one; inputs exclude each other."""
    tuned = add_lora(build(boundary_ratio=3.0), rank=2)
    set_compression(tuned, None, reduce="first")
    found = [m.reduce for m in tuned.modules() if isinstance(m, fc.nn.LearnedBoundary)]
    assert found == ["first", "first"]  # peft's copy runs
    model = build()
    model.config.compressor = "BipartiteMerge"  # as after loading, when the compressor is missing
    model.rule = "uniform:3"
    assert model.config.compressor is None
    inputs = batch()
    frames, lengths = model.encode(inputs["input_features"], inputs["feature_attention_mask"])
    pooled = model.compress(frames, lengths)
    with pytest.raises(ValueError, match="pass frames or pooled, not both"):
        model.pack(inputs["input_ids"], inputs["attention_mask"], frames, lengths, pooled=pooled)
    model = build()
    model.save_pretrained(tmp_path / "base")
    model.use_compressor(fc.nn.BipartiteMerge(2.0))
    tuned = add_lora(model, rank=2)
    tuned.save_pretrained(tmp_path / "lora")
    model.config.save_pretrained(tmp_path / "lora")
    (tmp_path / "lora" / "base.json").write_text(json.dumps({"model": str(tmp_path / "base")}))
    with pytest.MonkeyPatch.context() as patch:
        plain = FastCompressForConditionalGeneration.from_pretrained(tmp_path / "base")
        patch.setattr("fastcompress.lalm.loading.load_model", lambda path: (plain, None))
        with pytest.warns(UserWarning, match="was saved with compressor BipartiteMerge, which the"):
            _load_adapter(tmp_path / "lora")


def test_a_compressor_s_loss_has_its_own_weight():
    model = build()
    model.use_compressor(fc.nn.IntegrateAndFire(24, 3.0, loss_weight=5.0).double())
    out = model(**batch())
    torch.testing.assert_close(out.loss, out.lm_loss + 5.0 * out.compressor_loss)


def test_losses_beside_the_labels_count_once_a_step():
    """``Trainer`` adds the losses of the batches of a step; extra losses count once per step."""
    model = build(boundary_ratio=3.0, train_encoder=True, ctc_tokens=["a", "b"])
    inputs = batch() | {"ctc_labels": torch.tensor([[1, 2], [2, -100], [1, -100]])}
    whole = model(**inputs)
    torch.testing.assert_close(whole.loss, whole.lm_loss + whole.ctc_loss + 0.1 * whole.compressor_loss)
    labels = int((whole.packed.labels != -100).sum())
    parts = [model(**inputs, num_items_in_batch=items) for items in (torch.tensor(2 * labels), 2 * labels)]
    torch.testing.assert_close(sum(part.loss for part in parts), whole.loss)
    assert parts[0].ctc_loss == whole.ctc_loss and parts[0].compressor_loss == whole.compressor_loss


@pytest.mark.parametrize(
    "module",
    [
        fc.nn.BipartiteMerge(2.0),
        fc.nn.IterativeFusion(5),
        fc.nn.GreedySegments(0.4, max_len=4),
        fc.nn.SegmentPool("top-k:3"),
    ],
    ids=lambda module: type(module).__name__,
)
def test_any_compressor(module: torch.nn.Module):
    model = build()
    inputs = batch()
    frames, lengths = model.encode(inputs["input_features"], inputs["feature_attention_mask"])
    model.use_compressor(module)
    tokens = module(frames, lengths=lengths)
    out = model(**inputs)
    assert out.num_audio_tokens == len(tokens.values) < int(lengths.sum()) and out.compressor_loss is None
    out.loss.backward()
    assert model.projector.weight.grad.any()
    with pytest.raises(ValueError, match="cannot set rule local-max: this model has a compressor"):
        model.rule = "local-max"
    saved = add_lora(model, rank=2).peft_config["default"].modules_to_save
    assert saved == ["projector"]  # the compressor has no parameters


def test_no_rule_is_no_compressor(tmp_path: Path):
    """With rule "none" every frame is kept, and `compression` is the name of the compressor."""
    for build_one in (lambda: learned(), lambda: add_lora(learned(), rank=2)):
        model = build_one()
        inputs = batch()
        assert unwrap(model).compression == "LearnedBoundary"
        set_compression(model, None)
        assert unwrap(model).compression == "LearnedBoundary"
        set_compression(model, "none")
        out = model(**inputs)
        assert unwrap(model).compression == "none" and out.compressor_loss is None
        assert out.num_audio_tokens == out.num_frames
        assert (unwrap(model).config.boundary_ratio, unwrap(model).config.compressor) == (None, None)
        set_compression(model, "uniform:3")
        assert unwrap(model).compression == "uniform:3"
    model = learned()
    model.use_compressor(fc.nn.BipartiteMerge(2.0))
    assert model.compression == "BipartiteMerge"
    model.rule = None
    model.save_pretrained(tmp_path)
    assert FastCompressForConditionalGeneration.from_pretrained(tmp_path).compression == "none"


def test_labels_of_the_ctc_head_as_boundaries():
    model = build(ctc_tokens=["a", "b", "c"], rule="label-change:blank=0")
    inputs = {key: value for key, value in batch().items() if key != "labels"}
    frames, lengths = model.encode(inputs["input_features"], inputs["feature_attention_mask"])
    labels = model.ctc_head(frames).argmax(-1)
    wanted = fc.segment_pool(frames, lengths=lengths, rule=fc.LabelChange(blank=0), labels=labels)
    found = model.compress(frames, lengths)
    assert torch.equal(found.values, wanted.values) and 0 < len(found.values) < int(lengths.sum())
    assert model.generate(**inputs, max_new_tokens=2).shape[0] == 3
    for make in (lambda: build(rule="label-change"), lambda: setattr(build(), "rule", "label-change")):
        with pytest.raises(ValueError, match=re.escape("label-change") + ".* needs ctc_tokens"):
            make()


def test_training_from_the_command_s_settings(tmp_path: Path):
    """Boundaries that are trained from scratch, or with LoRA on another model, are loaded with a run."""
    train = write_tones(tmp_path, 16, texts=2)
    common = {
        "data": str(train),
        "per_device_train_batch_size": 4,
        "save_steps": 0,
        "logging_steps": 1,
        "augment": False,
    }
    settings = {"boundary_ratio": 2.5, "max_steps": 4, "gradient_accumulation_steps": 2, **common}
    run = Run(TrainSettings(output_dir=str(tmp_path / "run"), **settings), say=lambda text: None)
    run.train()
    model, processor = load_model(tmp_path / "run")
    assert model.compressor.ratio == 2.5 and not torch.equal(model.compressor.key.weight, torch.eye(128))
    rows = logs.read(tmp_path / "run" / "log.csv")
    assert all(row["loss"] > row["lm_loss"] + row["ctc_loss"] for row in rows)
    settings = {"rule": "none", "max_steps": 2, **common}
    Run(TrainSettings(output_dir=str(tmp_path / "base"), **settings), say=lambda text: None).train()
    settings = {"model": str(tmp_path / "base"), "boundary_ratio": 3.0, "lora_rank": 4, "max_steps": 3, **common}
    Run(TrainSettings(output_dir=str(tmp_path / "lora"), **settings), say=lambda text: None).train()
    tuned, processor = load_model(tmp_path / "lora")
    inputs = Examples(read_manifest(train), processor).batch([0, 1], targets=False)
    base = tuned.get_base_model()
    trained = [p for n, p in base.named_parameters() if "compressor" in n and "modules_to_save" in n]
    assert len(trained) == 2 and not torch.equal(trained[0], torch.eye(128))
    assert tuned.generate(**inputs, max_new_tokens=3).shape[0] == 2
    for more in ({}, {"lora_rank": 4}):
        settings = {"model": str(tmp_path / "run"), "rule": "none", "max_steps": 1, **common, **more}
        folder = tmp_path / f"none-{len(more)}"
        Run(TrainSettings(output_dir=str(folder), **settings), say=lambda text: None).train()
        assert unwrap(load_model(folder)[0]).compression == "none"
    for wrong, text in (
        ({"boundary_ratio": 1.0}, "`boundary_ratio` must be more than 1, got 1.0"),
        ({"boundary_kind": "cnn"}, "`boundary_kind` must be one of h-net, cif, got 'cnn'"),
        ({"boundary_ratio": 2.0, "rule": "local-max"}, "`boundary_ratio` excludes `rule`, got 2.0 and 'local-max'"),
    ):
        with pytest.raises(SettingsError, match=re.escape(text)):
            TrainSettings(output_dir="run", **(wrong | common))

"""Dynamic mode: compressed models against the stock model, and batches against each sample alone."""

from __future__ import annotations

import inspect
import itertools
import re

import pytest
import torch
import transformers
from torch import nn

import fastcompress as fc
from fastcompress.integrations.transformers import FAMILIES, apply_to, revert
from tests.support import audio_llms
from tests.support.compressed_llms import GREEDY, batch, grads, largest, make
from tests.support.slow import some

NAMES = tuple(audio_llms.FAMILIES)
BEFORE_PROJECTOR = tuple(name for name in NAMES if not FAMILIES[name].why_not_before)
# The identity compressor changes nothing


@pytest.mark.parametrize("name", NAMES)
def test_identity_equals_stock(name):
    model = make(name)
    right, left = (batch(name, model, side=side, labels=True) for side in ("right", "left"))
    labels = right.pop("labels")
    left.pop("labels")
    with torch.no_grad():
        stock = model(**right).logits
        short = left["input_ids"].shape[1] - int(left["attention_mask"].sum(1)[1])
        assert short > 0  # so that the padding is on the left
        written = model.generate(**left, **GREEDY)
        beams = model.generate(**left, **GREEDY | {"num_beams": 2, "num_return_sequences": 2})
        seen, told = torch.zeros_like(labels).bool(), labels != -100
        seen[:, :-1] = told[:, 1:]
        loss = nn.functional.cross_entropy(stock[seen], labels[told])
    for pack in (False, True):
        apply_to(model, "uniform:1", pack=pack)
        with torch.no_grad():
            out = model(**right)
            kept = right["attention_mask"].bool()
            assert out.logits.shape == stock.shape and (out.logits - stock)[kept].abs().max() <= 1e-6
            assert torch.equal(out.compressed.source, kept.flatten().nonzero()[:, 0])
            if pack:  # prompts of `generate` are not packed
                assert torch.equal(model.generate(**left, **GREEDY), written)
                again = model.generate(**left, **GREEDY | {"num_beams": 2, "num_return_sequences": 2})
                assert torch.equal(again, beams)
            trained = model(**right, labels=labels)
            assert trained.logits.shape == (1, int(told.sum()), audio_llms.VOCABULARY)
            assert (trained.logits[0] - stock[seen]).abs().max() <= 1e-6
            assert abs(trained.loss - loss) <= 1e-6
            assert model(**right, labels=labels, num_items_in_batch=3).loss * 3 == pytest.approx(float(loss) * 12)
        revert(model)


@pytest.mark.parametrize("name", BEFORE_PROJECTOR)
def test_identity_before_the_projector_equals_stock(name):
    model = make(name)
    inputs = batch(name, model, side="right")
    with torch.no_grad():
        stock = model(**inputs).logits
        apply_to(model, "uniform:1", before_projector=True)
        assert (model(**inputs).logits - stock)[inputs["attention_mask"].bool()].abs().max() <= 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_revert_restores_the_stock_model(name):
    model = make(name)
    inputs = batch(name, model, labels=True)
    before = {key: id(value) for key, value in vars(model).items()}
    signatures = [inspect.signature(getattr(model, method)) for method in ("forward", "generate")]
    with torch.no_grad():
        stock = model(**inputs)
        for mode in ("dynamic", "budget"):
            if mode == "budget" and FAMILIES[name].budget is None:
                continue
            apply_to(model, "uniform:3", mode)
            assert [inspect.signature(getattr(model, method)) for method in ("forward", "generate")] == signatures
            assert isinstance(model.audio_compressor, fc.nn.SegmentPool)
            assert revert(model) is model
            assert {key: id(value) for key, value in vars(model).items()} == before
            for module in model.modules():
                assert "forward" not in vars(module) and "get_audio_features" not in vars(module)
            again = model(**inputs)
            assert torch.equal(again.logits, stock.logits) and torch.equal(again.loss, stock.loss)
    assert model.model.language_model.config._attn_implementation == "sdpa"
    with pytest.raises(ValueError, match="is not compressed"):
        revert(model)


# Compressed


# Families differ in how audio becomes rows, and rules in which rows become a token.
@pytest.mark.parametrize(
    ("name", "rule"),
    [*((name, "local-max") for name in NAMES), ("qwen2_audio", "uniform:3"), ("audioflamingo3", "threshold:1.0")],
)
def test_packed_equals_padded_and_each_sample_alone(name, rule):
    model = make(name)
    inputs = batch(name, model, labels=True)
    for before in (False, True) if name in BEFORE_PROJECTOR else (False,):
        losses, gradients = [], []
        for pack in (False, True):
            apply_to(model, rule, pack=pack, before_projector=before)
            out = model(**inputs)
            out.loss.backward()
            losses.append(out.loss.detach())
            gradients.append(grads(model))
            if pack:
                break
            revert(model)
        assert abs(losses[0] - losses[1]) <= 1e-9 and largest(*gradients) <= 1e-9
        assert any("tower" in n or "encoder" in n for n in gradients[0]) or name == "vibevoice_asr"  # frozen
        counts = out.compressed.cu_seqlens.diff().tolist()
        assert sum(counts) < int(inputs["attention_mask"].sum())
        total = 0.0
        for i in range(3):
            alone = model(**audio_llms.one(name, inputs, i))
            assert alone.compressed.cu_seqlens.tolist() == [0, counts[i]]
            alone.loss.backward()
            total += float(alone.loss.detach()) / 3
        assert abs(total - losses[0]) <= 1e-6
        apart = grads(model)
        assert largest({n: g * 3 for n, g in gradients[0].items()}, apart) <= 1e-6
        if before:  # generation depends only on the tokens, so it is tested once
            revert(model)
            continue
        inputs_only = {k: v for k, v in inputs.items() if k != "labels"}
        with torch.no_grad():
            together = model.generate(**inputs_only, **GREEDY)
            logits = model(**inputs_only).logits
            for i in range(3):
                single = audio_llms.one(name, inputs_only, i)
                assert torch.equal(model.generate(**single, **GREEDY)[0, -6:], together[i, -6:])
                assert (model(**single).logits[0, -1] - logits[i, -1]).abs().max() <= 1e-5
        revert(model)


@pytest.mark.parametrize("name", NAMES)
def test_stock_decoder_on_every_frame_oracle(name):
    """The shortened input gives the result of the stock decoder on the full input, whose frames equal their tokens.

    All frames of a token have its position. With proportional attention they see each other and are seen; else only the
    first one is. A causal mask would be no oracle beyond the first layer.
    """
    model = make(name)
    inputs = batch(name, model, side="right")
    captured = {}

    def capture(module, args, kwargs):
        captured["embeds"] = kwargs["inputs_embeds"]

    handle = model.model.language_model.register_forward_pre_hook(capture, with_kwargs=True)
    with torch.no_grad():
        model(**inputs)
    handle.remove()
    ids, merged, mask = inputs["input_ids"], captured["embeds"].clone(), inputs["attention_mask"].bool()
    first = mask.clone()  # rows of text, and the first frame of each token
    lengths = mask.long()
    for row, ids_row in enumerate(ids):
        places = (ids_row == audio_llms.AUDIO).nonzero()[:, 0]
        for begin in range(0, len(places), 3):
            segment = places[begin : begin + 3]
            merged[row, segment] = merged[row, segment].mean(0)
            first[row, segment[1:]] = False
            lengths[row, segment] = len(segment)
    run = first.cumsum(1)
    starts = (mask.cumsum(1) - 1).masked_fill(~first, 0).cummax(1).values
    for proportional, positions in itertools.product((False, True), ("compact", "time")):
        place = starts + (lengths - 1).clamp_min(0) // 2 if positions == "time" else run - 1
        seen = (run[:, :, None] >= run[:, None]) & (mask if proportional else first)[:, None]
        with torch.no_grad():
            kwargs = {"inputs_embeds": merged, "attention_mask": seen[:, None], "position_ids": place.clamp_min(0)}
            oracle = model.lm_head(model.model.language_model(**kwargs, use_cache=False).last_hidden_state)
            for pack in (False, True):
                apply_to(model, "uniform:3", pack=pack, proportional_attention=proportional, positions=positions)
                for cached in ({}, {"use_cache": True}):
                    out = model(**inputs, **cached)
                    for row in range(3):
                        found = out.logits[row, : int(first[row].sum())]
                        assert (found - oracle[row, first[row]]).abs().max() <= 1e-6
                assert torch.equal(out.compressed.next_positions, (mask if positions == "time" else first).sum(1))
                revert(model)


@pytest.mark.parametrize("name", NAMES)
def test_generation_continues_where_the_frames_end(name):
    """Greedy search, and beams, give the tokens of forward passes over the whole text; left padding changes nothing."""
    model = make(name)
    inputs = batch(name, model, side="left")
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    apply_to(model, "uniform:3")
    with torch.no_grad():
        written = model.generate(**inputs, **GREEDY, suppress_tokens=[audio_llms.AUDIO])
        text, seen = ids, mask
        for _ in range(GREEDY["max_new_tokens"]):
            out = model(**inputs | {"input_ids": text, "attention_mask": seen})
            logits = out.logits[:, -1:]
            logits[..., [audio_llms.END, audio_llms.AUDIO]] = -torch.inf  # as above
            text = torch.cat([text, logits.argmax(-1)], 1)
            seen = torch.cat([seen, seen.new_ones(len(seen), 1)], 1)
    assert torch.equal(written, text)


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("name", ["qwen2_audio", "glmasr"])
def test_samples_do_not_leak(name, mode):
    model = make(name)
    getattr(model, mode)()
    apply_to(model, "uniform:2")
    inputs = batch(name, model, (30, 30, 30), labels=True)
    told = model(**inputs).logits[0].detach().reshape(3, 4, -1)
    changed = dict(inputs)
    changed["input_features"] = inputs["input_features"].clone()
    changed["input_features"][0] += 1
    now = model(**changed).logits[0].detach().reshape(3, 4, -1)
    assert torch.equal(now[1:], told[1:]) and not torch.equal(now[0], told[0])


def test_logits_are_in_the_columns_of_the_stock_model():
    """The last column predicts the next token of each sample if the padding of the input is on the left."""
    model = make("audioflamingo3")
    inputs = batch("audioflamingo3", model)
    apply_to(model, "uniform:3")
    with torch.no_grad():
        out = model(**inputs)
        written = model.generate(**inputs, max_new_tokens=1, do_sample=False)[:, -1]
        assert torch.equal(out.logits[:, -1].argmax(-1), written)
        cached = model(**inputs, use_cache=True)
        cache = getattr(cached, "cache", None) or cached.past_key_values
        assert (cached.logits - out.logits)[:, -1].abs().max() <= 1e-9
        assert cache.get_seq_length() == out.logits.shape[1]
        assert (model(**inputs, logits_to_keep=1).logits[:, 0] - out.logits[:, -1]).abs().max() <= 1e-9
        as_tuple = model(**inputs, return_dict=False)
        assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[0], out.logits)
        revert(model)
        apply_to(model, "uniform:3", pack=False)
        trained = model(**inputs, labels=inputs["input_ids"])
        assert all(getattr(trained, name, None) is None for name in ("cache", "past_key_values"))
        loss, logits, *_ = model(**inputs, labels=inputs["input_ids"], return_dict=False)
        assert loss.dim() == 0 and logits.dim() == 3


def test_the_last_column_predicts_the_next_token_without_padding():
    """Compression shortens prompts of equal length by different amounts."""
    model = make("qwen2_audio")
    inputs = batch("qwen2_audio", model, (50, 50, 50))
    longest = inputs["input_ids"].shape[1] - 4
    inputs = {k: v[:, -longest:] if v.shape == inputs["input_ids"].shape else v for k, v in inputs.items()}
    inputs["input_ids"] = inputs["input_ids"].where(inputs["attention_mask"].bool(), 7)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    with torch.no_grad():
        for more in ({}, {"attention_mask": None}):
            apply_to(model, "local-max")
            given = inputs | more
            lengths = model(**given).compressed.cu_seqlens.diff()
            assert lengths.unique().numel() > 1
            written = model.generate(**given, max_new_tokens=1, do_sample=False)[:, -1]
            assert torch.equal(model(**given).logits[:, -1].argmax(-1), written)
            revert(model)


def test_labels_of_audio_are_not_predicted():
    model = make("qwen2_audio")
    inputs = batch("qwen2_audio", model)
    for before in (False, True):
        apply_to(model, "uniform:3", before_projector=before)
        out = model(**inputs, labels=inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100))
        told = out.compressed.labels[out.compressed.labels != -100]
        assert audio_llms.AUDIO not in told.tolist()
        text = (inputs["input_ids"] != audio_llms.AUDIO) & inputs["attention_mask"].bool()
        assert len(told) == int(text.sum()) - 3  # no row predicts the first row of a sample
        revert(model)


# Generation


@pytest.mark.parametrize(
    "name", some(("qwen2_audio", "qwen2_5_omni_thinker", "granite_speech"), "qwen2_audio", "qwen2_5_omni_thinker")
)
def test_generation_settings(name):
    model = make(name)
    inputs = batch(name, model)
    ids = inputs["input_ids"]
    with torch.no_grad():
        stock = {}
        settings = {
            "static": {"cache_implementation": "static"},
            "total": {"max_length": ids.shape[1] + 5, "max_new_tokens": None},
            "config": {
                "generation_config": transformers.GenerationConfig(max_length=ids.shape[1] + 5, do_sample=False),
                "max_new_tokens": None,
            },
            "at least": {"min_length": ids.shape[1] + 5},
            "penalty": {"repetition_penalty": 1.3},
            "details": {"return_dict_in_generate": True, "output_scores": True},
        }
        for key, more in settings.items():
            stock[key] = model.generate(**inputs, **{k: v for k, v in (GREEDY | more).items() if v is not None})
        apply_to(model, "uniform:1")
        for key, more in settings.items():
            if key == "penalty" and not FAMILIES[name].prompt_ids:
                continue  # documented: the penalty applies only to generated ids
            out = model.generate(**inputs, **{k: v for k, v in (GREEDY | more).items() if v is not None})
            if key == "details":
                assert len(out.scores) == len(stock[key].scores)
                out, stock[key] = out.sequences, stock[key].sequences
            assert torch.equal(out, stock[key]), key
        positional = {k: v for k, v in inputs.items() if k != "input_ids"}
        assert torch.equal(model.generate(ids, **positional, **GREEDY), model.generate(**inputs, **GREEDY))
        revert(model)
        apply_to(model, "uniform:3")
        static = model.generate(**inputs, **GREEDY, cache_implementation="static")
        assert torch.equal(static, model.generate(**inputs, **GREEDY))
        assert torch.equal(static[:, : ids.shape[1]], ids)
        out = model.generate(**inputs, **GREEDY, num_beams=3, num_return_sequences=2)
        assert out.shape == (6, ids.shape[1] + 6) and torch.equal(out[:, : ids.shape[1]], ids.repeat_interleave(2, 0))


def test_generation_that_cannot_work_is_refused():
    model = make("qwen2_audio")
    inputs = batch("qwen2_audio", model)
    apply_to(model, "uniform:3")
    for more, text in (
        ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens cannot be used with a compressed prompt"),
        ({"assistant_model": model}, "assistant_model cannot be used"),
        ({"prefill_chunk_size": 4}, "prefill_chunk_size and a paged cache cannot be used"),
        ({"cache_implementation": "paged"}, "paged cache"),
        ({"use_cache": False}, "use_cache=False cannot be used with a compressed prompt"),
        ({"max_length": 5}, None),
    ):
        error, text = (NotImplementedError, text) if text else (ValueError, "max_length must be > 21, the number")
        with pytest.raises(error, match=re.escape(text)):
            model.generate(**inputs, **more)
    with torch.no_grad():
        out = model(**inputs, use_cache=True)
    cache = getattr(out, "cache", None) or out.past_key_values
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    with pytest.raises(NotImplementedError, match="cannot continue from a cache"):
        model.generate(**inputs, **{name: cache})


def test_granite_turns_its_adapter_on_for_audio(monkeypatch):
    model = make("granite_speech")
    inputs = batch("granite_speech", model)
    turned = []
    monkeypatch.setattr(model, "_hf_peft_config_loaded", True)
    monkeypatch.setattr(model, "enable_adapters", lambda: turned.append("on"))
    monkeypatch.setattr(model, "disable_adapters", lambda: turned.append("off"))
    model.generate(**inputs, **GREEDY)
    apply_to(model, "uniform:3")
    model.generate(**inputs, **GREEDY)
    model.generate(torch.tensor([[5, 6, 7]]), **GREEDY)
    assert turned == ["on", "on", "off"]

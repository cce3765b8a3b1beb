"""Budget mode: the number of tokens depends only on the length of the audio, and processors write the placeholders."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import fastcompress as fc
from fastcompress.integrations.transformers import FAMILIES, BudgetProcessor, apply_to, revert
from tests.support import audio_llms
from tests.support.compressed_llms import GREEDY, batch, make

NAMES = tuple(name for name, family in FAMILIES.items() if family.budget is not None)
#: Sizes of audio for families with windows: some audios have several windows.
SIZES = {"audioflamingo3": (130, 9, 50), "voxtral": (35, 9, 60)}


class Nothing:
    """A processor that the tests do not call."""

    tokenizer = None


#: Settings of ``apply_to`` that dynamic mode has by default for a rule, and those of budget mode.
PARTS = {"proportional_attention": True, "positions": "time"}
WITHOUT = {"proportional_attention": False, "positions": "compact"}


@pytest.mark.parametrize(
    ("name", "rule", "parts"),
    [
        *((name, "uniform:3", PARTS) for name in NAMES),
        *((name, rule, WITHOUT) for name in SIZES for rule in ("uniform:4", "uniform:size=4,tail=drop")),
    ],
)
def test_budget_is_what_dynamic_mode_does(name, rule, parts):
    """The two modes give the same result if no window ends inside a segment. The numbers of tokens always match."""
    model = make(name)
    sizes = SIZES.get(name, (20, 9, 16))
    inputs = batch(name, model, sizes, labels=True)
    apply_to(model, rule, "budget", **parts)
    shortened = BudgetProcessor(Nothing(), model).shorten(dict(inputs))
    assert shortened["input_ids"].shape == shortened["attention_mask"].shape == shortened["labels"].shape
    with torch.no_grad():
        out = model(**shortened)
        prompt = {key: value for key, value in shortened.items() if key != "labels"}
        written = model.generate(**prompt, **GREEDY)
        static = model.generate(**prompt, **GREEDY, cache_implementation="static")
        assert torch.equal(written, static)
    revert(model)
    window = FAMILIES[name].window and FAMILIES[name].window(model.config)
    whole = not window or max(sizes) <= window or window % fc.Rule.from_string(rule).size == 0
    apply_to(model, rule, **parts)
    with torch.no_grad():
        dynamic = model(**inputs)
        longer = {key: value for key, value in inputs.items() if key != "labels"}
        lengths = dynamic.compressed.cu_seqlens.diff()
        if whole:
            assert shortened["attention_mask"].sum(1).tolist() == lengths.tolist()
            assert abs(out.loss - dynamic.loss) <= 1e-6
            assert torch.equal(model.generate(**longer, **GREEDY)[:, -6:], written[:, -6:])
        else:
            assert (shortened["attention_mask"].sum(1) >= lengths - len(sizes)).all()


def test_gradients_reach_the_audio():
    for name in NAMES:
        model = make(name)
        inputs = batch(name, model, labels=True)
        apply_to(model, "uniform:3", "budget")
        model(**BudgetProcessor(Nothing(), model).shorten(inputs)).loss.backward()
        outside = [p for n, p in model.named_parameters() if "language_model" not in n and "lm_head" not in n]
        assert sum(float(p.grad.abs().sum()) for p in outside if p.grad is not None) > 0, name


def test_rules_and_models_without_a_budget():
    for name, family in FAMILIES.items():
        model = make(name)
        if family.budget is None:
            with pytest.raises(NotImplementedError, match=f"{name} has no budget mode: it (computes|puts)"):
                apply_to(model, "uniform:3", "budget")
        else:
            with pytest.raises(NotImplementedError, match="depends only on the length"):
                apply_to(model, "local-max", "budget")
            with pytest.raises(NotImplementedError, match="depends only on the length"):
                apply_to(model, torch.nn.Identity(), "budget")
        assert not hasattr(model, "audio_compressor")
    model = make("audioflamingo3")
    with pytest.raises(ValueError, match="model must be compressed in budget mode, got AudioFlamingo3For"):
        BudgetProcessor(Nothing(), model)
    apply_to(model, "uniform:3")
    with pytest.raises(ValueError, match="model must be compressed in budget mode"):
        BudgetProcessor(Nothing(), model)


def test_other_reductions():
    model = make("glmasr")
    inputs = batch("glmasr", model, labels=True)
    losses = []
    for reduce in ("mean", "max"):
        apply_to(model, fc.nn.SegmentPool("uniform:3", reduce=reduce), "budget")
        losses.append(model(**BudgetProcessor(Nothing(), model).shorten(dict(inputs))).loss)
        revert(model)
    assert losses[0] != losses[1]


# Processors


def conversation(samples: np.ndarray) -> list[dict]:
    return [
        {
            "role": "user",
            "content": [{"type": "audio", "audio": samples}, {"type": "text", "text": "write what you hear"}],
        }
    ]


@pytest.mark.parametrize("name", ["qwen2_audio", "audioflamingo3"])
def test_processors(name, tmp_path):
    model = audio_llms.make(name)
    stock = audio_llms.processor(name)
    g = np.random.default_rng(0)
    audios = [g.standard_normal(n).astype(np.float32) for n in (9000, 14000)]
    padded = {"text_kwargs": {"padding": True}, "return_tensors": "pt"}
    apply_to(model, "uniform:3", "budget")
    processor = BudgetProcessor(stock, model)
    text = "write what <audio> you hear"
    for kind in ("call", "chat"):

        def run(p, kind=kind):
            if kind == "call":
                return p(text=[text, text], audio=audios, **padded)
            arguments = {"tokenize": True, "return_dict": True, "add_generation_prompt": True}
            return p.apply_chat_template([conversation(a) for a in audios], **arguments, processor_kwargs=padded)

        before, after = run(stock), run(processor)
        counts = [int((x["input_ids"] == audio_llms.AUDIO).sum()) for x in (before, after)]
        rows = (before["input_ids"] == audio_llms.AUDIO).sum(1).tolist()
        assert (after["input_ids"] == audio_llms.AUDIO).sum(1).tolist() == [-(-n // 3) for n in rows]
        assert counts[1] < counts[0] and (after["attention_mask"][0] == 0).sum() < (before["attention_mask"] == 0).sum()
        words = [w.replace("<audio>", "").split() for w in stock.batch_decode(before["input_ids"])]
        assert words[1] == stock.batch_decode(after["input_ids"])[1].replace("<audio>", "").split()
        assert after["input_ids"][0, 0] == audio_llms.PAD and type(after) is type(before)
        assert model.generate(**after, **GREEDY).shape[1] == after["input_ids"].shape[1] + 6
    assert processor.apply_chat_template(conversation(audios[0]), tokenize=False).count("<audio>") == 1
    with pytest.raises(TypeError, match="input_ids must be a tensor"):
        processor.shorten({"input_ids": [[1, 2]]})
    assert processor.batch_decode([[14]]) == stock.batch_decode([[14]]) and copy.copy(processor).tokenizer
    processor.save_pretrained(tmp_path)
    again = type(stock).from_pretrained(tmp_path)
    assert again(text=[text], audio=audios[:1], **padded)["input_ids"].tolist() != after["input_ids"][:1].tolist()


def test_everything_of_the_prompt_is_shortened():
    model = make("audioflamingo3")
    apply_to(model, "uniform:2", "budget")
    processor = BudgetProcessor(Nothing(), model)
    a = audio_llms.AUDIO
    inputs = {
        "input_ids": torch.tensor([[5, a, a, a, 6, a, 7], [8, a, a, a, a, 0, 0]]),
        "attention_mask": torch.tensor([[1] * 7, [1] * 5 + [0] * 2]),
        "labels": torch.tensor([[-100, -100, -100, -100, 6, -100, 7], [8, -100, -100, -100, -100, -100, -100]]),
        "mm_token_type_ids": torch.tensor([[0, 3, 3, 3, 0, 3, 0], [0, 3, 3, 3, 3, 0, 0]]),
        "input_features": torch.zeros(3, 16, 100),
    }
    found = processor.shorten(dict(inputs))
    assert found["input_ids"].tolist() == [[5, a, a, 6, a, 7], [8, a, a, 0, 0, 0]]
    assert found["attention_mask"].tolist() == [[1] * 6, [1, 1, 1, 0, 0, 0]]
    assert found["labels"].tolist() == [[-100, -100, -100, 6, -100, 7], [8, -100, -100, -100, -100, -100]]
    assert found["mm_token_type_ids"].tolist() == [[0, 3, 3, 0, 3, 0], [0, 3, 3, 0, 0, 0]]
    assert found["input_features"] is inputs["input_features"]
    assert processor.count(25) == 13 and processor.count(60) == 13 + 13 + 5  # windows of 25


def test_transcription_requests():
    model, stock = audio_llms.make("audioflamingo3"), audio_llms.processor("audioflamingo3")
    apply_to(model, "uniform:3", "budget")
    processor = BudgetProcessor(stock, model)
    samples = np.random.default_rng(0).standard_normal(9000).astype(np.float32)
    before, after = (p.apply_transcription_request(samples) for p in (stock, processor))
    rows = int((before["input_ids"] == audio_llms.AUDIO).sum())
    assert int((after["input_ids"] == audio_llms.AUDIO).sum()) == -(-rows // 3)
    assert model.generate(**after, **GREEDY).shape[1] == after["input_ids"].shape[1] + 6


@pytest.mark.parametrize("rule", ["uniform:100", "top-k:count=1"])
@pytest.mark.parametrize("name", NAMES)
def test_audio_of_one_token(name: str, rule: str):
    """Qwen2-Audio takes a prompt without adjacent placeholders for one of its old processors."""
    model = make(name)
    for sizes in ((20, 9, 16), (9,)):
        inputs = batch(name, model, sizes, labels=True)
        apply_to(model, rule, **WITHOUT)
        wanted = model(**inputs).loss
        revert(model)
        apply_to(model, rule, "budget")
        shortened = BudgetProcessor(Nothing(), model).shorten(dict(inputs))
        if name not in SIZES:  # these cut audio into windows, with a token each
            assert (shortened["input_ids"] == audio_llms.AUDIO).sum(1).tolist() == [1] * len(sizes)
        assert abs(model(**shortened).loss - wanted) <= 1e-6
        shortened.pop("labels")
        assert model.generate(**shortened, **GREEDY).shape[1] == shortened["input_ids"].shape[1] + 6
        revert(model)


@pytest.mark.parametrize("name", NAMES)
def test_audio_of_one_row(name: str):
    model = make(name)
    for mode in ("dynamic", "budget"):
        inputs = batch(name, model, (1,) if name != "granite_speech" else (3,), labels=True)
        apply_to(model, "uniform:3", mode)
        shortened = BudgetProcessor(Nothing(), model).shorten(dict(inputs)) if mode == "budget" else inputs
        assert model(**shortened).loss.isfinite()
        revert(model)


def test_prompts_of_old_processors_are_refused():
    model = make("qwen2_audio")
    inputs = batch("qwen2_audio", model, (20, 9))
    apply_to(model, "uniform:3", "budget")
    inputs["input_ids"] = torch.tensor([[5, audio_llms.AUDIO, 6], [5, audio_llms.AUDIO, 7]])
    inputs["attention_mask"] = torch.ones(2, 3).long()
    with pytest.raises(ValueError, match="one placeholder per token, as BudgetProcessor writes them, got 2 for 6 tok"):
        model(**inputs)


# Without a model


@pytest.mark.parametrize("rule", ["uniform:3", "top-k:rate=3", "top-k:count=4", "min-variance:3"])
def test_a_processor_of_a_saved_configuration(rule: str, tmp_path: Path):
    for name in NAMES:
        model = audio_llms.make(name)
        inputs = audio_llms.batch(name, model, SIZES.get(name, (20, 9, 16)))
        apply_to(model, rule, "budget")
        wanted = BudgetProcessor(Nothing(), model).shorten(dict(inputs))
        model.config.save_pretrained(tmp_path / name)
        config = transformers.AutoConfig.from_pretrained(tmp_path / name)
        found = BudgetProcessor.from_config(Nothing(), config).shorten(dict(inputs))
        assert torch.equal(found["input_ids"], wanted["input_ids"]) and found.keys() == wanted.keys()


def test_configurations_without_a_budget():
    model = audio_llms.make("audioflamingo3")
    with pytest.raises(ValueError, match="config must have a rule that was saved in budget mode, got none; call apply"):
        BudgetProcessor.from_config(Nothing(), model.config)
    apply_to(model, "uniform:3")
    with pytest.raises(ValueError, match="saved in budget mode, got one of dynamic mode"):
        BudgetProcessor.from_config(Nothing(), model.config)
    model.config.fastcompress |= {"mode": "budget", "rule": "local-max"}
    with pytest.raises(NotImplementedError, match="only on the length .*, got local-max; use mode='dynamic'"):
        BudgetProcessor.from_config(Nothing(), model.config)
    model.config.fastcompress |= {"clock": "time"}
    with pytest.raises(ValueError, match="unknown field 'clock'"):
        BudgetProcessor.from_config(Nothing(), model.config)
    with pytest.raises(NotImplementedError, match="qwen2 is not a supported audio LLM"):
        BudgetProcessor.from_config(Nothing(), transformers.Qwen2Config())
    music = audio_llms.make("musicflamingo").config
    music.fastcompress = {"version": 1, "mode": "budget", "before_projector": False, "rule": "uniform:3"}
    with pytest.raises(NotImplementedError, match="musicflamingo has no budget mode: it computes timestamps"):
        BudgetProcessor.from_config(Nothing(), music)

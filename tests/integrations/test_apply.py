"""What can be applied to which model: modules, refusals, input, copies, threads."""

from __future__ import annotations

import copy
import pickle
import re
import threading

import pytest
import torch
import transformers
from torch import nn

import fastcompress as fc
from fastcompress.integrations import transformers as integration
from fastcompress.integrations.transformers import FAMILIES, REFUSED, apply_to, load_compressor, revert
from tests.integrations.test_dynamic import GREEDY, batch, grads, largest, make
from tests.support import audio_llms


class Gate(nn.Module):
    """A compressor that learns something."""

    def __init__(self, width: int, rule: str = "uniform:2") -> None:
        super().__init__()
        self.gate = nn.Linear(width, width)
        self.pool = fc.nn.SegmentPool(rule)

    def forward(self, rows: torch.Tensor, cu_seqlens: torch.Tensor) -> fc.Pooled:
        return self.pool(self.gate(rows), cu_seqlens=cu_seqlens)


# Modules


@pytest.mark.parametrize("before", [False, True], ids=["after", "before the projector"])
def test_learned_compressors(before, tmp_path):
    model = make("audioflamingo3")
    inputs = batch("audioflamingo3", model, labels=True)
    torch.manual_seed(1)
    compressor = Gate(24 if before else 32).double()
    apply_to(model, compressor, before_projector=before)
    out = model(**inputs)
    out.loss.backward()
    assert compressor.gate.weight.grad.abs().sum() > 0
    assert out.compressed.cu_seqlens.tolist() == [0, 12, 24, 41]
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, dtype=torch.float64).eval()
    apply_to(again, Gate(24 if before else 32).double(), before_projector=before)
    assert load_compressor(again, tmp_path) is again
    with torch.no_grad():
        assert torch.equal(again(**inputs).loss, model(**inputs).loss)
    revert(again)
    apply_to(again, Gate(16), before_projector=before)
    with pytest.raises(ValueError, match="audio_compressor.gate.bias must have shape"):
        load_compressor(again, tmp_path)
    with pytest.raises(ValueError, match="weights of audio_compressor: gate.bias, gate.weight; got none"):
        load_compressor(again, tmp_path / "nowhere")


def test_modules_are_called_as_the_rule_is():
    """What a pass that packs does at once, step by step."""
    model = make("glmasr")
    inputs = batch("glmasr", model, labels=True)
    found = []
    for compressor in ("local-max", fc.nn.SegmentPool("local-max"), Wrapped("local-max")):
        apply_to(model, compressor)
        model(**inputs).loss.backward()
        found.append(grads(model))
        revert(model)
    assert largest(found[0], found[1]) == 0.0 and largest(found[0], found[2]) <= 1e-12
    losses = []
    for reduce in ("mean", "max", "first"):
        apply_to(model, fc.nn.SegmentPool("uniform:3", reduce=reduce))
        losses.append(float(model(**inputs).loss.detach()))
        revert(model)
    assert len(set(losses)) == 3


class Wrapped(nn.Module):
    def __init__(self, rule: str) -> None:
        super().__init__()
        self.pool = fc.nn.SegmentPool(rule)

    def forward(self, rows: torch.Tensor, cu_seqlens: torch.Tensor) -> fc.Pooled:
        return self.pool(rows, cu_seqlens=cu_seqlens)


def test_modules_that_return_something_else():
    model = make("audioflamingo3")
    inputs = batch("audioflamingo3", model)

    class Odd(nn.Module):
        def __init__(self, function):
            super().__init__()
            self.function = function

        def forward(self, rows, cu_seqlens):
            return self.function(rows, cu_seqlens)

    def longer(rows, cu_seqlens):
        twice = fc.segment_pool(rows.repeat_interleave(2, 0), cu_seqlens=cu_seqlens * 2, rule="uniform:1")
        return twice

    for function, before, error, text in (
        (lambda rows, cu: rows, False, TypeError, "such as fastcompress.Pooled, got Tensor"),
        (
            lambda rows, cu: fc.segment_pool(rows, rule="uniform:2"),
            False,
            ValueError,
            "compressor must return 3 audios, the number of its input, got 1",
        ),
        (longer, True, ValueError, "compressor must not return more rows per audio than its input has, [10, 4, 8]"),
    ):
        apply_to(model, Odd(function), before_projector=before)
        with pytest.raises(error, match=re.escape(text)):
            model(**inputs)
        revert(model)
    with pytest.raises(ValueError, match="compact=True"):
        apply_to(model, fc.nn.SegmentPool("uniform:2", compact=False))


def test_copies_are_their_own():
    model = make("qwen2_audio")
    inputs = batch("qwen2_audio", model, labels=True)
    apply_to(model, Gate(32).double())
    other = copy.deepcopy(model)
    with torch.no_grad():
        loss = model(**inputs).loss
        other.audio_compressor.gate.weight.mul_(2)
        assert torch.equal(model(**inputs).loss, loss) and not torch.equal(other(**inputs).loss, loss)
        revert(other)
        assert torch.equal(model(**inputs).loss, loss)
    assert not hasattr(other, "audio_compressor") and hasattr(model, "audio_compressor")


def test_pickles_are_refused():
    """Methods would come back as the stock ones, and the model without compression."""
    model = make("qwen2_audio")
    apply_to(model, "uniform:3")
    with pytest.raises(pickle.PicklingError, match="a compressed model cannot be pickled; call revert first"):
        pickle.dumps(model)
    revert(model)
    assert len(pickle.dumps(model)) > 1000


def test_another_attention_is_not_packed_through():
    model = make("qwen2_audio")
    inputs = batch("qwen2_audio", model, labels=True)
    apply_to(model, "uniform:3")
    with torch.no_grad():
        loss = model(**inputs).loss
        model.set_attn_implementation("sdpa")
        assert abs(model(**inputs).loss - loss) <= 1e-9


def test_flash_attention_is_replaced():
    """It would unpad packed rows by their empty mask."""
    model = make("qwen2_audio")
    inputs = batch("qwen2_audio", model, labels=True)
    stock = apply_to(make("qwen2_audio"), "uniform:2")(**inputs).loss
    model.model.language_model.config._attn_implementation = "flash_attention_2"
    apply_to(model, "uniform:2")
    assert model.model.language_model.config._attn_implementation == "fastcompress"
    assert torch.equal(model(**inputs).loss, stock)


def test_compiled_models_run():
    model = make("qwen2_audio")
    inputs = batch("qwen2_audio", model, labels=True)
    apply_to(model, "uniform:3")
    with torch.no_grad():
        assert torch.equal(torch.compile(model, backend="eager")(**inputs).loss, model(**inputs).loss)


@pytest.mark.parametrize(
    "module", [fc.nn.BipartiteMerge(2.0), fc.nn.IterativeFusion(4), fc.nn.GreedySegments(0.9)], ids=lambda m: str(m)
)
@pytest.mark.parametrize("before", [False, True])
def test_compressors_that_merge(module: nn.Module, before: bool):
    model = make("qwen2_audio")
    inputs = batch("qwen2_audio", model, labels=True)
    stock = model(**inputs).logits.shape[1]
    apply_to(model, module, before_projector=before)
    out = model(**inputs)
    assert out.compressed.inputs_embeds.shape[0] < stock * len(inputs["input_ids"])
    assert out.loss.isfinite()
    assert model.generate(**{k: v for k, v in inputs.items() if k != "labels"}, max_new_tokens=2).shape[0] > 0


@pytest.mark.parametrize("kind", [fc.nn.LearnedBoundary, fc.nn.IntegrateAndFire])
def test_a_compressor_s_own_loss_is_added(kind: type[nn.Module]):
    model = make("qwen2_audio")
    inputs = batch("qwen2_audio", model, labels=True)
    module = kind(32, 3.0, loss_weight=0.5).double()
    apply_to(model, module)
    with torch.no_grad():
        for p in module.parameters():
            torch.nn.init.normal_(p)
    out = model(**inputs)
    told = out.compressed.labels[out.compressed.labels != -100]
    lm = nn.functional.cross_entropy(out.logits[0], told)
    torch.testing.assert_close(out.loss, lm + 0.5 * module.loss)
    out.loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in module.parameters())
    # Of a step of four batches the trainer adds the losses up, each of which is told the labels of all.
    parts = sum(model(**inputs, num_items_in_batch=torch.tensor(4 * len(told))).loss for _ in range(4))
    torch.testing.assert_close(parts, out.loss)
    text = batch("qwen2_audio", model, (None, None), labels=True)
    stale = model(**text).loss  # the loss of an earlier batch is not this one's
    assert abs(stale - model(**text, num_items_in_batch=8).loss) <= 1e-9


@pytest.mark.parametrize("before", [False, True], ids=["after", "before"])
@pytest.mark.parametrize("kind", [fc.nn.LearnedBoundary, fc.nn.IntegrateAndFire])
def test_a_compressor_takes_the_dtype_of_the_model(kind: type[nn.Module], before: bool):
    model = audio_llms.make("qwen2_audio").to(torch.bfloat16)
    width = model.config.audio_config.d_model if before else model.get_input_embeddings().embedding_dim
    module = kind(width, 3.0)
    apply_to(model, module, before_projector=before)
    assert {p.dtype for p in module.parameters()} == {torch.bfloat16}
    inputs = audio_llms.batch("qwen2_audio", model, labels=True)
    inputs["input_features"] = inputs["input_features"].to(torch.bfloat16)
    model(**inputs).loss.backward()
    assert all(p.grad.isfinite().all() for p in module.parameters())


def test_methods_that_others_replaced_are_kept():
    model = make("qwen2_audio")
    inputs = batch("qwen2_audio", model)
    calls = []
    inner = model.forward
    model.forward = lambda *args, **kwargs: calls.append(1) or inner(*args, **kwargs)
    ours = model.forward
    apply_to(model, "uniform:3")
    assert model(**inputs).compressed is not None and calls == [1]
    revert(model)
    assert model.forward is ours


def test_another_model_may_run_inside():
    """Such as a teacher, or a judge, that a compressor or a hook asks."""
    outer, inner = make("qwen2_audio"), make("audioflamingo3")
    inputs, other = batch("qwen2_audio", outer), batch("audioflamingo3", inner)
    apply_to(inner, "uniform:2")
    embeds = torch.randn(1, 7, 32, dtype=torch.float64)
    with torch.no_grad():
        decoded = inner.model.language_model(inputs_embeds=embeds).last_hidden_state
        compressed = inner(**other).logits
        apply_to(outer, "uniform:3")
        alone = outer(**inputs).logits
        found = []

        def ask(*_):
            found.append(inner.model.language_model(inputs_embeds=embeds).last_hidden_state)
            found.append(inner(**other).logits)

        outer.model.audio_tower.register_forward_hook(ask)
        assert torch.equal(outer(**inputs).logits, alone)
    assert torch.equal(found[0], decoded) and torch.equal(found[1], compressed)


def test_threads_do_not_meet():
    models = [make("qwen2_audio"), make("audioflamingo3")]
    inputs = [batch("qwen2_audio", models[0]), batch("audioflamingo3", models[1])]
    for model, rule in zip(models, ("uniform:2", "local-max"), strict=True):
        apply_to(model, rule)
    with torch.no_grad():
        alone = [model(**x).logits for model, x in zip(models, inputs, strict=True)]
    wrong = []

    def work(i):
        with torch.no_grad():
            for _ in range(15):
                if not torch.equal(models[i](**inputs[i]).logits, alone[i]):
                    wrong.append(i)

    threads = [threading.Thread(target=work, args=(i % 2,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# Input that is not what it should be


def test_text_alone():
    model = make("qwen2_audio")
    inputs = batch("qwen2_audio", model, (None, None), labels=True)
    stock = model(**inputs).loss
    apply_to(model, "uniform:3")
    out = model(**inputs)
    assert abs(out.loss - stock) <= 1e-6
    out.loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    text = {k: v for k, v in inputs.items() if k != "labels"}
    assert not hasattr(model(**text), "compressed")  # stock
    assert model.generate(**text, **GREEDY).shape == (2, text["input_ids"].shape[1] + 6)
    mixed = batch("qwen2_audio", model, (20, None, 9), labels=True)
    assert model(**mixed).compressed.cu_seqlens.diff().tolist() == [7 + 4, 10, 13 + 2]


def test_bad_input():
    model = make("qwen2_audio")
    inputs = batch("qwen2_audio", model)
    apply_to(model, "uniform:3")
    for more, error, text in (
        ({"position_ids": torch.zeros_like(inputs["input_ids"])}, ValueError, "position_ids must be None"),
        ({"attention_mask": torch.ones(3, 1, 21, 21)}, ValueError, "must have the shape of input_ids, [3, 21], got"),
        ({"inputs_embeds": torch.zeros(3, 21, 32)}, ValueError, "without inputs_embeds"),
    ):
        with pytest.raises(error, match=re.escape(text)):
            model(**inputs | more)
    unexpanded = {k: v[:1] for k, v in inputs.items()}
    unexpanded["input_ids"] = torch.tensor([[5, audio_llms.AUDIO, 6]])
    unexpanded["attention_mask"] = torch.ones(1, 3).long()
    with pytest.raises(ValueError, match="input_ids must have one placeholder per row of audio"):
        model(**unexpanded)
    omni = make("qwen2_5_omni_thinker")
    apply_to(omni, "uniform:3")
    with pytest.raises(NotImplementedError, match="takes only audio and text, got pixel_values"):
        omni(**batch("qwen2_5_omni_thinker", omni), pixel_values=torch.zeros(1))


def test_models_that_cannot_be_compressed_are_refused():
    class Config:
        def __init__(self, kind):
            self.model_type = kind

    class Model:
        def __init__(self, kind):
            self.config = Config(kind)

    for kind, reason in REFUSED.items():
        with pytest.raises(NotImplementedError, match=re.escape(f"{kind} cannot be compressed: {reason}")):
            apply_to(Model(kind), "uniform:3")
    with pytest.raises(NotImplementedError, match="bert is not a supported audio LLM; supported: audioflam"):
        apply_to(Model("bert"), "uniform:3")
    with pytest.raises(NotImplementedError, match="must be the one with a head"):
        apply_to(make("qwen2_audio").model, "uniform:3")
    model = make("qwen2_audio")
    with pytest.raises(NotImplementedError, match="budget mode pools the projector's output"):
        apply_to(model, "uniform:3", "budget", before_projector=True)
    model = make("granite_speech")
    with pytest.raises(NotImplementedError, match="before its projector: its projector attends to frames in windows"):
        apply_to(model, "uniform:3", before_projector=True)
    for arguments, error, text in (
        ({"mode": "static"}, ValueError, "mode must be 'dynamic' or 'budget', got 'static'"),
        ({"mode": "budget", "pack": True}, ValueError, "pack must be None or False in budget mode"),
        ({"compressor": "uniform:0"}, ValueError, "size"),
        ({"compressor": 3}, TypeError, ""),
    ):
        with pytest.raises(error, match=text):
            apply_to(model, **{"compressor": "uniform:3"} | arguments)
        assert not hasattr(model, "fastcompress_settings") and not hasattr(model, "audio_compressor")
        assert model.model.language_model.config._attn_implementation == "sdpa"
    apply_to(model, "uniform:3")
    with pytest.raises(ValueError, match="already compressed by SegmentPool"):
        apply_to(model, "uniform:2")


def test_decoders_that_would_leak_are_not_packed():
    model = make("qwen2_audio")
    model.model.language_model.config.layer_types = ["linear_attention", "full_attention"]
    with pytest.raises(NotImplementedError, match="pass pack=False to compress without packing"):
        apply_to(model, "uniform:3")
    model.model.language_model.config.layer_types = ["full_attention"] * 2
    apply_to(model, "uniform:3", pack=False)


def test_versions(monkeypatch):
    model = make("qwen2_audio")
    monkeypatch.setattr(transformers, "__version__", "5.1.0")
    with pytest.raises(ImportError, match="needs transformers 5.24 or later, got 5.1.0"):
        apply_to(model, "uniform:3")
    monkeypatch.setattr(transformers, "__version__", "6.0.0.dev0")
    with pytest.warns(UserWarning, match="transformers 6.0.0.dev0 is newer than the tested versions"):
        apply_to(model, "uniform:3")


def test_the_table_names_every_family():
    assert set(audio_llms.FAMILIES) == set(FAMILIES)
    text = integration.table()
    for kind in (*FAMILIES, *REFUSED):
        assert kind in text


# What would otherwise be wrong without a word


def test_subclasses_and_new_compressors_are_asked():
    class Learned(fc.nn.SegmentPool):
        def __init__(self) -> None:
            super().__init__("uniform:2")
            self.linear = nn.Linear(32, 32).double()

        def forward(self, rows: torch.Tensor, **layout) -> fc.Pooled:
            return super().forward(self.linear(rows), **layout)

    model = make("audioflamingo3")
    inputs = batch("audioflamingo3", model, labels=True)
    compressor = Learned()
    apply_to(model, compressor)
    model(**inputs).loss.backward()
    assert compressor.linear.weight.grad.abs().sum() > 0
    revert(model)
    apply_to(model, "uniform:3")
    rows = len(model(**inputs).compressed.source)
    model.audio_compressor = fc.nn.SegmentPool("uniform:10")
    assert len(model(**inputs).compressed.source) < rows
    with pytest.raises(NotImplementedError, match="label-change needs labels"):
        apply_to(make("glmasr"), "label-change")


@pytest.mark.parametrize("name", ["audioflamingo3", "voxtral", "qwen2_5_omni_thinker", "granite_speech"])
def test_a_missing_mask_is_inferred_as_ever(name):
    model = make(name)
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, 2
    inputs = batch(name, model)
    assert not inputs.pop("attention_mask").all()
    stock = model.generate(**inputs, **GREEDY)
    apply_to(model, "uniform:1")
    assert torch.equal(model.generate(**inputs, **GREEDY), stock)


def test_caches():
    model = make("audioflamingo3")
    inputs = audio_llms.one("audioflamingo3", batch("audioflamingo3", model), 0)
    apply_to(model, "uniform:3")
    with torch.no_grad():
        cache = transformers.DynamicCache()
        out = model(**inputs, cache=cache)
        assert cache.get_seq_length() == out.logits.shape[1]
        with pytest.raises(NotImplementedError, match="cannot follow rows of a cache"):
            model(**inputs, cache=cache)
        written = model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
        kept = written.get("cache") if written.get("cache") is not None else written.past_key_values
        with pytest.raises(NotImplementedError, match="cannot continue from the cache of a compressed prompt"):
            model.generate(written.sequences, cache=kept, **GREEDY)
    with pytest.raises(NotImplementedError, match="needs input_ids, which locate it in the prompt"):
        model(inputs_embeds=torch.zeros(1, 4, 32).double(), input_features=inputs["input_features"])
    prefixed = peft_prefix(model)
    with pytest.raises(NotImplementedError, match="or of prefix tuning"):
        prefixed(**inputs)


def peft_prefix(model: nn.Module) -> nn.Module:
    peft = pytest.importorskip("peft")
    config = peft.PrefixTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=3,
        num_layers=2,
        token_dim=16,
        num_attention_heads=2,
        num_transformer_submodules=1,
    )
    return peft.get_peft_model(model, config)


def test_methods_that_are_replaced_afterwards():
    model = make("audioflamingo3")
    inputs = batch("audioflamingo3", model)
    apply_to(model, "uniform:3")
    decoder = model.model.language_model
    ours = decoder.forward
    decoder.forward = type(decoder).forward.__get__(decoder)
    with pytest.raises(RuntimeError, match="forward of language_model was replaced after apply_to"):
        model(**inputs)
    with pytest.raises(RuntimeError, match="forward of Qwen2Model was replaced after apply_to"):
        revert(model)
    decoder.forward = ours
    assert model(**inputs).compressed is not None


def test_nothing_left_to_generate_from():
    model = make("audioflamingo3")
    inputs = batch("audioflamingo3", model, (20, 9))
    is_audio = inputs["input_ids"] == audio_llms.AUDIO
    inputs["attention_mask"] = torch.where(
        torch.tensor([[True], [False]]), is_audio, inputs["attention_mask"] > 0
    ).long()
    apply_to(model, "uniform:size=100,tail=drop")
    with pytest.raises(ValueError, match="sample 0 is empty: SegmentPool"):
        model.generate(**inputs, **GREEDY)


def test_compressed_prompt():
    model = make("qwen2_audio")
    inputs = batch("qwen2_audio", model)
    with pytest.raises(ValueError, match="model must be compressed in dynamic mode, got Qwen2AudioFor"):
        integration.compressed_prompt(model, **inputs)
    apply_to(model, "uniform:3")
    packed = integration.compressed_prompt(model, **inputs)
    assert packed.cu_seqlens.tolist() == model(**inputs).compressed.cu_seqlens.tolist()
    with pytest.raises(ValueError, match="inputs must have input_ids"):
        integration.compressed_prompt(model)
    with pytest.raises(NotImplementedError, match="the router's loss needs rows"):
        model(**inputs, output_router_logits=True)

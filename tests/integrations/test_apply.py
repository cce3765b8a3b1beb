"""``apply_to`` with modules, and copies, compilation and threads of compressed models."""

from __future__ import annotations

import copy
import pickle
import re
import threading

import pytest
import torch
from torch import nn

import fastcompress as fc
from fastcompress.integrations.transformers import apply_to, load_compressor, revert
from tests.support import audio_llms
from tests.support.compressed_llms import Gate, batch, grads, largest, make


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
    """A module runs step by step what one pass of ``pack`` does for a rule, with the same result."""
    model = make("glmasr")
    inputs = batch("glmasr", model, labels=True)
    found = []
    for compressor in ("local-max", fc.nn.SegmentPool("local-max"), Wrapped("local-max")):
        apply_to(model, compressor, proportional_attention=True, positions="time")
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


def test_modules_that_return_another_type():
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


def test_copies_are_independent():
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
    """An unpickled model would have the stock methods, and so no compression."""
    model = make("qwen2_audio")
    apply_to(model, "uniform:3")
    with pytest.raises(pickle.PicklingError, match="a compressed model cannot be pickled; call revert first"):
        pickle.dumps(model)
    revert(model)
    assert len(pickle.dumps(model)) > 1000


def test_another_attention_runs_padded():
    model = make("qwen2_audio")
    inputs = batch("qwen2_audio", model, labels=True)
    apply_to(model, "uniform:3")
    model.set_attn_implementation("sdpa")
    with pytest.raises(NotImplementedError, match="attn_implementation='fastcompress', got 'sdpa'"):
        model(**inputs)
    apply_to(revert(model), "uniform:3", proportional_attention=False)
    with torch.no_grad():
        loss = model(**inputs).loss
        model.set_attn_implementation("sdpa")
        assert abs(model(**inputs).loss - loss) <= 1e-9


def test_flash_attention_is_replaced():
    """FlashAttention of transformers would unpad packed rows by their mask, which is missing."""
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
    # Trainer adds the losses of the four batches of a step. Each gets the number of labels of all four.
    parts = sum(model(**inputs, num_items_in_batch=torch.tensor(4 * len(told))).loss for _ in range(4))
    torch.testing.assert_close(parts, out.loss)
    text = batch("qwen2_audio", model, (None, None), labels=True)
    stale = model(**text).loss  # the compressor's loss of an earlier batch is not added
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
    """A compressor or a hook can call another model, such as a teacher."""
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


def test_models_in_several_threads_are_independent():
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

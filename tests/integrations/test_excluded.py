"""What a mask excludes, and other samples, must not reach values or gradients, whatever they hold."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from fastcompress.integrations.transformers import FAMILIES, BudgetProcessor, apply_to, features, revert
from tests.support import audio_llms
from tests.support.compressed_llms import batch, grads, largest, make
from tests.support.slow import some

BAD = (torch.nan, torch.inf, -torch.inf)
MASKED = tuple(name for name in FAMILIES if name != "voxtral")  # which takes whole windows only
#: Mode, whether frames are pooled before the projector, whether the decoder runs packed.
PATHS = (("dynamic", False, True), ("dynamic", False, False), ("dynamic", True, True), ("budget", False, None))
QUICK = ("qwen2_audio", "glmasr", "granite_speech", "qwen3_asr", "fun_asr_nano")


class Nothing:
    """A processor that is not asked."""

    tokenizer = None


def paths(name: str, inputs: dict[str, Any], model: Any) -> Any:
    """Apply every path to a model in turn, and yield its inputs."""
    family = FAMILIES[name]
    for mode, before, pack in PATHS:
        if (before and family.why_not_before) or (mode == "budget" and family.budget is None):
            continue
        apply_to(model, "uniform:3", mode, pack, before_projector=before)
        yield BudgetProcessor(Nothing(), model).shorten(dict(inputs)) if mode == "budget" else inputs
        revert(model)


def spoiled(name: str, model: Any, inputs: dict[str, Any], bad: float) -> dict[str, Any]:
    """Return a batch whose excluded features are not finite."""
    family = FAMILIES[name]
    (key,) = family.features
    inside = features._inside(model.model, inputs[key], inputs[family.mask], family.time)
    changed = torch.where(inside, inputs[key], bad)
    assert 0 < int((~changed.isfinite()).sum()) < changed.numel()
    return inputs | {key: changed}


@pytest.mark.parametrize("name", some(MASKED, *QUICK))
def test_excluded_features_have_no_effect(name: str):
    model = make(name)
    for inputs in paths(name, batch(name, model, (20, 9, 16), labels=True), model):
        out = model(**inputs)
        out.loss.backward()
        wanted = grads(model)
        prompt = {key: value for key, value in inputs.items() if key != "labels"}
        written = model.generate(**prompt, max_new_tokens=3, do_sample=False)
        for bad in BAD:
            again = model(**spoiled(name, model, inputs, bad))
            assert torch.equal(again.loss, out.loss) and torch.equal(again.logits, out.logits)
            again.loss.backward()
            assert largest(grads(model), wanted) == 0.0
        again = model.generate(**spoiled(name, model, prompt, torch.nan), max_new_tokens=3, do_sample=False)
        assert torch.equal(again, written)


@pytest.mark.parametrize("name", some(FAMILIES, *QUICK, "voxtral"))
def test_samples_have_no_effect_on_others(name: str):
    """Values of the others are equal, and so are the gradients of their features."""
    model = make(name)
    for inputs in paths(name, batch(name, model, (20, 9, 16)), model):
        (key,) = FAMILIES[name].features
        found = []
        for bad in (None, torch.nan):
            x = inputs[key].clone()
            if bad is not None:
                x[0] = torch.where(x[0] == 0, x[0], bad)  # 0 is padding
            x.requires_grad_()
            logits = model(**inputs | {key: x}).logits[1:]
            # The encoders of VibeVoice run without gradients.
            (grad,) = torch.autograd.grad(logits[:, -1].sum(), x, allow_unused=name == "vibevoice_asr")
            grad = torch.zeros_like(x) if grad is None else grad
            found.append((logits.detach(), grad[1:]))
            assert bad is None or x.isnan().any()
        assert torch.equal(found[0][0].nan_to_num(), found[1][0].nan_to_num())
        assert torch.equal(found[0][1], found[1][1]) and found[0][1].isfinite().all()


def test_finite_padding_is_left_as_it_is():
    """Stock encoders see the silence that processors pad with."""
    model = make("glmasr")
    inputs = batch("glmasr", model)
    mask = inputs["input_features_mask"].bool()[:, None]
    inputs["input_features"] = torch.where(mask, inputs["input_features"], -1.5)
    with torch.no_grad():
        stock = model(**inputs).logits
        apply_to(model, "uniform:1", pack=False)
        kept = inputs["attention_mask"].sum(1)
        for row, count in enumerate(kept.tolist()):
            assert (model(**inputs).logits[row, -count:] - stock[row, -count:]).abs().max() <= 1e-5


@pytest.mark.parametrize("mode", ["dynamic", "budget"])
def test_additive_masks_are_refused(mode: str):
    model = apply_to(make("glmasr"), "uniform:3", mode)
    inputs = batch("glmasr", model, (20, 9))
    inputs["input_features_mask"] = torch.where(inputs["input_features_mask"] > 0, 0.0, -1e9)
    with pytest.raises(ValueError, match="input_features_mask must be bool or contain only 0 and 1, got -1e.09"):
        model(**inputs)


def test_copies_and_revert():
    model = apply_to(make("glmasr"), "uniform:3")
    other = copy.deepcopy(model)
    inputs = spoiled("glmasr", model, batch("glmasr", model, (20, 9)), torch.nan)
    revert(model)
    assert other(**inputs).logits.isfinite().all()
    assert not model.model._forward_pre_hooks and not model.model._forward_pre_hooks_with_kwargs


@pytest.mark.parametrize("pack", [True, False])
def test_the_embedding_of_padding_has_no_effect(pack: bool):
    model = make("qwen2_audio")
    inputs = batch("qwen2_audio", model, labels=True)
    apply_to(model, "uniform:3", pack=pack)
    found = []
    for bad in (0.0, torch.nan):
        with torch.no_grad():
            model.get_input_embeddings().weight[audio_llms.PAD] = bad
        loss = model(**inputs).loss
        loss.backward()
        found.append((loss.detach(), grads(model)))
    assert torch.equal(found[0][0], found[1][0]) and largest(found[0][1], found[1][1]) == 0.0

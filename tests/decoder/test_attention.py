"""Packed decoders give the results of the same decoders run sample by sample, and samples do not affect each other."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import fastcompress as fc
from fastcompress.decoder import attention, packed_attention
from tests.support.attention import reference
from tests.support.decoders import DECODERS, LENGTHS, SIZES, decoder, packed_batch, samples


# In fp32 a stock decoder differs by up to 1.8e-5 from its own fp64 result (gemma, logits up to 7, AVX2). qwen2_moe runs
# in fp32, since torch's grouped matrix product does not support fp64.
@pytest.mark.parametrize(
    ("kind", "dtype", "atol"),
    [
        *((kind, torch.float64, 1e-5) for kind in DECODERS if kind != "qwen2_moe"),
        *((kind, torch.float32, 5e-5) for kind in ("qwen2_moe", "gemma", "gemma2")),
    ],
    ids=str,
)
def test_packed_equals_sample_by_sample(kind: str, dtype: torch.dtype, atol: float):
    model, stock = decoder(kind).to(dtype), decoder(kind, "eager").to(dtype)
    embeds, labels = samples(model)
    embeds = [e.to(dtype) for e in embeds]
    alone = [e.clone().requires_grad_() for e in embeds]
    expected = [stock(inputs_embeds=e).logits[0] for e in alone]
    losses = [
        torch.nn.functional.cross_entropy(logits[:-1], target[0, 1:], reduction="sum")
        for logits, target in zip(expected, labels, strict=True)
    ]
    expected_loss = sum(losses) / sum(n - 1 for n in LENGTHS)
    together = [e.clone().requires_grad_() for e in embeds]
    packed = packed_batch(together, labels)
    for extra in ({}, {"use_cache": True}):
        out = model(**(packed.model_inputs() | extra))
        torch.testing.assert_close(out.logits[0], torch.cat(expected), rtol=1e-5, atol=atol)
    torch.testing.assert_close(out.loss, expected_loss.float(), rtol=1e-5, atol=atol)
    grads = torch.autograd.grad(out.loss, [*together, *model.parameters()], allow_unused=True)
    expected_grads = torch.autograd.grad(expected_loss, [*alone, *stock.parameters()], allow_unused=True)
    compared = 0
    for a, b in zip(grads, expected_grads, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=atol)
            compared += bool(b.abs().max() > 1e-3)
    assert compared > 10


@pytest.mark.parametrize("kind", ["qwen2", "gemma2", "mistral"])
def test_an_upper_bound_changes_nothing(kind: str):
    model = decoder(kind)
    embeds, labels = samples(model)
    exact, loose = (packed_batch(embeds, labels, compact) for compact in (True, False))
    assert len(loose.source) > len(exact.source)
    a, b = model(**exact.model_inputs()), model(**loose.model_inputs())
    torch.testing.assert_close(b.logits[0, : len(exact.source)], a.logits[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(b.loss, a.loss, rtol=1e-5, atol=1e-6)
    assert b.logits.isfinite().all()
    padded, mask = exact.unpack(a.logits)
    assert padded.shape == (len(LENGTHS), max(LENGTHS), 60) and mask.sum() == sum(LENGTHS)


# Leaks


class PackingModel(torch.nn.Module):
    """A model that takes a padded batch and packs it, as a user would write it."""

    def __init__(self, decoder: Any):
        super().__init__()
        self.decoder = decoder
        self.logits: list[Tensor] = []

    def gradient_checkpointing_enable(self, **kwargs: Any) -> None:
        self.decoder.gradient_checkpointing_enable(**kwargs)

    def forward(self, inputs_embeds: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> Any:
        packed = fc.pack(inputs_embeds=inputs_embeds, attention_mask=attention_mask, labels=labels)
        kwargs = packed.model_inputs()
        del kwargs["use_cache"]  # at its default
        out = self.decoder(**kwargs)
        self.logits.append(packed.unpack(out.logits)[0].detach())
        return out


@contextlib.contextmanager
def never_a_full_mask(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Assert that transformers builds no T x T mask."""
    from transformers import masking_utils

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a mask was built")

    with monkeypatch.context() as patch:
        patch.setitem(transformers.AttentionMaskInterface._global_mapping, "fastcompress", refuse)
        patch.setattr(masking_utils, "sdpa_mask", refuse)
        yield


def batches(other_length: bool) -> Iterator[dict[str, Tensor]]:
    """Return two batches that differ in the first sample."""
    g = torch.Generator().manual_seed(3)
    rows, labels = torch.randn(3, 40, 64, generator=g), torch.randint(0, 60, (3, 40), generator=g)
    lengths = torch.tensor([[31], [40], [12]])
    for changed in (False, True):
        if changed:
            rows = torch.cat([torch.randn(1, 40, 64, generator=g), rows[1:]])
            lengths = torch.tensor([[17 if other_length else 31], [40], [12]])
        mask = torch.arange(40) < lengths
        yield {"inputs_embeds": rows, "attention_mask": mask.long(), "labels": labels.masked_fill(~mask, -100)}


def check_no_leak(before: Tensor, after: Tensor, other_length: bool) -> None:
    assert not torch.equal(before[0, :12], after[0, :12])
    for sample, length in ((1, 40), (2, 12)):
        a, b = before[sample, :length], after[sample, :length]
        if other_length:
            torch.testing.assert_close(b, a, rtol=0, atol=1e-5)
        else:
            assert torch.equal(a, b)


# Kinds: full attention, a window, a window and a soft cap. Lengths: the other samples keep their rows, or move. Modes:
# with and without a cache and gradient checkpointing.
@pytest.mark.parametrize(
    ("kind", "mode", "other_length"),
    [
        *((kind, "eval", other_length) for kind in ("qwen2", "mistral", "gemma2") for other_length in (False, True)),
        *((kind, mode, False) for kind in ("qwen2", "gemma2") for mode in ("train", "checkpointing")),
    ],
)
def test_samples_are_independent(kind: str, mode: str, other_length: bool, monkeypatch: pytest.MonkeyPatch):
    model = PackingModel(decoder(kind)).train(mode != "eval")
    if mode == "checkpointing":
        model.gradient_checkpointing_enable()
    with never_a_full_mask(monkeypatch):
        for batch in batches(other_length):
            batch["inputs_embeds"].requires_grad_()
            out = model(**batch)
            # Neither the logits nor the gradients of sample 1 depend on the other samples.
            first = int(batch["attention_mask"][0].sum())
            (grad,) = torch.autograd.grad(out.logits[0, first + 30 : first + 40].square().sum(), batch["inputs_embeds"])
            assert grad[1].abs().sum() > 0 and not grad[[0, 2]].any()
    check_no_leak(*model.logits, other_length)


@pytest.mark.parametrize("other_length", [False, True], ids=["same length", "other length"])
def test_samples_are_independent_under_trainer(other_length: bool, tmp_path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("accelerate", reason="Trainer needs accelerate")
    logits = []
    for batch in batches(other_length):
        model = PackingModel(decoder("qwen2"))
        data = [{name: tensor[i] for name, tensor in batch.items()} for i in range(3)]
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=3,
            max_steps=1,
            learning_rate=0.0,
            report_to=[],
            save_strategy="no",
            remove_unused_columns=False,
            gradient_checkpointing=True,
            use_cpu=True,
            data_seed=0,
            disable_tqdm=True,
        )
        trainer = transformers.Trainer(model=model, args=arguments, train_dataset=data)
        sampler = torch.utils.data.SequentialSampler(data)
        monkeypatch.setattr(trainer, "_get_train_sampler", lambda *_, sampler=sampler: sampler)
        with never_a_full_mask(monkeypatch):
            trainer.train()
        logits.append(model.logits[0])
    check_no_leak(*logits, other_length)


def test_the_leak_test_finds_leaks():
    """Stock SDPA with its default cache attends across packed samples."""
    model = decoder("qwen2", "sdpa")
    logits = []
    for batch in batches(False):
        packed = fc.pack(inputs_embeds=batch["inputs_embeds"], attention_mask=batch["attention_mask"])
        out = model(inputs_embeds=packed.inputs_embeds[None], position_ids=packed.position_ids[None])
        logits.append(packed.unpack(out.logits)[0].detach())
    with pytest.raises(AssertionError):
        check_no_leak(*logits, False)


# Input that is not packed


@pytest.mark.parametrize("kind", DECODERS)
def test_padded_batches_and_generation_are_stock(kind: str):
    model, stock = decoder(kind), decoder(kind, "eager")
    ids = torch.randint(1, 60, (3, 30), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :11] = mask[1, :4] = 0
    a, b = (m(input_ids=ids, attention_mask=mask).logits for m in (model, stock))
    torch.testing.assert_close(a[mask.bool()], b[mask.bool()], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model(input_ids=ids).logits, stock(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
    tokens = [m.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False) for m in (model, stock)]
    assert torch.equal(*tokens)


@pytest.mark.parametrize("causal", [True, False])
def test_a_soft_cap_without_packing(causal: bool, monkeypatch: pytest.MonkeyPatch):
    """Stock SDPA does not support soft caps. Ours computes them in blocks, without a T x T matrix."""
    monkeypatch.setattr(sys.modules[packed_attention.__module__], "BLOCK", 16)
    query, key, value = (torch.randn(2, h, 50, 8, dtype=torch.float64) for h in (4, 2, 2))
    module = torch.nn.Module()
    module.is_causal = causal
    out, _ = attention.attention_forward(module, query, key, value, None, softcap=2.0)
    flat = [t.transpose(1, 2).reshape(100, t.shape[1], 8) for t in (query, key, value)]
    expected = reference(*flat, [0, 50, 100], softcap=2.0, causal=causal)
    torch.testing.assert_close(out.reshape(100, 4, 8), expected)
    mask = torch.ones(50, 50, dtype=torch.bool).tril() if causal else torch.ones(50, 50, dtype=torch.bool)
    masked, _ = attention.attention_forward(
        module, query, key, value, mask[None, None].expand(2, 1, 50, 50), softcap=2.0
    )
    torch.testing.assert_close(masked, out)
    # A single decoded row attends to the whole cache; rows of another sequence attend to all of its rows.
    for rows in (1, 20):
        part, _ = attention.attention_forward(
            module, query[:, :, -rows:], key, value, None, softcap=2.0, is_causal=rows == 1
        )
        whole = reference(*flat, [0, 50, 100], softcap=2.0, causal=False).reshape(2, 50, 4, 8)
        torch.testing.assert_close(part, whole[:, -rows:])


def test_an_encoder_with_a_soft_cap_is_not_causal():
    sizes = SIZES | {
        "num_hidden_layers": 2,
        "query_pre_attn_scalar": 16,
        "attn_logit_softcapping": 2.0,
        "sliding_window": 64,
    }
    config = transformers.AutoConfig.for_model("t5gemma", encoder=dict(sizes), decoder=dict(sizes), vocab_size=60)
    torch.manual_seed(0)
    model = transformers.AutoModelForSeq2SeqLM.from_config(config, attn_implementation="eager").eval()
    ids = torch.randint(1, 60, (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(input_ids=ids, decoder_input_ids=ids[:, :7]).logits
        model.set_attn_implementation("fastcompress")
        torch.testing.assert_close(
            model(input_ids=ids, decoder_input_ids=ids[:, :7]).logits, expected, rtol=1e-5, atol=1e-5
        )


def test_a_decoder_under_autocast():
    """Rotary embeddings return queries and keys in fp32, while values are in bf16."""
    model = decoder("qwen2")
    packed = packed_batch(samples(model)[0])
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(**packed.model_inputs()).logits
    torch.testing.assert_close(logits.float(), model(**packed.model_inputs()).logits, rtol=0.1, atol=0.5)


def test_flash_attention_of_transformers_runs_model_inputs_without_a_mask(monkeypatch: pytest.MonkeyPatch):
    """Its kernels are not installed here; ``packed_attention`` replaces them."""
    from transformers import modeling_flash_attention_utils as flash

    def varlen(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, **_: Any) -> Tensor:
        return attention.packed_attention(q, k, v, cu_seqlens_q)

    kernels = (None, varlen, None, flash._pad_input, flash._unpad_input), (lambda **_: {}, None)
    monkeypatch.setattr(flash, "lazy_import_flash_attention", lambda *_, **__: kernels)
    model = decoder("qwen2")
    inputs = packed_batch(samples(model)[0]).model_inputs()
    wanted = model(**inputs).logits
    model.config._attn_implementation = "flash_attention_2"
    torch.testing.assert_close(model(**inputs | {"attention_mask": None}).logits, wanted, atol=1e-5, rtol=1e-5)


def test_prepare():
    model = attention.prepare(decoder("qwen2", "eager"))
    assert model.config._attn_implementation == "fastcompress"
    embeds = samples(model)[0]
    expected = torch.cat([decoder("qwen2", "eager")(inputs_embeds=e).logits[0] for e in embeds])
    torch.testing.assert_close(model(**packed_batch(embeds).model_inputs()).logits[0], expected, rtol=1e-5, atol=1e-5)


def test_a_model_whose_decoder_is_its_head_is_prepared_or_refused():
    config = transformers.AutoConfig.for_model("modernbert-decoder", **(SIZES | {"num_hidden_layers": 2}))
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    attention.prepare(model)
    embeds = samples(model)[0]
    with torch.no_grad():
        expected = torch.cat([model(inputs_embeds=e).logits[0] for e in embeds])
        got = model(**packed_batch(embeds).model_inputs()).logits[0]
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)

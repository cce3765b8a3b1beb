"""The benchmarks of published methods, of packing and of a packed decoder: checked, then timed, and written down."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import fastcompress as fc
from benchmarks import __main__ as command
from benchmarks import report
from benchmarks.gpu_packing import HALF_ERROR
from benchmarks.suites import decoder, methods, prefill
from benchmarks.suites import pack as packing
from benchmarks.suites.checks import WrongResult


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_form_of_packing_gives_the_same_rows(dtype: torch.dtype):
    tables = packing.measure(packing.QUICK, dtype, 1, 2, 1 << 10, 1)
    assert [table.direction for table in tables] == ["forward", "forward+backward"]
    assert set(tables[0].samples) == {*packing.forms(), packing.CLONE}
    assert set(tables[1].samples) == set(packing.forms()) >= packing.FORMS.keys() - packing.MODULES.keys()
    assert "x ours" in report.packing_text(tables[0])
    assert "against a clone" in report.packing_targets_text(tables)


def test_a_wrong_form_is_not_timed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(packing.FORMS, "one flat cat", lambda batch: packing.flat_cat(batch).flip(0))
    with pytest.raises(WrongResult, match="one flat cat: other rows"):
        packing.measure(packing.QUICK, torch.float32, 1, 1, 1 << 10, 1)


def test_gradients_of_the_forms_agree():
    (batch, *_) = packing.batches(packing.QUICK, torch.float32, 1 << 10)
    grads = []
    for form in packing.forms().values():
        audio = batch.audio.detach().requires_grad_()
        out = form(packing.Batch(**(vars(batch) | {"audio": audio})))
        grads.append(torch.autograd.grad(out.square().sum(), audio)[0])
    for grad in grads[1:]:
        torch.testing.assert_close(grad, grads[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_published_methods(dtype: torch.dtype):
    """Every published form gives our tokens, and the same gradients."""
    (batch, *_) = methods.batches(methods.QUICK, dtype, 1 << 10)
    batch = methods.Batch(**(vars(batch) | {"x": batch.x.requires_grad_()}))
    for method in filter(lambda method: method.available, methods.METHODS):
        ours = method.ours(batch)
        grad = torch.randn(ours.shape, generator=torch.Generator().manual_seed(0)).to(dtype)
        mine = torch.autograd.grad(ours, batch.x, grad)[0]
        for name, form in method.published.items():
            theirs = form(batch)
            assert theirs.shape == ours.shape and theirs.dtype == dtype, (method.name, name)
            methods.check(name, ours, theirs)
            methods.check(f"{name}, gradient", mine, torch.autograd.grad(theirs, batch.x, grad)[0])


def test_a_wrong_method_is_not_timed(monkeypatch: pytest.MonkeyPatch):
    right = methods.METHODS[0]
    wrong = methods.Method("CIF", lambda batch: right.ours(batch) * 1.01, right.published)
    monkeypatch.setattr(methods, "METHODS", (wrong,))
    with pytest.raises(WrongResult, match="CIF, scatter_add, padded: .* tokens differ by more than rounding"):
        methods.measure(methods.QUICK, torch.float32, 1, 1, 1 << 10, 1)
    shorter = methods.Method("CIF", lambda batch: right.ours(batch)[1:], right.published)
    monkeypatch.setattr(methods, "METHODS", (shorter,))
    with pytest.raises(WrongResult, match="tokens of torch.float32 for"):
        methods.measure(methods.QUICK, torch.float32, 1, 1, 1 << 10, 1)
    monkeypatch.setattr(methods, "METHODS", (right,))
    tables = methods.measure(methods.QUICK, torch.float32, 1, 1, 1 << 10, 1)
    assert [table.direction for table in tables] == ["forward", "forward+backward"]
    assert "scatter_add, padded" in report.methods_text(tables)


@pytest.mark.slow
def test_the_decoder_is_checked_timed_and_its_memory_read(monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("transformers")
    for table in decoder.measure(1, 1, "quick", 1):
        assert set(table.samples) == set(decoder.FORMS)
        assert all(peak is None or peak > 0 for peak in table.peaks.values())
        assert "padding" in report.decoder_text(table)
    assert 0.2 < decoder.padding(decoder.lengths(decoder.SIZES["cpu"])) < 0.8

    def build(form: str, size: decoder.Size, right=decoder.build):
        call = right(form, size)
        return call if form != decoder.OURS else lambda backward: (call(backward)[0] + 1, call(backward)[1])

    monkeypatch.setattr(decoder, "build", build)
    with pytest.raises(WrongResult, match="packed, fastcompress: logits are off by 6.* of their norm"):
        decoder.measure(1, 1, "quick", 1)


def test_logits_of_samples_that_see_each_other_are_found(monkeypatch: pytest.MonkeyPatch):
    """Also by what is allowed to bf16 on a GPU."""
    pytest.importorskip("transformers")
    expected = decoder.build(decoder.PADDED, decoder.SIZES["quick"])(False)[0]

    def as_one_sequence(self: fc.PackedInputs, right=fc.PackedInputs.model_inputs) -> dict[str, Any]:
        count = len(self.source)
        cu = torch.tensor([0, count], dtype=torch.int32)
        return right(self) | {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu, "max_length_q": count}

    call = decoder.build(decoder.OURS, decoder.SIZES["quick"])
    decoder.check(decoder.OURS, call(False)[0], expected, HALF_ERROR)
    monkeypatch.setattr(fc.PackedInputs, "model_inputs", as_one_sequence)
    with pytest.raises(WrongResult, match="logits are off"):
        decoder.check(decoder.OURS, call(False)[0], expected, HALF_ERROR)


@pytest.mark.slow
def test_prefill_is_checked_and_timed(monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("transformers")
    table = prefill.measure(1, 1, "quick", 1)
    text, audio = 2 * prefill.TEXT, 2 * 2 * 25
    assert table.tokens["stock"] == text + audio and table.tokens["uniform:2"] == text + audio // 2
    assert table.tokens["uniform:3"] == text + 2 * 17 and table.cache["uniform:2"] == 2 * 2 * (25 + 50) * 2 * 2 * 16 * 4
    assert all(peak is None or peak > 0 for peak in table.peaks.values())
    assert "to the first token" in report.prefill_text(table)
    stock, inputs = prefill.build(prefill.SIZES["quick"])
    model = prefill.compressed(stock, "uniform:3")
    assert all(a is b for a, b in zip(stock.parameters(), model.parameters(), strict=True))
    assert not hasattr(stock, "audio_compressor")
    monkeypatch.setattr(prefill, "first_word", lambda model, inputs: inputs["input_ids"][:, -1] * 0 - 1)
    with pytest.raises(WrongResult, match="uniform:3: generate writes something else"):
        prefill.check("uniform:3", model, stock, inputs, 1e-4)
    with pytest.raises(WrongResult, match="uniform:3: logits are off by"):
        prefill.check("uniform:3", model, stock, inputs, -1.0)


def test_the_command_writes_them_down(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "out.json"
    arguments = ["--quick", "--parts", "packing", "--dtypes", "bf16", "--reps", "1", "--json", str(path)]
    assert command.main(arguments) == 0
    document = json.loads(path.read_text())
    assert document["tables"] == document["decoder"] == []
    assert [table["direction"] for table in document["packing"]] == ["forward", "forward+backward"]
    assert {row["form"] for row in document["packing"][1]["rows"]} == set(packing.forms())
    assert "against masked_scatter" in capsys.readouterr().out

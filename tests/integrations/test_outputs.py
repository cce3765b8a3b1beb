"""Outputs of compressed models: ``compressed`` survives what rebuilds outputs."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.utils import _pytree as pytree

import fastcompress as fc
from fastcompress.integrations.transformers import FAMILIES, apply_to, revert
from fastcompress.lalm.modeling import FastCompressOutput
from tests.support import audio_llms
from tests.support.compressed_llms import batch, make
from tests.support.slow import some


@pytest.mark.parametrize("with_labels", [True, False])
@pytest.mark.parametrize("name", some(FAMILIES, "qwen2_audio", "audioflamingo3", "granite_speech"))
def test_conversion_by_accelerate(name: str, with_labels: bool):
    from accelerate.utils import convert_outputs_to_fp32

    model = make(name)
    inputs = batch(name, model, labels=with_labels)
    apply_to(model, "uniform:3")
    wanted = model(**inputs)
    found = convert_outputs_to_fp32(model.forward)(**inputs)
    assert type(found) is type(wanted) and list(found) == list(wanted)
    assert isinstance(found.compressed, fc.PackedInputs) and found["compressed"] is found.compressed
    assert found.compressed.cu_seqlens.tolist() == wanted.compressed.cu_seqlens.tolist()
    assert (found.loss is None) is (not with_labels)


@pytest.fixture
def new_state() -> Iterator[None]:
    """The precision of accelerate is one per process, and other tests have set it."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


def test_a_prepared_model(new_state: None):
    import accelerate

    model = apply_to(audio_llms.make("qwen2_audio"), "uniform:3")
    inputs = audio_llms.batch("qwen2_audio", model, labels=True)
    prepared = accelerate.Accelerator(mixed_precision="bf16", cpu=True).prepare(model)
    out = prepared(**inputs)
    assert out.compressed.cu_seqlens.shape == (4,) and out.loss.dtype == torch.float32


def test_the_class_is_one_of_the_stock_output():
    model = make("qwen2_audio")
    inputs = batch("qwen2_audio", model, labels=True)
    stock = type(model(**inputs))
    apply_to(model, "uniform:3")
    out = model(**inputs)
    assert isinstance(out, stock) and type(out) is type(model(**inputs))
    assert out.to_tuple()[-1] is out.compressed and len(out.to_tuple()) == len(out.keys())
    as_tuple = model(**inputs, return_dict=False)
    assert isinstance(as_tuple[-1], fc.PackedInputs) and torch.equal(as_tuple[0], out.loss)
    again = pytree.tree_unflatten(*reversed(pytree.tree_flatten(out)))
    assert type(again) is type(out) and torch.equal(again.compressed.cu_seqlens, out.compressed.cu_seqlens)
    again = pickle.loads(pickle.dumps(out))
    assert type(again) is type(out) and torch.equal(again.compressed.inputs_embeds, out.compressed.inputs_embeds)
    revert(model)
    assert type(model(**inputs)) is stock


def test_the_output_of_the_reference_model():
    from accelerate.utils import convert_outputs_to_fp32

    packed = fc.pack(torch.tensor([[1, 2]]), torch.randn(4, 3))
    out = FastCompressOutput(logits=torch.zeros(1, 2, 4, dtype=torch.bfloat16), packed=packed)
    found = convert_outputs_to_fp32(lambda: out)()
    assert found.packed is packed and found.logits.dtype == torch.float32 and found.loss is None


@pytest.mark.parametrize("labels", [True, False])
def test_trainer_predicts(labels: bool, tmp_path: Path):
    """It gathers every item of an output as tensors, but for those that the configuration names."""
    model = apply_to(audio_llms.make("qwen2_audio"), "uniform:3")
    inputs = audio_llms.batch("qwen2_audio", model, labels=labels)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), report_to=[], use_cpu=True, remove_unused_columns=False, disable_tqdm=True,
        per_device_eval_batch_size=3,
    )  # fmt: skip
    trainer = transformers.Trainer(model=model, args=arguments, data_collator=lambda _: inputs)
    found: Any = trainer.predict([0] * 3)
    tensors = found.predictions if isinstance(found.predictions, tuple) else (found.predictions,)
    assert tensors[0].shape[-1] == audio_llms.VOCABULARY
    assert "keys_to_ignore_at_inference" not in model.config.to_dict()

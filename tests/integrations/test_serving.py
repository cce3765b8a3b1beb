"""Budget mode where a serving engine runs it: with the engine's version of transformers, and no model to ask.

The slow test runs this file again with the versions that engines pin, in environments of their own.
"""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from fastcompress.integrations.transformers import FAMILIES, BudgetProcessor, apply_to, revert
from tests.support import ROOT, audio_llms
from tests.support.compressed_llms import GREEDY, batch, make

NAMES = tuple(name for name, family in FAMILIES.items() if family.budget is not None)
#: The first and the last minor version that engines pin.
PINNED = ("5.16", "5.19")


class Nothing:
    """A processor that is not asked."""

    tokenizer = None


def model_of(name: str) -> Any:
    try:
        model = make(name)
    except ImportError:
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    if name == "vibevoice_asr" and "sample" not in inspect.signature(model.model.forward).parameters:
        pytest.skip(f"transformers {transformers.__version__} always adds noise in {name}")
    return model


def decoder_rows(model: Any, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the decoder's input of a batch, and the logits."""
    found = []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: found.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    with torch.no_grad():
        logits = model(**inputs).logits
    hook.remove()
    return found[0], logits


@pytest.mark.parametrize("name", NAMES)
def test_tokens_are_means_of_stock_rows(name: str):
    model = model_of(name)
    inputs = batch(name, model, (20, 9, 16))
    stock, logits = decoder_rows(model, inputs)
    apply_to(model, "uniform:3", "budget")
    shortened = BudgetProcessor(Nothing(), model).shorten(dict(inputs))
    found, _ = decoder_rows(model, shortened)
    for row in range(3):
        kept, real = (x["attention_mask"][row].bool() for x in (shortened, inputs))
        audio = (inputs["input_ids"][row] == audio_llms.AUDIO) & real
        begin = int(audio[real].nonzero()[0])
        rows = stock[row][real]
        end = begin + int(audio.sum())
        means = [part.mean(0) for part in rows[begin:end].split(3)]
        wanted = torch.cat([rows[:begin], torch.stack(means), rows[end:]])
        assert (found[row][kept] - wanted).abs().max() <= 1e-6
    written = model.generate(**shortened, **GREEDY)
    assert torch.equal(written[:, :-6], shortened["input_ids"])
    assert torch.equal(model.generate(**shortened, **GREEDY, cache_implementation="static"), written)
    revert(model)
    assert torch.equal(decoder_rows(model, inputs)[1], logits)


@pytest.mark.parametrize("name", ["qwen2_audio", "audioflamingo3"])
def test_a_saved_model_is_served_without_apply_to(name: str, tmp_path: Path):
    """The processor of an engine needs the configuration alone, and asks for as many tokens as the model gives."""
    model, stock = audio_llms.make(name), audio_llms.processor(name)
    apply_to(model, "uniform:3", "budget").save_pretrained(tmp_path)
    processor = BudgetProcessor.from_config(stock, transformers.AutoConfig.from_pretrained(tmp_path))
    again = apply_to(type(model).from_pretrained(tmp_path).eval())
    assert again.fastcompress_settings.mode == "budget"
    samples = np.random.default_rng(0).standard_normal(9000).astype(np.float32)
    inputs = processor(text=["write <audio> you hear"], audio=[samples], return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, model(**inputs).logits)


def environment(folder: Path, requirement: str) -> Path:
    """Make an environment with a package of its own and all others of this one, and return its Python."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / "bin" / "python"
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-compile", requirement]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"pip cannot install {requirement}: {done.stderr.strip().splitlines()[-1]}")
    (site,) = folder.glob("lib/python*/site-packages")
    shared = [path for path in sys.path if path.endswith("-packages")]
    (site / "shared.pth").write_text("\n".join(shared) + "\n")
    return python


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("version", PINNED)
def test_versions_that_engines_pin(version: str, tmp_path: Path):
    python = environment(tmp_path / "env", f"transformers=={version}.*")
    command = [str(python), "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "-p", "no:xdist", __file__]
    done = subprocess.run(
        [*command, "-k", "means or served"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    shown = subprocess.run([python, "-c", "import transformers; print(transformers.__version__)"], capture_output=True)
    assert shown.stdout.decode().startswith(f"{version}."), shown.stderr.decode()
    print(done.stdout)

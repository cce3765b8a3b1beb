"""Each example runs and gives the result that its text promises."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

from fastcompress.audio import load_audio
from fastcompress.integrations.transformers import apply_to, revert
from tests.support import ROOT, tiny_whisper

EXAMPLES = ROOT / "examples"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"examples_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_each_example_has_a_test():
    names = {path.stem for path in EXAMPLES.iterdir() if path.suffix in (".py", ".ipynb")}
    assert names == {"demo", "train_with_segment_pool", "qwen2_audio_lora", "streaming", "tour", "whisper"}


def test_demo(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """The output has all columns, and the compressed ones have fewer tokens."""
    pytest.importorskip("jiwer")
    demo = load("demo")
    read = demo.read_manifest
    monkeypatch.setattr(demo, "read_manifest", lambda path: read(path)[:2])
    threads = torch.get_num_threads()
    try:
        assert demo.main() == 0
    finally:
        torch.set_num_threads(threads)
    lines = capsys.readouterr().out.splitlines()
    tokens = []
    for title, _, _ in demo.COLUMNS:
        (line,) = (line for line in lines if line.startswith(title))
        tokens.append(float(line.removeprefix(title).split()[0]))
    assert max(tokens[1:]) < tokens[0] / 3


def test_whisper(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """The output has the texts of the stock model and of compressed ones."""
    example = load("whisper")
    folder = tiny_whisper.write(tmp_path, max_target_positions=100)
    example.main([str(folder)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "fast.wav" and len(lines) == 3 * (1 + len(example.RULES))
    texts = {line.split(maxsplit=1)[0]: line[22:] for line in lines[1:4]}
    model, processor = tiny_whisper.make(max_target_positions=100), tiny_whisper.processor()
    inputs = processor(load_audio(example.SPEECH / "fast.wav"), sampling_rate=16000, return_tensors="pt")
    for rule in example.RULES[1:]:
        apply_to(model, rule, silence="pool")
        tokens = model.generate(**inputs, max_new_tokens=64)
        assert texts[rule] == processor.batch_decode(tokens, skip_special_tokens=True)[0].strip()
        revert(model)
    assert len(set(texts.values())) > 1


@pytest.mark.parametrize("rule", ["threshold:0.5,max_len=8", "uniform:4"])
def test_training_lowers_the_loss(rule: str, capsys: pytest.CaptureFixture[str]):
    losses = load("train_with_segment_pool").main(["--rule", rule, "--steps", "16"])
    assert len(losses) == 16 and max(losses[-3:]) < 0.7 * losses[0]
    last = capsys.readouterr().out.splitlines()[-1].split()
    assert last[0] == "step" and int(last[-2]) < int(last[-4]) / 2  # tokens and frames


def test_tokens_of_the_training_example_are_the_phones():
    """With the example's threshold a segment ends where the phone changes, so the label is the phone of all frames."""
    example = load("train_with_segment_pool")
    g = torch.Generator().manual_seed(1)
    frames, cu_seqlens, phone = example.make_batch(8, torch.randn(example.PHONES, example.WIDTH, generator=g), g)
    assert cu_seqlens.dtype == torch.int32 and int(cu_seqlens[-1]) == len(frames) == len(phone)
    _, pooled = example.Model("threshold:0.5,max_len=8")(frames, cu_seqlens)
    ids = pooled.segments.ids()
    assert torch.equal(ids.diff() > 0, (ids[1:] != ids[:-1])) and int(ids[-1]) + 1 == len(pooled.values)
    pure = phone == phone[pooled.segments.starts][ids]
    assert pure.float().mean() > 0.99


@pytest.mark.parametrize("arguments", [[], ["--rule", "uniform:3", "--chunk", "1"], ["--rule", "threshold:0.01"]])
def test_streaming(arguments: list[str], capsys: pytest.CaptureFixture[str]):
    count = load("streaming").main(arguments)
    lines = capsys.readouterr().out.splitlines()
    final = sum(int(line.split(":")[1].split()[0]) for line in lines[:-1])
    assert final == count > 1 and lines[-1].startswith(f"{count} tokens")


def test_streaming_detects_a_difference(monkeypatch: pytest.MonkeyPatch):
    example = load("streaming")
    whole = example.fc.segment_pool
    monkeypatch.setattr(example.fc, "segment_pool", lambda x, **kwargs: whole(x + 1e-3, **kwargs))
    with pytest.raises(AssertionError):
        example.main([])


def test_qwen2_audio_lora(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    example = load("qwen2_audio_lora")
    sizes = ["--max-steps", "6", "--per-device-train-batch-size", "2"]
    losses = example.main(["--tiny", *sizes, "--output-dir", str(tmp_path / "adapter")])
    assert len(losses) == 6 and losses[-1] < 0.5 * losses[0]
    assert "62 rows became 30" in capsys.readouterr().out  # 2 x (25 + 6) rows; 9 tokens replace 25 rows of audio

    stock = example.apply_to(example.tiny_model(), "uniform:3")
    tuned = peft.PeftModel.from_pretrained(stock, tmp_path / "adapter")
    names = [name for name, p in tuned.named_parameters() if "lora_B" in name and p.abs().sum() > 0]
    assert names and all("language_model" in name for name in names)
    assert len(names) == 2 * 7  # two layers, seven projections per layer


@pytest.mark.parametrize("arguments", [[], ["--model", "somewhere"], ["--tiny", "--model", "somewhere"]])
def test_qwen2_audio_lora_names_the_missing_argument(arguments: list[str], capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("peft")
    with pytest.raises(SystemExit):
        load("qwen2_audio_lora").main(arguments)
    assert "--model" in capsys.readouterr().err


def test_tour(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """The cells run in order, in the folder of the notebook, as on a notebook server."""
    pytest.importorskip("av")
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("agg")
    notebook = json.loads((EXAMPLES / "tour.ipynb").read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert len(cells) >= 6
    monkeypatch.chdir(EXAMPLES)
    names: dict[str, object] = {}
    for cell in cells:
        assert cell["outputs"] == [] and cell["execution_count"] is None, "a notebook is kept without output"
        exec(compile("".join(cell["source"]), f"tour.ipynb, {cell['id']}", "exec"), names)
    matplotlib.pyplot.close("all")
    out = capsys.readouterr().out
    assert "a gradient for every frame: True" in out and "positions start again: [0, 0]" in out

"""Training of compressed stock models with peft, gradient checkpointing, ``Trainer``, two processes and finetune."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import peft
import pytest
import torch
import torch.distributed as dist
import transformers
from torch.nn.parallel import DistributedDataParallel

from fastcompress.cli import main as cli
from fastcompress.integrations.transformers import FAMILIES, apply_to, revert
from fastcompress.training import finetuning
from fastcompress.training.manifest import read_manifest
from fastcompress.training.parsing import read_record
from fastcompress.training.settings import FinetuneSettings
from tests.support import audio_llms, forking
from tests.support.command_line import flags
from tests.support.compressed_llms import GREEDY, Gate, batch, grads, largest, make
from tests.support.lalm_data import write_tones

NAMES = tuple(audio_llms.FAMILIES)
TARGETS = r".*language_model.*\.(q_proj|v_proj|down_proj)"


def lora(model, **kwargs):
    torch.manual_seed(3)
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False, **kwargs))


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("granite")])  # not supported
def test_gradient_checkpointing_changes_nothing(name):
    found = []
    for checkpointing in (False, True):
        model = make(name)
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        apply_to(model, "uniform:3")
        model(**batch(name, model, labels=True)).loss.backward()
        found.append(grads(model))
    assert largest(*found) <= 1e-12


@pytest.mark.parametrize("first", ["peft", "compression"])
@pytest.mark.parametrize("name", ["qwen2_audio", "granite_speech", "qwen2_5_omni_thinker"])
def test_adapters(name, first, tmp_path):
    """peft and compression can be applied in either order. LoRA and other trained weights are saved and restored."""

    def build():
        model = make(name)
        torch.manual_seed(5)
        gate = Gate(32).double()
        return model, gate

    model, gate = build()
    inputs = batch(name, model, labels=True)
    if first == "compression":
        apply_to(model, gate)
        tuned = lora(model, modules_to_save=["audio_compressor"], task_type="CAUSAL_LM")
    else:
        tuned = lora(model)
        assert apply_to(tuned, gate) is tuned
    out = tuned(**inputs)
    out.loss.backward()
    trained = {n for n, p in tuned.named_parameters() if p.requires_grad and p.grad is not None and p.grad.any()}
    assert sum("lora_B" in n for n in trained) == 6 and any("audio_compressor" in n for n in trained)
    assert not any("tower" in n or "encoder" in n or "head" in n for n in trained)
    prompt = {key: value for key, value in inputs.items() if key != "labels"}
    written = tuned.generate(**prompt, **GREEDY)
    assert torch.equal(written[:, : prompt["input_ids"].shape[1]], prompt["input_ids"])
    if first == "peft":
        revert(tuned)
        assert not hasattr(tuned.get_base_model(), "audio_compressor")
        return
    with torch.no_grad():
        gate_weight = [p for n, p in tuned.named_parameters() if "gate.weight" in n and p.requires_grad]
        assert len(gate_weight) == 1
        gate_weight[0].mul_(1.5)
        loss = tuned(**inputs).loss
    tuned.save_pretrained(tmp_path)
    again, gate = build()
    apply_to(again, gate)
    loaded = peft.PeftModel.from_pretrained(again, tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).loss, loss)
        merged = loaded.merge_and_unload()
        assert abs(merged(**inputs).loss - loss) <= 1e-9


@pytest.mark.parametrize("first", ["peft", "compression"])
@pytest.mark.parametrize("name", ["audioflamingo3", "voxtral"])
def test_adapters_with_the_projector_pool_before_it(name, first):
    """Compression finds the projector after peft has wrapped it in a copy, and after peft has merged the copy."""
    model = make(name)
    inputs = batch(name, model)
    with torch.no_grad():
        apply_to(model, "uniform:3", before_projector=True)
        wanted = model(**inputs).logits
        revert(model)
        apply_to(model, "uniform:3")
        assert (model(**inputs).logits - wanted).abs().max() > 0.1  # pooling after the projector gives another result
        revert(model)
        config = peft.LoraConfig(r=2, target_modules=TARGETS, modules_to_save=["multi_modal_projector"])  # B is 0
        if first == "compression":
            apply_to(model, "uniform:3", before_projector=True)
            tuned = peft.get_peft_model(model, config)
        else:
            tuned = apply_to(peft.get_peft_model(model, config), "uniform:3", before_projector=True)
        assert (tuned(**inputs).logits - wanted).abs().max() <= 1e-9
        merged = tuned.merge_and_unload()
        assert (merged(**inputs).logits - wanted).abs().max() <= 1e-9


class Rows(torch.utils.data.Dataset):
    """A data set of the samples of a batch."""

    def __init__(self, inputs):
        self.rows = [{key: value[i] for key, value in inputs.items()} for i in range(len(inputs["input_ids"]))]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


@pytest.mark.parametrize("pack", [False, True], ids=["padded", "packed"])
def test_trainer(pack, tmp_path):
    """The loss over accumulated batches is a mean over labels. Packed and padded training give the same weights."""
    model = make("qwen2_audio").float()
    inputs = audio_llms.batch("qwen2_audio", model, (20, 9, 16, 12), labels=True)
    inputs["labels"][0, -2:] = -100  # so that samples have different numbers of labels
    apply_to(model, "uniform:3", pack=pack)
    with torch.no_grad():
        expected = float(model(**inputs).loss)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        learning_rate=1e-2, logging_steps=1, report_to=[], remove_unused_columns=False, use_cpu=True, save_steps=2,
        disable_tqdm=True, per_device_eval_batch_size=2, prediction_loss_only=True, max_grad_norm=0.0,
    )  # fmt: skip
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=Rows(inputs), eval_dataset=Rows(inputs))
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[0] == pytest.approx(expected, rel=1e-4) and losses[-1] < losses[0]
    assert trainer.evaluate()["eval_loss"] < losses[0]
    assert (tmp_path / "checkpoint-2" / "model.safetensors").exists()


def train_in_parallel(folder: Path, rank: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    model = make("qwen2_audio").train()
    torch.manual_seed(1)
    apply_to(model, Gate(32).double())
    parallel = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for step in range(3):
        # The second process has text alone, in the second step; in the third it has other audio.
        sizes = (None, None) if (rank, step) == (1, 1) else (20, 9) if rank == 0 else (16, 12)
        inputs = batch("qwen2_audio", model, sizes, labels=True, seed=step)
        parallel(**inputs, num_items_in_batch=8).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.save(model.state_dict(), folder / f"weights-{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_one_with_text_alone(tmp_path):
    processes = [forking.start(functools.partial(train_in_parallel, tmp_path, rank)) for rank in range(2)]
    assert [forking.wait(process) for process in processes] == [0, 0]
    found = [torch.load(tmp_path / f"weights-{rank}.pt") for rank in range(2)]
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    model = make("qwen2_audio")
    torch.manual_seed(1)
    apply_to(model, Gate(32).double())
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for step in range(3):
        for sizes in ((20, 9), (None, None) if step == 1 else (16, 12)):
            inputs = batch("qwen2_audio", model, sizes, labels=True, seed=step)
            model(**inputs, num_items_in_batch=16).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, value in model.state_dict().items():
        assert (found[0][name] - value).abs().max() <= 1e-9, name


@pytest.mark.parametrize("name", ["qwen2_audio", "audioflamingo3"])
def test_pipeline(name):
    model, processor = audio_llms.make(name), audio_llms.processor(name)
    samples = torch.randn(9000, generator=torch.Generator().manual_seed(0)).numpy()
    content = [{"type": "audio", "audio": samples}, {"type": "text", "text": "write what you hear"}]
    apply_to(model, "uniform:3")
    seen = []
    decoder = model.model.language_model
    handle = decoder.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(x.shape[1]) if (x := kwargs.get("inputs_embeds")) is not None else None,
        with_kwargs=True,
    )
    pipe = transformers.pipeline("any-to-any", model=model, processor=processor)
    out = pipe([{"role": "user", "content": content}], max_new_tokens=4, return_full_text=False)
    handle.remove()
    assert isinstance(out[0]["generated_text"], str) and out[0]["generated_text"]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        return_dict=True,
        add_generation_prompt=True,
        processor_kwargs={"return_tensors": "pt"},
    )
    alone = model.generate(**inputs, max_new_tokens=4)
    words = processor.batch_decode(alone[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0]
    assert out[0]["generated_text"].split() == words.split()
    rows = int((inputs["input_ids"] == audio_llms.AUDIO).sum())
    assert min(s for s in seen if s > 1) <= inputs["input_ids"].shape[1] - rows + -(-rows // 3)


# The command


@pytest.fixture(scope="module")
def stock(tmp_path_factory) -> Path:
    """Write folders of stock models with their processors, and manifests."""
    folder = tmp_path_factory.mktemp("stock")
    for name in ("qwen2_audio", "audioflamingo3"):
        audio_llms.make(name).save_pretrained(folder / name)
        audio_llms.processor(name).save_pretrained(folder / name)
    write_tones(folder, 12, "train", seed=1, texts=2)
    write_tones(folder, 4, "dev", seed=2)
    return folder


def arguments(stock: Path, name: str, out: Path, **more) -> list[str]:
    options = {
        "model": stock / name,
        "data": stock / "train.jsonl",
        "output_dir": out,
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 0.02,
        "bf16": False,
        "save_steps": 2,
        "logging_steps": 1,
        "max_new_tokens": 5,
        "prompt": "write what you hear",
        "lora_rank": 4,
    } | more
    return ["finetune", *flags(**options)]


@pytest.mark.parametrize("mode", ["dynamic", "budget"])
@pytest.mark.parametrize("name", ["qwen2_audio", "audioflamingo3"])
def test_finetune(stock, name, mode, tmp_path, capsys):
    out = tmp_path / "run"
    line = arguments(stock, name, out, mode=mode, dev=stock / "dev.jsonl", warmup_steps=1, max_steps=6)
    assert cli.main(line) == 0, capsys.readouterr().err
    record = json.loads((out / "finetune.json").read_text())
    losses = dict(record["losses"])
    assert list(losses) == [1, 2, 3, 4, 5, 6] and losses[6] < losses[1]
    scores = record["scores"]
    assert scores["utterances"] == 4 and 0 <= scores["cer"] and 7 < scores["tokens_per_second"] < 11  # 25 / 3
    assert "dev:" in capsys.readouterr().out
    model, processor = finetuning.load(str(stock / name), torch.float32)
    trained = apply_to(peft.PeftModel.from_pretrained(model, out / "adapter"))  # with the rule that is saved beside it
    for folder in ("adapter", "checkpoint-6"):
        saved = json.loads((out / folder / "fastcompress.json").read_text())
        assert (saved["rule"], saved["mode"]) == (read_record(FinetuneSettings, out).rule, mode)
    names = [n for n, p in trained.named_parameters() if "lora_B" in n]
    assert len(names) == 14 and all("language_model" in n for n in names)
    assert any("multi_modal_projector" in n and "modules_to_save" in n for n, _ in trained.named_parameters())
    if mode == "budget":
        processor = finetuning.BudgetProcessor(processor, trained)
    conversations = finetuning.Conversations(processor, "write what you hear")
    assert finetuning.score(trained, conversations, read_manifest(stock / "dev.jsonl"), 3, 5) == scores


def test_finetune_skips_unreadable_audio(stock, tmp_path, capsys):
    lines = (stock / "train.jsonl").read_text().splitlines()
    damaged = stock / "audio" / "damaged.wav"
    damaged.write_bytes((stock / "audio" / "train-0.wav").read_bytes()[:40])
    missing = json.dumps({"audio_filepath": "audio/nowhere.wav", "text": "low"})
    bad = json.dumps({"audio_filepath": "audio/damaged.wav", "text": "low"})
    (stock / "mixed.jsonl").write_text("\n".join([*lines[:3], missing, bad]))
    assert cli.main(arguments(stock, "qwen2_audio", tmp_path / "run", data=stock / "mixed.jsonl", max_steps=1)) == 0
    assert f"{stock / 'mixed.jsonl'}: skipped 2 of 5 utterances:" in capsys.readouterr().err
    for more, text in (
        ({"data": stock / "none.jsonl"}, "no such file"),
        ({"model": stock}, "config"),
        ({"rule": "uniform:0"}, "size must be at least 1, got 0"),
        ({"max_steps": 0}, "--max-steps must be at least 1, got 0"),
        ({"save_steps": 0}, "--save-steps must be at least 1, got 0"),
        ({"mode": "budget", "rule": "local-max"}, "budget mode needs a rule"),
        ({"learning_rate": -1.0}, "--learning-rate must be more than 0, got -1.0"),
    ):
        assert cli.main(arguments(stock, "qwen2_audio", tmp_path / "other", **more)) == 2
        assert text in capsys.readouterr().err, more
    (stock / "only.jsonl").write_text(missing)
    assert cli.main(arguments(stock, "qwen2_audio", tmp_path / "other", data=stock / "only.jsonl")) == 2
    assert "has no usable utterance" in capsys.readouterr().err


def test_finetune_reports_its_memory(stock, tmp_path, capsys):
    line = arguments(stock, "audioflamingo3", tmp_path / "run")
    assert cli.main([*line, "--dry-run"]) == 0
    assert "billion parameters" in capsys.readouterr().out and not (tmp_path / "run").exists()
    settings = FinetuneSettings(model=str(stock / "audioflamingo3"), data="x", output_dir="x", lora_rank=4, bf16=False)
    found = finetuning.memory(settings)
    model, _ = finetuning.load(settings.model, torch.float32)
    apply_to(model, settings.rule)
    model = finetuning.add_lora(model, settings)
    assert found["parameters"] == sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert found["trained"] == trained and found["training_bytes"] == 12 * trained
    assert found["weights_bytes"] == 4 * found["parameters"]


def test_a_processor_without_a_template(stock):
    processor = audio_llms.processor("audioflamingo3")
    utterances = read_manifest(stock / "train.jsonl")
    with_template = finetuning.Conversations(processor, "write what you hear")(utterances[:2] + utterances[-1:])
    processor.chat_template = None
    found = finetuning.Conversations(processor, " write what you hear")(utterances[:2])
    tokenizer = processor.tokenizer
    for batch_, first in ((with_template, "<s> user"), (found, "<audio>")):
        for row, labels, u in zip(batch_["input_ids"], batch_["labels"], utterances[:2], strict=False):
            told = labels[labels != -100].tolist()
            assert tokenizer.decode(told) == f"{u.target} </s>"
            assert row[labels != -100].tolist() == told
            text = tokenizer.decode(row)
            assert text.startswith(first) and "write what you hear" in text
    assert (with_template["input_ids"][2] != audio_llms.AUDIO).all() and len(with_template["input_features"]) == 2


def test_info_lists_the_models(capsys):
    assert cli.main(["info", "--models"]) == 0
    text = capsys.readouterr().out
    assert all(kind in text for kind in FAMILIES)
    assert cli.main(["info", "--models", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["voxtral"]["budget"] and found["musicflamingo"]["why_no_budget"] and found["moshi"]["refused"]


@pytest.fixture
def one_precision():
    """Reset accelerate's state: a process has one precision, and each run is usually a process."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()


@pytest.mark.parametrize("name", ["qwen2_audio", "audioflamingo3"])
def test_finetune_in_bf16_trains_in_fp32(stock, name, tmp_path, capsys, one_precision):
    out = tmp_path / "run"
    line = arguments(stock, name, out, bf16=True, dev=stock / "dev.jsonl")
    assert cli.main(line) == 0, capsys.readouterr().err
    state = torch.load(out / "checkpoint-4" / "optimizer.pt", weights_only=True)["state"].values()
    assert len(state) > 14 and {s[key].dtype for s in state for key in ("exp_avg", "exp_avg_sq")} == {torch.float32}
    assert json.loads((out / "finetune.json").read_text())["scores"]["utterances"] == 4
    settings = FinetuneSettings(model=str(stock / name), data="x", output_dir="x", lora_rank=4)
    found = finetuning.memory(settings)
    assert found["training_bytes"] == 12 * found["trained"]
    model, _ = finetuning.load(settings.model, torch.bfloat16)
    model = finetuning.add_lora(apply_to(model, settings.rule), settings)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert found["weights_bytes"] == sum(p.numel() * p.element_size() for p in model.parameters())

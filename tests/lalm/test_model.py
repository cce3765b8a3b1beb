"""The reference audio LLM with tiny random parts, against its parts run one by one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from fastcompress.lalm import FastCompressConfig, FastCompressForConditionalGeneration
from fastcompress.lalm.encoders import WAVEFORM, encode
from tests.support.reference_models import AUDIO, LENGTHS, TEXT, WHISPER, WINDOW, batch, build, samples

RULES = (None, "uniform:3", "local-max", "local-max:prominence=0.1", "threshold:0.5")


# Parameters: which rows become a token; the padding of the audio in the encoder; the side of the padding of the text.
@pytest.mark.parametrize(
    ("rule", "padding", "left"),
    [
        *((rule, "window", False) for rule in RULES),
        *((rule, "longest", True) for rule in (None, "uniform:3")),
        ("local-max", "window", True),
    ],
)
def test_a_batch_is_its_samples(rule: str | None, padding: str, left: bool):
    model = build(rule=rule, audio_padding=padding, train_encoder=True)
    full = batch(left=left)
    whole = model(**full)
    parts = [model(**part) for part in samples(full)]
    torch.testing.assert_close(whole.logits, torch.cat([p.logits for p in parts], 1), rtol=1e-5, atol=1e-5)
    counts = [int((p.packed.labels != -100).sum()) for p in parts]
    mean = sum(p.loss * n for p, n in zip(parts, counts, strict=True)) / sum(counts)
    torch.testing.assert_close(whole.loss, mean, rtol=1e-5, atol=1e-5)
    weights = [p for p in model.parameters() if p.requires_grad]
    for a, b in zip(*(torch.autograd.grad(t, weights) for t in (whole.loss, mean)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert whole.num_frames == sum((n + 1) // 2 for n in LENGTHS)
    assert whole.num_audio_tokens == sum(int(p.num_audio_tokens) for p in parts)
    assert (whole.num_audio_tokens < whole.num_frames) == (rule is not None)


@pytest.mark.parametrize("text", ["llama", "mistral", "gemma", "qwen3", "gemma3_text", "granite", "phi3"])
def test_decoders(text: str):
    model = build(text=text, rule="uniform:3")
    full = batch()
    parts = [model(**part).logits for part in samples(full)]
    torch.testing.assert_close(model(**full).logits, torch.cat(parts, 1), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:the decoder runs padded")
def test_a_decoder_that_cannot_be_packed_runs_padded():
    config = transformers.MambaConfig(vocab_size=60, hidden_size=32, num_hidden_layers=2, state_size=4, pad_token_id=0)
    audio = transformers.AutoConfig.for_model("whisper", **WHISPER)
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="the decoder runs padded: mamba cannot run packed"):
        model = FastCompressForConditionalGeneration(
            FastCompressConfig(audio, config, "uniform:3", audio_token_id=AUDIO)
        ).eval()
    full = batch()
    whole, parts = model(**full), [model(**part) for part in samples(full)]
    torch.testing.assert_close(whole.logits, torch.cat([p.logits for p in parts], 1), rtol=1e-4, atol=1e-4)
    del full["labels"]
    ends = model.prefill(whole.packed)
    expected = [model.prefill(p.packed) for p in parts]
    torch.testing.assert_close(ends, torch.cat(expected, 1), rtol=1e-4, atol=1e-4)


def test_without_labels_every_row_has_logits():
    model = build(rule="uniform:4")
    full = batch()
    labelled = model(**full)
    del full["labels"]
    out = model(**full)
    assert out.loss is None and out.logits.shape == (1, len(out.packed.source), 60)
    rows = (labelled.packed.labels[1:] != -100).nonzero()[:, 0]
    torch.testing.assert_close(labelled.logits, out.logits[:, rows])
    last = out.packed.cu_seqlens[1:].long() - 1
    torch.testing.assert_close(model.prefill(out.packed), out.logits[:, last])


def test_frames_in_place_of_features():
    model = build(rule="local-max")
    full = batch()
    expected = model(**full)
    frames, lengths = model.encode(full.pop("input_features"), full.pop("feature_attention_mask"))
    assert torch.equal(model(**full, frames=frames, frame_lengths=lengths).loss, expected.loss)
    with pytest.raises(ValueError, match="pass input_features or frames, not both"):
        model(**full, frames=frames, frame_lengths=lengths, input_features=frames)


def test_frames_need_their_lengths():
    """Without lengths, the padding would be compressed like speech."""
    model = build()
    full = batch()
    frames, lengths = model.encode(full.pop("input_features"), full.pop("feature_attention_mask"))
    for given in ({"frames": frames}, {"frame_lengths": lengths}):
        with pytest.raises(ValueError, match="frames and frame_lengths must be passed together"):
            model(**full, **given)
        with pytest.raises(ValueError, match="frames and frame_lengths must be passed together"):
            model.generate(full["input_ids"], full["attention_mask"], **given)


# Encoders


def test_audio_longer_than_a_window_is_cut_into_windows():
    model = build()
    tower = model.audio_tower
    features = torch.randn(2, 16, 3 * WINDOW + 31)
    lengths = torch.tensor([3 * WINDOW + 31, WINDOW + 7])
    mask = (torch.arange(features.shape[2]) < lengths[:, None]).long()
    frames, counts = encode(tower, features, mask)
    assert counts.tolist() == [(n + 1) // 2 for n in lengths.tolist()]
    for row, length, found in zip(features, lengths.tolist(), frames, strict=True):
        silence = row[:, :length].amax() - 2
        for begin in range(0, length, WINDOW):
            end = min(begin + WINDOW, length)
            window = silence.expand(16, WINDOW).clone()
            window[:, : end - begin] = row[:, begin:end]
            expected = tower(window[None]).last_hidden_state[0, : (end - begin + 1) // 2]
            torch.testing.assert_close(found[begin // 2 : begin // 2 + len(expected)], expected, rtol=1e-5, atol=1e-5)
    # Empty windows are not computed.
    calls = []
    handle = tower.register_forward_pre_hook(lambda _, arguments: calls.append(len(arguments[0])))
    encode(tower, features, mask)
    handle.remove()
    assert calls == [4 + 2]


def test_padding_as_whisper_pads():
    """Stock Whisper pads a short audio with silence, whose features are 2 below the maximum."""
    extractor = transformers.WhisperFeatureExtractor(feature_size=16, chunk_length=1)
    samples = np.random.default_rng(0).standard_normal(8000).astype(np.float32)
    stock = extractor(samples, sampling_rate=16000, return_tensors="pt").input_features  # padded to a second
    short = extractor(
        samples, sampling_rate=16000, padding="longest", truncation=False, return_tensors="pt"
    ).input_features
    model = build()
    assert stock.shape[2] == WINDOW and short.shape[2] == 50
    expected = model.audio_tower(stock).last_hidden_state[:, :24]
    zeros = model.audio_tower(torch.nn.functional.pad(short, (0, 50))).last_hidden_state[:, :24]
    frames = model.encode(short)[0][:, :24]
    # The last two frames depend on the padding of the samples, which is reflected in one case and zero in the other.
    error, wrong = (float((f - expected).norm() / expected.norm()) for f in (frames, zeros))
    assert error < 0.03 and wrong > 5 * error, (error, wrong)


@pytest.mark.parametrize("padding", ["window", "longest"])
def test_normalized_features_have_no_level(padding: str):
    full = batch()
    features, mask = full["input_features"], full["feature_attention_mask"]
    expected = build(normalize_features=True, audio_padding=padding).encode(features, mask)[0]
    for options, same in (({"normalize_features": True}, True), ({}, False)):
        model = build(audio_padding=padding, **options)
        assert torch.allclose(*(model.encode(features + c, mask)[0] for c in (0.0, 0.7)), atol=1e-4) == same
    if padding == "window":  # padding with silence comes after the subtraction of the mean, before the factor 2
        length = LENGTHS[0]
        row = features[:1, :, :length]
        by_hand = 2 * torch.cat([row - row.mean(), (row.max() - 2 - row.mean()).expand(1, 16, WINDOW - length)], 2)
        frames = build().audio_tower(by_hand).last_hidden_state[0, : (length + 1) // 2]
        torch.testing.assert_close(expected[0, : (length + 1) // 2], frames, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", sorted(WAVEFORM & {"wav2vec2", "hubert", "wavlm"}))
def test_encoders_of_samples(kind: str):
    model = build(audio=kind, rule="uniform:2", train_encoder=True)
    full = batch()
    g = torch.Generator().manual_seed(5)
    lengths = torch.tensor([[900], [400], [1200]])
    full["input_features"] = torch.randn(3, 1200, generator=g)
    full["feature_attention_mask"] = (torch.arange(1200) < lengths).long()
    out = model(**full)
    alone = {k: v[:1] for k, v in full.items()}
    alone["input_features"], alone["feature_attention_mask"] = full["input_features"][:1, :900], torch.ones(1, 900)
    one = model(**alone)
    count = one.logits.shape[1]
    torch.testing.assert_close(out.logits[:, :count], one.logits, rtol=1e-3, atol=1e-3)
    out.loss.backward()
    assert model.audio_tower.encoder.layers[0].attention.q_proj.weight.grad.abs().sum() > 0


def test_masked_encoder():
    config = transformers.AutoConfig.for_model(
        "parakeet_encoder", hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        num_mel_bins=16, subsampling_conv_channels=8, conv_kernel_size=5, dropout=0.0, layerdrop=0.0,
        activation_dropout=0.0, attention_dropout=0.0, dropout_positions=0.0,
    )  # fmt: skip
    text = transformers.AutoConfig.for_model("qwen2", **TEXT)
    model = FastCompressForConditionalGeneration(
        FastCompressConfig(config, text, "uniform:2", audio_token_id=AUDIO)
    ).eval()
    full = batch()
    frames, lengths = model.encode(full["input_features"], full["feature_attention_mask"])
    alone, length = model.encode(full["input_features"][:1, :, :70], torch.ones(1, 70))
    assert length[0] == lengths[0] < 20
    torch.testing.assert_close(frames[0, : length[0]], alone[0, : length[0]], rtol=1e-3, atol=1e-3)
    assert model(**full).loss.isfinite()


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda m, b: m(**(b | {"input_features": b["input_features"][0]})), ValueError, "input_features of whisper must have shape [A, bins, T] (log-mel features), got [16, 100]"),
        (lambda m, b: m(**(b | {"feature_attention_mask": torch.ones(3, 99)})), ValueError, "feature_attention_mask must have shape [3, 100], got [3, 99]"),
        (lambda m, b: m(**(b | {"feature_attention_mask": torch.tensor([[1], [0], [1]]).expand(3, 100)})), ValueError, "audio 1 is empty"),
        (lambda m, b: m(**(b | {"input_features": b["input_features"][:2], "feature_attention_mask": None})), ValueError, "sample 2 needs 2 audios after the 1 of the samples before it, but audio has only 2 audios"),
        (lambda m, b: m(**(b | {"input_features": None})), ValueError, "sample 0 needs 1 audios"),
        (lambda m, b: m(**(b | {"ctc_labels": torch.ones(3, 2).long()})), ValueError, "ctc_labels need ctc_tokens"),
        (lambda m, b: m(**(b | {"input_ids": b["input_ids"] + 1})), ValueError, "input_ids must lie in [0, 60)"),
        (lambda m, b: FastCompressConfig(rule="nonsense:3"), ValueError, "unknown rule 'nonsense'"),
        (lambda m, b: FastCompressConfig(audio_padding="none"), ValueError, "audio_padding must be one of window, longest, got 'none'"),
        (lambda m, b: FastCompressConfig(audio_config={"model_type": "nothing"}), ValueError, "audio_config has model_type 'nothing'"),
        (lambda m, b: FastCompressConfig(audio_config=3), TypeError, "audio_config must be a transformers configuration or a dict, got int"),
        (lambda m, b: FastCompressConfig(ctc_tokens=[]), ValueError, "ctc_tokens must hold at least one unit"),
        (lambda m, b: FastCompressForConditionalGeneration(FastCompressConfig(transformers.BertConfig())), NotImplementedError, "audio_config has model_type 'bert'; supported encoders: "),
        (lambda m, b: setattr(m, "rule", "uniform:0"), ValueError, "size must be at least 1"),
    ],
)  # fmt: skip
def test_errors(call: Any, error: type[Exception], message: str):
    with pytest.raises(error, match=re.escape(message)):
        call(build(), batch())


# Training


def test_ctc_loss():
    model = build(train_encoder=True, ctc_tokens=["a", "b", "c"], ctc_weight=0.5)
    full = batch()
    labels = torch.tensor([[1, 2, 3], [2, -100, -100], [3, 3, -100]])
    out = model(**full, ctc_labels=labels)
    frames, lengths = model.encode(full["input_features"], full["feature_attention_mask"])
    losses = []
    for i, target in enumerate(labels):
        target = target[target > 0]
        log_probs = model.ctc_head(frames[i, : lengths[i]]).log_softmax(-1)[:, None]
        loss = torch.nn.functional.ctc_loss(log_probs, target[None], lengths[i : i + 1], torch.tensor([len(target)]))
        losses.append(loss)
    torch.testing.assert_close(out.ctc_loss, torch.stack(losses).mean())
    torch.testing.assert_close(out.loss, out.lm_loss + 0.5 * out.ctc_loss)
    with pytest.raises(ValueError, match="ctc_labels must have one row per audio, 3,"):
        model(**full, ctc_labels=labels[:2])


@pytest.mark.parametrize("has_audio", [True, False])
def test_every_parameter_is_in_the_graph(has_audio: bool):
    """Otherwise processes that average gradients would wait for each other."""
    model = build(train_encoder=True, ctc_tokens=["a"])
    if has_audio:
        loss = model(**batch()).loss  # no CTC labels
    else:
        ids = torch.tensor([[3, 4, 5]])
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert all(p.grad is not None for p in trained.values())
    assert (model.projector.weight.grad.abs().sum() > 0) == has_audio


def test_a_frozen_encoder_stays_as_it_is():
    model = build()
    model.audio_tower.config.dropout = model.audio_tower.dropout = 0.5
    model.train()
    assert not model.audio_tower.training and model.language_model.training
    assert not any(p.requires_grad for p in model.audio_tower.parameters())
    full = batch()
    a, b = (model.encode(full["input_features"])[0] for _ in range(2))
    assert torch.equal(a, b) and not a.requires_grad
    model.train_encoder(True)
    assert model.audio_tower.training and model.audio_tower.conv1.weight.requires_grad
    assert not model.audio_tower.embed_positions.weight.requires_grad
    a, b = (model.encode(full["input_features"])[0] for _ in range(2))
    assert not torch.equal(a, b) and a.requires_grad


def test_gradient_checkpointing_changes_nothing():
    grads = []
    for checkpointing in (False, True):
        model = build(rule="local-max", train_encoder=True).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            assert model.language_model.is_gradient_checkpointing
        model(**batch()).loss.backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_bf16():
    model = build(rule="uniform:3")
    expected = model(**batch()).loss
    model = model.to(torch.bfloat16)
    out = model(**batch())
    assert out.logits.dtype == torch.bfloat16 and out.loss.dtype == torch.float32
    torch.testing.assert_close(out.loss, expected, rtol=0.05, atol=0.05)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = build(rule="uniform:3")(**batch())
    torch.testing.assert_close(mixed.loss, expected, rtol=0.05, atol=0.05)


def test_trainer(tmp_path: Path):
    pytest.importorskip("accelerate")
    model = build(rule="uniform:2", train_encoder=True)
    before = model.projector.weight.detach().clone()
    parts = [part for part in samples(batch()) if part["input_ids"].shape[1] != 5]
    data = [{k: v[0] for k, v in part.items()} for part in parts]

    def collate(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        ids = torch.nn.utils.rnn.pad_sequence([item["input_ids"] for item in items], batch_first=True)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(i["input_ids"]) for i in items], batch_first=True)
        audio = [item["input_features"] for item in items if "input_features" in item]
        found = {
            "input_ids": ids,
            "attention_mask": mask,
            "labels": ids.masked_fill((mask == 0) | (ids == AUDIO), -100),
        }
        return found | ({"input_features": torch.stack(audio)} if audio else {})

    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=2,
        max_steps=3,
        learning_rate=1e-3,
        report_to=[],
        use_cpu=True,
        remove_unused_columns=False,
        save_strategy="steps",
        save_steps=3,
        disable_tqdm=True,
        gradient_accumulation_steps=2,
    )
    result = transformers.Trainer(model=model, args=arguments, train_dataset=data, data_collator=collate).train()
    assert 0 < result.training_loss < 20 and not torch.equal(model.projector.weight, before)
    loaded = FastCompressForConditionalGeneration.from_pretrained(tmp_path / "checkpoint-3")
    assert torch.equal(loaded.projector.weight, model.projector.weight)


# Generation


@pytest.mark.parametrize("text", ["qwen2", "gemma3_text"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_a_batch_generates_the_text_of_its_samples(options: dict[str, int], text: str):
    model = build(text=text, rule="local-max")
    options = options | {"max_new_tokens": 8, "do_sample": False}
    for left in (False, True):
        full = batch(left=left)
        labels = full.pop("labels")
        together = model.generate(**full, **options)
        assert torch.equal(together[:, :5], full["input_ids"])
        for row, part in zip(together, samples(full | {"labels": labels}), strict=True):
            prompt = part["input_ids"].shape[1]
            del part["labels"]
            alone = model.generate(**part, **options)[0, prompt:]
            assert row[5 : 5 + len(alone)].tolist() == alone.tolist()
            assert set(row[5 + len(alone) :].tolist()) <= {0, 2}  # padding and eos


def test_generation_agrees_with_forward():
    """Each token is the most likely one after the prompt and the tokens before it."""
    model = build(rule="uniform:3")
    part = samples(batch())[2]
    prompt = part["input_ids"]
    del part["labels"]
    tokens = model.generate(**part, max_new_tokens=5, do_sample=False, eos_token_id=None)
    logits = model(**(part | {"input_ids": tokens})).logits[0]
    assert logits[-6:-1].argmax(-1).tolist() == tokens[0, prompt.shape[1] :].tolist()


@pytest.mark.parametrize("text", ["qwen2", "gemma2"])
def test_parts_of_compression_without_training(text: str, tmp_path: Path):
    """A model that is loaded uses them for a rule that its weights were not trained with, packed, padded and cached."""
    build(text=text).save_pretrained(tmp_path)
    model = FastCompressForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert (model.proportional_attention, model.positions) == (False, "compact")
    full = batch(left=True)
    labels = full.pop("labels")
    stock = model(**full).logits
    model.rule = "uniform:1"
    torch.testing.assert_close(model(**full).logits, stock)
    model.rule = "uniform:3"
    assert (model.proportional_attention, model.positions) == (True, "time")
    out = model(**full)
    assert out.packed.next_positions.tolist() == [3 + 35, 3, 3 + 5 + 50]  # text and frames
    texts = []
    for beams in (1, 3):
        tokens = model.generate(**full, max_new_tokens=5, do_sample=False, eos_token_id=None, num_beams=beams)
        texts.append(tokens)
        for row, part in zip(tokens, samples(full | {"labels": labels}), strict=True):
            del part["labels"]
            alone = model.generate(**part, max_new_tokens=5, do_sample=False, eos_token_id=None, num_beams=beams)
            assert row[5:].tolist() == alone[0, -5:].tolist()
    part = samples(full | {"labels": labels})[2]
    del part["labels"]
    given = torch.cat([part["input_ids"], texts[0][2:3, -5:]], 1)
    logits = model(**(part | {"input_ids": given, "attention_mask": torch.ones_like(given)})).logits[0]
    assert logits[-6:-1].argmax(-1).tolist() == texts[0][2, -5:].tolist()
    model.save_pretrained(tmp_path / "again")
    again = FastCompressForConditionalGeneration.from_pretrained(tmp_path / "again").eval()
    assert (again.rule, again.proportional_attention, again.positions) == ("uniform:3", True, "time")
    again.rule = "uniform:2"  # its weights were saved with a rule, and keep the settings of their training
    assert (again.proportional_attention, again.positions) == (True, "time")
    again.positions, again.proportional_attention = "compact", False
    assert not torch.equal(again(**full).logits, out.logits)
    with pytest.raises(ValueError, match="positions must be 'compact' or 'time', got 'middle'"):
        again.positions = "middle"
    with pytest.raises(TypeError, match="proportional_attention must be True or False, got 1"):
        again.proportional_attention = 1


def test_return_values_of_generate():
    model = build(rule="uniform:3")
    full = batch()
    del full["labels"]
    out = model.generate(
        **full,
        max_new_tokens=3,
        num_beams=2,
        num_return_sequences=2,
        return_dict_in_generate=True,
        output_scores=True,
        eos_token_id=None,
    )
    assert out.sequences.shape == (6, 8) and len(out.scores) == 3
    assert torch.equal(out.sequences[:, :5], full["input_ids"].repeat_interleave(2, 0))

"""The processor of the reference audio LLM, which turns text and audio into the model's input."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import transformers

from fastcompress.lalm import FastCompressConfig, FastCompressProcessor
from fastcompress.training.recipes import MOST_WORDS, PIECES, build_tokenizer

A = "<|audio|>"
TEMPLATE = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }} {% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"


def processor(kind: str = "whisper", template: str | None = None) -> FastCompressProcessor:
    tokenizer = build_tokenizer(["what is this", "[user] [assistant]"])
    tokenizer.chat_template = template
    if kind == "whisper":
        return FastCompressProcessor(transformers.WhisperFeatureExtractor(feature_size=16), tokenizer)
    return FastCompressProcessor(transformers.Wav2Vec2FeatureExtractor(), tokenizer)


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(round(16000 * seconds)).astype(np.float32)


def test_text_and_audio():
    p = processor()
    inputs = p(
        [f"{A} what", "is", f"this {A} {A}"], audio=[noise(1.0), noise(0.5, 1), noise(2.0, 2)], sampling_rate=16000
    )
    ids = inputs["input_ids"]
    assert (ids == p.audio_token_id).sum(1).tolist() == [1, 0, 2]
    assert inputs["attention_mask"].sum(1).tolist() == [2, 1, 3]
    assert inputs["input_features"].shape == (3, 16, 200)
    assert inputs["feature_attention_mask"].sum(1).tolist() == [100, 50, 200]
    # The features of each audio are those of the audio alone, and those of Whisper's own extractor.
    alone = p(A, audio=noise(0.5, 1))["input_features"][0]
    assert torch.equal(inputs["input_features"][1, :, :50], alone)
    stock = p.feature_extractor(noise(2.0, 2), sampling_rate=16000, return_tensors="pt").input_features[0]
    assert stock.shape[1] == 3000 and torch.allclose(inputs["input_features"][2, :, :199], stock[:, :199], atol=1e-5)
    assert "input_features" not in p("what is this")


def test_audio_is_neither_cut_nor_padded_at_30_seconds():
    assert processor()(A, audio=noise(41.0))["input_features"].shape == (1, 16, 4100)


def test_samples_for_encoders_of_samples():
    inputs = processor("wav2vec2")([A, A], audio=[noise(1.0), torch.from_numpy(noise(0.5))], sampling_rate=16000)
    assert inputs["input_features"].shape == (2, 16000)
    assert inputs["feature_attention_mask"].sum(1).tolist() == [16000, 8000]
    assert abs(float(inputs["input_features"][1, :8000].mean())) < 1e-4


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            (["what", f"{A} is {A}"], [noise(1.0)]),
            "text must have one <|audio|> per audio, got 2 (text 0: 0, text 1: 2) for 1 audios",
        ),
        ((["what"], [noise(1.0)]), "text must have one <|audio|> per audio, got 0 (text 0: 0) for 1 audios"),
        ((A, None), "text must have one <|audio|> per audio, got 1 (text 0: 1) for 0 audios"),
        ((A, noise(1.0), 8000), "sampling_rate must be 16000 Hz, got 8000"),
        ((A, noise(0.01)), "audio must be [S] with at least 400 samples (one frame), got shape [160]"),
        ((A, noise(1.0)[None]), "audio must be [S] with at least 400 samples (one frame), got shape [1, 16000]"),
    ],
)
def test_inputs_that_do_not_fit(arguments: tuple[Any, ...], message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        processor()(*arguments)


def test_conversations(tmp_path: Path):
    p = processor(template=TEMPLATE)
    path = tmp_path / "a.wav"
    soundfile.write(path, noise(0.5), 8000)
    talk = [
        {"role": "user", "content": [{"type": "audio", "audio": str(path)}, {"type": "text", "text": " what is this"}]}
    ]
    assert p.apply_chat_template(talk) == f"[user] {A} what is this "
    assert (
        p.apply_chat_template([talk, talk], add_generation_prompt=True) == [f"[user] {A} what is this [assistant]"] * 2
    )
    inputs = p.apply_chat_template(talk, tokenize=True, add_generation_prompt=True)
    assert inputs["input_features"].shape[2] == 100  # a second, resampled
    text = [{"role": "user", "content": "what"}]
    assert p.apply_chat_template(text, tokenize=True, return_dict=False).tolist() == [
        p.tokenizer("[user] what").input_ids
    ]
    wrong = [{"role": "user", "content": [{"type": "image"}]}]
    with pytest.raises(ValueError, match="the type of a message's content must be 'audio' or 'text', got 'image'"):
        p.apply_chat_template(wrong)


def test_prompts():
    p = processor()
    ids = p.tokenizer.convert_tokens_to_ids
    assert p.prompt_ids("what is", True) == [p.audio_token_id, ids("what"), ids("is"), p.tokenizer.bos_token_id]
    assert p.prompt_ids("", False) == [p.tokenizer.bos_token_id]
    p = processor(template=TEMPLATE)
    assert p.tokenizer.decode(p.prompt_ids("what", True)) == f"[user] {A} what [assistant]"


def test_saved_and_loaded(tmp_path: Path):
    p = processor(template=TEMPLATE)
    p.save_pretrained(tmp_path)
    FastCompressConfig(audio_token_id=p.audio_token_id).save_pretrained(tmp_path)
    for loader in (FastCompressProcessor, transformers.AutoProcessor):
        loaded = loader.from_pretrained(tmp_path)
        assert type(loaded) is FastCompressProcessor and loaded.audio_token_id == p.audio_token_id
        a, b = (x(f"{A} what", audio=noise(1.0)) for x in (p, loaded))
        assert all(torch.equal(a[name], b[name]) for name in a)
        assert loaded.prompt_ids("what", True) == p.prompt_ids("what", True)


def test_tokenizers():
    """Words are tokens if there are few, else pieces of words. In both cases decoding restores every text."""
    few = build_tokenizer(["drei vier", "vier fünf"])
    assert len(few) == 4 + 3 and few.decode(few("fünf drei").input_ids) == "fünf drei"
    assert few("sechs").input_ids == [few.unk_token_id]
    texts = [
        f"{a}und{b}" for a in ("ein", "zwei", "drei", "vier", "fünf") for b in (f"x{i}y" for i in range(MOST_WORDS))
    ]
    many = build_tokenizer(texts)
    assert len(many) == PIECES
    for text in (texts[7], f"{texts[3]} {texts[11]}"):
        assert many.decode(many(text).input_ids) == text


def test_arguments_of_the_template():
    """Arguments of the template are passed to it. An unknown argument raises an error and is not ignored."""
    end = "{% if not loop.last or not continue_final_message %}</s>{% endif %}"
    p = processor(template="{% for m in messages %}{{ m.content }}" + end + "{% endfor %}")
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert p.apply_chat_template(talk) == "a</s>b</s>"
    assert p.apply_chat_template(talk, continue_final_message=True) == "a</s>b"
    other = processor(template="{{ tools | length }}{{ style }}")
    assert other.apply_chat_template(talk, tools=[{"name": "x"}], style="s") == "1s"
    for name in ("no_such_argument", "padding"):
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
            p.apply_chat_template(talk, tokenize=True, **{name: True})
    assert p.apply_chat_template(talk, tokenize=True, return_tensors="pt")["input_ids"].dim() == 2
    with pytest.raises(ValueError, match="return_tensors must be 'pt', got 'np'"):
        p.apply_chat_template(talk, tokenize=True, return_tensors="np")

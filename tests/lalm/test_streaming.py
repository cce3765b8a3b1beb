"""Streaming transcription never revises text, and gives the offline text if all audio is final at the same time."""

from __future__ import annotations

import io
import os
import random
import re
import signal
import struct
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from fastcompress.audio import load_audio
from fastcompress.cli import transcribe as cli_transcribe
from fastcompress.cli.main import main
from fastcompress.lalm import (
    FastCompressConfig,
    FastCompressForConditionalGeneration,
    FastCompressProcessor,
    add_lora,
)
from fastcompress.lalm.loading import load_model
from fastcompress.lalm.streaming import HOP, LOOK_AHEAD, StreamingTranscriber, average_lagging, quietest
from fastcompress.training.evaluation import transcribe
from fastcompress.training.examples import Examples
from fastcompress.training.manifest import Utterance, read_manifest
from fastcompress.training.recipes import build_tokenizer
from tests.support import ROOT

ASSETS = ROOT / "assets"
DIGITS = [ASSETS / "digits" / f"{i}.wav" for i in range(10)]
RATE = 16_000


@pytest.fixture(scope="module", params=["digits", "digits-uniform-4"])
def loaded(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    return load_model(ASSETS / "models" / request.param)


@pytest.fixture(scope="module")
def digits() -> tuple[Any, Any]:
    return load_model(ASSETS / "models" / "digits")


def whole(model: Any, processor: Any, samples: np.ndarray) -> str:
    utterance = Utterance(None, "", "", len(samples) / RATE, samples=(samples, RATE))
    return transcribe(model, Examples([utterance], processor), max_new_tokens=256, do_sample=False)[0][0]


def stream(model: Any, processor: Any, chunks: list[np.ndarray], **settings: Any) -> StreamingTranscriber:
    """Return a transcriber that has read all chunks, after checking that its pieces join to its text."""
    transcriber, text = StreamingTranscriber(model, processor, **settings), ""
    for piece in (*(lambda c=c: transcriber.feed(c) for c in chunks), transcriber.finish):
        text += piece()
        assert transcriber.text == text
    return transcriber


def chunked(samples: np.ndarray, seed: int) -> list[np.ndarray]:
    g, found, t = random.Random(seed), [], 0
    while t < len(samples):
        size = g.choice([0, 1, 7, 160, 399, 4000, 9001])
        found.append(samples[t : t + size])
        t += size
    return found


@pytest.mark.parametrize(
    "files",
    [
        pytest.param((*DIGITS[:2], ASSETS / "speech" / "numbers.wav"), id="some"),
        pytest.param((*DIGITS, *sorted((ASSETS / "speech").glob("*.wav"))), id="all", marks=pytest.mark.slow),
    ],
)
def test_final_at_once_is_the_whole(loaded: tuple[Any, Any], files: tuple[Path, ...]):
    for path in files:
        samples = load_audio(path)
        transcriber = StreamingTranscriber(*loaded, look_ahead=8)
        assert transcriber.feed(samples) == ""  # no frame was final
        assert transcriber.finish() == whole(*loaded, samples) != ""
        assert transcriber.latency().first == transcriber.latency().seconds == len(samples) / RATE


@pytest.mark.parametrize("rule", ["none", "threshold:0.1", "local-max:min_len=2", "lookback:2,threshold=0.1"])
def test_final_at_once_is_the_whole_with_every_rule_that_streams(rule: str):
    loaded = load_model(ASSETS / "models" / "digits", rule)
    samples = load_audio(DIGITS[1])
    assert stream(*loaded, [samples], look_ahead=8).text == whole(*loaded, samples) != ""


def test_words_are_final_before_the_audio_ends_and_are_right(loaded: tuple[Any, Any]):
    utterances = read_manifest(ASSETS / "digits" / "test.jsonl")
    right = early = 0
    for utterance in utterances:
        found = stream(*loaded, [load_audio(utterance.audio_filepath)])
        right += found.text == utterance.target
        latency = found.latency()
        early += latency.first < latency.seconds
        assert 0 < latency.lagging <= latency.seconds
    assert right >= 8 and early >= 5


@pytest.mark.parametrize(
    "rule, settings",
    [
        ("uniform:4", {}),
        ("local-max", {"look_ahead": 0.0, "hop": 0.2}),
        ("uniform:4", {"window": 1.0, "look_ahead": 0.1, "hop": 0.3}),
        ("threshold:0.1", {"window": 1.5, "look_ahead": 9}),
    ],
)
def test_any_chunks_give_the_same(rule: str, settings: dict[str, float]):
    loaded = load_model(ASSETS / "models" / "digits", rule)
    samples = np.concatenate([load_audio(DIGITS[0]), load_audio(DIGITS[8])])
    wanted = stream(*loaded, [samples], **settings)
    assert wanted.text
    for chunks in (chunked(samples, 0), chunked(samples, 1), np.split(samples, range(160, len(samples), 160))):
        found = stream(*loaded, chunks, **settings)
        assert found.text == wanted.text and found.latency() == wanted.latency() and found._final == wanted._final
        assert torch.equal(tokens_of(found), tokens_of(wanted))


def tokens_of(found: StreamingTranscriber) -> torch.Tensor:
    return torch.cat([part.values for part in found._tokens])


def test_frames_are_final_after_the_look_ahead(digits: tuple[Any, Any]):
    """A final frame keeps its value of the first encoding in which it was final. Tokens pool these values."""
    model, processor = digits
    samples = load_audio(DIGITS[1])
    found = stream(model, processor, [samples], look_ahead=0.4, hop=0.5)
    wanted, stops = [], [*range(RATE // 2, len(samples), RATE // 2), len(samples)]
    for stop in stops:
        inputs = processor.pad_features([processor.features(samples[:stop], RATE)])
        with torch.no_grad():
            frames, lengths = model.encode(*inputs.values())
        frames = frames[0, : lengths[0]]
        final = len(frames) if stop == len(samples) else len(frames) * (stop - 6400) // stop
        wanted += frames[len(wanted) : final]
    assert torch.equal(tokens_of(found), torch.stack(wanted))


def test_what_two_hypotheses_agree_on_is_final(digits: tuple[Any, Any]):
    words = digits[1].tokenizer
    hypotheses = ["one two", "one three", "one three four", "one three four", "one three four five"]
    script = iter([words(text).input_ids for text in hypotheses])
    transcriber = StreamingTranscriber(*digits, look_ahead=0.0, hop=0.5)
    transcriber._decode = lambda: next(script)
    pieces = [transcriber.feed(np.zeros(RATE // 2, np.float32)) for _ in range(4)]
    assert pieces == ["", "one", " three", " four"]
    assert transcriber._delays == [RATE, 3 * RATE // 2, 2 * RATE]
    assert transcriber.finish() == " five"
    assert transcriber.latency().first == 1.0
    # Words at 0, 0.5, 1 and 1.5 s are written after 1, 1.5 and 2 s; then the audio ends.
    assert transcriber.latency().lagging == pytest.approx((1 + 1 + 1) / 3)


def test_lagging_is_computed_per_utterance(digits: tuple[Any, Any]):
    words = digits[1].tokenizer
    script = iter(["one", "one two", "one two three", "one two three", "four", "four five", "four five"])
    transcriber = StreamingTranscriber(*digits, look_ahead=0.0, hop=0.5, window=2)
    transcriber._decode = lambda: words(next(script)).input_ids
    transcriber.feed(np.zeros(round(2.75 * RATE), np.float32))  # cut at 1.55 s, which is known at 2 s
    transcriber.finish()
    assert transcriber.text == "one two three four five"
    first = (1 + (1.5 - 1.55 / 3) + (2 - 2 * 1.55 / 3)) / 3
    second = (1 + (1.2 - 1.2 / 2)) / 2
    assert transcriber.latency().lagging == pytest.approx((first + second) / 2)


def test_a_generated_audio_token_is_not_part_of_the_prompt(digits: tuple[Any, Any]):
    """A decoder can generate the audio token if it is in its vocabulary."""
    transcriber = StreamingTranscriber(*digits, look_ahead=0.0, hop=0.5)
    decode, written = transcriber._decode, digits[1].tokenizer("one <|audio|> two").input_ids
    assert digits[0].config.audio_token_id in written
    transcriber._decode = lambda: decode() and written
    assert [transcriber.feed(np.zeros(RATE // 2, np.float32)) for _ in range(3)] == ["", "one", ""]
    assert transcriber.finish() == " two"


def test_the_same_tokens_twice_agree_on_nothing(digits: tuple[Any, Any]):
    """While a long segment is open there are no new tokens, and decoding the same tokens again confirms no text."""
    loaded = load_model(ASSETS / "models" / "digits", "uniform:60")
    transcriber = StreamingTranscriber(*loaded, look_ahead=0.0, hop=0.5)
    decoded = []
    decode = transcriber._decode
    transcriber._decode = lambda: decoded.append(transcriber._heard) or decode()
    transcriber.feed(load_audio(DIGITS[1])[: 5 * RATE // 2])
    assert decoded == [3 * RATE // 2, 5 * RATE // 2]  # 60 frames are 1.2 s


def test_text_is_never_revised(digits: tuple[Any, Any]):
    """A token can be a part of a character, or lose a space if others follow it. Printed text does not change."""
    texts = {1: "caf\ufffd", 2: "café it '", 3: "café it's", 4: "café it's so"}
    transcriber = StreamingTranscriber(*digits)
    transcriber.processor = SimpleNamespace(tokenizer=SimpleNamespace(decode=lambda ids, **_: texts[ids[0]]))
    seen = []
    for number in texts:
        transcriber._final, transcriber._heard = [number], number
        transcriber._write(over=number == 4)
        seen.append(transcriber.text)
    assert seen == ["caf", "café it '", "café it '", "café it ''s so"]
    assert transcriber._delays == [2, 2, 4, 4]  # the time of a word is that of its last letter


def test_a_long_stream_is_cut_where_it_is_quiet(loaded: tuple[Any, Any]):
    first, second, quiet = load_audio(DIGITS[0]), load_audio(DIGITS[3]), np.zeros(3000, np.float32)
    samples = np.concatenate([first, quiet, second, quiet, first])
    found = stream(*loaded, [samples], window=2, look_ahead=9)
    # Sound and silence alternate: 1.604 s, 0.188 s, 1.24 s, 0.188 s, 1.604 s. Each cut is in the middle of the first
    # 0.1 s of a silence that is in the last half second of a window of 2 s.
    cut = len(first) + 800
    begin = cut + 28_000 - 4_000  # the last half second of the second window
    middle = cut + 24_000 + quietest(samples[cut + 24_000 : cut + 32_000], 1600)
    assert begin < middle + 4_000 and len(samples) - middle <= 32_000
    parts = [samples[:cut], samples[cut:middle], samples[middle:]]
    assert found.text == " ".join(whole(*loaded, part) for part in parts)
    # A full window is not cut before more audio arrives.
    exact = np.concatenate([first, np.zeros(32_000 - len(first), np.float32)])
    assert stream(*loaded, [exact], window=2, look_ahead=9).text == whole(*loaded, exact)


def test_no_text_of_audio_that_may_be_after_the_cut(digits: tuple[Any, Any]):
    samples = np.concatenate([load_audio(path) for path in DIGITS[:3]])
    transcriber, places = StreamingTranscriber(*digits, window=2, hop=0.1), []
    for chunk in np.split(samples, range(160, len(samples), 160)):
        if transcriber.feed(chunk):
            places.append(transcriber._filled)
    assert places and max(places) < 24_000 + 160


def test_quietest():
    g = np.random.default_rng(0)
    for count, width in ((1, 1), (5, 9), (50, 7), (50, 50)):
        samples = g.standard_normal(count).astype(np.float32)
        energies = [np.square(samples[i : i + width], dtype=np.float64).sum() for i in range(max(1, count - width + 1))]
        assert quietest(samples, width) == int(np.argmin(energies)) + min(width, count) // 2
    assert quietest(np.zeros(20, np.float32), 4) == 2


def test_average_lagging():
    assert average_lagging([10, 20, 30], 30) == 10
    assert average_lagging([30, 30, 30], 30) == 30  # as offline
    assert average_lagging([5, 30, 40], 30) == (5 + 30 - 10) / 2
    assert average_lagging([7], 30) == 7


def test_audio_that_is_too_short(digits: tuple[Any, Any]):
    for count in (0, 1, 399):
        transcriber = StreamingTranscriber(*digits)
        assert transcriber.feed(np.zeros(count, np.float32)) == ""
        with pytest.raises(ValueError, match=f"at least 400 samples \\(one frame\\), got shape \\[{count}\\]"):
            transcriber.finish()
    samples = 0.1 * np.random.default_rng(0).standard_normal(400).astype(np.float32)
    assert stream(*digits, [samples]).text == whole(*digits, samples)
    assert stream(*digits, [samples, samples[:0]], look_ahead=0.0).latency().seconds == 0.025
    for bad in (np.zeros((1, 400)), np.array([0.0, np.nan]), np.array([np.inf])):
        with pytest.raises(ValueError, match="samples must be"):
            StreamingTranscriber(*digits).feed(bad)
    transcriber = stream(*digits, [samples])
    assert transcriber.finish() == ""
    with pytest.raises(ValueError, match="has ended"):
        transcriber.feed(samples)


def test_samples_of_other_types(digits: tuple[Any, Any]):
    stream = StreamingTranscriber(*digits)
    with pytest.raises(TypeError, match="samples must be floating point with full scale at 1, got int16"):
        stream.feed(np.zeros(100, np.int16))
    with pytest.raises(TypeError, match="samples must be floating point with full scale at 1, got list"):
        stream.feed([0.0])
    with pytest.raises(ValueError, match=r"samples must be \[S\] and finite, got shape \[1, 100\]"):
        stream.feed(torch.zeros(1, 100))
    for dtype in (torch.bfloat16, torch.float64):
        assert stream.feed(torch.zeros(100, dtype=dtype)) == ""


def test_invalid_settings(digits: tuple[Any, Any]):
    for settings, message in (
        ({"window": 9}, "window must be at most 8 s, the encoder's window, got 9"),
        ({"window": 0.9}, "window must be at least 1 s (two hops), got 0.9"),
        ({"window": float("nan")}, "window must be finite and at least 0 seconds, got nan"),
        ({"hop": 0.02}, "hop must be at least 0.025 s (one frame), got 0.02"),
        ({"hop": float("inf")}, "hop must be finite and at least 0 seconds, got inf"),
        ({"look_ahead": -0.1}, "look_ahead must be finite and at least 0 seconds, got -0.1"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            StreamingTranscriber(*digits, **settings)


def test_compressions_that_need_the_whole_sequence():
    model, processor = load_model(ASSETS / "models" / "digits")
    for rule in ("top-k:rate=2", "label-change", "local-max:prominence=0.1", "peak-height:0.04"):
        model.rule = rule
        with pytest.raises(NotImplementedError, match="cannot be streamed"):
            StreamingTranscriber(model, processor)
    model.rule = "local-max"
    for name, value in (("keys", "ctc"), ("reduce", "first")):
        usual = getattr(model.config, name)
        setattr(model.config, name, value)
        with pytest.raises(NotImplementedError, match=f"{name} must be '{usual}' to stream .*, got '{value}'"):
            StreamingTranscriber(model, processor)
        setattr(model.config, name, usual)
    StreamingTranscriber(model, processor)
    model.learn_boundaries(3.0)
    with pytest.raises(NotImplementedError, match="compressor LearnedBoundary cannot be streamed"):
        StreamingTranscriber(model, processor)


def test_an_encoder_of_samples_and_lora():
    """An encoder of samples has no window of its own; the decoder has LoRA."""
    pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    tokenizer = build_tokenizer(["one two three four"])
    processor = FastCompressProcessor(transformers.Wav2Vec2FeatureExtractor(), tokenizer)
    audio = transformers.Wav2Vec2Config(
        hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, conv_dim=(16, 16, 16),
        conv_stride=(8, 8, 5), conv_kernel=(10, 8, 5), num_feat_extract_layers=3, num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=2, feat_extract_norm="layer", do_stable_layer_norm=True,
    )  # fmt: skip
    text = transformers.Qwen2Config(
        vocab_size=8,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=64,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    config = FastCompressConfig(audio, text, "threshold:0.001", audio_token_id=processor.audio_token_id)
    model = add_lora(FastCompressForConditionalGeneration(config), rank=2)
    for name, weights in model.named_parameters():
        if weights.dim() > 1 and "lora" in name or "language_model" in name:
            torch.nn.init.normal_(weights, std=0.5)
    samples = np.random.default_rng(0).standard_normal(3 * RATE).astype(np.float32)
    wanted = transcribe(
        model,
        Examples([Utterance(None, "", "", 3.0, samples=(samples, RATE))], processor),
        max_new_tokens=6,
        do_sample=False,
    )[0][0]
    assert stream(model, processor, chunked(samples, 0), look_ahead=3, max_new_tokens=6).text == wanted != ""
    assert StreamingTranscriber(model, processor)._window == 30 * RATE
    long = np.tile(samples, 3)
    found = [stream(model, processor, c, window=4, max_new_tokens=6) for c in ([long], chunked(long, 1))]
    assert found[0].text == found[1].text and len(found[0].text.split()) > len(wanted.split())


def test_the_maximum_number_of_tokens_per_utterance(digits: tuple[Any, Any]):
    samples = load_audio(DIGITS[1])
    for more in ({}, {"look_ahead": 9}):
        with pytest.warns(UserWarning, match="1 of 1 utterances were cut at max_new_tokens=3") as caught:
            assert stream(*digits, [samples], max_new_tokens=3, **more).text == "five four five"
        assert len([w for w in caught if "were cut" in str(w.message)]) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert len(stream(*digits, [samples]).text.split()) == 6


def command(*arguments: str) -> list[str]:
    return ["transcribe", *map(str, arguments), "--model", str(ASSETS / "models" / "digits")]


def test_the_help_shows_the_defaults():
    assert f"(default: {LOOK_AHEAD:g})" in cli_transcribe._STREAM["look_ahead"]
    assert f"(default: {HOP:g})" in cli_transcribe._STREAM["hop"]


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    samples, _ = soundfile.read(DIGITS[2])
    soundfile.write(tmp_path / "a.wav", np.stack([samples, samples], 1), 44_100)  # faster, and resampled
    files = [DIGITS[1], tmp_path / "a.wav"]
    assert main(command(*files)) == 0
    wanted = capsys.readouterr().out
    assert main(command(*files, "--stream", "--look-ahead", "8")) == 0
    captured = capsys.readouterr()
    assert captured.out == wanted
    assert captured.err.splitlines()[0].startswith(f"{files[0]}: 2.97 s, computed in ")
    assert main(command(DIGITS[1], "--stream", "--hop", "0.4", "--window", "4", "--rule", "uniform:2")) == 0
    captured = capsys.readouterr()
    assert captured.out.count("\n") == 1 and "first text after 1.20 s, words " in captured.err


def test_standard_input(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """The writer of the pipe pauses halfway; text that is final by then has been printed."""
    reader, writer = os.pipe()
    content = DIGITS[1].read_bytes()
    more = threading.Event()
    seen = []

    def write() -> None:
        with open(writer, "wb", buffering=0) as pipe:
            pipe.write(content[:80_000])
            more.wait(20)
            pipe.write(content[80_000:])

    class Output(io.StringIO):
        def write(self, text: str) -> int:
            seen.append((text, more.is_set()))
            more.set()
            return len(text)

    thread = threading.Thread(target=write)
    thread.start()
    with open(reader, "rb") as pipe, monkeypatch.context() as patch:
        patch.setattr("sys.stdin", SimpleNamespace(buffer=pipe))
        patch.setattr("sys.stdout", Output())
        assert main(command("-", "--stream")) == 0
    thread.join()
    assert "".join(text for text, _ in seen) == "five four five seven four six\n"
    assert seen[0] == ("five", False)
    assert capsys.readouterr().err.startswith("-: 2.97 s, computed in ")


def test_standard_input_of_ffmpeg(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """The header has no length and is followed by a chunk of metadata. This chunk and trailing bytes are not audio."""
    content = DIGITS[1].read_bytes()
    place = content.index(b"data")
    tag = b"LIST" + struct.pack("<I", 26) + b"INFOISFT" + struct.pack("<I", 14) + b"Lavf60.16.100\0"
    loud = b"LIST" + struct.pack("<I", 16_000) + bytes(range(1, 251)) * 64
    streams = [content[:4] + struct.pack("<I", len(content) + len(loud) - 8) + content[8:] + loud]
    for size in (b"\0\0\0\0", b"\xff\xff\xff\xff"):
        streams.append(content[:4] + size + content[8:place] + tag + b"data" + size + content[place + 8 :])
    for piped in streams:
        monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(piped)))
        assert main(command("-", "--stream")) == 0
        captured = capsys.readouterr()
        assert captured.out == "five four five seven four six\n" and captured.err.startswith("-: 2.97 s, computed in ")


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Restore Python's handler of interrupts, because a shell ignores interrupts in background processes."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_the_first_interrupt_ends_the_input_alone(interruptible: None):
    usual = signal.getsignal(signal.SIGINT)
    with cli_transcribe._interrupt_ends_input():
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    with cli_transcribe._interrupt_ends_input():
        pass
    assert signal.getsignal(signal.SIGINT) is usual


def test_errors_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def fails(*arguments: str, code: int = 2) -> str:
        assert main(command(*arguments)) == code
        captured = capsys.readouterr()
        assert captured.err.count("fastcompress: error: ") == 1 and "Traceback" not in captured.err
        return captured.err

    audio = str(DIGITS[0])
    assert "- (standard input) needs --stream" in fails("-")
    assert "--look-ahead needs --stream" in fails(audio, "--look-ahead", "1")
    assert "can be read once" in fails("-", "-", "--stream")
    assert "--stream: rule top-k:rate=2 needs the whole sequence" in fails(audio, "--stream", "--rule", "top-k:rate=2")
    assert "--stream: window must be at most" in fails(audio, "--stream", "--window", "60")
    soundfile.write(tmp_path / "short.wav", np.zeros(100), RATE)
    soundfile.write(tmp_path / "none.wav", np.zeros(0), RATE)
    assert "short.wav: audio must be [S] with at least 400" in fails(tmp_path / "short.wav", "--stream")
    assert "none.wav: contains no audio" in fails(tmp_path / "none.wav", audio, "--stream", code=1)
    for content in (b"", b"no wave " * 9):
        stdin = io.BytesIO(content)
        stdin.name = "<stdin>"
        monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=stdin))
        assert "<stdin>: not an audio file that can be read" in fails("-", "--stream")

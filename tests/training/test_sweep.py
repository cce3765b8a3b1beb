"""Sweeps: one model of each kind, its rows, resumption, comparisons and the bootstrap."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch

from fastcompress.decoder.saved_rule import stored
from fastcompress.integrations.transformers import apply_to, revert
from fastcompress.lalm.loading import load_model
from fastcompress.training.evaluation import transcribe
from fastcompress.training.examples import Examples
from fastcompress.training.finetuning import Conversations
from fastcompress.training.manifest import ManifestError, Utterance, read_manifest
from fastcompress.training.settings import SettingsError
from fastcompress.training.sweep.audio_llms import AudioLLM, merged_rows, rows_in_place_of_encoder
from fastcompress.training.sweep.bootstrap import Bootstrap, Interval
from fastcompress.training.sweep.loading import load
from fastcompress.training.sweep.measure import Sweep
from fastcompress.training.sweep.models import Answer, Decoding, SweepModel, Variant
from fastcompress.training.sweep.reference import Reference
from fastcompress.training.sweep.scores import Comparer, Score, Scorer
from fastcompress.training.sweep.whisper import Whisper
from fastcompress.training.usable import load_utterance
from tests.support import ROOT, audio_llms, tiny_whisper
from tests.support.lalm_data import write_tones

pytestmark = [
    pytest.mark.xdist_group("training"),
]

DIGITS = str(ROOT / "assets" / "models" / "digits")
KINDS = ("whisper", "qwen2_audio", "audioflamingo3", "fastcompress")
DECODING = Decoding(max_new_tokens=5, prompt="write")


@pytest.fixture(scope="module")
def tones(tmp_path_factory: pytest.TempPathFactory) -> list[Utterance]:
    found = read_manifest(write_tones(tmp_path_factory.mktemp("tones"), 5))
    return [dataclasses.replace(u, more={"speaker": "ab"[i % 2]}) for i, u in enumerate(found)]


def make(kind: str) -> SweepModel:
    if kind == "whisper":
        return Whisper(tiny_whisper.make(), tiny_whisper.processor(), DECODING)
    if kind == "fastcompress":
        return Reference(*load_model(DIGITS), DECODING)
    return AudioLLM(audio_llms.make(kind), audio_llms.processor(kind), DECODING)


@torch.inference_mode()
def stock_texts(kind: str, model: Any, processor: Any, utterances: Sequence[Utterance]) -> list[str | None]:
    """Return the texts of the stock model, each utterance alone."""
    if kind == "fastcompress":
        model.rule = None
        plain = [dataclasses.replace(u, prompt="write") for u in utterances]
        return transcribe(model, Examples(plain, processor), 1, max_new_tokens=5, do_sample=False)[0]
    found: list[str | None] = []
    for utterance in utterances:
        if kind == "whisper":
            samples = load_utterance(utterance, 16000)
            features = processor.feature_extractor(samples, sampling_rate=16000, return_tensors="pt").input_features
            ids = model.generate(features, max_new_tokens=5, do_sample=False)[0]
        else:
            inputs = Conversations(processor, "write").prompts([utterance])
            ids = model.generate(**inputs, max_new_tokens=5, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        found.append(processor.tokenizer.decode(ids, skip_special_tokens=True).strip())
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_each_kind_of_model(kind: str, tones: list[Utterance], tmp_path: Path):
    model = make(kind)
    processor = model.conversations.processor if isinstance(model, AudioLLM) else model.processor  # type: ignore[attr-defined]
    sweep = Sweep(model, tones, tmp_path, batch_size=3)
    assert not model.why_not_cached and sweep.encoding_seconds > 0
    rows = sweep.run(sweep.variants(["uniform:2", "min-variance:rate=4,max_len=8"]))
    assert [row.variant.rule for row in rows] == ["none", "uniform:2", "min-variance:rate=4,max_len=8"]
    assert [answer.text for answer in rows[0].answers] == stock_texts(kind, model.model, processor, tones)
    assert len({answer.text for answer in rows[0].answers}) > 1
    for row, rate in zip(rows, (1, 2, 4), strict=True):
        for answer, every in zip(row.answers, rows[0].answers, strict=True):
            assert answer.frames == every.frames and answer.tokens == math.ceil(answer.frames / rate)
            assert answer.keys == every.keys - every.tokens + answer.tokens
            assert answer.new_tokens == 5 or not answer.clipped
        assert row.prefill_ms > 0 and row.decoding_ms > 0 and row.cpu_seconds > 0
    scores = Scorer(sweep.utterances).scores(rows)
    assert scores[1].frames_per_token == pytest.approx(2, rel=0.05)
    assert scores[0].tokens_per_second == pytest.approx(scores[1].tokens_per_second * scores[1].frames_per_token)


def test_silence_of_whisper(tones: list[Utterance], tmp_path: Path):
    sweep = Sweep(make("whisper"), tones, tmp_path)
    frames = [answer.audio_frames for answer in sweep.row(Variant("none")).answers]
    # A window of the features reaches 12.5 ms further than the audio.
    assert all(0 <= n - 50 * (u.duration or 0) < 2 for n, u in zip(frames, sweep.utterances, strict=True))
    wanted = {
        "keep": [(50 - n + math.ceil(n / 4), math.ceil(n / 4), n) for n in frames],
        "pool": [(13, 13, 50)] * len(frames),
        # The window, 50 frames here, counts as 30 s.
        3.0: [(math.ceil((n + 5) / 4), math.ceil((n + 5) / 4), n + 5) for n in frames],
    }
    for silence, expected in wanted.items():
        answers = sweep.row(Variant("uniform:4", silence=silence)).answers
        assert [(a.keys, a.tokens, a.frames) for a in answers] == expected
        assert [a.audio_tokens for a in answers] == [math.ceil(n / 4) for n in frames]


def test_audio_that_fills_the_window(tmp_path: Path):
    noise = np.random.default_rng(0).standard_normal(16000).astype(np.float32)
    utterances = [
        Utterance(None, "low", "low", samples=(noise, 16000)),
        Utterance(None, "low", "low", samples=(0 * noise, 16000)),
    ]
    sweep = Sweep(make("whisper"), utterances, tmp_path)
    answers = sweep.row(Variant("uniform:4", silence="keep")).answers
    assert [(a.audio_frames, a.keys) for a in answers] == [(50, 13), (0, 50)]


def test_a_run_keeps_its_compression(tones: list[Utterance]):
    model = make("fastcompress")
    base = model.model
    for change in (lambda: setattr(base, "rule", "uniform:3"), lambda: base.learn_boundaries(3.0)):
        change()
        before = base.rule, base.compressor, base.config.boundary_ratio, base.config.rule, base.config.reduce
        with model.compressed(Variant("uniform:2", reduce="first")):
            assert base.compression == "uniform:2" and base.config.reduce == "first"
        after = base.rule, base.compressor, base.config.boundary_ratio, base.config.rule, base.config.reduce
        assert after == before


def test_a_row_does_not_depend_on_the_batch(tones: list[Utterance], tmp_path: Path):
    texts = []
    for size in (1, 5):
        rows = Sweep(make("whisper"), tones, tmp_path, batch_size=size).run([Variant("min-variance")])
        texts.append([answer.text for answer in rows[0].answers])
    assert texts[0] == texts[1]


@pytest.mark.parametrize("kind", ["whisper", "qwen2_audio", "fastcompress"])
def test_an_interrupted_sweep_continues_after_its_last_row(
    kind: str, tones: list[Utterance], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    first = Sweep(make(kind), tones, tmp_path)
    variants = first.variants(["uniform:2", "uniform:3"])
    done = first.run(variants[:2])
    answer = type(first.model).answer
    with monkeypatch.context() as patched:
        patched.setattr(type(first.model), "answer", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            first.run(variants)
    calls: list[Any] = []

    def counted(self: Any, utterances: Any, states: Any) -> Any:
        calls.append(self.model)
        return answer(self, utterances, states)

    monkeypatch.setattr(type(first.model), "answer", counted)
    monkeypatch.setattr(type(first.model), "encode", lambda *_: pytest.fail("states are on disk"))
    again = Sweep(make(kind), tones, tmp_path)
    assert again.run(variants)[:2] == done and len(calls) == 1
    assert again.encoding_seconds == pytest.approx(first.encoding_seconds)
    again.run(variants)
    assert len(calls) == 1
    again.model.decoding = dataclasses.replace(DECODING, max_new_tokens=4)  # other settings
    again.run(variants[:1])
    assert len(calls) == 2
    again.path(variants[0]).write_text("{")  # damaged
    again.run(variants[:1])
    assert len(calls) == 3


def test_states_of_another_model_or_audio_are_not_used(tones: list[Utterance], tmp_path: Path):
    Sweep(make("whisper"), tones, tmp_path)
    other = Whisper(tiny_whisper.make(seed=1), tiny_whisper.processor(), DECODING)
    encoded: list[int] = []
    encode = other.encode
    other.encode = lambda samples: (encoded.append(len(samples)), encode(samples))[1]  # type: ignore[method-assign]
    Sweep(other, tones, tmp_path)
    assert len(encoded) == len(tones)
    Sweep(other, [dataclasses.replace(tones[0], offset=0.1, duration=0.1), *tones[1:]], tmp_path)
    assert encoded[len(tones) :] == [1600]


@pytest.mark.parametrize("name", audio_llms.FAMILIES)
def test_rows_take_the_place_of_the_encoder(name: str, monkeypatch: pytest.MonkeyPatch):
    model = audio_llms.make(name)
    inputs = audio_llms.batch(name, model, (20, 9, 14))
    rows = merged_rows(model, inputs)
    other = torch.randn_like(rows)
    with rows_in_place_of_encoder(model, lambda: other):
        for part in ("audio_tower", "encoder", "acoustic_tokenizer_encoder"):
            for module in getattr(model.model, part, torch.nn.Identity()).children():
                monkeypatch.setattr(module, "forward", lambda *_, **__: pytest.fail("the encoder runs"))
        assert torch.equal(merged_rows(model, inputs), other)
    monkeypatch.undo()
    assert torch.equal(merged_rows(model, inputs), rows)


def test_a_model_that_takes_no_rows_is_computed_for_each_rule(
    tones: list[Utterance], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    cached = Sweep(make("qwen2_audio"), tones, tmp_path / "cached").row(Variant("uniform:2"))
    monkeypatch.setattr("fastcompress.training.sweep.audio_llms.rows_in_place_of_encoder", lambda *_: 1 / 0)
    monkeypatch.setattr(AudioLLM, "_takes_rows", lambda *_: False)
    sweep = Sweep(make("qwen2_audio"), tones, tmp_path / "again")
    assert "does not take rows of audio" in sweep.model.why_not_cached and not list(
        (tmp_path / "again").glob("states/*/*")
    )
    assert [a.text for a in sweep.row(Variant("uniform:2")).answers] == [a.text for a in cached.answers]


def test_ablations(tones: list[Utterance], tmp_path: Path):
    sweep = Sweep(make("whisper"), tones, tmp_path)
    off = {"proportional_attention": False}
    found = sweep.variants(["uniform:4", "none"], ablate=True, silence="pool")
    assert found == [Variant("none", silence="pool"), *(Variant("uniform:4", silence="pool", **c) for c in ({}, off))]
    sweep.model.switches = {"proportional_attention": False, "positions": "compact"}
    changes = ({}, off, {"positions": "compact"}, off | {"positions": "compact"})
    assert sweep.variants(["uniform:4"], ablate=True)[1:] == [Variant("uniform:4", **c) for c in changes]
    assert [v.label for v in sweep.variants(["uniform:4"], ablate=True)][2:4] == [
        "uniform:4, proportional attention off",
        "uniform:4, positions compact",
    ]


def test_parts_of_whisper():
    model = make("whisper")
    for passed, wanted in ((None, True), (True, True), (False, False)):
        with model.compressed(Variant("uniform:4", proportional_attention=passed, silence="pool")):
            found = model.model.fastcompress_settings
            assert (found.proportional_attention, found.silence) == (wanted, "pool")
    assert not hasattr(model.model, "fastcompress_settings") and "forward" not in vars(model.model.model.encoder)


def test_parts_of_audio_llms():
    model = make("qwen2_audio")
    variants = [Variant("uniform:8"), *model.ablations("uniform:8")]
    found = []
    for variant in variants:
        with model.compressed(variant):
            settings = model.model.fastcompress_settings
            found.append((settings.proportional_attention, settings.positions))
    assert found == [(True, "time"), (False, "time"), (True, "compact"), (False, "compact")]


@pytest.mark.filterwarnings("error")
def test_the_rule_that_was_saved_with_a_model_stays_and_has_its_parts():
    model = make("qwen2_audio")
    apply_to(model.model, "uniform:3", proportional_attention=False, positions="compact")
    saved = model.model.config.fastcompress
    revert(model.model)
    model.model.config.fastcompress = saved
    found = []
    for rule in ("none", "uniform:3", "uniform:8"):
        with model.compressed(Variant(rule)):
            settings = model.model.fastcompress_settings
            found.append((settings.proportional_attention, settings.positions))
        assert model.model.config.fastcompress == saved
    assert found[1:] == [(False, "compact"), (False, "compact")]  # as the weights were trained


def test_parts_of_a_run():
    model = make("fastcompress")
    base = model.model
    found = []
    for variant in (Variant("none"), Variant("uniform:8"), *model.ablations("uniform:8")):
        with model.compressed(variant):
            found.append((base.proportional_attention, base.positions))
    assert found == [(False, "compact"), (True, "time"), (False, "time"), (True, "compact"), (False, "compact")]
    assert (base.proportional_attention, base.positions, base.rule) == (False, "compact", None)
    base.trained_on_frames = False
    assert Reference(base, model.processor, DECODING).ablations("uniform:8") == []  # type: ignore[attr-defined]


def test_unusable_audio_is_skipped_and_counted(tones: list[Utterance], tmp_path: Path):
    (tmp_path / "bad.wav").write_bytes(b"RIFF")
    bad = [
        Utterance(tmp_path / "bad.wav", "low", "low"),
        Utterance(None, "low", "low"),
        dataclasses.replace(tones[0], offset=0.0, duration=0.01),
    ]
    sweep = Sweep(make("whisper"), [*bad, *tones], tmp_path / "out")
    assert [u.text for u in sweep.utterances] == [u.text for u in tones] and len(sweep.skipped) == 3
    with pytest.raises(ManifestError, match="no utterance has usable audio"):
        Sweep(make("whisper"), bad, tmp_path / "out")


def test_audio_longer_than_the_window_is_skipped(tones: list[Utterance], tmp_path: Path):
    model = make("whisper")
    model.model.config.max_source_positions = 10
    with pytest.raises(ManifestError, match=r"more than Whisper's window of 0\.2 s; cut it by offset and duration"):
        Sweep(model, tones, tmp_path)


@pytest.mark.parametrize(
    ("kind", "variant", "message"),
    [
        ("whisper", Variant("uniform:2", positions="time"), "whisper has no positions"),
        ("whisper", Variant("uniform:2", silence=-1.0), "silence must be"),
        ("qwen2_audio", Variant("uniform:2", silence="keep"), "silence"),
        ("fastcompress", Variant("uniform:2", silence="keep"), "`silence` is supported for whisper only"),
        ("whisper", Variant("label-change"), "label-change"),
    ],
)
def test_variants_that_a_model_lacks(kind: str, variant: Variant, message: str, tones: list[Utterance], tmp_path: Path):
    sweep = Sweep(make(kind), tones[:1], tmp_path)
    with pytest.raises(SettingsError, match=message):
        sweep.check([Variant("none"), variant])


def test_languages_of_whisper(tones: list[Utterance]):
    for decoding in (Decoding(5, language="de"), Decoding(5, task="translate")):
        with pytest.raises(SettingsError, match="English"):
            Whisper(tiny_whisper.make(), tiny_whisper.processor(), decoding)
    model = Whisper(tiny_whisper.make(), tiny_whisper.processor(), DECODING)
    assert model._task(tones) == {}
    model._is_multilingual = True
    assert model._task(tones) == {"task": "transcribe"}
    german = [dataclasses.replace(u, more={"language": "de"}) for u in tones]
    assert model._task(german)["language"] == ["de"] * len(tones)
    with pytest.raises(SettingsError, match="some lines of the manifest have a language"):
        model._task([german[0], tones[1]])
    model.decoding = Decoding(5, language="en")
    assert model._task([german[0], tones[1]])["language"] == ["de", "en"]


def test_load(tmp_path: Path):
    for folder, message in ((tmp_path, "it has no config.json"), (tmp_path / "none", "`model` ")):
        with pytest.raises(SettingsError, match=message):
            load(str(folder), "cpu", DECODING)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "architectures": ["BertModelX"]}))
    with pytest.raises(SettingsError, match="no architecture BertModelX"):
        load(str(tmp_path), "cpu", DECODING)
    assert isinstance(load(DIGITS, "cpu", DECODING), Reference)
    audio_llms.make("qwen2_audio").half().save_pretrained(tmp_path / "llm")
    audio_llms.processor("qwen2_audio").save_pretrained(tmp_path / "llm")
    found = load(str(tmp_path / "llm"), "cpu", DECODING)
    assert isinstance(found, AudioLLM) and found.model.dtype == torch.float32


def test_load_an_adapter(tmp_path: Path):
    peft = pytest.importorskip("peft")
    base, adapter = tmp_path / "base", tmp_path / "run" / "adapter"
    audio_llms.make("qwen2_audio").save_pretrained(base)
    model = type(audio_llms.make("qwen2_audio")).from_pretrained(base)
    apply_to(model, "uniform:3")
    config = peft.LoraConfig(target_modules=r".*language_model.*q_proj", init_lora_weights=False)
    tuned = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
    tuned.save_pretrained(adapter)
    audio_llms.processor("qwen2_audio").save_pretrained(adapter)
    inputs = audio_llms.batch("qwen2_audio", model)
    for path in (adapter.parent, adapter):
        found = load(str(path), "cpu", DECODING).model
        assert stored(found) == stored(model) is not None
        apply_to(found)
        torch.testing.assert_close(found(**inputs).logits, tuned.eval()(**inputs).logits)
    written = json.loads((adapter / "adapter_config.json").read_text()) | {"base_model_name_or_path": None}
    (adapter / "adapter_config.json").write_text(json.dumps(written))
    with pytest.raises(SettingsError, match="adapter_config.json has no base_model_name_or_path"):
        load(str(adapter), "cpu", DECODING)


# Scores


def score(variant: Variant, rate: float, errors: Sequence[int]) -> Score:
    whole = Interval(0.0, 0.0, 0.0)
    return Score(
        variant, variant.label, len(errors), 40, whole, 0, 0, 0, 0.0, None, 9, rate, 50 / rate, 50 / rate, 1, 1, 0, 1,
        errors=tuple(errors),
    )  # fmt: skip


def test_comparison_with_uniform_pooling_is_interpolated_in_tokens_per_second():
    off = {"proportional_attention": False}
    scores = [
        score(Variant("none"), 50, [1, 0, 0, 1]),
        score(Variant("uniform:2"), 25, [2, 1, 1, 2]),
        score(Variant("uniform:4"), 12.5, [4, 4, 4, 4]),
        score(Variant("uniform:4", **off), 12.5, [9, 9, 9, 9]),
        score(Variant("uniform:2", reduce="first"), 25, [9, 9, 9, 9]),
    ]
    comparer = Comparer([10, 10, 10, 10], [None] * 4)
    cases = {
        12.4: ("uniform:4", 16.0),
        15.625: ("between uniform:4 and uniform:2", 0.75 * 16 + 0.25 * 6),
        40.0: ("between uniform:2 and none", 0.4 * 6 + 0.6 * 2),
    }
    for rate, (against, errors) in cases.items():
        found = comparer.against_uniform(score(Variant("local-max"), rate, [5, 5, 5, 5]), scores)
        assert found is not None and found.against == against
        assert found.interval.value == pytest.approx(100 * (20 - errors) / 40)
    assert comparer.against_uniform(score(Variant("local-max"), 10, [5] * 4), scores) is None
    assert comparer.against_uniform(scores[1], scores) is None
    plain = comparer.against_uniform(score(Variant("local-max", **off), 12.5, [5] * 4), scores)
    assert plain is not None and plain.against == "uniform:4, proportional attention off"
    none = comparer.against_none(scores[1], scores)
    assert none is not None and none.interval.value == pytest.approx(100 * 4 / 40)
    assert comparer.against_none(scores[0], scores) is None
    other = score(Variant("uniform:2", silence="pool"), 25, [1] * 4)
    assert comparer.against_none(other, scores) is None and comparer.against_uniform(other, scores) is None


def test_scores_are_the_errors_of_the_texts(tones: list[Utterance], tmp_path: Path):
    def answer(text: str) -> Answer:
        return Answer(text, 9, 4, 8, 0.5, 4, 8, 3, False)

    sweep = Sweep(make("whisper"), tones[:2], tmp_path)
    row = sweep.row(Variant("uniform:2"))
    references = [u.target for u in tones[:2]]
    row = dataclasses.replace(row, answers=[answer(f"X{references[0]} more"), answer("")])
    found = Scorer(tones[:2]).scores([row])[0]
    words = len(" ".join(references).split())
    assert (found.substitutions, found.insertions, found.deletions) == (1, 1, len(references[1].split()))
    assert found.wer.value == pytest.approx(100 * (2 + len(references[1].split())) / words) and found.bleu is None
    assert (found.keys, found.tokens_per_second, found.frames_per_token) == (9, 8, 2)
    assert Score.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    translated = [dataclasses.replace(u, more={"task": "translation"}) for u in tones[:2]]
    translated = [dataclasses.replace(u, target="one two three four") for u in translated]
    exact = dataclasses.replace(row, answers=[answer("one two three four")] * 2)
    found = Scorer(translated).scores([exact])[0]
    assert found.bleu == pytest.approx(100) and found.cer == found.wer.value == 0


# Bootstrap


def test_two_speakers_have_three_resamples():
    """Drawing two of two speakers gives the first twice, both, or the second twice."""
    bootstrap = Bootstrap(["a", "b", "a"])
    assert (bootstrap.unit, bootstrap.units) == ("speaker", 2)
    found = bootstrap.difference([3, 1, 2], [1, 1, 0], [10, 20, 10])
    assert found == Interval(100 * 4 / 40, 0.0, 100 * 4 / 20)
    assert bootstrap.rate([3, 1, 2], [10, 20, 10]) == Interval(100 * 6 / 40, 5.0, 25.0)


@pytest.mark.parametrize("speakers", [["a", "b", None], ["a", "a", "a"], [None] * 3])
def test_utterances_are_resampled_without_several_speakers(speakers: list[str | None]):
    bootstrap = Bootstrap(speakers)
    assert (bootstrap.unit, bootstrap.units) == ("utterance", 3)


def test_the_bootstrap_agrees_with_scipy():
    g = np.random.default_rng(0)
    words = g.integers(5, 30, 60)
    first, second = g.binomial(words, 0.2), g.binomial(words, 0.15)
    found = Bootstrap([None] * 60).difference(first.tolist(), second.tolist(), words.tolist())

    def statistic(a: Any, b: Any, n: Any, axis: int) -> Any:
        return 100 * (a.sum(axis) - b.sum(axis)) / n.sum(axis)

    wanted = scipy.stats.bootstrap(
        (first, second, words), statistic, paired=True, n_resamples=10_000, method="percentile", rng=1
    )
    deviation = wanted.standard_error
    # A 2.5th percentile of 10,000 normal resamples has a standard error of 0.027 of their deviation.
    assert abs(found.low - wanted.confidence_interval.low) < 6 * math.sqrt(2) * 0.027 * deviation
    assert abs(found.high - wanted.confidence_interval.high) < 6 * math.sqrt(2) * 0.027 * deviation
    assert found.low < found.value < found.high


def test_many_utterances_are_resampled_in_parts(monkeypatch: pytest.MonkeyPatch):
    words, errors = [10] * 50, [i % 3 for i in range(50)]
    whole = Bootstrap([None] * 50).rate(errors, words)
    monkeypatch.setattr("fastcompress.training.sweep.bootstrap._ENTRIES", 120)
    assert Bootstrap([None] * 50).rate(errors, words) == whole

"""`fastcompress inspect`, from audio files to tables, pictures and JSON."""

import json
import os
import re
import struct
import sys
from pathlib import Path

import matplotlib.image as matplotlib_image
import numpy as np
import pytest
import soundfile
import torch

import fastcompress as fc
from fastcompress.audio import log_mel
from fastcompress.cli.main import main
from fastcompress.inspection import picture
from fastcompress.inspection.table import LOG_MEL_RULES, Encoder, EncoderError, LogMel, inspect_audio, white_noise
from tests.support import ROOT, processes

SPEECH = ROOT / "assets" / "speech" / "rainbow.wav"
SAMPLES = 70_717  # 4.42 s: 441 frames
GREY, BLUE, LIGHT_BLUE = (0x6E, 0x6E, 0x6E), (0x00, 0x72, 0xB2), (0xA9, 0xD6, 0xF0)


def speech_frames() -> torch.Tensor:
    """Return the frames that `inspect` compresses, computed without its code."""
    frames = log_mel(soundfile.read(SPEECH, dtype="float32")[0])
    return frames - frames.mean(0)


def table_rows(text: str) -> list[list[str]]:
    """Return the cells of the table's rows. A row of white noise is named after its rule, with a tilde."""
    rows, rule = [], ""
    for line in text.splitlines():
        match = re.fullmatch(r"(\S.*?|  on white noise) +(\d+) +(\d+) +([\d.]+) +([\d.]+) +([\d.]+)", line)
        if match:
            rule = match[1] if match[1].strip() == match[1] else "~" + rule.lstrip("~")
            rows.append([rule, *match.groups()[1:]])
    return rows


def run(capsys, *arguments: object) -> tuple[int, str, str]:
    code = main(["inspect", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_table_counts_the_segments_of_segment_pool(capsys):
    code, out, err = run(capsys, SPEECH)
    assert code == 0 and err == ""
    assert out.splitlines()[0] == f"{SPEECH}: 4.42 s, log-mel, 441 frames of width 80 at 100 per second"
    rows = table_rows(out)
    frames, noise_frames = speech_frames(), LogMel().frames(white_noise(SAMPLES))[0]
    expected = []
    for text in LOG_MEL_RULES:
        rule = fc.Rule.from_string(text)
        for name, x in ((str(rule), frames), ("~" + str(rule), noise_frames)):
            tokens = fc.segment_pool(x, rule=rule).values.shape[0]
            expected.append([name, "441", str(tokens), f"{441 / tokens:.2f}", f"{tokens / (SAMPLES / 16_000):.1f}"])
    assert [row[:5] for row in rows] == expected
    assert all(float(row[5]) > 0 for row in rows)


def test_the_table_is_aligned(capsys):
    _, out, _ = run(capsys, SPEECH, "--rule", "uniform:1", "--rule", "uniform:441")
    lines = [line for line in out.splitlines()[1:] if line]
    assert lines[0].split() == ["rule", "frames", "tokens", "ratio", "tokens/s", "ms"]
    assert len(lines) == 5 and len({len(line) for line in lines}) == 1
    for heading in ("frames", "tokens", "ratio", "tokens/s", "ms"):
        end = re.search(rf"{heading}(?= |$)", lines[0]).end()
        assert all(line[end - 1].isdigit() and line[end : end + 1] in ("", " ") for line in lines[1:])


def test_rules_can_be_chosen_and_noise_left_out(capsys):
    rules = ["uniform:7", "local-max:order=2,min_len=3", "threshold:0.5"]
    code, out, _ = run(capsys, SPEECH, "--no-noise", *(part for rule in rules for part in ("--rule", rule)))
    assert code == 0
    frames = speech_frames()
    counts = [len(fc.segment_pool(frames, rule=fc.Rule.from_string(rule)).values) for rule in rules]
    assert counts[0] == 63
    assert [(row[0], int(row[2])) for row in table_rows(out)] == [
        (str(fc.Rule.from_string(rule)), count) for rule, count in zip(rules, counts, strict=True)
    ]


def test_local_maxima_compress_noise_about_threefold():
    result = inspect_audio(SPEECH, [fc.LocalMax()]).results[1]
    assert result.on_noise and 2.8 < result.ratio < 3.3


def test_boundaries_do_not_depend_on_the_recording_level(tmp_path):
    samples = soundfile.read(SPEECH, dtype="float32")[0]
    soundfile.write(tmp_path / "quiet.wav", samples * 0.1, 16_000, subtype="FLOAT")
    rules = [fc.LocalMax(prominence=0.15), fc.Threshold(0.4)]
    loud = inspect_audio(SPEECH, rules, noise=False)
    quiet = inspect_audio(tmp_path / "quiet.wav", rules, noise=False)
    torch.testing.assert_close(quiet.distance, loud.distance, atol=1e-4, rtol=0, equal_nan=True)
    for a, b in zip(loud.results, quiet.results, strict=True):
        assert torch.equal(a.segments.starts, b.segments.starts) and a.tokens > 30


def test_a_silent_file_gives_a_result_and_a_note(tmp_path, capsys):
    soundfile.write(tmp_path / "silent.wav", np.zeros(32_000), 16_000)
    code, out, _ = run(capsys, tmp_path / "silent.wav", "--no-noise", "--png", tmp_path / "silent.png")
    assert code == 0
    assert "note: silent: every sample is 0, so all frames are equal and rules on distances find no boundary." in out
    tokens = {row[0]: row[2] for row in table_rows(out)}
    assert tokens["uniform:2"] == "100"
    assert tokens["local-max"] == tokens["local-max:prominence=0.15"] == tokens["threshold:0.4"] == "1"
    assert (tmp_path / "silent.png").stat().st_size > 5_000


def pixels(path: Path) -> np.ndarray:
    return (matplotlib_image.imread(path)[..., :3] * 255).round().astype(int)


def last_row_blocks(path: Path) -> list[tuple[int, ...]]:
    """Return the colours of the last rule's row from left to right, with runs of equal colours merged.

    The row is at pixels 70 to 106 above the lower edge.
    """
    line = [tuple(pixel) for pixel in pixels(path)[-88].tolist()]
    return [colour for i, colour in enumerate(line) if i == 0 or colour != line[i - 1]]


def test_the_picture_shows_the_segments(tmp_path, capsys):
    # 441 frames in segments of 100: 5 blocks, dark first.
    code, out, _ = run(capsys, SPEECH, "--rule", "local-max", "--rule", "uniform:100", "--png", tmp_path / "a.png")
    assert code == 0 and f"picture: {tmp_path / 'a.png'}" in out
    data = (tmp_path / "a.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    assert width == 1600 and 600 < height < 1000
    assert 30_000 < len(data) < 1_000_000
    assert last_row_blocks(tmp_path / "a.png").count(GREY) == 3
    assert {BLUE, LIGHT_BLUE} <= {tuple(c) for c in pixels(tmp_path / "a.png")[-134].tolist()}  # the row of local-max


def test_start_and_seconds_choose_what_the_picture_shows(tmp_path, capsys):
    # From 1.0 to 1.5 s there are 5 segments of 0.1 s, numbers 10 to 14, three of them dark.
    options = ["--rule", "uniform:10", "--start", 1, "--seconds", 0.5, "--no-noise"]
    assert run(capsys, SPEECH, *options, "--png", tmp_path / "a.png")[0] == 0
    assert last_row_blocks(tmp_path / "a.png").count(GREY) == 3
    assert run(capsys, SPEECH, *options, "--start", 1.1, "--png", tmp_path / "b.png")[0] == 0
    assert last_row_blocks(tmp_path / "b.png").count(GREY) == 2


def test_the_distance_curve_peaks_where_segments_start(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(picture.Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    picture.draw(inspect_audio(SPEECH, [fc.LocalMax()], noise=False), tmp_path / "a.png", start=1.0, seconds=2.0)
    curve, peaks = figures[0].axes[1].lines
    starts = fc.segment_pool(speech_frames(), rule=fc.LocalMax()).segments.starts.numpy() / 100
    shown = starts[(starts > 1.0) & (starts <= 3.0)]
    np.testing.assert_allclose(peaks.get_xdata(), shown)
    np.testing.assert_allclose(np.interp(shown, *curve.get_data()), peaks.get_ydata(), rtol=1e-5)
    before, after = (np.interp(shown + step, *curve.get_data()) for step in (-0.01, 0.01))
    higher = (peaks.get_ydata() > before) & (peaks.get_ydata() > after)
    assert higher[1:-1].all() and len(higher) > 40  # the first and the last may lack a neighbour in the picture


def test_long_rules_and_odd_names_can_be_drawn(tmp_path, capsys):
    path = tmp_path / "a $x_1$ 語 {name}.wav"
    path.write_bytes(SPEECH.read_bytes())
    rule = "local-max:order=2,threshold=0.1,prominence=0.05,min_len=2,max_len=20"
    code, _, err = run(capsys, path, "--rule", rule, "--png", tmp_path / "out.png")
    assert code == 0 and err == "" and (tmp_path / "out.png").stat().st_size > 30_000


def test_json_holds_the_table_and_the_segments(tmp_path, capsys):
    _, out, _ = run(capsys, SPEECH, "--rule", "local-max", "--json", tmp_path / "new" / "a.json")
    (file,) = json.loads((tmp_path / "new" / "a.json").read_text())
    assert (file["path"], file["frame_rate"], file["frame_width"]) == (str(SPEECH), 100.0, 80)
    speech, on_noise = file["results"]
    cells = [
        [str(r["tokens"]), f"{r['ratio']:.2f}", f"{r['tokens_per_second']:.1f}", f"{r['milliseconds']:.2f}"]
        for r in (speech, on_noise)
    ]
    assert cells == [row[2:] for row in table_rows(out)]
    assert (speech["input"], on_noise["input"]) == ("audio", "white noise")
    assert "segments_seconds" not in on_noise
    segments = np.array(speech["segments_seconds"])
    starts = fc.segment_pool(speech_frames(), rule=fc.LocalMax()).segments.starts
    np.testing.assert_allclose(segments[:, 0], starts.numpy() / 100)
    np.testing.assert_array_equal(segments[1:, 0], segments[:-1, 1])
    assert segments[-1, 1] == 4.41


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "the following arguments are required: FILE (see: fastcompress inspect --help)"),
        (["a.wav", "--rule", "foo"], "unknown rule 'foo'; the rules are "),
        (["a.wav", "--rule", "uniform:0"], "size must be at least 1, got 0"),
        (["a.wav", "--rule", "local-max:size=3"], "has no field 'size'"),
        ([SPEECH, "--rule", "label-change"], "label-change needs a label per frame, which an audio file does not have"),
        (["a.wav", "--start", "-1"], "argument --start: '-1' is not a time in seconds"),
        (["a.wav", "--start", "soon"], "argument --start: 'soon' is not a time in seconds"),
        (["a.wav", "--seconds", "0"], "argument --seconds: must be more than 0 seconds"),
        (["a.wav", "--seconds", "nan"], "argument --seconds: 'nan' is not a time in seconds"),
        (["a.wav", "b.wav", "--png", "x.png"], "--png x.png: one picture for 2 files; name a folder instead"),
        (["a/x.wav", "b/x.flac", "--png", "out"], "a/x.wav and b/x.flac would both be written to out"),
        (["a.wav", "--png", SPEECH], "neither a folder nor a .png file"),
        (["missing.wav"], "missing.wav: no such file or directory"),
        ([SPEECH, "--json", ROOT], "is a directory"),
        ([SPEECH, "--json", SPEECH / "a.json"], "a.json: not a directory"),
        ([SPEECH, "--png", SPEECH / "a.png"], "a.png: not a directory"),
        ([SPEECH, "--encoder", "nowhere"], "nowhere: no such folder"),
        ([SPEECH, "--start", "5", "--png", "x.png"], "start must be from 0 to 4.42 s, the end of the audio, got 5 s"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(capsys, monkeypatch, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, *arguments)
    assert code == 2
    assert "--json" not in arguments or out == ""  # the error comes before the computation
    assert err.startswith("fastcompress: error: ") and err.endswith("\n") and err.count("\n") == 1
    assert message in err


def test_no_command_and_an_unknown_one_are_mistakes(capsys):
    assert main([]) == 2 and "required: COMMAND" in capsys.readouterr().err
    assert main(["inspct"]) == 2 and "unknown command 'inspct'; did you mean inspect?" in capsys.readouterr().err


def test_files_that_fail_do_not_stop_the_others(tmp_path, capsys):
    (tmp_path / "text.wav").write_text("no audio")
    soundfile.write(tmp_path / "short.wav", np.ones(100) * 0.1, 16_000)
    bad = [tmp_path / "missing.wav", tmp_path / "text.wav", tmp_path / "short.wav"]
    code, out, err = run(capsys, bad[0], SPEECH, *bad[1:], "--rule", "uniform:2", "--png", tmp_path / "pictures")
    assert code == 1
    assert [row[2] for row in table_rows(out)] == ["221", "221"]
    assert sorted(os.listdir(tmp_path / "pictures")) == ["rainbow.png"]
    assert err.splitlines() == [
        f"fastcompress: error: {bad[0]}: no such file or directory",
        f"fastcompress: error: {bad[1]}: not an audio file that can be read (Invalid data found when processing input)",
        f"fastcompress: error: {bad[2]}: the audio is 6.2 ms long; the least is one window of 25 ms (400 samples)",
        f"fastcompress: error: 3 of 4 files failed: {bad[0]}, {bad[1]}, {bad[2]}",
    ]
    assert run(capsys, *bad)[0] == 2


@pytest.mark.parametrize(
    "module, extra",
    [
        ("av", "audio"),
        ("soxr", "audio"),
        ("tqdm", "audio"),
        ("matplotlib", "audio"),
        ("transformers", "encoders"),
    ],
)
def test_a_missing_package_is_named_with_its_extra(capsys, monkeypatch, tmp_path, module, extra):
    for name in list(sys.modules):
        if name.partition(".")[0] == module or name in (
            "fastcompress.audio",
            "fastcompress.audio_file",
            "fastcompress.inspection.table",
        ):
            monkeypatch.delitem(sys.modules, name)
    for name in ("audio", "inspection", "inspection.picture", "inspection.table"):
        monkeypatch.delattr(f"fastcompress.{name}", raising=False)
        monkeypatch.delitem(sys.modules, f"fastcompress.{name}", raising=False)
    monkeypatch.setitem(sys.modules, module, None)  # importing it raises ModuleNotFoundError
    code, out, err = run(capsys, SPEECH, "--png", tmp_path / "a.png", "--encoder", tmp_path)
    assert (code, out) == (2, "")
    assert err == f"fastcompress: error: this needs {module}: pip install 'fastcompress[{extra}]'\n"
    if module == "matplotlib":  # only the picture needs matplotlib
        assert run(capsys, SPEECH, "--rule", "uniform:2")[0] == 0


def test_progress_goes_to_stderr_for_long_audio_only(tmp_path, capsys):
    soundfile.write(tmp_path / "long.wav", np.tile(soundfile.read(SPEECH)[0], 28), 16_000)
    code, out, err = run(capsys, tmp_path / "long.wav", "--rule", "uniform:3")
    assert code == 0 and "123.75 s, log-mel, 12375 frames" in out and table_rows(out)[0][2] == "4125"
    for stage in ("reading", "encoding", "encoding white noise"):
        assert f"long.wav: {stage} 100% |" in err and "124/124 s of audio" in err
    assert run(capsys, SPEECH)[2] == ""


def test_the_module_runs_as_a_program(tmp_path):
    command = ["-m", "fastcompress", "inspect", "voice.flac", "none.wav"]
    soundfile.write(tmp_path / "voice.flac", np.tile(soundfile.read(SPEECH)[0][:, None], (1, 2)), 16_000)
    done = processes.run([*command, "--png", "out", "--rule", "local-max"], cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "fastcompress: error: none.wav: no such file or directory",
        "fastcompress: error: 1 of 2 files failed: none.wav",
    ]
    assert table_rows(done.stdout)[0][:3] == ["local-max", "441", str(len(fc.segment_pool(speech_frames()).values))]
    assert (tmp_path / "out" / "voice.png").stat().st_size > 30_000


@pytest.fixture(scope="module")
def whisper(tmp_path_factory) -> Path:
    """Save a random Whisper with a window of 3 s, in the format of checkpoints."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.WhisperConfig(
        d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=32, decoder_ffn_dim=32, vocab_size=10, max_source_positions=150, num_mel_bins=80,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("models") / "tiny-whisper"
    transformers.WhisperModel(config).save_pretrained(path)
    transformers.WhisperFeatureExtractor(chunk_length=3).save_pretrained(path)
    return path


def test_a_whisper_encoder_is_run_in_its_windows(whisper, capsys, tmp_path):
    import transformers

    code, out, err = run(capsys, SPEECH, "--encoder", whisper, "--png", tmp_path / "a.png", "--no-noise")
    assert code == 0 and err == ""
    # 3 s are 150 frames. In the second window, 1.42 s are 71 frames, and the other 79 are padding.
    assert out.splitlines()[0].endswith("4.42 s, whisper encoder tiny-whisper, 221 frames of width 32 at 50 per second")
    assert (tmp_path / "a.png").stat().st_size > 30_000

    samples = soundfile.read(SPEECH, dtype="float32")[0]
    extractor = transformers.WhisperFeatureExtractor(chunk_length=3)
    encoder = transformers.WhisperModel.from_pretrained(whisper).get_encoder().eval()
    windows = [samples[:48_000], np.pad(samples[48_000:], (0, 96_000 - len(samples)))]
    with torch.no_grad():
        features = extractor(windows, sampling_rate=16_000, return_tensors="pt").input_features
        hidden = encoder(features).last_hidden_state  # [2, 150, 32]
    expected = torch.cat([hidden[0], hidden[1, :71]])
    inspected = inspect_audio(SPEECH, [fc.LocalMax()], Encoder(whisper), noise=False)
    torch.testing.assert_close(inspected.frames, expected, atol=1e-5, rtol=1e-5)
    tokens = {row[0]: int(row[2]) for row in table_rows(out)}
    assert tokens["uniform:2"] == 111
    assert tokens["local-max"] == len(fc.segment_pool(inspected.frames, rule=fc.LocalMax()).values) > 20


def test_a_waveform_encoder_is_run_in_pieces(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Wav2Vec2Config(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        conv_dim=(8,) * 7,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=2,
    )
    transformers.Wav2Vec2Model(config).save_pretrained(tmp_path / "wav2vec2")
    transformers.Wav2Vec2FeatureExtractor().save_pretrained(tmp_path / "wav2vec2")
    encoder = Encoder(tmp_path / "wav2vec2")
    for seconds, frames in ((2, 99), (30.01, 2 * 750)):  # 30.01 s are two pieces of 15.005 s
        values, rate = encoder.frames(white_noise(round(seconds * 16_000)))
        assert values.shape == (frames, 16)
        assert rate == pytest.approx(frames / seconds, rel=1e-4)
    with pytest.raises(EncoderError, match=r"wav2vec2: cannot encode 0\.01 s of audio"):
        encoder.frames(white_noise(200))
    for window in (None, 480_000):  # at 16 kHz, 0 samples remain of one sample at 44.1 kHz
        encoder.window = window
        with pytest.raises(EncoderError, match="the audio is empty: 0 samples"):
            encoder.frames(white_noise(0))


@pytest.mark.parametrize("kind", ["no model", "broken weights", "no feature extractor"])
def test_a_folder_without_a_usable_encoder_is_one_line(whisper, capsys, tmp_path, kind):
    if kind != "no model":
        for file in whisper.iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    if kind == "broken weights":
        (tmp_path / "model.safetensors").write_bytes(b"not weights")
    if kind == "no feature extractor":
        (tmp_path / "preprocessor_config.json").unlink()
    code, out, err = run(capsys, SPEECH, "--encoder", tmp_path)
    assert code == 2 and out == ""
    assert (
        err.startswith(f"fastcompress: error: {tmp_path}: cannot load a transformers encoder (")
        and err.count("\n") == 1
    )

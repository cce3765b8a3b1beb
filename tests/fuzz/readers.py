"""Fuzz targets for the readers. A reader may raise only its documented error, for any bytes.

``python -m tests.fuzz.readers TARGET SECONDS`` searches with atheris (guided by coverage of the Python code) for bytes
that raise another error. It starts from the files in ``tests/fuzz/corpus/TARGET`` and writes its findings there.
``test_readers.py`` replays the corpus.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.support import ROOT

CORPUS = Path(__file__).parent / "corpus"
#: Maximum number of samples to read, since the header of a small file can promise many.
MOST_SAMPLES = 1 << 22


@contextlib.contextmanager
def file(data: bytes, name: str) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        path = Path(folder) / name
        path.write_bytes(data)
        yield path


def _read_audio(source: Path | io.BytesIO) -> None:
    import numpy as np

    from fastcompress.audio import AudioError, AudioWarning, audio_blocks

    total = 0
    with contextlib.suppress(AudioError), warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", AudioWarning)
        for block in audio_blocks(source):
            assert block.ndim == 1 and block.dtype == np.float32 and np.isfinite(block).all()
            total += len(block)
            if total > MOST_SAMPLES:
                break


def audio(data: bytes) -> None:
    with file(data, "a.wav") as path:
        _read_audio(path)


def audio_stream(data: bytes) -> None:
    _read_audio(io.BytesIO(data))


def audio_part(data: bytes) -> None:
    """Read a part of the audio, which seeks, and the length, which counts packets."""
    from fastcompress.audio import AudioError, AudioWarning, audio_seconds, load_audio

    with file(data, "a.wav") as path, warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", AudioWarning)
        with contextlib.suppress(AudioError):
            assert audio_seconds(path) > 0
        with contextlib.suppress(AudioError):
            assert len(load_audio(path, offset=0.01, duration=0.5)) <= 8_000


def manifest(data: bytes) -> None:
    from fastcompress.audio import AudioError
    from fastcompress.training.manifest import ManifestError, read_manifest, warnings_of
    from fastcompress.training.usable import check_audio, load_utterance

    with file(data, "a.jsonl") as path:
        try:
            utterances = read_manifest(path)
        except ManifestError as error:
            assert "\n" not in str(error), error
            return
        good, skipped = check_audio(utterances)
        assert len(good) + len(skipped) == len(utterances)
        warnings_of(utterances)
        for utterance in filter(lambda u: u.has_audio, utterances):
            with contextlib.suppress(AudioError):
                load_utterance(utterance, 16_000)


def rule(data: bytes) -> None:
    from fastcompress.rules import Rule

    text = data.decode("utf-8", "surrogateescape")
    try:
        found = Rule.from_string(text)
    except ValueError:
        return
    assert Rule.from_string(str(found)) == found
    assert Rule.from_dict(found.to_dict()) == found


def settings(data: bytes) -> None:
    from fastcompress.training.parsing import RECORD, read_settings, write_record
    from fastcompress.training.settings import SettingsError, TrainSettings

    with file(data, "run.yaml") as path:
        try:
            found = read_settings(TrainSettings, path)
        except SettingsError as error:
            assert "\n" not in str(error), error
            return
        write_record(found, path.parent)
        assert read_settings(TrainSettings, path.with_name(RECORD)) == found


def checkpoint(data: bytes) -> None:
    """Replace each file of a checkpoint in turn by the bytes, and leave the others intact."""
    import torch

    from fastcompress.training import checkpoints

    weights = {"a": torch.ones(2, requires_grad=True)}
    optimizer = torch.optim.SGD(weights.values(), lr=0.1, momentum=0.9)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        path = checkpoints.save(Path(folder), 1, weights, optimizer, keep=1)
        for part in sorted(path.iterdir()):
            whole = part.read_bytes()
            part.write_bytes(data)
            with contextlib.suppress(checkpoints.CheckpointError):
                checkpoints.load(path, weights, optimizer)
            part.write_bytes(whole)
        assert checkpoints.load(path, weights, optimizer) == 1


TARGETS: dict[str, Callable[[bytes], None]] = {
    function.__name__: function for function in (audio, audio_stream, audio_part, manifest, rule, settings, checkpoint)
}


def main() -> None:
    parser = argparse.ArgumentParser(description="fuzz a reader with atheris")
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("seconds", type=int)
    arguments = parser.parse_args()
    if arguments.seconds > 0:
        import atheris

        with atheris.instrument_imports(include=["fastcompress"]):
            import fastcompress.audio
            import fastcompress.training.manifest
            import fastcompress.training.runs  # noqa: F401
        folder = CORPUS / arguments.target
        folder.mkdir(parents=True, exist_ok=True)
        new = ROOT / "build" / "fuzz" / arguments.target  # libFuzzer writes to the first folder; a later run reuses it
        new.mkdir(parents=True, exist_ok=True)
        options = [f"-max_total_time={arguments.seconds}", "-timeout=20", "-rss_limit_mb=4096", "-max_len=4096"]
        options += [f"-artifact_prefix={folder}/", "-print_final_stats=1", "-verbosity=0", str(new), str(folder)]
        atheris.Setup([sys.argv[0], *options], TARGETS[arguments.target])
        atheris.Fuzz()


def run(target: str, seconds: int) -> int:
    """Fuzz in a separate process, and return its exit status."""
    command = [sys.executable, "-m", "tests.fuzz.readers", target, str(seconds)]
    return subprocess.run(command, cwd=ROOT).returncode


if __name__ == "__main__":
    main()

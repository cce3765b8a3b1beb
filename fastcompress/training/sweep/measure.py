"""Sweep: compare compression rules on a user's own model and data.

Encoder states are computed once and kept on disk. A row is the result of one variant: a rule with its settings. It is
saved as soon as it is complete; a later run with the same model, data and settings does not compute it again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from fastcompress.audio import AudioError
from fastcompress.decoder.limits import counting_answers
from fastcompress.files import check_folder, clean, write_file
from fastcompress.training.manifest import ManifestError, Utterance
from fastcompress.training.settings import SettingsError
from fastcompress.training.sweep.models import NONE, Answer, SweepModel, Variant
from fastcompress.training.sweep.states import States, audio_key, fingerprint
from fastcompress.training.usable import Skipped, load_utterance
from fastcompress.version import __version__

#: Called with the name of a task, the number of utterances that are done, and the total.
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Row:
    """A measured variant.

    Attributes:
        variant: The variant.
        answers: Answer for each utterance, in the order of the sweep.
        prefill_ms: Mean time per utterance from the encoder states to the first new token, in batches.
        decoding_ms: Mean time per utterance from the first new token to the last.
        cpu_seconds: Processor time of the row.
    """

    variant: Variant
    answers: list[Answer]
    prefill_ms: float
    decoding_ms: float
    cpu_seconds: float


class Sweep:
    """Measure variants of the compression of one model on one manifest.

    Args:
        model: The model.
        utterances: Utterances of the manifest. Those whose audio cannot be used are skipped.
        out: Folder of states and rows.
        batch_size: Utterances per batch.
        skipped: Record of the skipped utterances, to which new ones are added.
        progress: Function that is called after each utterance or batch.

    Attributes:
        utterances: Utterances that are scored.
        encoding_seconds: Processor time of the encoder, in this run and earlier ones.

    Raises:
        ManifestError: No utterance has usable audio.
        OSError: The folder cannot be written.
    """

    def __init__(
        self,
        model: SweepModel,
        utterances: Sequence[Utterance],
        out: Path,
        batch_size: int = 16,
        skipped: Skipped | None = None,
        progress: Progress | None = None,
    ) -> None:
        check_folder(out)
        self.model: SweepModel = model
        self.out: Path = out
        self.batch_size: int = batch_size
        self.skipped: Skipped = Skipped(report=None) if skipped is None else skipped
        self._progress: Progress = progress or (lambda what, done, total: None)
        self._rows = out / "rows"
        self._rows.mkdir(parents=True, exist_ok=True)
        clean(self._rows)
        self._model_key = fingerprint(model.model)
        self._states = States(out / "states", self._model_key)
        self._keys: list[str] = []
        self.encoding_seconds: float = 0.0
        self.utterances: list[Utterance] = []
        self._encode(utterances)

    def _encode(self, utterances: Sequence[Utterance]) -> None:
        """Compute the encoder states that are not on disk, and select the usable utterances."""
        for done, utterance in enumerate(utterances):
            self._progress("encoding", done, len(utterances))
            if not utterance.has_audio:
                self.skipped.add(utterance, AudioError(f"{utterance.name}: has no audio"))
                continue
            key = audio_key(utterance)
            found = None if self.model.why_not_cached else self._states.facts(key)
            try:
                seconds, cpu_seconds = self._encode_one(utterance, key) if found is None else found
            except AudioError as error:
                self.skipped.add(utterance, error)
                continue
            self.encoding_seconds += cpu_seconds
            self.utterances.append(replace(utterance, duration=seconds))
            self._keys.append(key)
        self._progress("encoding", len(utterances), len(utterances))
        self.skipped.finish()
        if not self.utterances:
            raise ManifestError(f"no utterance has usable audio: {next(iter(self.skipped.lines))}")

    def _encode_one(self, utterance: Utterance, key: str) -> tuple[float, float]:
        """Compute and save the states of an utterance; return the seconds of its audio and of processor time."""
        since = time.process_time()
        samples = load_utterance(utterance, self.model.sampling_rate)
        seconds = len(samples) / self.model.sampling_rate
        if self.model.why_not_cached:
            return seconds, 0.0
        states = self.model.encode(samples)
        spent = time.process_time() - since
        if not self.model.why_not_cached:  # the first call of `encode` sets it
            self._states.save(key, states, seconds, spent)
        return seconds, spent

    def variants(self, rules: Sequence[str], ablate: bool = False, silence: str | float | None = None) -> list[Variant]:
        """Return the variants of rules, the first of which keeps every frame.

        Args:
            rules: Text forms of the rules, or ``"none"``.
            ablate: Whether to add variants without proportional attention and positions in time.
            silence: Treatment of silence, for Whisper.
        """
        found = []
        for rule in dict.fromkeys([NONE, *rules]):
            found += [Variant(rule), *(self.model.ablations(rule) if ablate else [])]
        return [replace(variant, silence=silence) for variant in found]

    def states(self) -> Iterator[dict[str, Tensor]]:
        """Yield the encoder states of each utterance from disk."""
        return (self._states.load(key) for key in self._keys)

    def check(self, variants: Sequence[Variant]) -> None:
        """Check that the model supports each variant, before hours are spent.

        Raises:
            SettingsError: The model does not support a variant.
        """
        for variant in variants:
            try:
                with self.model.compressed(variant):
                    pass
            except SettingsError:
                raise
            except (NotImplementedError, TypeError, ValueError) as error:
                raise SettingsError(f"`rule` {variant.label}: {error}") from error

    def run(self, variants: Sequence[Variant]) -> list[Row]:
        """Compute the row of each variant, or read it from disk."""
        return [self.row(variant) for variant in variants]

    def path(self, variant: Variant) -> Path:
        """Return the file of a row. Its name has a hash of everything on which the result depends."""
        facts = {
            "version": __version__,
            "model": self._model_key,
            "audio": self._keys,
            "prompts": [[u.prompt, u.more.get("language")] for u in self.utterances],
            "decoding": dataclasses.asdict(self.model.decoding),
            "batch_size": self.batch_size,
            "variant": dataclasses.asdict(variant),
        }
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]
        name = "".join(c if c.isalnum() else "-" for c in variant.label)
        return self._rows / f"{name[:80]}-{digest}.json"

    def row(self, variant: Variant) -> Row:
        """Compute the row of a variant, or read it from disk."""
        path = self.path(variant)
        if (found := _read(path, variant, len(self.utterances))) is not None:
            return found
        self.out.mkdir(parents=True, exist_ok=True)
        row = self.measure(variant)
        write_file(path, json.dumps(dataclasses.asdict(row), ensure_ascii=False))
        return row

    def states_of(self, index: int) -> dict[str, Tensor]:
        """Return the encoder states of an utterance, by its index in ``utterances``."""
        return self._states.load(self._keys[index])

    def measure(self, variant: Variant) -> Row:
        """Compute the row of a variant, and do not save it: the model may have been trained in the meantime."""
        order = sorted(range(len(self.utterances)), key=lambda i: self.utterances[i].duration or 0.0)
        answers: dict[int, Answer] = {}
        prefill = decoding = 0.0
        since = time.process_time()
        with self.model.compressed(variant), counting_answers():  # rows count cut answers
            for begin in range(0, len(order), self.batch_size):
                self._progress(variant.label, begin, len(order))
                chosen = order[begin : begin + self.batch_size]
                states = [] if self.model.why_not_cached else [self.states_of(i) for i in chosen]
                batch = self.model.answer([self.utterances[i] for i in chosen], states)
                answers |= dict(zip(chosen, batch.answers, strict=True))
                prefill, decoding = prefill + batch.prefill, decoding + batch.decoding
        self._progress(variant.label, len(order), len(order))
        return Row(
            variant,
            [answers[i] for i in range(len(order))],
            1e3 * prefill / len(order),
            1e3 * decoding / len(order),
            time.process_time() - since,
        )


def _read(path: Path, variant: Variant, count: int) -> Row | None:
    """Return a row that an earlier run has written; ``None`` if there is no complete one."""
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        row = Row(**values | {"variant": variant, "answers": [Answer(**answer) for answer in values["answers"]]})
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return row if len(row.answers) == count else None

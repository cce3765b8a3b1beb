"""Measure compression with LoRA on real speech, without transcripts: ``python -m experiments.distill FOLDER``.

Whisper's decoder is adapted to compressed audio by self-distillation. The targets are the texts that the same model
writes from every frame. The encoder is frozen: its states are computed once per utterance and kept in ``--out``.

    FOLDER/whisper-tiny.en/, FOLDER/whisper-base/                       models (docs/sweep.md)
    FOLDER/speech/librispeech-train-clean-untranscribed.jsonl           training, and 30 held-out utterances
    FOLDER/speech/librispeech-test-other.jsonl                          test, with transcripts and speakers

``--tune`` compares settings on the held-out utterances by their agreement with the targets; the test set is not read.
The runs are in the order of their importance. A later call skips complete runs. Results are written to
experiments/results/distill-*.json after each run; ``python -m experiments.distill_report`` prints their tables.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import random
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div

from experiments.real import NEW_TOKENS, RESULTS, ROOT, min_variance
from fastcompress.files import write_file
from fastcompress.training.batches import BatchPlan
from fastcompress.training.manifest import Utterance
from fastcompress.training.sweep.loading import load
from fastcompress.training.sweep.measure import Sweep
from fastcompress.training.sweep.models import NONE, Decoding, Variant
from fastcompress.training.sweep.scores import Scorer
from fastcompress.training.sweep.whisper import Whisper
from fastcompress.training.usable import Skipped

MODELS = ("whisper-tiny.en", "whisper-base")
TRAIN, TEST = "librispeech-train-clean-untranscribed.jsonl", "librispeech-test-other.jsonl"
#: Number of utterances of the training data that are held out.
HELD_OUT = 30
SEEDS = (0, 1, 2)
#: Rules in the order of the runs; ``none`` is the control.
RULES = (NONE, "uniform:4", min_variance(4), "uniform:3", min_variance(3), min_variance(6), "uniform:6")
#: Linear layers that are adapted: all projections of the decoder's attention.
TARGETS = r".*decoder\.layers\.\d+\.(self_attn|encoder_attn)\.(q|k|v|out)_proj"

_EVERY_FRAME = Variant(NONE, silence="keep")
_IGNORED = -100  # label that is not part of the loss
_DECODED = 20  # utterances per batch of decoding, as in `experiments/real.py`


@dataclass(frozen=True)
class Settings:
    """Settings of LoRA.

    Attributes:
        learning_rate: Highest learning rate: it increases during the first tenth of the steps, and then decreases
            linearly to zero.
        steps: Number of steps.
        kl: Share of the loss that is the divergence from the distributions of the model on every frame; the rest is
            the cross-entropy of the text.
        batch_size: Utterances per step.
        rank: Rank of the adapter, whose scale is 2.
    """

    learning_rate: float = 1e-4
    steps: int = 48
    kl: float = 0.0
    batch_size: int = 6
    rank: int = 16


#: Settings of the runs: the better of the first two of ``TRIED``; the third has not been run.
SETTINGS = Settings(3e-4)
#: Settings to compare on the held-out utterances, and the rule with which they are compared.
TRIED = (
    Settings(1e-4),
    Settings(3e-4),
    Settings(3e-4, kl=1.0),
)
TUNING_RULE = min_variance(6)


def untranscribed(path: Path) -> list[Utterance]:
    """Return the utterances of a manifest whose lines have no text."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return [
        Utterance(path.parent / line["audio_filepath"], "", "", more={"speaker": line["speaker"]}, source=f"{path}:{i}")
        for i, line in enumerate(lines, 1)
    ]


class Distillation:
    """Self-distillation of one model.

    Args:
        folder: Folder of models and speech.
        name: Name of the model.
        out: Folder of states and targets.
    """

    def __init__(self, folder: Path, name: str, out: Path) -> None:
        self.folder, self.name, self.out = folder, name, out
        language = None if name.endswith(".en") else "en"
        model = load(str(folder / name), "cpu", Decoding(NEW_TOKENS, language))
        assert isinstance(model, Whisper)
        self.whisper: Whisper = model
        self.train = Sweep(model, untranscribed(folder / "speech" / TRAIN), out, _DECODED)
        row = self.train.row(_EVERY_FRAME)
        self.target_seconds: float = row.cpu_seconds
        texts = [answer.text for answer in row.answers]
        usable = [i for i, answer in enumerate(row.answers) if answer.text and not answer.clipped]
        order = random.Random(0).sample(usable, len(usable))
        self.held_out, self.trained = sorted(order[:HELD_OUT]), sorted(order[HELD_OUT:])
        self.prompt: list[int] = _prompt(model.model, language)
        tokenizer = model.processor.tokenizer
        end = model.model.generation_config.eos_token_id
        self.ids = [[*tokenizer(f" {text}", add_special_tokens=False).input_ids, end] for text in texts]
        dev = [replace(self.train.utterances[i], text=texts[i], target=texts[i]) for i in self.held_out]
        self.dev = Sweep(model, dev, out, _DECODED)
        self._teacher: dict[int, Tensor] = {}

    def _forward(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return the logits ``[B, T, V]`` and labels ``[B, T]`` of utterances, as the model is compressed now."""
        states = [self.train.states_of(i) for i in indices]
        sequences = [torch.tensor(self.prompt + self.ids[i]) for i in indices]
        pad = torch.nn.utils.rnn.pad_sequence
        inputs = pad([ids[:-1] for ids in sequences], True, self.ids[indices[0]][-1])
        labels = pad([ids[1:] for ids in sequences], True, _IGNORED)
        labels[:, : len(self.prompt) - 1] = _IGNORED
        out = self.whisper.model(
            input_features=self.whisper.features(states), decoder_input_ids=inputs, labels=labels, use_cache=False
        )
        return out.logits, labels

    def _loss(self, indices: Sequence[int], kl: float) -> Tensor:
        """Return the loss of utterances, the mean over their tokens."""
        logits, labels = self._forward(indices)
        counted = labels != _IGNORED
        loss = (1 - kl) * cross_entropy(logits[counted], labels[counted])
        if kl:
            wanted = torch.cat([self._teacher[i] for i in indices]).float()
            loss = loss + kl * kl_div(logits[counted].log_softmax(-1), wanted, reduction="batchmean", log_target=True)
        return loss

    @torch.no_grad()
    def _learn_distributions(self) -> None:
        """Compute the logarithms of the probabilities that predict each token of the targets, from every frame."""
        with self.whisper.compressed(_EVERY_FRAME):
            for i in self.trained:
                if i not in self._teacher:
                    logits, labels = self._forward([i])
                    self._teacher[i] = logits[labels != _IGNORED].log_softmax(-1).half()

    @contextmanager
    def adapted(self, variant: Variant, seed: int, settings: Settings) -> Iterator[list[float]]:
        """Train LoRA for a variant. In the context, which yields the losses of all steps, the model has the adapter."""
        if settings.kl:
            self._learn_distributions()
        torch.manual_seed(seed)
        config = peft.LoraConfig(r=settings.rank, lora_alpha=2 * settings.rank, target_modules=TARGETS)
        wrapped = peft.get_peft_model(self.whisper.model, config).eval()
        try:
            yield self._fit([p for p in wrapped.parameters() if p.requires_grad], variant, seed, settings)
        finally:
            wrapped.unload()

    def _fit(self, parameters: list[Any], variant: Variant, seed: int, settings: Settings) -> list[float]:
        plan = BatchPlan([len(self.ids[i]) for i in self.trained], settings.batch_size, seed=seed)
        optimizer = torch.optim.AdamW(parameters, settings.learning_rate, weight_decay=0.0)
        warmup = max(1, settings.steps // 10)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min((step + 1) / warmup, (settings.steps - step) / max(1, settings.steps - warmup))
        )
        losses = []
        with self.whisper.compressed(variant):
            for step in range(settings.steps):
                loss = self._loss([self.trained[i] for i in plan.batch(step)], settings.kl)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                losses.append(float(loss.detach()))
        return losses

    @torch.no_grad()
    def held_out_loss(self, variant: Variant) -> float:
        """Return the cross-entropy of the held-out targets, the mean over utterances."""
        with self.whisper.compressed(variant):
            return sum(float(self._loss([i], 0.0)) for i in self.held_out) / len(self.held_out)

    def disagreement(self, variant: Variant) -> float:
        """Return the word error rate of the held-out utterances against their targets, in %."""
        return Scorer(self.dev.utterances, "whisper").scores([self.dev.measure(variant)])[0].wer.value

    def tune(self, results: Path) -> None:
        """Compare settings on the held-out utterances, and write the results."""
        path = results / f"distill-tuning-{self.name}.json"
        found: dict[str, Any] = {"name": self.name, "rows": []}
        if path.exists():
            found = json.loads(path.read_text(encoding="utf-8"))
        variant = Variant(TUNING_RULE, silence="keep")
        for settings in (None, *TRIED):
            key = {"rule": variant.rule, "settings": None if settings is None else dataclasses.asdict(settings)}
            if any(key.items() <= row.items() for row in found["rows"]):
                continue
            since = time.process_time()
            row: dict[str, Any]
            if settings is None:
                row = {"loss": self.held_out_loss(variant), "disagreement": self.disagreement(variant)}
            else:
                with self.adapted(variant, SEEDS[0], settings) as losses:
                    row = {"loss": self.held_out_loss(variant), "disagreement": self.disagreement(variant)}
                    row["losses"] = losses
            found["rows"].append(key | row | {"cpu_seconds": time.process_time() - since})
            write_file(path, json.dumps(found) + "\n")
            print(f"{self.name}: {settings}: {row}", flush=True)

    def run(self, seeds: Sequence[int], results: Path) -> None:
        """Train and test every rule with each seed, and write the results after each run."""
        skipped = Skipped()
        test = Sweep(self.whisper, skipped.read(self.folder / "speech" / TEST), self.out, _DECODED, skipped)
        path = results / f"distill-{self.name}.json"
        for seed in seeds:
            for rule in RULES:
                found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"rows": []}
                key = {"rule": rule, "seed": seed, "settings": dataclasses.asdict(SETTINGS)}
                if any(key.items() <= row.items() for row in found["rows"]):
                    continue
                variant = Variant(rule, silence="keep")
                since = time.process_time()
                with self.adapted(variant, seed, SETTINGS) as losses:
                    training = time.process_time() - since
                    loss = self.held_out_loss(variant)
                    scorer = Scorer(test.utterances, "whisper")
                    score = scorer.scores([test.measure(variant)])[0]
                values = {name: value for name, value in score.to_dict().items() if not name.startswith("vs_")}
                row = {"losses": losses, "held_out_loss": loss, "training_cpu_seconds": training, "score": values}
                facts = {
                    "name": self.name,
                    "trained": len(self.trained),
                    "held_out": len(self.held_out),
                    "speakers": [u.more.get("speaker") for u in test.utterances],
                    "words": scorer.words,
                    "encoding_cpu_seconds": round(self.train.encoding_seconds + test.encoding_seconds, 1),
                    "target_cpu_seconds": round(self.target_seconds, 1),
                    "torch": torch.__version__,
                    "transformers": transformers.__version__,
                    "peft": peft.__version__,
                    "machine": platform.machine(),
                }
                kept = [r for r in found["rows"] if (r["rule"], r["seed"]) != (rule, seed)]
                write_file(path, json.dumps(facts | {"rows": [*kept, key | row]}) + "\n")
                spent = f"{training:.0f} s of training, {score.cpu_seconds:.0f} s of test"
                print(f"{self.name}, seed {seed}, {rule}: {score.wer.value:.2f} % WER, {spent}", flush=True)


def _prompt(model: Any, language: str | None) -> list[int]:
    """Return the ids that precede a text without timestamps."""
    config = model.generation_config
    found = [config.decoder_start_token_id]
    if getattr(config, "is_multilingual", False):
        found += [config.lang_to_id[f"<|{language}|>"], config.task_to_id["transcribe"]]
    end = getattr(config, "no_timestamps_token_id", None)
    return found if end is None else [*found, end]


def main() -> int:
    """Run the experiment."""
    parser = argparse.ArgumentParser(prog="python -m experiments.distill", description=__doc__)
    parser.add_argument("folder", type=Path, help="folder of models and speech")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "distill", help="folder of states and targets")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results (experiments/results)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default %(default)s)")
    parser.add_argument("--models", nargs="*", default=MODELS, help="models (default: %(default)s)")
    parser.add_argument("--seeds", nargs="*", type=int, default=SEEDS, help="seeds (default: %(default)s)")
    parser.add_argument("--tune", action="store_true", help="compare settings on the held-out utterances instead")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    for name in options.models:
        if not (options.folder / name).is_dir():
            print(f"{name}: not in {options.folder}, skipped", flush=True)
            continue
        distillation = Distillation(options.folder, name, options.out)
        if options.tune:
            distillation.tune(options.results)
        else:
            distillation.run(options.seeds, options.results)
    return 0


if __name__ == "__main__":
    sys.exit(main())

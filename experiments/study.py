"""Run one seed of one task: a frame-level model, its compression with and without LoRA, and training with compression.

Every row is written to the results as soon as it is complete. A later run skips rows that are in the results.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from experiments.selection import AttentionSelection, BlankRemoval, FrameSelection
from fastcompress.files import write_file
from fastcompress.lalm.loading import load_model, set_compression
from fastcompress.lalm.lora import add_lora
from fastcompress.nn import BipartiteMerge, GreedySegments, IterativeFusion, NoveltyPool
from fastcompress.training.evaluation import evaluate
from fastcompress.training.examples import EncodedExamples, Examples
from fastcompress.training.manifest import read_manifest
from fastcompress.training.recipes import build_small
from fastcompress.training.settings import TrainerSettings
from fastcompress.training.trainer import Training

#: Manifests to score; ``dev`` is for choosing settings.
SETS = ("dev", "test", "test-voice", "test-noise", "test-engine")


@dataclass(frozen=True)
class Compression:
    """A compression of frames into tokens.

    Attributes:
        rule, reduce, keys: Values for the model's configuration.
        module: Factory of a compressor (``fastcompress.nn`` or ``FrameSelection``) that replaces the rule.
        learned: Kind of learned boundaries, at 3 frames per token, that replace the rule.
        proportional_attention, positions: As in the model's configuration; ``experiments/training_free.py`` compares
            them.
    """

    name: str
    rule: str = "none"
    reduce: str = "mean"
    keys: str = "frames"
    module: Callable[[], torch.nn.Module] | None = None
    learned: str | None = None
    proportional_attention: bool = False
    positions: str = "compact"

    @property
    def text(self) -> str:
        """The rule, or a description of its replacement."""
        if self.module is not None:
            return str(self.module())
        return self.rule if self.learned is None else f"learned: {self.learned}"

    def apply(self, model: Any) -> None:
        """Set this compression in a model."""
        set_compression(model, self.rule, self.reduce, self.keys)
        if self.module is not None:
            module = self.module()
            if isinstance(module, FrameSelection):
                module.attach(model)
            model.use_compressor(module)
        if self.learned is not None:
            model.learn_boundaries(3.0, self.learned)
        model.proportional_attention, model.positions = self.proportional_attention, self.positions


FRAMES = Compression("every frame", "none")
POOLING_3X = Compression("uniform pooling 3x", "uniform:3")
#: Compressions to compare. The last one was chosen on the development set of the digits with seed 0.
COMPRESSIONS = (
    FRAMES,
    Compression("uniform sampling 3x", "uniform:3", "first"),
    Compression("uniform pooling 2x", "uniform:2"),
    POOLING_3X,
    Compression("uniform pooling 4x", "uniform:4"),
    Compression("local maxima", "local-max"),
    Compression("CTC change", "threshold:0.3,min_len=2,max_len=5", "mean", "ctc"),
)
#: Published methods by name. Thresholds, the count and rates were chosen so that each method gives 3 frames per token
#: on the development set of the digits; errors were not considered. A-ToMe merges one round. Methods without such a
#: setting have their own rate.
METHODS = (
    Compression("A-ToMe", module=partial(BipartiteMerge, 2.0)),
    Compression("FastAdaSP", "top-k:rate=3"),
    Compression("FastLongSpeech", module=partial(IterativeFusion, 20)),
    Compression("SA-MAP's merge", module=partial(GreedySegments, 0.3)),
    Compression("Affinity Pooling", "lookback:3,threshold=0.2"),
    Compression("CTC compression", "label-change"),
    Compression("UnsupSeg", "local-max:prominence=0.1,normalize=True"),
    Compression("Segmental CPC", "peak-height:0.04"),
    Compression("H-Net's router", learned="h-net"),
    Compression("CIF", learned="cif"),
    Compression("AdaTS", module=partial(NoveltyPool, 0.2)),
    Compression("LTBM", module=partial(BipartiteMerge, 3.0, 5)),
    Compression("blank removal", module=partial(BlankRemoval, 0.5)),
    Compression("CTC without blanks", "label-change:blank=0"),
    Compression("first-layer attention", module=partial(AttentionSelection, 3.0)),
)
FROM_SCRATCH = (
    Compression("uniform pooling 4x", "uniform:4"),
    Compression("uniform pooling 8x", "uniform:8"),
    Compression("local maxima", "local-max"),
)


@dataclass(frozen=True)
class Budget:
    """Amounts of training and scoring.

    Attributes:
        steps: Steps of training from scratch, at 8 utterances.
        lora_steps: Steps of LoRA, at 16 utterances.
        lora_utterances: Utterances to train LoRA on.
        scored: Utterances of each test set; 0 scores all.
        written: Maximum number of text ids per utterance.
        base: Folder of a trained frame-level model; None trains one from scratch.
        compressions, methods: Compressions to score, each with LoRA on the frame-level model.
        from_scratch: Compressions for which a model is trained from scratch.
    """

    steps: int = 6000
    lora_steps: int = 600
    lora_utterances: int = 6000
    scored: int = 0
    written: int = 64
    base: str | None = None
    compressions: tuple[Compression, ...] = COMPRESSIONS
    methods: tuple[Compression, ...] = METHODS
    from_scratch: tuple[Compression, ...] = FROM_SCRATCH


#: Budget per task. The digits have all compressions. On numbers, LoRA at 3x is worse than its control, so a model is
#: trained from scratch at 3x.
BUDGETS = {
    "digits": Budget(),
    "numbers": Budget(methods=(), from_scratch=(POOLING_3X,)),
    "commands": Budget(methods=(), from_scratch=()),
}


class Study:
    """One seed of one task.

    Args:
        task: Name of the task in the results.
        data: Folder from ``fastcompress make-data``.
        folder: Folder for results and trained models.
        seed: Seed of all random numbers.
        budget: Amount of training and scoring.
    """

    def __init__(self, task: str, data: Path, folder: Path, seed: int, budget: Budget) -> None:
        self.task, self.data, self.folder, self.seed, self.budget = task, data, folder, seed, budget
        self.record = folder / f"{task}-{seed}.json"
        self.rows: list[dict[str, Any]] = json.loads(self.record.read_text()) if self.record.exists() else []

    def run(self) -> Path:
        """Compute the missing rows and return the file of all rows."""
        for compression in self.budget.from_scratch:
            if not self._has("start", compression):
                path, seconds = self._model(compression.name.replace(" ", "-"), compression)
                model, processor = load_model(path)
                self._score("start", compression, model, self._sets(model, processor), seconds, self.budget.steps)
        tuned = (*self.budget.compressions, *self.budget.methods)
        work = [(stage, one) for one in tuned for stage in ("zero-shot", "lora") if not self._has(stage, one)]
        if not work:
            return self.record
        base = Path(self.budget.base) if self.budget.base is not None else self._model("base", FRAMES)[0]
        model, processor = load_model(base)
        sets = self._sets(model, processor)
        train: EncodedExamples | None = None
        for stage, compression in work:
            if stage == "zero-shot":
                model, _ = load_model(base)
                compression.apply(model)
                self._score(stage, compression, model, sets, 0.0, 0)
            else:
                if train is None:
                    train = self._encoded("train", model, processor, self.budget.lora_utterances)
                self._train_lora(base, compression, train, sets)
        return self.record

    def _manifest(self, name: str) -> Path:
        return self.data / f"{name}.jsonl"

    def _has(self, stage: str, compression: Compression) -> bool:
        return any(row["stage"] == stage and row["compression"] == compression.name for row in self.rows)

    def _encoded(self, name: str, model: Any, processor: Any, most: int = 0) -> EncodedExamples:
        utterances = read_manifest(self._manifest(name))
        count = most or (self.budget.scored if name != "train" else 0)
        return EncodedExamples(Examples(utterances[: count or None], processor), model)

    def _sets(self, model: Any, processor: Any) -> dict[str, EncodedExamples]:
        return {name: self._encoded(name, model, processor) for name in SETS if self._manifest(name).exists()}

    def _model(self, name: str, compression: Compression) -> tuple[Path, float]:
        """Return the folder of a model, trained from scratch if missing, and the seconds of the training."""
        path = self.folder / "models" / f"{self.task}-{self.seed}-{name}"
        return path, 0.0 if (path / "config.json").exists() else self._train_from_scratch(path, compression)

    def _train_from_scratch(self, path: Path, compression: Compression) -> float:
        """Train a model and return the seconds that it took."""
        utterances = read_manifest(self._manifest("train"))
        model, processor = build_small(utterances, seed=self.seed)
        compression.apply(model)
        examples = Examples(utterances, processor, cache=True, phones=model.config.ctc_tokens)
        settings = TrainerSettings(
            max_steps=self.budget.steps,
            per_device_train_batch_size=8,
            learning_rate=2e-3,
            warmup_steps=250,
            seed=self.seed,
            save_steps=500,
            logging_steps=50,
        )
        since = time.monotonic()
        training = Training(model, examples, settings, path)
        training.resume()
        training.run()
        model.save_pretrained(path)
        processor.save_pretrained(path)
        return time.monotonic() - since

    def _train_lora(
        self, base: Path, compression: Compression, train: EncodedExamples, sets: dict[str, EncodedExamples]
    ) -> None:
        model, _ = load_model(base)
        model.train_encoder(False)
        compression.apply(model)
        torch.manual_seed(self.seed)
        model = add_lora(model, rank=16, alpha=32.0)
        settings = TrainerSettings(
            max_steps=self.budget.lora_steps,
            per_device_train_batch_size=16,
            learning_rate=2e-3,
            projector_learning_rate=5e-4,
            warmup_steps=40,
            augment=False,
            seed=self.seed,
            save_steps=0,
            logging_steps=50,
        )
        since = time.monotonic()
        name = f"{self.task}-{self.seed}-lora-{compression.name.replace(' ', '-')}"
        Training(model, train, settings, self.folder / "models" / name).run()
        self._score("lora", compression, model, sets, time.monotonic() - since, self.budget.lora_steps)

    def _score(
        self,
        stage: str,
        compression: Compression,
        model: Any,
        sets: dict[str, EncodedExamples],
        seconds: float,
        steps: int,
    ) -> None:
        scores = {}
        for name, examples in sets.items():
            timed = 10 if name == "test" else 0
            result, _ = evaluate(model, examples, 32, timed=timed, max_new_tokens=self.budget.written)
            scores[name] = dataclasses.asdict(result)
        row = {
            "task": self.task,
            "seed": self.seed,
            "stage": stage,
            "compression": compression.name,
            "rule": compression.text,
            "reduce": compression.reduce,
            "keys": compression.keys,
            "steps": steps,
            "training_seconds": round(seconds, 1),
            "scores": scores,
        }
        self.rows.append(row)
        write_file(self.record, json.dumps(self.rows, indent=1))
        wer, rate = scores["dev"]["wer"], scores["dev"]["tokens_per_second"]
        what = f"{self.task}, seed {self.seed}: {stage}, {compression.name}"
        print(f"{what}: {rate:.1f} tokens/s, WER {wer:.1f} % (dev)", flush=True)


def run_study(task: str, data: Path, folder: Path, seed: int, budget: Budget) -> Path:
    """Run a ``Study`` on one thread, in its own process."""
    from transformers.utils import logging

    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return Study(task, data, folder, seed, budget).run()


def spread(values: list[float]) -> tuple[float, float]:
    """Return mean and sample standard deviation."""
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return mean, 0.0
    return mean, math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1))

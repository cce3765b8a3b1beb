"""Training of the reference audio LLM: on one process or several, resumed to the bit after a kill.

Each step's batch, dropout and augmentation are functions of the seed, the step and the process. A checkpoint is then
the trained weights, statistics such as those of batch normalisation, the optimizer and the number of steps, and nothing
else.
"""

from __future__ import annotations

import contextlib
import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastcompress import files
from fastcompress.checks import IGNORED_LABEL
from fastcompress.decoder.generation import unwrap
from fastcompress.training import checkpoints
from fastcompress.training.batches import BatchPlan
from fastcompress.training.examples import Augmentation, Examples
from fastcompress.training.logs import Logs


class TrainingStopped(RuntimeError):
    """Training that cannot go on; the message says why and where the last good checkpoint is."""


@dataclass(frozen=True)
class TrainingArguments:
    """How to train; what to train is the model's, on what the examples'.

    Attributes:
        steps: updates of the weights.
        batch_size: examples of a process in a step.
        accumulate: batches whose gradients are added up for a step.
        learning_rate: of everything but the projector, at its highest.
        projector_learning_rate: likewise; ``None``: the same.
        warmup_steps: in which the rate rises from 0; it then falls along a cosine to ``final_rate`` of its highest.
        final_rate: of the highest.
        betas, weight_decay: of AdamW.
        max_grad_norm: to which gradients are clipped.
        augment: SpecAugment of the features.
        seed: of the order of examples, dropout and augmentation.
        precision: ``"fp32"`` or ``"bf16"`` (autocast), of what is computed. A run keeps what it trains, and the moments
            of AdamW, in fp32 either way; what is frozen stays in the dtype in which it came.
        gradient_checkpointing: compute activations twice to save memory.
        save_every: steps between checkpoints, a multiple of ``log_every``, or a resumed run would log other means; 0:
            only at the end.
        keep: how many checkpoints are kept.
        log_every: steps between lines of the log.
        evaluate_every: steps between losses on the development set, a multiple of ``log_every``, whose lines they are
            in; 0: only at the end.
    """

    steps: int = 1000
    batch_size: int = 8
    accumulate: int = 1
    learning_rate: float = 1e-3
    projector_learning_rate: float | None = None
    warmup_steps: int = 100
    final_rate: float = 0.03
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.02
    max_grad_norm: float = 1.0
    augment: bool = True
    seed: int = 0
    precision: str = "fp32"
    gradient_checkpointing: bool = False
    save_every: int = 500
    keep: int = 2
    log_every: int = 10
    evaluate_every: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate", "log_every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("warmup_steps", "save_every", "evaluate_every", "weight_decay", "final_rate"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if not (self.projector_learning_rate is None or self.projector_learning_rate >= 0):
            raise ValueError(f"projector_learning_rate must not be negative, got {self.projector_learning_rate}")
        for name in ("save_every", "evaluate_every"):
            if getattr(self, name) % self.log_every:
                raise ValueError(f"{name} must be a multiple of log_every, {self.log_every}, got {getattr(self, name)}")
        for name in ("learning_rate", "max_grad_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.precision not in ("fp32", "bf16"):
            raise ValueError(f"precision must be fp32 or bf16, got {self.precision!r}")

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0, as a share of the highest."""
        rising = min(1.0, (step + 1) / max(1, self.warmup_steps))
        falling = 0.5 * (1 + math.cos(math.pi * min(1.0, step / self.steps)))
        return rising * (falling * (1 - self.final_rate) + self.final_rate)


Progress = Callable[[int, dict[str, float]], None]
"""Called at each line of the log with the steps done and what was measured since the last."""


class Training:
    """Trains a model in ``folder``: ``checkpoints/``, ``log.csv`` and events of TensorBoard.

    Args:
        model: a ``FastCompressForConditionalGeneration``, with or without LoRA; what requires gradients is trained.
        examples: to train on.
        arguments: how.
        folder: of the run.
        development: whose loss is logged, if given.
        accelerator: of ``accelerate``; ``None``: a new one.
    """

    def __init__(
        self,
        model: Any,
        examples: Examples,
        arguments: TrainingArguments,
        folder: Path,
        development: Examples | None = None,
        accelerator: Any = None,
    ) -> None:
        from accelerate import Accelerator

        self.arguments = arguments
        self.folder = folder
        self.examples: Examples = examples
        self.development: Examples | None = development
        mixed = "bf16" if arguments.precision == "bf16" else "no"
        self.accelerator: Any = accelerator or Accelerator(mixed_precision=mixed)
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not trained:
            raise ValueError("model has no parameter that requires gradients: nothing to train")
        self.trained = trained
        if arguments.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        rate = arguments.learning_rate
        own_rate = arguments.projector_learning_rate
        projector_rate = rate if own_rate is None else own_rate
        groups = [
            {"params": [p for n, p in trained.items() if "projector" not in n], "highest": rate},
            {"params": [p for n, p in trained.items() if "projector" in n], "highest": projector_rate},
        ]
        optimizer = torch.optim.AdamW(
            [g for g in groups if g["params"]], lr=rate, betas=arguments.betas, weight_decay=arguments.weight_decay
        )
        self.model: Any
        self.optimizer: Any
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.buffers: dict[str, torch.Tensor] = _buffers(model)  # after prepare, which moves them
        lengths = [utterance.duration or 0.0 for utterance in examples.utterances]
        self.plan: BatchPlan = BatchPlan(lengths, arguments.batch_size, self.accelerator.num_processes, arguments.seed)
        self.step: int = 0

    @property
    def _checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def resume(self) -> int:
        """Goes back to the last checkpoint, if there is one; returns the steps done."""
        if self.accelerator.is_main_process:
            files.clean(self._checkpoints)
        self.accelerator.wait_for_everyone()
        found = checkpoints.found(self._checkpoints)
        if found:
            self.step = checkpoints.load(found[-1], self.trained, self.optimizer, self.buffers)
        return self.step

    def run(self, progress: Progress | None = None) -> None:
        """Trains from where it is to the last step.

        Raises:
            TrainingStopped: the loss or the gradient is not finite.
        """
        arguments, main = self.arguments, self.accelerator.is_main_process
        logs = Logs(self.folder, self.step) if main else None
        since = time.monotonic()
        measured: list[dict[str, float]] = []
        try:
            while self.step < arguments.steps:
                measured.append(self.update())
                last = self.step == arguments.steps
                if self.step % arguments.log_every == 0 or last:
                    row = _mean(measured)
                    now = time.monotonic()
                    row["tokens_per_second"] = sum(m["tokens"] for m in measured) / (now - since)
                    row["seconds_per_step"] = (now - since) / len(measured)
                    if self._is_due(arguments.evaluate_every) and self.development is not None:
                        row["development_loss"] = self.loss(self.development)
                    since, measured = time.monotonic(), []
                    if logs is not None:
                        logs.write(self.step, row)
                    if progress is not None:
                        progress(self.step, row)
                if self._is_due(arguments.save_every):
                    self.save()
        finally:
            if logs is not None:
                logs.close()

    def _is_due(self, every: int) -> bool:
        return self.step == self.arguments.steps or (every > 0 and self.step % every == 0)

    def save(self) -> None:
        """Writes a checkpoint of the steps done."""
        if self.accelerator.is_main_process:
            tensors = self.trained | self.buffers
            checkpoints.save(self._checkpoints, self.step, tensors, self.optimizer, self.arguments.keep)
        self.accelerator.wait_for_everyone()

    def update(self) -> dict[str, float]:
        """One step of the optimizer; returns what was measured in it.

        Raises:
            TrainingStopped: as :meth:`run`.
        """
        arguments, accelerator = self.arguments, self.accelerator
        self.model.train()
        _seed(arguments.seed, self.step, accelerator.process_index)
        augmentation = Augmentation() if arguments.augment else None
        batches = []
        for part in range(arguments.accumulate):
            where = self.step * arguments.accumulate + part
            process = accelerator.process_index
            indices = self.plan.batch(where, process)
            batch = self.examples.batch(indices, augmentation, f"{arguments.seed}, {where}, {process}")
            batches.append({name: tensor.to(accelerator.device) for name, tensor in batch.items()})
        # Of all processes and parts: each label, and each audio, then weighs the same wherever it landed.
        counts = torch.tensor(
            [
                sum(int((b["labels"] != IGNORED_LABEL).sum()) for b in batches),
                sum(len(b.get("ctc_labels", ())) for b in batches),
            ],
            device=accelerator.device,
        )
        labels, audios = accelerator.reduce(counts, "sum").tolist()
        share = arguments.rate(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = group["highest"] * share
        totals = torch.zeros(5, dtype=torch.float64, device=accelerator.device)
        for i, batch in enumerate(batches):
            with accelerator.no_sync(self.model) if i < len(batches) - 1 else contextlib.nullcontext():
                with accelerator.autocast():
                    out = self.model(**batch, num_items_in_batch=labels)
                loss = out.lm_loss
                ctc = out.lm_loss.new_zeros(())
                if out.ctc_loss is not None:
                    ctc = out.ctc_loss * (len(batch["ctc_labels"]) / max(1, audios))
                    loss = loss + unwrap(self._unwrapped).config.ctc_weight * ctc
                if out.compressor_loss is not None:  # a mean over frames: of processes and parts, too
                    parts_of_all = accelerator.num_processes * arguments.accumulate
                    loss = loss + unwrap(self._unwrapped).compressor_weight * out.compressor_loss / parts_of_all
                # The processes' gradients are averaged, where their sum is meant.
                accelerator.backward(loss * accelerator.num_processes)
            parts = (loss, out.lm_loss, ctc, out.num_audio_tokens, out.num_frames)
            totals += torch.stack([torch.as_tensor(v, device=totals.device).detach().double() for v in parts])
        norm = float(accelerator.clip_grad_norm_(list(self.trained.values()), arguments.max_grad_norm))
        loss, lm_loss, ctc_loss, tokens, frames = accelerator.reduce(totals, "sum").tolist()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise TrainingStopped(self._why_stopped(loss, norm))
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        found = {"loss": loss, "lm_loss": lm_loss, "grad_norm": norm}
        found["learning_rate"] = self.optimizer.param_groups[0]["lr"]  # the projector's is in the last
        if unwrap(self._unwrapped).config.ctc_tokens:
            found["ctc_loss"] = ctc_loss
        return found | {"tokens": labels + tokens, "audio_tokens": tokens, "audio_frames": frames}

    @property
    def _unwrapped(self) -> Any:
        return self.accelerator.unwrap_model(self.model)

    def _why_stopped(self, loss: float, norm: float) -> str:
        found = checkpoints.found(self._checkpoints)
        kept = f"the last good checkpoint is {found[-1]}" if found else "there is no checkpoint yet"
        return (
            f"the loss of step {self.step + 1} is {loss} and the norm of its gradient {norm}: training stopped before "
            f"the weights were changed, {kept}. A lower learning rate or fp32 may help"
        )

    @torch.no_grad()
    def loss(self, examples: Examples) -> float:
        """Of the decoder, a label, on examples that are not trained on; each process computes all of it."""
        self.model.eval()
        total, count = 0.0, 0
        model = self._unwrapped
        for begin in range(0, len(examples), self.arguments.batch_size):
            indices = range(begin, min(begin + self.arguments.batch_size, len(examples)))
            batch = {k: v.to(self.accelerator.device) for k, v in examples.batch(indices).items()}
            batch.pop("ctc_labels", None)
            labels = int((batch["labels"] != IGNORED_LABEL).sum())
            with self.accelerator.autocast():
                total += float(model(**batch, num_items_in_batch=1).lm_loss)
            count += labels
        return total / max(1, count)


def _buffers(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What training may change besides weights: the persistent buffers of modules that are then in training mode."""
    before = {module: module.training for module in model.modules()}
    model.train()
    found = {
        f"{name}.{own}" if name else own: buffer
        for name, module in model.named_modules()
        if module.training
        for own, buffer in module.named_buffers(recurse=False)
        if own not in module._non_persistent_buffers_set
    }
    for module, mode in before.items():
        module.training = mode
    return found


def _seed(seed: int, step: int, process: int) -> None:
    """Dropout, and whatever else is random in a step: transformers draws the masks of some encoders from numpy."""
    g = random.Random(f"{seed}, {step}, {process}")
    torch.manual_seed(g.getrandbits(63))
    np.random.seed(g.getrandbits(32))
    random.seed(g.getrandbits(63))


def _mean(rows: list[dict[str, float]]) -> dict[str, float]:
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}

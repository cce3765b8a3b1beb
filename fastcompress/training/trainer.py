"""Training of the reference audio LLM on one or several processes. A resumed run is bit-equal to an uninterrupted one.

Each step's batch, dropout and augmentation are functions of the seed, the step and the process. A checkpoint therefore
has only the trained weights, statistics such as those of batch normalization, the optimizer and the number of steps.
"""

from __future__ import annotations

import contextlib
import math
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastcompress import files
from fastcompress.checks import IGNORED_LABEL
from fastcompress.decoder.generation import unwrap
from fastcompress.training import checkpoints, distillation
from fastcompress.training.batches import BatchPlan
from fastcompress.training.distillation import Teacher
from fastcompress.training.examples import Augmentation, Examples
from fastcompress.training.logs import Logs
from fastcompress.training.rate_schedule import RateSchedule
from fastcompress.training.settings import TrainerSettings


class TrainingStopped(RuntimeError):
    """Training cannot continue. The message has the reason and the last good checkpoint."""


Progress = Callable[[int, dict[str, float]], None]
"""Called at each line of the log with the number of steps, and what was measured since the last line."""


class Training:
    """Train a model, and write ``checkpoints/``, ``log.csv`` and TensorBoard events.

    Args:
        model: A ``FastCompressForConditionalGeneration``, with or without LoRA. Parameters that require gradients are
            trained.
        examples: Examples to train on.
        settings: Settings of optimization, checkpoints and log.
        folder: Folder of the run.
        development: Examples whose loss is logged.
        accelerator: Instance of ``accelerate.Accelerator``. ``None``: a new one.
        schedule: Rules of the batches. ``None``: the model's.
        teacher: Model to learn from, beside the labels.
    """

    def __init__(
        self,
        model: Any,
        examples: Examples,
        settings: TrainerSettings,
        folder: Path,
        development: Examples | None = None,
        accelerator: Any = None,
        schedule: RateSchedule | None = None,
        teacher: Teacher | None = None,
    ) -> None:
        from accelerate import Accelerator

        self.settings: TrainerSettings = settings
        self.folder = folder
        self.examples: Examples = examples
        self.development: Examples | None = development
        self.schedule: RateSchedule | None = schedule
        self.teacher: Teacher | None = teacher
        mixed = "bf16" if settings.bf16 else "no"
        self.accelerator: Any = accelerator or Accelerator(mixed_precision=mixed)
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not trained:
            raise ValueError("`model` has no parameter that requires gradients")
        self.trained = trained
        if settings.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        rate = settings.learning_rate
        own_rate = settings.projector_learning_rate
        projector_rate = rate if own_rate is None else own_rate
        groups = [
            {"params": [p for n, p in trained.items() if "projector" not in n], "highest": rate},
            {"params": [p for n, p in trained.items() if "projector" in n], "highest": projector_rate},
        ]
        optimizer = torch.optim.AdamW(
            [g for g in groups if g["params"]],
            lr=rate,
            betas=(settings.adam_beta1, settings.adam_beta2),
            weight_decay=settings.weight_decay,
        )
        self.model: Any
        self.optimizer: Any
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.buffers: dict[str, torch.Tensor] = _buffers(model)  # after prepare, which moves them
        lengths = [utterance.duration or 0.0 for utterance in examples.utterances]
        self.plan: BatchPlan = BatchPlan(
            lengths, settings.per_device_train_batch_size, self.accelerator.num_processes, settings.seed
        )
        self.step: int = 0

    @property
    def _checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def resume(self) -> int:
        """Load the last checkpoint, if there is one, and return its number of steps."""
        if self.accelerator.is_main_process:
            files.clean(self._checkpoints)
        self.accelerator.wait_for_everyone()
        found = checkpoints.found(self._checkpoints)
        if found:
            self.step = checkpoints.load(found[-1], self.trained, self.optimizer, self.buffers)
        return self.step

    def run(self, progress: Progress | None = None) -> None:
        """Train from the current step to the last.

        Raises:
            TrainingStopped: The loss or the gradient is not finite.
        """
        settings, main = self.settings, self.accelerator.is_main_process
        logs = Logs(self.folder, self.step) if main else None
        since = time.monotonic()
        measured: list[dict[str, float]] = []
        try:
            while self.step < settings.max_steps:
                measured.append(self.update())
                last = self.step == settings.max_steps
                if self.step % settings.logging_steps == 0 or last:
                    row = _mean(measured)
                    now = time.monotonic()
                    row["tokens_per_second"] = sum(m["tokens"] for m in measured) / (now - since)
                    row["seconds_per_step"] = (now - since) / len(measured)
                    if self._is_due(settings.eval_steps) and self.development is not None:
                        row["development_loss"] = self.loss(self.development)
                    since, measured = time.monotonic(), []
                    if logs is not None:
                        logs.write(self.step, row)
                    if progress is not None:
                        progress(self.step, row)
                if self._is_due(settings.save_steps):
                    self.save()
        finally:
            if self.schedule is not None:
                self.schedule.finish()
            if logs is not None:
                logs.close()

    def _is_due(self, every: int) -> bool:
        return self.step == self.settings.max_steps or (every > 0 and self.step % every == 0)

    def save(self) -> None:
        """Write a checkpoint."""
        if self.accelerator.is_main_process:
            tensors = self.trained | self.buffers
            checkpoints.save(self._checkpoints, self.step, tensors, self.optimizer, self.settings.save_total_limit)
        self.accelerator.wait_for_everyone()

    def update(self) -> dict[str, float]:
        """Run one step of the optimizer and return its measurements.

        Raises:
            TrainingStopped: As ``run``.
        """
        settings, accelerator = self.settings, self.accelerator
        self.model.train()
        _seed(settings.seed, self.step, accelerator.process_index)
        augmentation = Augmentation() if settings.augment else None
        batches = []
        for part in range(settings.gradient_accumulation_steps):
            where = self.step * settings.gradient_accumulation_steps + part
            process = accelerator.process_index
            indices = self.plan.batch(where, process)
            batch = self.examples.batch(indices, augmentation, f"{settings.seed}, {where}, {process}")
            batches.append({name: tensor.to(accelerator.device) for name, tensor in batch.items()})
        # Counts are over all processes and batches of the step, so that each label and each audio has the same weight.
        counts = torch.tensor(
            [
                sum(int((b["labels"] != IGNORED_LABEL).sum()) for b in batches),
                sum(len(b.get("ctc_labels", ())) for b in batches),
            ],
            device=accelerator.device,
        )
        labels, audios = accelerator.reduce(counts, "sum").tolist()
        share = settings.rate(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = group["highest"] * share
        totals = torch.zeros(6, dtype=torch.float64, device=accelerator.device)
        for i, batch in enumerate(batches):
            if self.schedule is not None:
                self.schedule.set(self.step, self.step * settings.gradient_accumulation_steps + i)
            with accelerator.no_sync(self.model) if i < len(batches) - 1 else contextlib.nullcontext():
                with accelerator.autocast():
                    out = self.model(**batch, num_items_in_batch=labels)
                loss = out.lm_loss
                ctc = out.lm_loss.new_zeros(())
                if out.ctc_loss is not None:
                    ctc = out.ctc_loss * (len(batch["ctc_labels"]) / max(1, audios))
                    loss = loss + unwrap(self._unwrapped).config.ctc_weight * ctc
                divergence = out.lm_loss.new_zeros(())
                if self.teacher is not None:
                    with accelerator.autocast():
                        wanted = self.teacher.logits(batch)
                    divergence = distillation.divergence(out.logits, wanted, labels)
                    loss = loss + self.teacher.weight * divergence
                if out.compressor_loss is not None:  # a mean over frames, and therefore over processes and batches
                    parts_of_all = accelerator.num_processes * settings.gradient_accumulation_steps
                    loss = loss + unwrap(self._unwrapped).compressor_weight * out.compressor_loss / parts_of_all
                # Gradients are averaged over processes; the loss needs their sum.
                accelerator.backward(loss * accelerator.num_processes)
            parts = (loss, out.lm_loss, ctc, divergence, out.num_audio_tokens, out.num_frames)
            totals += torch.stack([torch.as_tensor(v, device=totals.device).detach().double() for v in parts])
        norm = float(accelerator.clip_grad_norm_(list(self.trained.values()), settings.max_grad_norm))
        loss, lm_loss, ctc_loss, teacher_loss, tokens, frames = accelerator.reduce(totals, "sum").tolist()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise TrainingStopped(self._why_stopped(loss, norm))
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        found = {"loss": loss, "lm_loss": lm_loss, "grad_norm": norm}
        found["learning_rate"] = self.optimizer.param_groups[0]["lr"]  # the projector's rate is in the last group
        if unwrap(self._unwrapped).config.ctc_tokens:
            found["ctc_loss"] = ctc_loss
        if self.teacher is not None:
            found["teacher_loss"] = teacher_loss
        return found | {"tokens": labels + tokens, "audio_tokens": tokens, "audio_frames": frames}

    @property
    def _unwrapped(self) -> Any:
        return self.accelerator.unwrap_model(self.model)

    def _why_stopped(self, loss: float, norm: float) -> str:
        found = checkpoints.found(self._checkpoints)
        kept = f"the last good checkpoint is {found[-1]}" if found else "there is no checkpoint yet"
        return (
            f"the loss of step {self.step + 1} is {loss} and the norm of its gradient {norm}: training stopped before "
            f"the weights changed, {kept}; try a lower learning rate, or fp32"
        )

    @torch.no_grad()
    def loss(self, examples: Examples) -> float:
        """Return the decoder's loss per label on examples. Each process computes all of it."""
        self.model.eval()
        if self.schedule is not None:
            self.schedule.finish()
        total, count = 0.0, 0
        model = self._unwrapped
        for begin in range(0, len(examples), self.settings.per_device_train_batch_size):
            indices = range(begin, min(begin + self.settings.per_device_train_batch_size, len(examples)))
            batch = {k: v.to(self.accelerator.device) for k, v in examples.batch(indices).items()}
            batch.pop("ctc_labels", None)
            labels = int((batch["labels"] != IGNORED_LABEL).sum())
            with self.accelerator.autocast():
                total += float(model(**batch, num_items_in_batch=1).lm_loss)
            count += labels
        return total / max(1, count)


def _buffers(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the persistent buffers that training can change: those of modules in training mode."""
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
    """Seed all generators for a step; transformers draws the masks of some encoders from numpy."""
    g = random.Random(f"{seed}, {step}, {process}")
    torch.manual_seed(g.getrandbits(63))
    np.random.seed(g.getrandbits(32))
    random.seed(g.getrandbits(63))


def _mean(rows: list[dict[str, float]]) -> dict[str, float]:
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}

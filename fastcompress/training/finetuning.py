"""LoRA on a stock audio LLM with compressed audio, as in the paper on Qwen2-Audio.

``transformers.Trainer`` trains. This module makes the conversations and the adapter, and computes the scores.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import re
import sys
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fastcompress.checks import IGNORED_LABEL
from fastcompress.decoder.generation import unwrap
from fastcompress.decoder.limits import counting_answers
from fastcompress.files import check_folder, named, reason, write_file
from fastcompress.integrations.transformers import BudgetProcessor, apply_to, compressed_prompt
from fastcompress.integrations.transformers.prompts import processor_inputs
from fastcompress.lalm.lora import lora_targets
from fastcompress.training.evaluation import count_clipped, end_tokens
from fastcompress.training.manifest import Utterance
from fastcompress.training.normalization import normalizer
from fastcompress.training.parsing import RECORD, check_record, write_record
from fastcompress.training.scores import character_errors, total, word_errors
from fastcompress.training.settings import FinetuneSettings, SettingsError
from fastcompress.training.usable import SKIPPED, Skipped, load_utterance, print_line
from fastcompress.version import __version__

#: Names in the folder of a run: the adapter with its processor; and versions, losses and scores.
ADAPTER, RESULTS = "adapter", "finetune.json"


class FinetuningError(ValueError):
    """A run cannot start or resume. The message is one line."""


class Conversations:
    """Collator of batches. Each example is an instruction with an audio, and its answer.

    Args:
        processor: Processor of the model. Its chat template is used, or, without one, the audio token and the prompt.
        prompt: Instruction for utterances without one.
    """

    def __init__(self, processor: Any, prompt: str) -> None:
        self.processor = processor
        self.prompt = prompt
        extractor = getattr(processor, "feature_extractor", None) or getattr(processor, "audio_processor", None)
        self.sampling_rate: int = getattr(extractor, "sampling_rate", 16000)
        self.decoded: int = 0  # samples, so far

    def prompts(self, utterances: Sequence[Utterance]) -> dict[str, Tensor]:
        """Return the model's inputs up to the answer, padded on the left.

        Raises:
            AudioError: The audio of an utterance cannot be used.
        """
        # Utterances with and without audio are processed separately: some processors need an audio for each text.
        groups = [[i for i, u in enumerate(utterances) if u.has_audio is has_audio] for has_audio in (True, False)]
        rows: list[Tensor] = [torch.empty(0)] * len(utterances)
        found: dict[str, Tensor] = {}
        for group in filter(None, groups):
            inputs = self._processed([utterances[i] for i in group])
            ids = inputs["input_ids"]
            for i, row, kept in zip(group, ids, inputs["attention_mask"].bool(), strict=True):
                rows[i] = row[kept]
            found |= {name: x for name, x in inputs.items() if isinstance(x, Tensor) and x.shape != ids.shape}
        pad = nn.utils.rnn.pad_sequence
        found["input_ids"] = pad(rows, True, self.processor.tokenizer.pad_token_id, "left")
        found["attention_mask"] = pad([torch.ones_like(row) for row in rows], True, 0, "left")
        return found

    def _processed(self, utterances: Sequence[Utterance]) -> Any:
        """Return the processor's output for utterances that all have audio, or all have none."""
        audios = [load_utterance(u, self.sampling_rate) for u in utterances if u.has_audio]
        self.decoded += sum(map(len, audios))
        prompts = [self.prompt if u.prompt is None else u.prompt for u in utterances]
        return processor_inputs(self.processor, audios, prompts)

    def __call__(self, utterances: Sequence[Utterance]) -> dict[str, Tensor]:
        """Return the model's inputs with the answers and their labels, padded on the right."""
        inputs = self.prompts(utterances)
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        tokenizer = self.processor.tokenizer
        rows, labels = [], []
        for row, kept, u in zip(ids, mask.bool(), utterances, strict=True):
            target = tokenizer(u.target, add_special_tokens=False).input_ids
            target = torch.tensor([*target, tokenizer.eos_token_id])
            rows.append(torch.cat([row[kept], target]))
            labels.append(torch.cat([torch.full_like(row[kept], IGNORED_LABEL), target]))
        pad = nn.utils.rnn.pad_sequence
        others = {name: value for name, value in inputs.items() if value.shape != ids.shape}
        return others | {
            "input_ids": pad(rows, True, tokenizer.pad_token_id),
            "attention_mask": pad([torch.ones_like(row) for row in rows], True, 0),
            "labels": pad(labels, True, IGNORED_LABEL),
        }


def load(path: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """Load a stock model and its processor.

    Raises:
        FinetuningError: The folder has no model that transformers knows.
    """
    try:
        model = _class_of(transformers.AutoConfig.from_pretrained(path), path).from_pretrained(path, dtype=dtype)
        return model, transformers.AutoProcessor.from_pretrained(path)
    except FinetuningError:
        raise
    except (OSError, ValueError) as error:
        raise FinetuningError(named(path, str(error).strip().splitlines()[0])) from error


def _class_of(config: Any, path: str) -> Any:
    name = (config.architectures or ["none"])[0]
    if not hasattr(transformers, name):
        raise FinetuningError(f"{path}: transformers has no architecture {name}")
    return getattr(transformers, name)


def add_lora(model: Any, settings: FinetuneSettings) -> Any:
    """Add LoRA to the decoder of a compressed model and freeze the rest, except for the projector.

    Trained weights are in fp32, frozen weights keep their dtype. A model in bf16 then needs autocast.
    """
    from peft import LoraConfig, get_peft_model
    from peft.utils import ModulesToSaveWrapper

    core = {name for name, _ in model.model.named_children()}
    saved = [name for name in ("multi_modal_projector", "projector") if settings.train_projector and name in core]
    config = LoraConfig(
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,  # type: ignore[arg-type]  # annotated as int, but divided by the rank
        lora_dropout=settings.lora_dropout,
        target_modules=lora_targets(model.model.language_model),
        modules_to_save=saved or None,
    )
    tuned = get_peft_model(model, config)
    for module in tuned.modules():
        if isinstance(module, ModulesToSaveWrapper):
            module.modules_to_save.float()
    return tuned


def _compress(model: Any, settings: FinetuneSettings) -> None:
    apply_to(
        model,
        settings.rule,
        settings.mode,
        before_projector=settings.before_projector,
        proportional_attention=settings.proportional_attention,
        positions=settings.positions,
    )


def weights_dtype(settings: FinetuneSettings) -> torch.dtype:
    """Return the dtype of frozen weights."""
    return torch.bfloat16 if settings.bf16 else torch.float32


def memory(settings: FinetuneSettings) -> dict[str, int]:
    """Count parameters and bytes of a run, except for activations, from the model's configuration alone."""
    config = transformers.AutoConfig.from_pretrained(settings.model)
    before = torch.get_default_dtype()
    torch.set_default_dtype(weights_dtype(settings))
    try:
        with torch.device("meta"):
            model = _class_of(config, settings.model)(config)
            _compress(model, settings)
            model = add_lora(model, settings)
    finally:
        torch.set_default_dtype(before)
    sizes = [(p.numel(), p.element_size(), p.requires_grad) for p in model.parameters()]
    return {
        "parameters": sum(n for n, _, _ in sizes),
        "trained": sum(n for n, _, trained in sizes if trained),
        "weights_bytes": sum(n * size for n, size, _ in sizes),
        "training_bytes": sum(3 * n * size for n, size, trained in sizes if trained),  # gradient and two moments
    }


def finetune(settings: FinetuneSettings, resume: bool = False, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Adapt a model, and write ``run.yaml``, ``adapter/`` and ``finetune.json`` to the run's folder.

    Args:
        settings: Settings of the run.
        resume: Whether to continue after the last complete checkpoint of the folder.
        say: Function called with each line to print.

    Returns:
        The content of ``finetune.json``: versions, losses, and scores of ``dev``.

    Raises:
        SettingsError: ``resume`` with other settings than the run started with.
        FinetuningError: The folder already contains a run, or a model or manifest cannot be used.
        NotImplementedError: The model cannot be compressed in this way.
    """
    out = Path(settings.output_dir)
    if any(out.glob("checkpoint-*")) and not resume:
        raise FinetuningError(f"{out}: already contains a run; resume it, or choose another folder")
    if resume and (out / RECORD).is_file():
        check_record(settings, out)
    normalizer(settings.normalize)  # fail now if its package is missing
    try:
        check_folder(out)  # before gigabytes are loaded
    except OSError as error:
        raise SettingsError(f"`output_dir` {out}: {reason(error)}") from error
    last = newest_checkpoint(out, say)
    skipped = Skipped(out / SKIPPED, print_line if os.environ.get("RANK", "0") == "0" else None)
    data = _read(settings.data, settings, skipped, training=True)
    dev = [] if settings.dev is None else _read(settings.dev, settings, skipped)
    model, processor = load(settings.model, weights_dtype(settings))
    _compress(model, settings)
    if settings.mode == "budget":
        processor = BudgetProcessor(processor, model)
    torch.manual_seed(settings.seed)
    model = add_lora(model, settings)
    conversations = Conversations(processor, settings.prompt)
    trainer = transformers.Trainer(
        model=model, args=_training_arguments(settings), train_dataset=data, data_collator=conversations
    )
    if trainer.is_world_process_zero():
        out.mkdir(parents=True, exist_ok=True)
        skipped.write()
        if last is None:  # before the first checkpoint, which is resumed with them
            write_record(settings, out)
    if last is not None:
        say(f"resuming after step {last.name.rpartition('-')[2]} of {settings.max_steps}")
    trainer.train(resume_from_checkpoint=None if last is None else str(last))
    results: dict[str, Any] = {
        "versions": {
            "fastcompress": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "losses": [(row["step"], row["loss"]) for row in trainer.state.log_history if "loss" in row],
    }
    if trainer.is_world_process_zero():
        model.save_pretrained(out / ADAPTER)
        processor.save_pretrained(out / ADAPTER)
        if dev:
            batch_size = settings.per_device_train_batch_size
            scores = score(model, conversations, dev, batch_size, settings.max_new_tokens, settings.normalize)
            if scores["clipped"]:
                say(f"{scores['clipped']} of {len(dev)} answers were cut at {settings.max_new_tokens} new tokens")
            say(f"dev: {scores['wer']:.1f} % WER, {scores['tokens_per_second']:.1f} tokens per second of audio")
            results["scores"] = scores
        write_file(out / RESULTS, json.dumps(results, indent=1))
    return results


def _training_arguments(settings: FinetuneSettings) -> transformers.TrainingArguments:
    names = {field.name for field in dataclasses.fields(transformers.TrainingArguments)}
    return transformers.TrainingArguments(
        **{name: value for name, value in settings.to_dict().items() if name in names},
        lr_scheduler_type="cosine",
        gradient_checkpointing_kwargs={"use_reentrant": False} if settings.gradient_checkpointing else None,
        report_to=[],
        remove_unused_columns=False,
        label_names=["labels"],
        disable_tqdm=not sys.stderr.isatty(),
        use_cpu=not torch.cuda.is_available(),
        ddp_find_unused_parameters=False,
    )


def newest_checkpoint(out: Path, say: Callable[[str], object] = lambda text: None) -> Path | None:
    """Return the newest whole checkpoint. ``Trainer`` writes them in place, so a kill can leave part of one."""
    found = [path for path in out.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name) and path.is_dir()]
    for path in sorted(found, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True):
        if _is_whole(path):
            return path
        say(f"{path} is not whole: skipped")
    return None


def _is_whole(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))  # written last
        with safe_open(checkpoint / "adapter_model.safetensors", "pt"):
            pass
        zipped = [checkpoint / "optimizer.pt", checkpoint / "scheduler.pt", *checkpoint.glob("rng_state*.pth")]
        has_config = (checkpoint / "adapter_config.json").is_file()
        return has_config and len(zipped) > 2 and all(map(zipfile.is_zipfile, zipped))
    except (OSError, ValueError, SafetensorError):
        return False


def _read(path: str, settings: FinetuneSettings, skipped: Skipped, training: bool = False) -> list[Utterance]:
    """Return the utterances of a manifest that can be decoded, so that errors are found before training."""
    return skipped.decode(path, skipped.read(path, settings.max_seconds, training), 16000)


@counting_answers()  # it counts them itself, over all batches
@torch.no_grad()
def score(
    model: Any,
    conversations: Conversations,
    utterances: Sequence[Utterance],
    batch_size: int,
    max_new_tokens: int,
    normalize: str = "none",
) -> dict[str, float]:
    """Compute word and character error rates of greedy answers in %, and tokens per second of audio."""
    normalized = normalizer(normalize)
    base = unwrap(model)
    model.eval()
    written: list[str] = []
    tokens = clipped = 0
    before = conversations.decoded
    tokenizer = conversations.processor.tokenizer
    for begin in range(0, len(utterances), batch_size):
        inputs = conversations.prompts(utterances[begin : begin + batch_size])
        inputs = {
            name: value.to(base.device, base.dtype if value.is_floating_point() else None)
            for name, value in inputs.items()
        }
        is_audio = inputs["input_ids"] == base.config.audio_token_id
        # Trained weights are in fp32, frozen weights need not be.
        with torch.autocast(base.device.type, base.dtype, enabled=base.dtype in (torch.float16, torch.bfloat16)):
            if base.fastcompress_settings.mode == "dynamic":
                text = int((inputs["attention_mask"].bool() & ~is_audio).sum())
                tokens += len(compressed_prompt(base, **inputs).source) - text
            else:
                tokens += int(is_audio.sum())
            out = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        new = out[:, inputs["input_ids"].shape[1] :]
        clipped += count_clipped(new, end_tokens(base, tokenizer))
        written += tokenizer.batch_decode(new, skip_special_tokens=True)
    references, hypotheses = [normalized(u.target) for u in utterances], [normalized(t.strip()) for t in written]
    seconds = (conversations.decoded - before) / conversations.sampling_rate
    return {
        "utterances": len(utterances),
        "wer": total(word_errors(references, hypotheses)).rate,
        "cer": total(character_errors(references, hypotheses)).rate,
        "tokens_per_second": tokens / seconds if seconds else 0.0,
        "clipped": clipped,
    }

"""LoRA on a stock audio LLM whose audio is compressed: what the paper did to Qwen2-Audio.

transformers' ``Trainer`` trains; here are the conversations that it is given, the adapter, and the scores.
"""

from __future__ import annotations

import dataclasses
import json
import platform
import re
import sys
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fastcompress.audio import AudioError
from fastcompress.checks import IGNORED_LABEL
from fastcompress.decoder.generation import unwrap
from fastcompress.files import write_file
from fastcompress.integrations.transformers import BudgetProcessor, apply_to, compressed_prompt
from fastcompress.lalm.lora import lora_targets
from fastcompress.training.manifest import Utterance, check_audio, format_skipped, load_utterance, read_manifest
from fastcompress.version import __version__

#: Of a run's folder.
ADAPTER, RECORD = "adapter", "finetune.json"


class FinetuningError(ValueError):
    """A run that cannot start as asked; the message is one line."""


@dataclass(frozen=True)
class Finetuning:
    """How to adapt a model.

    Attributes:
        model: folder or name of a stock audio LLM.
        data: manifest to train on.
        out: folder of the run.
        rule: of the compression.
        mode, before_projector: as in :func:`apply_to`.
        dev: manifest that is scored at the end; ``None``: nothing is.
        prompt: what is asked for, where the manifest does not say.
        steps, batch_size, accumulate, learning_rate, warmup_steps: of ``Trainer``, with a cosine schedule.
        lora_rank, lora_alpha, lora_dropout: of LoRA on the decoder's attention and MLP.
        train_projector: train the projector in full, too.
        precision: ``"bf16"`` or ``"fp32"``, of the weights that are frozen, and of what is computed; what is trained is
            in fp32.
        gradient_checkpointing: compute activations twice to save memory.
        max_seconds: longer audio is skipped.
        max_new_tokens: of what is written when ``dev`` is scored.
        save_every, log_every: steps.
        seed: of everything.
    """

    model: str
    data: str
    out: str
    rule: str = "uniform:3"
    mode: str = "dynamic"
    before_projector: bool = False
    dev: str | None = None
    prompt: str = "Transcribe the audio."
    steps: int = 1000
    batch_size: int = 4
    accumulate: int = 4
    learning_rate: float = 1e-4
    warmup_steps: int = 50
    lora_rank: int = 16
    lora_alpha: float = 32.0
    lora_dropout: float = 0.0
    train_projector: bool = True
    precision: str = "bf16"
    gradient_checkpointing: bool = True
    max_seconds: float = 30.0
    max_new_tokens: int = 128
    save_every: int = 200
    log_every: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate", "lora_rank", "max_new_tokens", "save_every", "log_every"):
            if getattr(self, name) < 1:
                raise FinetuningError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.learning_rate > 0:
            raise FinetuningError(f"learning_rate must be positive, got {self.learning_rate}")
        if self.precision not in ("bf16", "fp32"):
            raise FinetuningError(f"precision must be bf16 or fp32, got {self.precision!r}")

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.precision == "bf16" else torch.float32


class Conversations:
    """Batches of a question with an audio, and its answer.

    Args:
        processor: of the model; its chat template is used, or, if it has none, the audio token and the prompt.
        prompt: what is asked for, where an utterance does not say.
    """

    def __init__(self, processor: Any, prompt: str) -> None:
        self.processor = processor
        self.prompt = prompt
        extractor = getattr(processor, "feature_extractor", None) or getattr(processor, "audio_processor", None)
        self.sampling_rate: int = getattr(extractor, "sampling_rate", 16000)

    def prompts(self, utterances: Sequence[Utterance]) -> dict[str, Tensor]:
        """What the model takes to write an answer, padded.

        Raises:
            AudioError: audio that cannot be used.
        """
        # Those without audio apart: some processors want one for each text.
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
        """What the processor makes of utterances that all have audio, or all have none."""
        audios = [load_utterance(u, self.sampling_rate) for u in utterances if u.has_audio]
        prompts = [self.prompt if u.prompt is None else u.prompt for u in utterances]
        padded = {"text_kwargs": {"padding": True}, "return_tensors": "pt"}
        if not (getattr(self.processor, "chat_template", None) or self.processor.tokenizer.chat_template):
            texts = [f"{self.processor.audio_token if audios else ''}{prompt}" for prompt in prompts]
            return self.processor(text=texts, audio=audios or None, **padded)
        heard = [[{"type": "audio", "audio": audio}] for audio in audios] or [[] for _ in prompts]
        conversations = [
            [{"role": "user", "content": [*audio, {"type": "text", "text": prompt}]}]
            for audio, prompt in zip(heard, prompts, strict=True)
        ]
        return self.processor.apply_chat_template(
            conversations, tokenize=True, return_dict=True, add_generation_prompt=True, processor_kwargs=padded
        )

    def __call__(self, utterances: Sequence[Utterance]) -> dict[str, Tensor]:
        """With the answers, to be written, behind; padded on the right."""
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
    """A stock model and its processor.

    Raises:
        FinetuningError: the folder has none that transformers knows.
    """
    try:
        model = _class_of(transformers.AutoConfig.from_pretrained(path), path).from_pretrained(path, dtype=dtype)
        return model, transformers.AutoProcessor.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise FinetuningError(f"{path}: {str(error).strip().splitlines()[0]}") from error


def _class_of(config: Any, path: str) -> Any:
    name = (config.architectures or ["none"])[0]
    if not hasattr(transformers, name):
        raise FinetuningError(f"{path}: its architecture, {name}, is not one of transformers")
    return getattr(transformers, name)


def add_lora(model: Any, settings: Finetuning) -> Any:
    """Freezes a compressed model but for LoRA on its decoder, and its projector: both in fp32, others as they are.

    A model in bf16 then needs autocast.
    """
    from peft import LoraConfig, get_peft_model
    from peft.utils import ModulesToSaveWrapper

    core = {name for name, _ in model.model.named_children()}
    saved = [name for name in ("multi_modal_projector", "projector") if settings.train_projector and name in core]
    config = LoraConfig(
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,  # type: ignore[arg-type]  # peft says int, and divides it by the rank
        lora_dropout=settings.lora_dropout,
        target_modules=lora_targets(model.model.language_model),
        modules_to_save=saved or None,
    )
    tuned = get_peft_model(model, config)
    for module in tuned.modules():
        if isinstance(module, ModulesToSaveWrapper):
            module.modules_to_save.float()
    return tuned


def memory(settings: Finetuning) -> dict[str, int]:
    """Parameters and bytes of a run, without what activations take: from the configuration, nothing is loaded."""
    config = transformers.AutoConfig.from_pretrained(settings.model)
    before = torch.get_default_dtype()
    torch.set_default_dtype(settings.dtype)
    try:
        with torch.device("meta"):
            model = _class_of(config, settings.model)(config)
            apply_to(model, settings.rule, settings.mode, before_projector=settings.before_projector)
            model = add_lora(model, settings)
    finally:
        torch.set_default_dtype(before)
    sizes = [(p.numel(), p.element_size(), p.requires_grad) for p in model.parameters()]
    return {
        "parameters": sum(n for n, _, _ in sizes),
        "trained": sum(n for n, _, trained in sizes if trained),
        "weights_bytes": sum(n * size for n, size, _ in sizes),
        "training_bytes": sum(3 * n * size for n, size, trained in sizes if trained),  # gradient, two of AdamW
    }


def finetune(settings: Finetuning, resume: bool = False, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Adapts a model, and writes ``adapter/`` and ``finetune.json`` to the run's folder.

    Args:
        settings: of the run.
        resume: go on after the last checkpoint of the folder.
        say: called with a line for people.

    Returns:
        what is in ``finetune.json``: settings, versions, losses, and scores of ``dev``.

    Raises:
        FinetuningError: the folder holds a run already, or one with other settings; a model or manifest that cannot be
            used.
        NotImplementedError: a model that cannot be compressed so.
    """
    out = Path(settings.out)
    if any(out.glob("checkpoint-*")) and not resume:
        raise FinetuningError(f"{out} holds a run already: resume it, or choose another folder")
    if resume:
        _check_settings(out, settings)
    last = _last_checkpoint(out, say)
    data = _read(settings.data, settings, say)
    dev = [] if settings.dev is None else _read(settings.dev, settings, say)
    model, processor = load(settings.model, settings.dtype)
    apply_to(model, settings.rule, settings.mode, before_projector=settings.before_projector)
    if settings.mode == "budget":
        processor = BudgetProcessor(processor, model)
    torch.manual_seed(settings.seed)
    model = add_lora(model, settings)
    cuda = torch.cuda.is_available()
    arguments = transformers.TrainingArguments(
        output_dir=str(out), max_steps=settings.steps, per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulate, learning_rate=settings.learning_rate,
        warmup_steps=settings.warmup_steps, lr_scheduler_type="cosine", bf16=settings.precision == "bf16",
        gradient_checkpointing=settings.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if settings.gradient_checkpointing else None,
        save_steps=settings.save_every, save_total_limit=2, logging_steps=settings.log_every, report_to=[],
        remove_unused_columns=False, label_names=["labels"], disable_tqdm=not sys.stderr.isatty(),
        seed=settings.seed, use_cpu=not cuda,
        ddp_find_unused_parameters=False,
    )  # fmt: skip
    conversations = Conversations(processor, settings.prompt)
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=data, data_collator=conversations)
    record: dict[str, Any] = {
        "settings": dataclasses.asdict(settings),
        "versions": {
            "fastcompress": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }
    if trainer.is_world_process_zero() and last is None:  # before the first checkpoint, which is resumed with them
        out.mkdir(parents=True, exist_ok=True)
        write_file(out / RECORD, json.dumps(record, indent=1))
    if last is not None:
        say(f"going on after step {last.name.rpartition('-')[2]} of {settings.steps}")
    trainer.train(resume_from_checkpoint=None if last is None else str(last))
    record["losses"] = [(row["step"], row["loss"]) for row in trainer.state.log_history if "loss" in row]
    if trainer.is_world_process_zero():
        model.save_pretrained(out / ADAPTER)
        processor.save_pretrained(out / ADAPTER)
        if dev:
            scores = score(model, conversations, dev, settings.batch_size, settings.max_new_tokens)
            say(f"dev: {scores['wer']:.1f} % WER, {scores['tokens_per_second']:.1f} tokens a second of audio")
            record["scores"] = scores
        write_file(out / RECORD, json.dumps(record, indent=1))
    return record


def _check_settings(out: Path, settings: Finetuning) -> None:
    """Raises if a run began with others; the folder itself may have been moved."""
    if not (out / RECORD).is_file():
        return
    try:
        known = json.loads((out / RECORD).read_text(encoding="utf-8"))["settings"]
        for name, value in dataclasses.asdict(settings).items():
            if name != "out" and known.get(name, value) != value:
                raise FinetuningError(f"{out}: its {name} is {known[name]!r}, not {value!r}; a run goes on as it began")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, FinetuningError):
            raise
        raise FinetuningError(f"{out / RECORD}: cannot be read ({type(error).__name__}: {error})") from error


def _last_checkpoint(out: Path, say: Callable[[str], None]) -> Path | None:
    """The newest whole checkpoint of ``Trainer``, which writes them in place, and so may be killed half-way."""
    found = [path for path in out.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name) and path.is_dir()]
    for path in sorted(found, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True):
        if _is_whole(path):
            return path
        say(f"{path} is not whole: it is left out")
    return None


def _is_whole(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))  # which is written last
        with safe_open(checkpoint / "adapter_model.safetensors", "pt"):
            pass
        zipped = [checkpoint / "optimizer.pt", checkpoint / "scheduler.pt", *checkpoint.glob("rng_state*.pth")]
        has_config = (checkpoint / "adapter_config.json").is_file()
        return has_config and len(zipped) > 2 and all(map(zipfile.is_zipfile, zipped))
    except (OSError, ValueError, SafetensorError):
        return False


def _read(path: str, settings: Finetuning, say: Callable[[str], None]) -> list[Utterance]:
    good, skipped = check_audio(read_manifest(path), max_seconds=settings.max_seconds)
    if skipped:
        say(f"{path}: {format_skipped(skipped)}")
    usable, damaged = [], []
    for u in good:  # now, and not after an hour of training
        try:
            if u.has_audio:
                load_utterance(u, 16000)
            usable.append(u)
        except AudioError as error:
            damaged.append((u, str(error)))
    if damaged:
        say(f"{path}: {format_skipped(damaged)}")
    if not usable:
        raise FinetuningError(f"{path}: no utterance is left that can be used")
    return usable


@torch.no_grad()
def score(
    model: Any, conversations: Conversations, utterances: Sequence[Utterance], batch_size: int, max_new_tokens: int
) -> dict[str, float]:
    """Word and character error rates of greedy answers, %, and tokens of a second of audio."""
    import jiwer

    base = unwrap(model)
    model.eval()
    written: list[str] = []
    tokens = 0
    tokenizer = conversations.processor.tokenizer
    for begin in range(0, len(utterances), batch_size):
        inputs = conversations.prompts(utterances[begin : begin + batch_size])
        inputs = {
            name: value.to(base.device, base.dtype if value.is_floating_point() else None)
            for name, value in inputs.items()
        }
        is_audio = inputs["input_ids"] == base.config.audio_token_id
        # What was trained is in fp32, the rest may not be.
        with torch.autocast(base.device.type, base.dtype, enabled=base.dtype in (torch.float16, torch.bfloat16)):
            if base.fastcompress_settings.mode == "dynamic":
                text = int((inputs["attention_mask"].bool() & ~is_audio).sum())
                tokens += len(compressed_prompt(base, **inputs).source) - text
            else:
                tokens += int(is_audio.sum())
            out = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        written += tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    references, hypotheses = [u.target for u in utterances], [text.strip() for text in written]
    seconds = sum(u.duration or 0.0 for u in utterances if u.has_audio)
    return {
        "utterances": len(utterances),
        "wer": 100 * float(jiwer.wer(references, hypotheses)),
        "cer": 100 * float(jiwer.cer(references, hypotheses)),
        "tokens_per_second": tokens / seconds if seconds else 0.0,
    }

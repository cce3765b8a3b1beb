"""Audio LLMs of transformers in a sweep: rows of audio from disk replace encoder and projector."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastcompress.integrations.transformers import compressed_prompt
from fastcompress.integrations.transformers.families import family_of
from fastcompress.integrations.transformers.patches import named
from fastcompress.integrations.transformers.prompts import processor_inputs
from fastcompress.training.evaluation import end_tokens
from fastcompress.training.finetuning import Conversations
from fastcompress.training.manifest import Utterance
from fastcompress.training.sweep.models import Answer, Batch, Captured, Clock, Decoding, SweepModel, Variant, applied
from fastcompress.training.sweep.models import written as rows_written


class AudioLLM(SweepModel):
    """A stock audio LLM.

    The rows of audio that the model merges into its prompt are computed once per utterance. If the model cannot take
    them from disk, its encoder runs again for each rule.

    Args:
        model: A model with a head, such as ``Qwen2AudioForConditionalGeneration``.
        processor: Its processor.
        decoding: Settings of decoding.

    Raises:
        NotImplementedError: The model is not supported by ``apply_to``.
    """

    def __init__(self, model: Any, processor: Any, decoding: Decoding) -> None:
        family_of(model)
        self.model: Any = model
        self.kind: str = model.config.model_type
        self.decoding: Decoding = decoding
        self.conversations = Conversations(processor, decoding.prompt)
        self.sampling_rate: int = self.conversations.sampling_rate
        self.switches: dict[str, Any] = {"proportional_attention": False, "positions": "compact"}
        self._is_checked = False

    @torch.inference_mode()
    def encode(self, samples: np.ndarray) -> dict[str, Tensor]:
        inputs = self._on_device(processor_inputs(self.conversations.processor, [samples], [self.decoding.prompt]))
        rows = merged_rows(self.model, inputs)
        if not self._is_checked:
            self._is_checked = True
            if not self._takes_rows(inputs, rows):
                self.why_not_cached = f"{self.kind} does not take rows of audio in place of its encoder"
        return {"states": rows}

    def _takes_rows(self, inputs: Mapping[str, Any], rows: Tensor) -> bool:
        """Return whether the model merges given rows into its prompt in place of its encoder's."""
        try:
            with rows_in_place_of_encoder(self.model, lambda: -rows):
                return torch.equal(merged_rows(self.model, inputs), -rows)
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError):
            return False

    def _on_device(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        model = self.model
        return {
            name: value.to(model.device, model.dtype if value.is_floating_point() else None)
            for name, value in inputs.items()
            if isinstance(value, Tensor)
        }

    @contextlib.contextmanager
    def compressed(self, variant: Variant) -> Iterator[None]:
        parts = {name: getattr(variant, name) for name in (*self.switches, "silence")}
        with applied(self.model, variant.rule, variant.reduce, **parts):
            yield

    @torch.inference_mode()
    def answer(self, utterances: Sequence[Utterance], states: Sequence[dict[str, Tensor]]) -> Batch:
        model, tokenizer = self.model, self.conversations.processor.tokenizer
        inputs = self._on_device(self.conversations.prompts(utterances))
        limits = {"max_new_tokens": self.decoding.max_new_tokens, "do_sample": False, "num_beams": 1}
        in_place: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if not self.why_not_cached:
            rows = torch.cat([s["states"] for s in states]).to(model.device)
            in_place = rows_in_place_of_encoder(model, lambda: rows)
        with in_place:
            keys = compressed_prompt(model, **inputs).cu_seqlens.diff().tolist()
            clock = Clock(model.device)
            model.generate(**inputs, stopping_criteria=[clock], **limits)
        prefill, decoding = clock.times()
        is_audio = inputs["input_ids"] == model.config.audio_token_id
        frames = is_audio.sum(1).tolist()
        text = (inputs["attention_mask"].bool() & ~is_audio).sum(1).tolist()
        answers = []
        for i, (ids, clipped) in enumerate(rows_written(clock.new, end_tokens(model, tokenizer))):
            tokens = keys[i] - text[i]
            seconds = utterances[i].duration or 0.0
            new = tokenizer.decode(ids, skip_special_tokens=True).strip()
            answers.append(Answer(new, keys[i], tokens, frames[i], seconds, tokens, frames[i], len(ids), clipped))
        return Batch(answers, prefill, decoding)


@torch.inference_mode()
def merged_rows(model: Any, inputs: Mapping[str, Any]) -> Tensor:
    """Return the rows of audio ``[N, H]`` that a stock model merges into its prompt, without running its decoder."""
    core = model.model
    arguments = {n: v for n, v in inputs.items() if n in inspect.signature(core.forward).parameters}
    is_audio = inputs["input_ids"] == model.config.audio_token_id
    try:
        with captured(core.language_model):
            core(**arguments, use_cache=False)
    except Captured as found:
        merged: Tensor = found.arguments["inputs_embeds"]
        return merged[is_audio.to(merged.device)].clone()
    raise RuntimeError(f"{model.config.model_type} did not call its language_model")


@contextlib.contextmanager
def captured(module: Any) -> Iterator[None]:
    """Raise ``Captured`` with the arguments of the next call of a module."""

    def stop(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise Captured(named(module.forward, args, kwargs))

    hook = module.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


@contextlib.contextmanager
def rows_in_place_of_encoder(model: Any, rows: Callable[[], Tensor]) -> Iterator[None]:
    """Let a model merge given rows of audio into its prompt, and run neither encoder nor projector.

    Args:
        model: An audio LLM of ``apply_to``, compressed or not.
        rows: Function that returns the rows ``[N, H]`` of all audios of the batch.
    """
    core, kind = model.model, model.config.model_type
    seen: list[Tensor] = []  # the mask or the lengths of the rows of the current call, if the model pads them

    def padded(mask: Tensor) -> Tensor:
        found = rows()
        spread = found.new_zeros(*mask.shape, found.shape[-1])
        spread[mask.to(found.device)] = found
        return spread

    def features(*args: Any, **kwargs: Any) -> Any:
        found = padded(seen[-1].bool()) if seen else rows()
        return SimpleNamespace(pooler_output=found, last_hidden_state=found)

    def project(*args: Any, **kwargs: Any) -> Tensor:
        return padded(torch.arange(int(seen[-1].max()), device=seen[-1].device) < seen[-1][:, None])

    with contextlib.ExitStack() as stack:
        if hasattr(core, "get_audio_features"):
            stack.enter_context(replaced(core, "get_audio_features", features))
            if kind.startswith("granite"):  # its merge selects rows by this mask
                hook = core.register_forward_pre_hook(
                    lambda _, args, kwargs: seen.append(kwargs["input_features_mask"]), with_kwargs=True
                )
                stack.callback(hook.remove)
        else:  # Qwen2-Audio selects rows by these lengths
            tower = core.audio_tower
            stock = tower._get_feat_extract_output_lengths

            def record(*args: Any, **kwargs: Any) -> Any:
                found = stock(*args, **kwargs)
                seen.append(found[1])
                return found

            stack.enter_context(replaced(tower, "_get_feat_extract_output_lengths", record))
            stack.enter_context(replaced(tower, "forward", lambda *a, **k: SimpleNamespace(last_hidden_state=None)))
            stack.enter_context(replaced(core.multi_modal_projector, "forward", project))
        yield


@contextlib.contextmanager
def replaced(target: Any, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Replace a method of an object in a context."""
    before = target.__dict__.get(name)
    setattr(target, name, function)
    try:
        yield
    finally:
        if before is None:
            delattr(target, name)
        else:
            setattr(target, name, before)

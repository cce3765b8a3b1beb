"""Text and audio to what the reference audio LLM takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken
from torch import Tensor
from transformers import AutoProcessor, BatchFeature, ProcessorMixin

from fastcompress.audio import load_audio
from fastcompress.lalm.configuration import FastCompressConfig

#: What a tokenizer hands to any chat template.
_OF_TEMPLATES = {"add_generation_prompt", "continue_final_message", "documents"}


class FastCompressProcessor(ProcessorMixin):
    """A feature extractor and a tokenizer with a token that stands for an audio.

    Unlike Whisper's own extractor it neither cuts audio at 30 s nor pads it to that.

    Args:
        feature_extractor: of the encoder.
        tokenizer: of the decoder; ``audio_token`` is added if it lacks it. The decoder's table needs no row for it.
        chat_template: of conversations whose contents are lists; ``None``: the tokenizer's, with text.
        audio_token: what stands for an audio in text.
    """

    def __init__(
        self,
        feature_extractor: Any = None,
        tokenizer: Any = None,
        chat_template: str | None = None,
        audio_token: str = "<|audio|>",
    ) -> None:
        if audio_token not in tokenizer.get_vocab():
            tokenizer.add_tokens([AddedToken(audio_token, special=True, normalized=False)])
        self.audio_token = audio_token
        self.audio_token_id: int = tokenizer.convert_tokens_to_ids(audio_token)
        super().__init__(feature_extractor, tokenizer, chat_template=chat_template)  # type: ignore[no-untyped-call]

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "input_features", "feature_attention_mask"]

    @property
    def sampling_rate(self) -> int:
        """Hz, of the audio that it takes."""
        return self.feature_extractor.sampling_rate

    @property
    def shortest(self) -> int:
        """Samples of a frame: the least audio that it takes."""
        return getattr(self.feature_extractor, "n_fft", 400)

    def __call__(
        self,
        text: str | Sequence[str],
        audio: Any = None,
        sampling_rate: int | None = None,
        return_tensors: str = "pt",
        **kwargs: Any,
    ) -> BatchFeature:
        """Inputs of the model.

        Args:
            text: one or several, with an ``audio_token`` for each audio.
            audio: in the order of the tokens: samples ``[S]``, one or a list.
            sampling_rate: of the samples, Hz; ``None``: the extractor's.
            return_tensors: ``"pt"``.
            kwargs: of the tokenizer.

        Returns:
            ``input_ids`` and ``attention_mask`` ``[B, L]``; with audio ``input_features`` and
            ``feature_attention_mask``.

        Raises:
            ValueError: the audios are more or fewer than their tokens, have another sampling rate or no full frame.
        """
        if return_tensors != "pt":
            raise ValueError(f"return_tensors must be 'pt', got {return_tensors!r}")
        texts = [text] if isinstance(text, str) else list(text)
        audios = [] if audio is None else [audio] if isinstance(audio, (np.ndarray, Tensor)) else list(audio)
        counts = [t.count(self.audio_token) for t in texts]
        if sum(counts) != len(audios):
            where = ", ".join(f"text {i}: {count}" for i, count in enumerate(counts))
            raise ValueError(f"text has {sum(counts)} {self.audio_token} ({where}), but audio has {len(audios)}")
        encoded = self.tokenizer(texts, **({"padding": True, "return_tensors": "pt"} | kwargs))
        data = {name: encoded[name] for name in ("input_ids", "attention_mask")}
        if audios:
            rate = self.sampling_rate if sampling_rate is None else sampling_rate
            data |= self.pad_features([self.features(a, rate) for a in audios])
        return BatchFeature(data)

    def features(self, samples: np.ndarray | Tensor, sampling_rate: int) -> Tensor:
        """What the encoder takes for one audio: float32 ``[bins, T]`` or ``[S]``.

        Raises:
            ValueError: another sampling rate, not ``[S]``, or shorter than a frame.
        """
        samples = np.asarray(samples, dtype=np.float32)
        if sampling_rate != self.sampling_rate:
            raise ValueError(f"sampling_rate must be {self.sampling_rate} Hz, got {sampling_rate}")
        if samples.ndim != 1 or samples.shape[0] < self.shortest:
            raise ValueError(
                f"audio must be [S] of at least {self.shortest} samples, one frame, got shape {list(samples.shape)}"
            )
        if self._takes_samples:
            return self.feature_extractor(samples, sampling_rate=sampling_rate, return_tensors="pt").input_values[0]
        # `padding` and `truncation` are of the 30 s that Whisper was trained on.
        found = self.feature_extractor(
            samples, sampling_rate=sampling_rate, truncation=False, padding="longest", return_tensors="pt"
        )
        features = found.input_features[0]
        return features if "Whisper" in type(self.feature_extractor).__name__ else features.T  # others: [T, bins]

    @property
    def _takes_samples(self) -> bool:
        return "input_values" in self.feature_extractor.model_input_names

    def pad_features(self, features: Sequence[Tensor]) -> dict[str, Tensor]:
        """Of several audios: ``input_features`` and ``feature_attention_mask``, 0 behind the end of each."""
        longest = max(f.shape[-1] for f in features)
        pad = torch.nn.functional.pad
        lengths = torch.tensor([f.shape[-1] for f in features])
        return {
            "input_features": torch.stack([pad(f, (0, longest - f.shape[-1])) for f in features]),
            "feature_attention_mask": (torch.arange(longest) < lengths[:, None]).long(),
        }

    def prompt_ids(self, prompt: str, has_audio: bool) -> list[int]:
        """Ids of a request up to where the answer begins: an audio, if there is one, and the words of the prompt.

        With the chat template where there is one; else audio, prompt, and the token that begins a text.
        """
        content = f"{self.audio_token if has_audio else ''}{prompt}"
        if self.tokenizer.chat_template is not None:
            messages = [{"role": "user", "content": content}]
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            return self.tokenizer(text, add_special_tokens=False).input_ids
        begin = self.tokenizer.bos_token_id
        return self.tokenizer(content, add_special_tokens=False).input_ids + ([] if begin is None else [begin])

    def apply_chat_template(  # type: ignore[override]  # fewer arguments
        self,
        conversation: Any,
        chat_template: str | None = None,
        tokenize: bool = False,
        return_dict: bool = True,
        return_tensors: str = "pt",
        tools: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Text of one conversation or several; with ``tokenize``, and ``return_dict``, what the model takes.

        A content may be a list of ``{"type": "text", "text": ...}`` and ``{"type": "audio", "audio": samples or
        path}``. ``kwargs`` are of the tokenizer's method, and variables of the template.

        Raises:
            TypeError: an argument that is neither.
            ValueError: a content of another type, or what :meth:`__call__` refuses.
        """
        template = self.tokenizer.get_chat_template(chat_template or self.chat_template, tools)
        for name in sorted(kwargs.keys() - _OF_TEMPLATES):
            if name not in template:
                raise TypeError(f"apply_chat_template() got an unexpected keyword argument {name!r}")
        several = bool(conversation) and isinstance(conversation[0], (list, tuple))
        audios: list[Any] = []
        texts = []
        for messages in conversation if several else [conversation]:
            plain = [m | {"content": self._plain(m["content"], audios)} for m in messages]
            arguments = {"chat_template": template, "tools": tools, "tokenize": False} | kwargs
            texts.append(self.tokenizer.apply_chat_template(plain, **arguments))
        if not tokenize:
            return texts if several else texts[0]
        inputs = self(texts, audios or None, return_tensors=return_tensors, add_special_tokens=False)
        return inputs if return_dict else inputs["input_ids"]

    def _plain(self, content: Any, audios: list[Any]) -> str:
        if isinstance(content, str):
            return content
        parts = []
        for part in content:
            if part["type"] == "audio":
                audio = part.get("audio", part.get("path"))
                audios.append(load_audio(audio, self.sampling_rate) if isinstance(audio, str) else audio)
                parts.append(self.audio_token)
            elif part["type"] == "text":
                parts.append(part["text"])
            else:
                raise ValueError(f"a content must be audio or text, got {part['type']!r}")
        return "".join(parts)


AutoProcessor.register(FastCompressConfig, FastCompressProcessor, exist_ok=True)

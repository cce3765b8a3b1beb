"""The processor of the reference audio LLM: text and audio become model inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken
from torch import Tensor
from transformers import AutoProcessor, BatchFeature, ProcessorMixin

from fastcompress.audio import float_samples, load_audio
from fastcompress.lalm.configuration import FastCompressConfig

#: Keyword arguments that every tokenizer's ``apply_chat_template`` accepts, whether the template uses them or not.
_OF_TEMPLATES = {"add_generation_prompt", "continue_final_message", "documents"}


class FastCompressProcessor(ProcessorMixin):
    """Turn text and audio into inputs of the reference model.

    The processor joins a feature extractor and a tokenizer with an audio token. Unlike Whisper's own extractor it
    neither cuts audio at 30 s nor pads it to 30 s.

    Args:
        feature_extractor: Feature extractor of the encoder.
        tokenizer: Tokenizer of the decoder. ``audio_token`` is added if it is missing; the decoder's embedding table
            needs no row for it.
        chat_template: Chat template; ``None``: the tokenizer's.
        audio_token: Text of the audio token.
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
        """Sampling rate of the audio, in Hz."""
        return self.feature_extractor.sampling_rate

    @property
    def shortest(self) -> int:
        """Length of the shortest audio that can be processed, one feature frame, in samples."""
        return getattr(self.feature_extractor, "n_fft", 400)

    def __call__(
        self,
        text: str | Sequence[str],
        audio: Any = None,
        sampling_rate: int | None = None,
        return_tensors: str = "pt",
        **kwargs: Any,
    ) -> BatchFeature:
        """Build the inputs of the model.

        Args:
            text: One text or several, with one ``audio_token`` per audio.
            audio: Samples ``[S]`` of one audio, or a list of them in the order of the audio tokens.
            sampling_rate: Sampling rate of the samples in Hz; ``None``: the feature extractor's.
            return_tensors: Only ``"pt"``.
            kwargs: Further arguments of the tokenizer.

        Returns:
            ``input_ids`` and ``attention_mask`` ``[B, L]`` int64; with audio also ``input_features`` ``[A, bins, T]``
            or ``[A, S]`` fp32 and ``feature_attention_mask`` ``[A, T]`` or ``[A, S]`` int64.

        Raises:
            ValueError: The numbers of audios and audio tokens differ, the sampling rate is not the extractor's, or an
                audio is shorter than one feature frame.
        """
        if return_tensors != "pt":
            raise ValueError(f"return_tensors must be 'pt', got {return_tensors!r}")
        texts = [text] if isinstance(text, str) else list(text)
        audios = [] if audio is None else [audio] if isinstance(audio, (np.ndarray, Tensor)) else list(audio)
        counts = [t.count(self.audio_token) for t in texts]
        if sum(counts) != len(audios):
            where = ", ".join(f"text {i}: {count}" for i, count in enumerate(counts))
            raise ValueError(
                f"text must have one {self.audio_token} per audio, got {sum(counts)} ({where}) for {len(audios)} audios"
            )
        encoded = self.tokenizer(texts, **({"padding": True, "return_tensors": "pt"} | kwargs))
        data = {name: encoded[name] for name in ("input_ids", "attention_mask")}
        if audios:
            rate = self.sampling_rate if sampling_rate is None else sampling_rate
            data |= self.pad_features([self.features(a, rate) for a in audios])
        return BatchFeature(data)

    def features(self, samples: np.ndarray | Tensor, sampling_rate: int) -> Tensor:
        """Compute the encoder's input for one audio.

        Args:
            samples: Samples ``[S]``, full scale at 1, or integers, which are divided by the full scale of their dtype.
            sampling_rate: Sampling rate of the samples in Hz.

        Returns:
            Features ``[bins, T]`` or samples ``[S]``, fp32.

        Raises:
            TypeError: The dtype of the samples has no full scale.
            ValueError: The sampling rate is not the extractor's, or the samples are not ``[S]`` or shorter than one
                feature frame.
        """
        samples = float_samples(samples)
        if sampling_rate != self.sampling_rate:
            raise ValueError(f"sampling_rate must be {self.sampling_rate} Hz, got {sampling_rate}")
        if samples.ndim != 1 or samples.shape[0] < self.shortest:
            raise ValueError(
                f"audio must be [S] with at least {self.shortest} samples (one frame), got shape {list(samples.shape)}"
            )
        if self._takes_samples:
            return self.feature_extractor(samples, sampling_rate=sampling_rate, return_tensors="pt").input_values[0]
        # By default Whisper's extractor cuts and pads to 30 s.
        found = self.feature_extractor(
            samples, sampling_rate=sampling_rate, truncation=False, padding="longest", return_tensors="pt"
        )
        features = found.input_features[0]
        return features if "Whisper" in type(self.feature_extractor).__name__ else features.T  # others return [T, bins]

    @property
    def _takes_samples(self) -> bool:
        return "input_values" in self.feature_extractor.model_input_names

    def pad_features(self, features: Sequence[Tensor]) -> dict[str, Tensor]:
        """Pad the features of several audios on the right.

        Args:
            features: ``[bins, T]`` or ``[S]`` of each audio, from [`features`][].

        Returns:
            ``input_features`` ``[A, bins, T]`` or ``[A, S]``, and ``feature_attention_mask`` ``[A, T]`` or ``[A, S]``
            int64, 0 after the end of each audio.
        """
        longest = max(f.shape[-1] for f in features)
        pad = torch.nn.functional.pad
        lengths = torch.tensor([f.shape[-1] for f in features], device="cpu")
        return {
            "input_features": torch.stack([pad(f, (0, longest - f.shape[-1])) for f in features]),
            "feature_attention_mask": (torch.arange(longest, device="cpu") < lengths[:, None]).long(),
        }

    def prompt_ids(self, prompt: str, has_audio: bool) -> list[int]:
        """Return the token ids of a request, up to the point where the answer begins.

        Without a chat template the ids are those of the audio token, the prompt and the beginning-of-text token.

        Args:
            prompt: Text of the request, after the audio.
            has_audio: Whether the request has an audio.
        """
        content = f"{self.audio_token if has_audio else ''}{prompt}"
        if self.tokenizer.chat_template is not None:
            messages = [{"role": "user", "content": content}]
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            return self.tokenizer(text, add_special_tokens=False).input_ids
        begin = self.tokenizer.bos_token_id
        return self.tokenizer(content, add_special_tokens=False).input_ids + ([] if begin is None else [begin])

    def apply_chat_template(  # type: ignore[override]  # the base class has more arguments
        self,
        conversation: Any,
        chat_template: str | None = None,
        tokenize: bool = False,
        return_dict: bool = True,
        return_tensors: str = "pt",
        tools: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Render one conversation or several as text, or as inputs of the model.

        Args:
            conversation: List of messages, or list of such lists. A message's ``content`` is text or a list of
                ``{"type": "text", "text": ...}`` and ``{"type": "audio", "audio": samples or path}``.
            chat_template: Template or its name; ``None``: the processor's, then the tokenizer's.
            tokenize: Whether to return inputs of the model; else the text is returned.
            return_dict: With ``tokenize``, whether to return everything that [`__call__`][] returns; else only
                ``input_ids``.
            return_tensors: Only ``"pt"``.
            tools: Tools, as the tokenizer's method takes them.
            kwargs: Arguments of the tokenizer's method and variables of the template.

        Raises:
            TypeError: The template does not use an argument.
            ValueError: A content has an unknown type, or [`__call__`][] refuses the input.
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
                raise ValueError(f"the type of a message's content must be 'audio' or 'text', got {part['type']!r}")
        return "".join(parts)


AutoProcessor.register(FastCompressConfig, FastCompressProcessor, exist_ok=True)

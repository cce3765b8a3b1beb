"""Normalization of texts before error rates are computed: case, punctuation, numbers, spelling.

The functions are those of transformers. Whisper's needs a map of English spellings, which transformers does not have;
it is in the package ``whisper-normalizer`` (``pip install 'fastcompress[normalize]'``).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.resources import files

#: ``none``: unchanged texts. ``basic``: lower case, without punctuation and symbols, for any language. ``whisper``:
#: English as in Whisper's scores; also numbers, contractions, and one spelling for British and American English.
NORMALIZERS = ("none", "basic", "whisper")


def normalizer(name: str) -> Callable[[str], str]:
    """Return the function of a name of ``NORMALIZERS``.

    Raises:
        ValueError: The name is unknown.
        ModuleNotFoundError: ``whisper`` without the package ``whisper-normalizer``.
    """
    if name not in NORMALIZERS:
        raise ValueError(f"normalize must be one of {', '.join(NORMALIZERS)}, got {name!r}")
    if name == "none":
        return str
    from transformers.models.whisper.english_normalizer import BasicTextNormalizer, EnglishTextNormalizer

    if name == "basic":
        basic = BasicTextNormalizer()
        return lambda text: basic(text).strip()
    spellings = files("whisper_normalizer") / "normalizers" / "english.json"
    english = EnglishTextNormalizer(json.loads(spellings.read_text(encoding="utf-8")))
    return lambda text: english(text).strip()

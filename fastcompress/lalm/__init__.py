"""A reference audio LLM on fastcompress: speech encoder, compression, projector, any causal decoder of transformers.

:func:`FastCompressForConditionalGeneration.from_parts` puts one together from pretrained parts; ``fastcompress train``,
``evaluate`` and ``transcribe`` run it from the command line. Importing this package registers the classes with the Auto
classes of transformers.
"""

from fastcompress.lalm.configuration import FastCompressConfig
from fastcompress.lalm.lora import add_lora
from fastcompress.lalm.modeling import FastCompressForConditionalGeneration
from fastcompress.lalm.processing import FastCompressProcessor

__all__ = ["FastCompressConfig", "FastCompressForConditionalGeneration", "FastCompressProcessor", "add_lora"]

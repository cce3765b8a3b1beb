"""The reference audio LLM: a speech encoder, compression, a projector and any causal decoder of transformers.

[`FastCompressForConditionalGeneration.from_parts`][] builds the model from a pretrained encoder and decoder.
``fastcompress train``, ``evaluate`` and ``transcribe`` run it from the command line. Importing this package registers
the classes with the Auto classes of transformers.
"""

from fastcompress.lalm.configuration import FastCompressConfig
from fastcompress.lalm.lora import add_lora
from fastcompress.lalm.modeling import FastCompressForConditionalGeneration
from fastcompress.lalm.processing import FastCompressProcessor

__all__ = ["FastCompressConfig", "FastCompressForConditionalGeneration", "FastCompressProcessor", "add_lora"]

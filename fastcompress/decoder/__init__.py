"""Run transformers decoders on packed rows. Importing this package registers the attention ``"fastcompress"``."""

from fastcompress.decoder.attention import (
    NAME,
    attention_forward,
    check_decoder,
    packed_attention,
    prepare,
    stack_of,
    takes_positions,
)

__all__ = ["NAME", "attention_forward", "check_decoder", "packed_attention", "prepare", "stack_of", "takes_positions"]

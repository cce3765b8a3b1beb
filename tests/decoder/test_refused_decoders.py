"""Decoders, arguments and rotary embeddings that do not support packed rows raise an error."""

from __future__ import annotations

import copy
import pickle
import re
from typing import Any

import pytest
import torch
import transformers

from fastcompress.decoder import attention
from fastcompress.decoder.attention import check_decoder
from tests.support.decoders import DECODERS, SIZES, WINDOW, decoder, packed_batch, samples


def test_invalid_arguments_of_transformers():
    model = decoder("llama")
    packed = packed_batch(samples(model)[0])
    inputs = packed.model_inputs()
    with pytest.raises(ValueError, match="packed rows take no attention mask"):
        model(**(inputs | {"attention_mask": torch.ones(1, 1, 366, 366, dtype=torch.bool)}))
    with pytest.raises(ValueError, match="packed rows must have batch size 1"):
        model(**(inputs | {"inputs_embeds": inputs["inputs_embeds"].expand(2, -1, -1)}))
    cache = model(**(inputs | {"use_cache": True})).past_key_values
    with pytest.raises(ValueError, match="packed rows cannot follow rows of a cache"):
        model(**(inputs | {"past_key_values": cache, "use_cache": True}))
    with pytest.raises(ValueError, match="cu_seq_lens_q and cu_seq_lens_k must be equal"):
        model(**(inputs | {"cu_seq_lens_k": torch.tensor([0, 366])}))
    moved = packed.cu_seqlens + torch.tensor([0, 0, 1, 0, 0, 0], dtype=torch.int32)
    with pytest.raises(ValueError, match=re.escape("got [0, 37, 42, 342, 343, 366] and [0, 37, 43, 342, 343, 366]")):
        model(**(inputs | {"cu_seq_lens_k": moved}))
    model(**(inputs | {"cu_seq_lens_k": packed.cu_seqlens.clone()}))
    with pytest.raises(ValueError, match="max_seqlen must be at least 300, the rows of the longest sequence, got 299"):
        model(**(inputs | {"max_length_q": 299}))
    with pytest.raises(NotImplementedError, match="output_attentions must be False"):
        model(**inputs, output_attentions=True)
    with pytest.raises(ValueError, match=re.escape("generate from PackedInputs.unpack() instead")):
        model.generate(**inputs, max_new_tokens=2)


@pytest.mark.parametrize("name", ["sinks", "indices", "position_bias"])
def test_arguments_of_attention_that_are_not_known_are_refused(name: str):
    model = decoder("llama")
    with pytest.raises(NotImplementedError, match=f"does not support {name}, which LlamaAttention passes"):
        model(**packed_batch(samples(model)[0]).model_inputs(), **{name: torch.zeros(4)})


def test_the_routers_loss_is_refused():
    model = decoder("qwen2_moe")
    packed = packed_batch(*samples(model))
    with pytest.raises(NotImplementedError, match="output_router_logits must be False"):
        model(**packed.model_inputs(), output_router_logits=True)
    model.config.output_router_logits = True
    with pytest.raises(NotImplementedError, match="output_router_logits must be False"):
        model(**packed.model_inputs())


# Rotary embeddings whose frequencies depend on the longest sample of a batch


LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 8,
    "long_factor": [4.0] * 8,
    "original_max_position_embeddings": 32,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 32}


@pytest.mark.parametrize("kind, rope", [("phi3", LONGROPE), ("llama", DYNAMIC)], ids=["longrope", "dynamic"])
def test_frequencies_of_the_longest_sample_are_refused(kind: str, rope: dict[str, Any]):
    sizes = (
        SIZES | {"max_position_embeddings": 32} if kind == "llama" else SIZES | {"original_max_position_embeddings": 32}
    )
    config = transformers.AutoConfig.for_model(kind, **sizes, rope_parameters=dict(rope))  # is modified
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="fastcompress").eval()
    long, short = torch.randn(1, 33, 64), torch.randn(1, 20, 64)
    alone = model(inputs_embeds=short).logits[0]
    packed = packed_batch([long[:, :32], short])
    torch.testing.assert_close(model(**packed.model_inputs()).logits[0, 32:], alone, rtol=1e-5, atol=1e-5)
    packed = packed_batch([long, short])
    message = f"cannot run samples of 33 positions packed: beyond 32 its '{rope['rope_type']}'"
    with pytest.raises(NotImplementedError, match=message):
        model(**packed.model_inputs())
    with pytest.raises(NotImplementedError, match="samples of 40 positions"):
        model(**(packed_batch([short]).model_inputs() | {"next_positions": torch.tensor([40])}))
    with pytest.raises(NotImplementedError, match="samples of 53 positions"):  # no max_seqlen: all rows count
        model(**(packed.model_inputs() | {"max_length_q": None}))


def test_frequencies_of_one_kind_of_layer():
    config = transformers.AutoConfig.for_model("gemma3_text", **SIZES)
    config.rope_parameters = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        "full_attention": dict(LONGROPE),
    }
    with pytest.raises(NotImplementedError, match="'longrope'"):
        attention._check_rope(config, 33, None)
    attention._check_rope(config, 32, None)
    attention._check_rope(transformers.AutoConfig.for_model("llama", **SIZES), 10**9, None)


@pytest.mark.parametrize(
    "config, reason",
    [
        ({"model_type": "qwen3_next"}, "'linear_attention' layers"),
        ({"model_type": "llama4_text"}, "'chunked_attention' layers"),
        ({"model_type": "bamba"}, "cannot run packed"),
        ({"model_type": "jamba"}, "cannot run packed"),
        ({"model_type": "falcon_h1"}, "cannot run packed"),
        ({"model_type": "lfm2"}, "cannot run packed"),
        ({"model_type": "zamba2"}, "cannot run packed"),
        (
            {"model_type": "granitemoehybrid", "layer_types": ["mamba", "attention"], "num_hidden_layers": 2},
            "cannot run packed",
        ),
        ({"model_type": "nemotron_h"}, "cannot run packed"),
        ({"model_type": "mamba"}, "cannot run packed"),
        ({"model_type": "recurrent_gemma"}, "cannot run packed"),
    ],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else "",
)
def test_decoders_that_mix_rows_are_refused(config: dict[str, Any], reason: str):
    kind = config.pop("model_type")
    config = transformers.AutoConfig.for_model(kind, **config)
    with pytest.raises(NotImplementedError, match=reason):
        check_decoder(config)


@pytest.mark.parametrize("kind", DECODERS)
def test_other_decoders_are_not_refused(kind: str):
    check_decoder(transformers.AutoConfig.for_model(kind, **SIZES, **DECODERS[kind]))
    check_decoder(transformers.AutoConfig.for_model(kind))


def test_a_hybrid_decoder_is_refused_when_it_runs():
    layers = {"layer_types": ["full_attention", "linear_attention"], "num_hidden_layers": 2}
    config = transformers.AutoConfig.for_model("qwen3_next", **(SIZES | layers), num_experts=2, num_experts_per_tok=1)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="fastcompress")
    embeds = torch.randn(1, 6, 64)
    with pytest.raises(NotImplementedError, match="qwen3_next cannot run packed"):
        model(**packed_batch([embeds]).model_inputs())


@pytest.mark.parametrize(
    "kind, reason",
    [
        ("rwkv", "its layers do not use"),
        ("bart", "its layers do not use"),
        ("mamba", "'linear_attention' layers"),
        ("jamba", "'linear_attention' layers"),
        ("xlstm", "its layers do not use"),
        ("roberta", "not causal"),
    ],
)
def test_prepare_refuses(kind: str, reason: str):
    config = transformers.AutoConfig.for_model(kind, vocab_size=60, hidden_size=48, num_hidden_layers=2, pad_token_id=0)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(NotImplementedError, match=f"{kind} cannot run packed: .*{reason}"):
        attention.prepare(model)


def test_decoders_that_choose_what_a_row_sees_are_refused():
    config = transformers.AutoConfig.for_model("doge", **SIZES)
    with pytest.raises(NotImplementedError, match="doge cannot run packed: .*keep_window_size"):
        attention.prepare(transformers.AutoModelForCausalLM.from_config(config))


def test_a_decoder_that_drops_cu_seqlens_is_refused():
    config = transformers.AutoConfig.for_model("nemotron", **SIZES)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="fastcompress")
    with pytest.raises(NotImplementedError, match="nemotron cannot run packed: .* does not pass cu_seq_lens_q"):
        model(**packed_batch([torch.randn(1, 6, 64)]).model_inputs())


def test_a_window_that_no_layer_declares_is_refused():
    config = transformers.AutoConfig.for_model("phimoe", **SIZES, sliding_window=WINDOW, num_local_experts=2)
    model = attention.prepare(transformers.AutoModelForCausalLM.from_config(config))
    with pytest.raises(NotImplementedError, match="sliding_window of 9, but PhimoeAttention does not specify"):
        model(**packed_batch([torch.randn(1, 6, 64)]).model_inputs())


def test_sinks_are_refused():
    config = transformers.AutoConfig.for_model("gpt_oss", **SIZES, num_local_experts=2, num_experts_per_tok=1)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.config._attn_implementation = "fastcompress"
    with pytest.raises(NotImplementedError, match="s_aux"):
        model(**packed_batch([torch.randn(1, 6, 64)]).model_inputs())


# Packed rows in decoders that are not prepared


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["qwen2", "llama", "phi3"])
def test_a_decoder_that_is_not_prepared_says_what_to_do(kind: str, implementation: str):
    model = decoder(kind, implementation)
    packed = packed_batch(*samples(model))
    with pytest.raises(ValueError, match=re.escape("fastcompress.decoder.prepare(decoder) before decoder(**packed")):
        model(**packed.model_inputs())
    assert attention.prepare(model)(**packed.model_inputs()).loss.isfinite()


def test_the_mask_of_packed_rows_can_be_moved_and_copied():
    mask = packed_batch(samples(decoder("qwen2"))[0]).model_inputs()["attention_mask"]
    for moved in (mask.to("cpu", non_blocking=True), copy.deepcopy(mask), pickle.loads(pickle.dumps(mask)), mask[0]):
        with pytest.raises(ValueError, match="does not know where packed samples start"):
            moved + torch.zeros(3)


def test_a_compiled_decoder_takes_the_mask_of_packed_rows():
    model = decoder("qwen2")
    del model.model.layers[1:]  # the compiler traces each layer
    packed = packed_batch(samples(model)[0])
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        assert torch.equal(compiled(**packed.model_inputs()).logits, model(**packed.model_inputs()).logits)
